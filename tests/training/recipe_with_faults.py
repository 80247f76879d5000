"""A recipe for tests of several processes: a run of a minute, with the faults that the environment asks for.

FAULT=process:part:call:kind, for example 1:step:5:TERM. part: step, evaluation or checkpoint. call: which one of this
process's. kind: a signal's name, or error. FAULT_MARK=file: made when it happens.
"""

import os
import signal
import time

from cdetr_jax.checkpoints.io import Checkpoints
from cdetr_jax.models import resnet
from cdetr_jax.training.parallel import Trainer
from configs import demo

PARTS = {"step": (Trainer, "step"), "evaluation": (Trainer, "detect"), "checkpoint": (Checkpoints, "save")}


def get_config():
    """The demo's, with one block a stage and one decoder layer; 24 steps, evaluated after 12 and 24."""
    resnet.STAGE_SIZES["resnet18"] = (1, 1, 1, 1)
    if fault := os.environ.get("FAULT"):
        _add(*fault.split(":"))
    config = demo.get_config()
    config.model.update({"backbone_width": 4, "width": 16, "num_heads": 2, "ffn_width": 16, "num_queries": 7})
    config.model.update({"dc5": False, "dropout": 0.1, "decoder_layers": 1, "encoder_layers": 0})
    config.data.update({"train_shapes": ((32, 32),), "eval_shapes": ((32, 32),), "short_sides_px": (32,)})
    config.data.update({"long_side_max_px": 32, "eval_short_side_px": 32, "max_targets": 4, "threads": 1})
    config.data.synthetic.update({"train_pictures": 24, "eval_pictures": 11, "height": 32, "width": 32})
    config.train.update({"batch_size": 4, "num_epochs": 4, "log_every_steps": 1, "checkpoint_every_steps": 2})
    config.eval.update({"batch_size": 4, "every_epochs": 2})
    return config


def _add(process: str, part: str, call: str, kind: str) -> None:
    owner, name = PARTS[part]
    before, calls = getattr(owner, name), []

    def with_fault(*arguments, **settings):
        import jax

        calls.append(name)
        if jax.process_index() == int(process) and len(calls) == int(call):
            if mark := os.environ.get("FAULT_MARK"):
                open(mark, "w").close()
            if kind == "error":
                raise ValueError("a fault that was asked for")
            os.kill(os.getpid(), getattr(signal, f"SIG{kind}"))
        if kind in ("INT", "TERM") and len(calls) >= int(call):
            time.sleep(1)  # JAX looks for a signal once a second, in which such a small run would be over
        return before(*arguments, **settings)

    setattr(owner, name, with_fault)
