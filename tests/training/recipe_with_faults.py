"""A recipe for tests of several processes: a short run, with the fault that the environment asks for.

FAULT=process:part:call:kind[:milliseconds], for example 1:step:5:TERM. process: a number, or all. part: of PARTS.
call: which one of this process's. kind: a signal's name, or error. milliseconds: so long after that call has begun.
FAULT_MARK=file: made when it happens. EVALUATED=file: gets the ids of the pictures that an AP is computed from.
"""

import json
import os
import signal
import threading
import time

import jax
from jax._src import cache_key

from cdetr_jax.checkpoints.io import Checkpoints
from cdetr_jax.data.synthetic import SyntheticShapes
from cdetr_jax.models import resnet
from cdetr_jax.training import evaluate, loop
from cdetr_jax.training.ahead import Ahead
from cdetr_jax.training.parallel import Trainer
from configs import demo

PARTS = {
    "start": (loop, "initial_state"),
    "compilation": (Ahead, "wait"),
    "step": (Trainer, "step"),
    "checkpoint": (Checkpoints, "save"),
    "evaluation": (Trainer, "detect"),
    "score": (Checkpoints, "set_score"),
    "picture": (SyntheticShapes, "load_image"),
}
COMPILATION_S = 30  # of a program, while a fault is to come in it
MESSAGE = "a fault that was asked for"


def get_config():
    """The demo's, with one block a stage and one decoder layer; 24 steps, evaluated after 12 and 24."""
    resnet.STAGE_SIZES["resnet18"] = (1, 1, 1, 1)
    # On a CPU the name of a compiled program has in it which process it is, and only the first one writes.
    cache_key._hash_accelerator_config = cache_key._hash_devices
    if fault := os.environ.get("FAULT"):
        process, part, call, kind, *milliseconds = fault.split(":")
        if process in ("all", str(jax.process_index())):
            _add(part, int(call), kind, int(*milliseconds) / 1000)
        if kind in ("INT", "TERM"):
            _slow_down()
    if file := os.environ.get("EVALUATED"):
        _note_pictures(file)
    config = demo.get_config()
    config.model.update({"backbone_width": 4, "width": 16, "num_heads": 2, "ffn_width": 16, "num_queries": 7})
    config.model.update({"dc5": False, "dropout": 0.1, "decoder_layers": 1, "encoder_layers": 0})
    config.data.update({"train_shapes": ((32, 32),), "eval_shapes": ((32, 32),), "short_sides_px": (32,)})
    config.data.update({"long_side_max_px": 32, "eval_short_side_px": 32, "max_targets": 4, "threads": 1})
    config.data.synthetic.update({"train_pictures": 24, "eval_pictures": 11, "height": 32, "width": 32})
    config.train.update({"batch_size": 4, "num_epochs": 4, "log_every_steps": 1, "checkpoint_every_steps": 2})
    config.eval.update({"batch_size": 4, "every_epochs": 2})
    return config


def _add(part, call, kind, seconds):
    owner, name = PARTS[part]
    before, calls = getattr(owner, name), []

    def happen():
        if mark := os.environ.get("FAULT_MARK"):
            open(mark, "w").close()
        if kind == "error":
            raise ValueError(MESSAGE)
        os.kill(os.getpid(), getattr(signal, f"SIG{kind}"))

    def with_fault(*arguments, **settings):
        calls.append(name)
        if len(calls) == call:
            if seconds and kind != "error":
                threading.Timer(seconds, happen).start()
            else:
                happen()
        return before(*arguments, **settings)

    setattr(owner, name, with_fault)
    if part == "compilation":
        compile_it = Ahead._compile
        Ahead._compile = lambda *arguments: (time.sleep(COMPILATION_S), compile_it(*arguments))


def _slow_down():
    """JAX looks for a signal once a second, in which such a small run would be far."""
    step = Trainer.step
    mark = os.environ["FAULT_MARK"]

    def slower(*arguments):
        if os.path.exists(mark):
            time.sleep(0.5)
        return step(*arguments)

    Trainer.step = slower


def _note_pictures(file):
    average_precision = evaluate.coco_average_precision

    def noted(records, categories, results):
        with open(file, "a") as lines:
            print(json.dumps([result["image_id"] for result in results]), file=lines)
        return average_precision(records, categories, results)

    evaluate.coco_average_precision = noted
