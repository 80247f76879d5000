"""Whole runs on small pictures: train, stop, go on, be killed, evaluate, predict, and what they refuse.

To keep this short the backbone has one block a stage, and runs of one model share what they compile; only the run that
is killed is a process of its own.
"""

import dataclasses
import functools
import json
import os
import shutil
import signal
import subprocess
import sys

import jax
import ml_collections
import numpy as np
import pytest
import tiny_run
from PIL import Image

import cdetr_jax
from cdetr_jax import build
from cdetr_jax.checkpoints.io import Checkpoints
from cdetr_jax.data.sources import BadPictureError
from cdetr_jax.evaluation.coco_eval import SUMMARY, CocoMetrics
from cdetr_jax.models import resnet
from cdetr_jax.structs import Category
from cdetr_jax.training import evaluate, loop, parallel, start
from cdetr_jax.training.step import StepFunctions, new_rng
from cdetr_jax.training.stopping import STOPPED, StoppedError
from cdetr_jax.visualization.curve import read_metrics
from cdetr_jax.weights.load import load_initial, load_weights
from configs import demo

STEPS_PER_EPOCH, STEPS = 2, 6
CLOCK = ("images_per_second", "data_percent", "match_percent")


def make_config(**groups):
    """Each step is logged and saved; no evaluation."""
    config = demo.get_config()
    pictures = {"data.synthetic.eval_pictures": 3, "data.synthetic.width": 32, "data.synthetic.max_objects": 4}
    saved = {"train.checkpoint_every_steps": 1, "train.keep_checkpoints": STEPS, "eval.every_epochs": 0}
    epochs = {"train.num_epochs": STEPS // STEPS_PER_EPOCH}
    changes = {f"{group}.{name}": value for group, fields in groups.items() for name, value in fields.items()}
    config.update_from_flattened_dict(tiny_run.FIELDS | pictures | saved | epochs | changes)
    return config


@pytest.fixture(scope="module", autouse=True)
def compiled_once():
    """Runs of one model share step functions, first parameters and compiled programs; the seed is 0 in all of them."""
    make_step_functions, init = build.make_step_functions, StepFunctions.init
    functions_of, states, all_devices = {}, {}, tuple(jax.local_devices())

    def shared_functions(config, num_classes, schedules):
        # Not the steps an epoch, which move the drop of the learning rate: it comes after all of these runs.
        groups = (config.model, config.matcher, config.loss, config.optimizer, config.eval)
        key = (num_classes, *(json.dumps(group.to_dict() | {"every_epochs": 0}) for group in groups))
        if key not in functions_of:
            functions_of[key] = make_step_functions(config, num_classes, schedules)
        return functions_of[key]

    def shared_init(self, rng, image_shape):
        if id(self) not in states:
            if isinstance(rng, jax.core.Tracer):  # only the shapes are asked for
                return init(self, rng, image_shape)
            with jax.ensure_compile_time_eval():
                states[id(self)] = jax.tree.map(np.asarray, init(self, new_rng(0), image_shape))
        return states[id(self)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(resnet.STAGE_SIZES, "resnet18", tiny_run.ONE_BLOCK_A_STAGE)
        patch.setattr(build, "make_step_functions", shared_functions)
        patch.setattr(StepFunctions, "init", shared_init)
        patch.setattr(StepFunctions, "__hash__", object.__hash__)
        trainer_of = functools.cache(parallel.Trainer)
        for module in (loop, evaluate):
            patch.setattr(
                module, "Trainer", lambda functions, devices=None: trainer_of(functions, devices or all_devices)
            )
        yield


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A whole run without any stop, evaluated at its end. Returns: config, workdir, the last evaluation's numbers."""
    workdir = tmp_path_factory.mktemp("undisturbed")
    config = make_config(eval={"every_epochs": 3})
    return config, workdir, loop.train_and_evaluate(config, workdir)


def nothing_ahead(*_):
    """For a trainer with a part that is no compiled function."""
    return []


def step_functions(config, num_classes=5):
    return build.make_step_functions(config, num_classes, build.make_schedules(config, 1))


def saved_steps(workdir):
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit())


def saved_state(workdir, step):
    """All arrays of a checkpoint and its position, under the names that are in the file."""
    checkpoints = Checkpoints(workdir, read_only=True)
    config = loop.run_files.load_config(workdir)
    functions = step_functions(config, len(loop.run_files.load_classes(workdir)))
    state, position = checkpoints.restore(step, start.template(config, functions))
    checkpoints.close()
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state)}, position


def check_same(workdir, other, step):
    """Every bit of the state and the position."""
    (state, position), (expected, expected_position) = saved_state(workdir, step), saved_state(other, step)
    assert position == expected_position
    assert state.keys() == expected.keys()
    different = [name for name, leaf in state.items() if leaf.tobytes() != expected[name].tobytes()]
    assert different == []


def rows_without_clock(workdir, kind="train"):
    rows = [row for row in read_metrics(workdir / "metrics.jsonl") if row["kind"] == kind]
    return [{name: value for name, value in row.items() if name not in CLOCK} for row in rows]


def copy_run(undisturbed, workdir, *, without=()):
    shutil.copytree(undisturbed[1], workdir)
    for name in without:
        (workdir / name).unlink()
    return workdir


# ------------------------------------------------------------------------------------------------- a whole cycle


def test_the_metrics_file_tells_every_step(undisturbed):
    _, workdir, summary = undisturbed
    train, evaluated = rows_without_clock(workdir), rows_without_clock(workdir, "eval")
    assert [row["step"] for row in train] == list(range(1, STEPS + 1))
    np.testing.assert_allclose([row["epoch"] for row in train], np.arange(1, STEPS + 1) / STEPS_PER_EPOCH)
    terms = [f"loss_{term}{layer}" for term in ("class", "l1", "giou") for layer in ("", "_layer0", "_layer1")]
    others = ["step", "epoch", "kind", "loss", "grad_norm", "class_error", "cardinality_error", "lr", "backbone_lr"]
    for row in train:
        assert sorted(row) == sorted(terms + others)
        sums = row["loss_class"] + row["loss_l1"] + row["loss_giou"]
        np.testing.assert_allclose(sums, row["loss"], rtol=1e-5)  # sums of float32 in another order
        assert row["grad_norm"] > 0
    warmup = np.array([0.25, 0.5, 0.75] + [1.0] * 3)
    np.testing.assert_allclose([row["lr"] for row in train], 1e-3 * warmup, rtol=1e-6)
    np.testing.assert_allclose([row["backbone_lr"] for row in train], 5e-4 * warmup, rtol=1e-6)
    assert all(name in read_metrics(workdir / "metrics.jsonl")[1] for name in CLOCK)
    assert [row["step"] for row in evaluated] == [STEPS]
    for name in ("curve.png", "eval.png", f"pictures/eval_{STEPS:08d}.jpg"):
        with Image.open(workdir / name) as drawing:
            drawing.load()
    assert "query_embed" in (workdir / "parameters.txt").read_text()
    (environment,) = (workdir / "environment.jsonl").read_text().splitlines()
    assert json.loads(environment)["step"] == 0
    assert {name: evaluated[0][name] for name in SUMMARY} == summary
    assert len(summary) == 12


def test_evaluate_gives_the_number_of_the_run_and_uses_the_moving_average(undisturbed, monkeypatch):
    config, workdir, summary = undisturbed
    original, seen = evaluate.detect_all, []

    def spy(config, trainer, variables, *rest):
        seen.append(variables)
        return original(config, trainer, variables, *rest)

    monkeypatch.setattr(evaluate, "detect_all", spy)
    weights = load_weights(workdir, "latest")
    assert evaluate.evaluate(config, weights).metrics.summary == summary
    state, _ = saved_state(workdir, STEPS)
    used = jax.tree_util.tree_leaves_with_path(seen[0]["params"])
    assert used
    for path, leaf in used:
        np.testing.assert_array_equal(leaf, state[f".ema_params{jax.tree_util.keystr(path)}"])
    moved = [
        np.abs(leaf - state[name.replace(".ema_params", ".params")]).max()
        for name, leaf in state.items()
        if name.startswith(".ema_params")
    ]
    assert max(moved) > 1e-4


def test_predict_reads_the_workdir(undisturbed):
    detector = cdetr_jax.Detector.from_pretrained(undisturbed[1])
    picture = np.full((20, 40, 3), 77, np.uint8)
    found = detector(picture, threshold=0.0)
    assert len(found) == 7 * 5  # every pair of query and class: top_k is more
    assert set(found.names) == {"disc", "square", "triangle", "cross", "ring"}
    assert set(found.class_ids.tolist()) == {1, 2, 3, 5, 8}
    assert (np.diff(found.scores) <= 0).all()
    assert len(detector(picture, threshold=1.0)) == 0


def test_a_complete_run_is_left_alone(undisturbed, tmp_path, monkeypatch):
    workdir = copy_run(undisturbed, tmp_path / "w")
    before = (workdir / "metrics.jsonl").read_text()
    asked_for, ahead = [], loop.Ahead
    monkeypatch.setattr(loop, "Ahead", lambda programs, *others: ahead(asked_for.extend(programs) or (), *others))
    assert loop.train_and_evaluate(undisturbed[0], workdir) is None
    assert saved_steps(workdir) == list(range(1, STEPS + 1))
    assert (workdir / "metrics.jsonl").read_text() == before
    assert asked_for == []  # nothing was compiled


def test_a_drawing_that_fails_ends_no_run(tmp_path, monkeypatch):
    warnings = []
    monkeypatch.setattr(loop.logging, "warning", lambda text, *values: warnings.append(text % values))
    (tmp_path / "metrics.jsonl").write_text("no JSON\n{}\n")
    loop._draw(tmp_path)
    assert len(warnings) == 1
    assert "could not draw how the run goes: ValueError" in warnings[0]


# -------------------------------------------------------------------------------------------------------- resume


def test_stopping_at_every_checkpoint_changes_nothing(undisturbed, tmp_path):
    for steps in range(1, STEPS + 1):
        loop.train_and_evaluate(make_config(train={"max_steps": steps, "keep_checkpoints": 2}), tmp_path)
    assert saved_steps(tmp_path) == [STEPS - 1, STEPS]
    check_same(tmp_path, undisturbed[1], STEPS)
    assert rows_without_clock(tmp_path) == rows_without_clock(undisturbed[1])


KILLED = """
import json, os, signal, sys
import ml_collections
from cdetr_jax.checkpoints.io import Checkpoints
from cdetr_jax.models import resnet
from cdetr_jax.training import loop

config, stages, first, second, last_step = map(json.loads, sys.argv[1:])
config = ml_collections.ConfigDict(config)
resnet.STAGE_SIZES["resnet18"] = tuple(stages)
save, new_trainer, trainers = Checkpoints.save, loop.Trainer, []


def one_trainer(*arguments):
    trainers.append(trainers[0] if trainers else new_trainer(*arguments))
    return trainers[0]


def save_and_go_no_further(self, step, *rest):
    save(self, step, *rest)  # goes on in the background
    if first in str(self.directory):
        self._manager.wait_until_finished()
        loop.train_and_evaluate(config, second)
    if step == last_step:
        os.kill(os.getpid(), signal.SIGKILL)


Checkpoints.save, loop.Trainer = save_and_go_no_further, one_trainer
loop.train_and_evaluate(config, first)
"""


def test_killed_runs_go_on_to_the_same_bits(undisturbed, tmp_path):
    """One after its first checkpoint was written, the other, begun inside it, while its last but one is written."""
    config, first, second = make_config(), tmp_path / "first", tmp_path / "second"
    arguments = [config.to_dict(), tiny_run.ONE_BLOCK_A_STAGE, str(first), str(second), STEPS - 1]
    run = subprocess.run(
        [sys.executable, "-c", KILLED, *map(json.dumps, arguments)],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == -signal.SIGKILL, run.stderr[-2000:]
    assert saved_steps(first) == [1]
    # A checkpoint that was being written is there whole or not at all.
    assert saved_steps(second)[-1] in [STEPS - 2, STEPS - 1]
    for workdir in (first, second):
        loop.train_and_evaluate(config, workdir)
        check_same(workdir, undisturbed[1], STEPS)
        assert rows_without_clock(workdir) == rows_without_clock(undisturbed[1])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_told_to_stop_saves_its_step_and_goes_on_to_the_same_bits(
    number, undisturbed, tmp_path, monkeypatch
):
    trainer = loop.Trainer(step_functions(make_config()))
    apply = trainer.apply

    def stop(*arguments):
        os.kill(os.getpid(), number)
        return apply(*arguments)

    monkeypatch.setattr(trainer, "apply", stop)
    monkeypatch.setattr(loop, "_programs", nothing_ahead)
    config = make_config(train={"checkpoint_every_steps": 100, "log_every_steps": 100})
    with pytest.raises(StoppedError, match=rf"^stopped; step 1 of {STEPS} is saved in {tmp_path}$") as stopped:
        loop.train_and_evaluate(config, tmp_path)
    assert stopped.value.exit_status == STOPPED == 75
    assert saved_steps(tmp_path) == [1]
    check_same(tmp_path, undisturbed[1], 1)
    with Image.open(tmp_path / "curve.png") as curve:
        curve.load()


@pytest.mark.parametrize(
    ("steps", "message", "saved"),
    [(0, "stopped before the first step", []), (2, "stopped; step 2 of 6 is saved in ", [2])],
)
def test_a_run_that_waits_for_a_program_stops_at_once(steps, message, saved, tmp_path, monkeypatch):
    calls = []

    def wait(self, names, wait):
        calls.append(names)
        if len(calls) > steps:
            os.kill(os.getpid(), signal.SIGTERM)
        return wait(lambda: len(calls) <= steps)

    monkeypatch.setattr(loop.Ahead, "wait", wait)
    config = make_config(train={"checkpoint_every_steps": 100, "log_every_steps": 100})
    with pytest.raises(StoppedError, match=f"^{message}"):
        loop.train_and_evaluate(config, tmp_path)
    assert saved_steps(tmp_path) == saved


def test_a_step_that_does_not_fit_the_memory_ends_in_one_line_that_says_what_to_change(tmp_path, monkeypatch):
    def wait(self, names, wait):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory in hbm.\n\nmore of it")

    monkeypatch.setattr(loop.Ahead, "wait", wait)
    message = (
        r"^1 picture\(s\) of 64 x 64 pixels \(height x width\) do not fit the memory of a device \(.*\); use a smaller "
        r"config\.train\.batch_size, .* \(RESOURCE_EXHAUSTED: Out of memory in hbm\.\)$"
    )
    with pytest.raises(MemoryError, match=message):
        loop.train_and_evaluate(make_config(), tmp_path)


@pytest.mark.parametrize("owner", [(evaluate, "coco_average_precision"), (Checkpoints, "set_score")])
def test_an_evaluation_that_failed_is_made_up_for(owner, undisturbed, tmp_path, monkeypatch):
    """The step is saved before; the same command then evaluates it, and gives what it would have given."""
    config = make_config(train={"max_steps": 2, "checkpoint_every_steps": 100}, eval={"every_epochs": 1})

    def fail(*_):
        raise MemoryError("too many pictures")

    with monkeypatch.context() as patch:
        patch.setattr(*owner, fail)
        with pytest.raises(MemoryError):
            loop.train_and_evaluate(config, tmp_path)
    check_same(tmp_path, undisturbed[1], 2)
    summary = loop.train_and_evaluate(config, tmp_path)
    assert len(summary) == 12
    assert [row["step"] for row in rows_without_clock(tmp_path, "eval")] == [2]
    assert loop.train_and_evaluate(config, tmp_path) is None  # once
    assert [row["step"] for row in rows_without_clock(tmp_path, "eval")] == [2]


def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(undisturbed, tmp_path):
    workdir = copy_run(undisturbed, tmp_path / "w")
    shutil.rmtree(workdir / "checkpoints" / str(STEPS) / "state")
    loop.train_and_evaluate(undisturbed[0], workdir)
    assert saved_steps(workdir) == list(range(1, STEPS + 1))
    check_same(workdir, undisturbed[1], STEPS)
    assert rows_without_clock(workdir) == rows_without_clock(undisturbed[1])


# --------------------------------------------------------------------------------------------- what is kept


def test_the_last_and_the_best_by_ap_are_kept(tmp_path, monkeypatch):
    precisions = iter((0.2, 0.5, 0.3))

    def made_up(*_):
        return CocoMetrics(dict.fromkeys(SUMMARY, 0.0) | {"AP": next(precisions)}, {}, {}, {}, {})

    monkeypatch.setattr(evaluate, "coco_average_precision", made_up)
    config = make_config(train={"checkpoint_every_steps": 100, "keep_checkpoints": 1}, eval={"every_epochs": 1})
    assert loop.train_and_evaluate(config, tmp_path)["AP"] == 0.3
    assert saved_steps(tmp_path) == [4, 6]
    for checkpoint, step in (("best", 4), ("latest", 6)):
        found, expected = load_weights(tmp_path, checkpoint), load_weights(tmp_path / "checkpoints" / str(step))
        jax.tree.map(np.testing.assert_array_equal, found.variables, expected.variables)
    assert any(
        (a != b).any()
        for a, b in zip(
            *(jax.tree.leaves(load_weights(tmp_path, c).variables) for c in ("best", "latest")), strict=True
        )
    )
    assert [row["AP"] for row in rows_without_clock(tmp_path, "eval")] == [0.2, 0.5, 0.3]


def test_best_is_the_newest_where_none_was_evaluated(undisturbed, tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (1, 2, 3):
        checkpoints.save(step, {"weight": np.full(2, step)}, {"epoch": 0})
    checkpoints.close()
    reader = Checkpoints(tmp_path, read_only=True)
    assert (reader.best_step(), reader.latest_step()) == (3, 3)
    state, position = reader.restore(2, {"weight": jax.ShapeDtypeStruct((2,), np.int64)})
    reader.close()
    assert state["weight"].tolist() == [2, 2]
    assert position == {"epoch": 0}


# ------------------------------------------------------------------------------------------- what is refused


def test_another_model_in_the_same_workdir_is_refused(undisturbed, tmp_path):
    workdir = copy_run(undisturbed, tmp_path / "w")
    config = make_config(model={"ffn_width": 20}, optimizer={"lr": 3e-4}, train={"num_epochs": 5})
    with pytest.raises(ValueError, match="holds another run") as error:
        loop.train_and_evaluate(config, workdir)
    assert "config.model.ffn_width was 16, is 20" in str(error.value)
    assert "config.optimizer.lr was 0.001, is 0.0003" in str(error.value)
    assert "num_epochs" not in str(error.value)  # may change
    assert saved_steps(workdir) == list(range(1, STEPS + 1))


def test_other_classes_in_the_same_workdir_are_refused(undisturbed, tmp_path):
    workdir = copy_run(undisturbed, tmp_path / "w")
    classes = list(loop.run_files.load_classes(workdir))
    classes[0], classes[1] = classes[1], None
    loop.run_files.save_classes(workdir, tuple(classes))
    before = (workdir / "classes.json").read_bytes()
    with pytest.raises(
        ValueError,
        match=r"w holds another run: class logit 0 was 'square' \(id 2\), is 'disc' \(id 1\); class logit 1 was "
        r"nothing, is 'square' \(id 2\)\. Use another",
    ):
        loop.train_and_evaluate(undisturbed[0], workdir)
    assert (workdir / "classes.json").read_bytes() == before


def test_two_runs_in_one_workdir_are_refused(tmp_path):
    with loop.run_files.locked(tmp_path), pytest.raises(ValueError, match=r"another run trains in .* process"):
        loop.train_and_evaluate(make_config(), tmp_path)


def test_other_steps_an_epoch_are_refused(undisturbed, tmp_path):
    workdir = copy_run(undisturbed, tmp_path / "w", without=["config.json"])
    with pytest.raises(ValueError, match=r"has 2 steps an epoch, but .* now give 3; use the same data"):
        loop.train_and_evaluate(make_config(data={"synthetic.train_pictures": 12}), workdir)


def test_other_shapes_are_refused_with_their_names(undisturbed, tmp_path):
    workdir = copy_run(undisturbed, tmp_path / "w", without=["config.json"])
    config = make_config(model={"num_queries": 5, "encoder_layers": 2, "decoder_layers": 1})
    with pytest.raises(ValueError, match=rf"checkpoint {STEPS} in .* does not fit the config's model and opt") as error:
        loop.train_and_evaluate(config, workdir)
    missing, rest = str(error.value).split("missing ")[1].split("; unused ")
    unused, misshapen = rest.split("; mis-shaped ")
    assert "ema_params/transformer/encoder_layers_1/" in missing
    assert "ema_params/transformer/decoder_layers_1/" in unused
    assert "ema_params/query_embed (7, 16), expected (5, 16)" in misshapen


def test_no_pictures_for_one_batch(tmp_path):
    with pytest.raises(
        ValueError, match=r"3 pictures do not fill one batch of 4; use a smaller config\.train\.batch_size"
    ):
        loop.train_and_evaluate(make_config(data={"synthetic.train_pictures": 3}), tmp_path)


@pytest.mark.parametrize(
    ("last_step", "every", "log", "message"),
    [
        (2, 1, 1, "step 2: a parameter is not finite"),
        (1, 100, 1, "step 2: the matching cost of decoder layer 0 is not finite in row . of the batch, picture"),
        (1, 100, 100, "step 2: the matching cost of decoder layer 0 is not finite in row . of the batch, picture"),
    ],
)
def test_parameters_that_are_not_finite_end_the_run_unsaved(
    last_step, every, log, message, undisturbed, tmp_path, monkeypatch
):
    trainer = loop.Trainer(step_functions(make_config(), 5))
    apply, calls = trainer.apply, []

    def poisoned(state, grads, losses):
        state, metrics = apply(state, grads, losses)
        calls.append(metrics)
        if len(calls) == last_step:
            state = state.replace(params=state.params | {"query_embed": state.params["query_embed"] * np.nan})
        return state, metrics

    monkeypatch.setattr(trainer, "apply", poisoned)
    monkeypatch.setattr(loop, "_programs", nothing_ahead)
    config = make_config(train={"checkpoint_every_steps": every, "log_every_steps": log})
    with pytest.raises(loop.NonFiniteLossError, match=message):
        loop.train_and_evaluate(config, tmp_path)
    assert saved_steps(tmp_path) == ([1] if every == 1 else [])
    for step in saved_steps(tmp_path):
        assert all(np.isfinite(leaf).all() for leaf in saved_state(tmp_path, step)[0].values())


@pytest.mark.parametrize("field", ["class_loss", "giou_loss"])
def test_a_loss_that_is_not_finite_ends_the_run_unsaved(field, undisturbed, tmp_path, monkeypatch):
    trainer = loop.Trainer(step_functions(make_config(), 5))
    loss, calls = trainer.loss, []

    def poisoned(*arguments):
        cotangents, losses = loss(*arguments)
        calls.append(1)
        if len(calls) == 3:  # two micro-batches a step
            losses = losses.replace(**{field: getattr(losses, field) * np.inf})
        return cotangents, losses

    monkeypatch.setattr(trainer, "loss", poisoned)
    monkeypatch.setattr(loop, "_programs", nothing_ahead)
    name = {"class_loss": "class", "giou_loss": "GIoU"}[field]
    # Neither logged nor saved at step 2: seen at the next step.
    config = make_config(train={"checkpoint_every_steps": 100, "log_every_steps": 100})
    with pytest.raises(loop.NonFiniteLossError, match=f"step 2: the {name} loss is not finite; use a lower"):
        loop.train_and_evaluate(config, tmp_path)
    assert saved_steps(tmp_path) == []


# ------------------------------------------------------------------------------------------- a damaged picture


def test_other_pictures_than_before_are_noticed(undisturbed, tmp_path, monkeypatch):
    warnings = []
    monkeypatch.setattr(loop.logging, "warning", lambda text, *values: warnings.append(text % values))
    config = make_config(train={"max_steps": 1})
    for sizes, expected in (([[32, 32]], 0), ([[32, 32]], 0), ([[32, 31]], 1)):
        monkeypatch.setattr(start, "sizes_hw", lambda _, sizes=sizes: np.array(sizes))
        loop.train_and_evaluate(config, tmp_path)
        assert sum("pictures have other sizes than before" in warning for warning in warnings) == expected


@pytest.fixture
def damaged(tmp_path):
    """A COCO folder of 12 JPEG files, one of them cut off."""
    rng = np.random.default_rng(0)
    names = [f"picture_{i}.jpg" for i in range(12)]
    for name in names:
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(tmp_path / name)
    content = (tmp_path / names[7]).read_bytes()
    (tmp_path / names[7]).write_bytes(content[: len(content) // 2])
    (tmp_path / "instances.json").write_text(
        json.dumps(
            {
                "images": [{"id": i, "file_name": name, "height": 32, "width": 32} for i, name in enumerate(names)],
                "annotations": [
                    {"id": i, "image_id": i, "category_id": 10 * (i % 5), "bbox": [3, 5, 17, 11]} for i in range(12)
                ],
                "categories": [{"id": 10 * i, "name": f"kind {i}"} for i in range(5)],
            }
        )
    )
    return {
        "source": "coco_folder",
        "train_images": str(tmp_path),
        "train_annotations": str(tmp_path / "instances.json"),
    }


def test_a_damaged_picture_stops_the_run_and_is_named(damaged, undisturbed, tmp_path):
    with pytest.raises(BadPictureError, match=r'picture_7\.jpg: cannot read .*config\.data\.on_error = "skip"'):
        loop.train_and_evaluate(make_config(data=damaged), tmp_path / "w")


def test_a_damaged_picture_is_skipped_where_asked_for(damaged, undisturbed, tmp_path, monkeypatch):
    warnings = []
    monkeypatch.setattr(loop.logging, "warning", lambda text, *values: warnings.append(text % values))
    config = make_config(data=damaged | {"on_error": "skip", "max_bad_fraction": 0.1}, train={"max_steps": 3})
    loop.train_and_evaluate(config, tmp_path / "w")
    assert saved_steps(tmp_path / "w") == [1, 2, 3]
    assert warnings[-1] == "1 damaged pictures were skipped: ['picture_7.jpg']"


def test_damaged_pictures_of_an_evaluation_are_told_with_it(damaged, undisturbed, monkeypatch):
    warnings = []
    monkeypatch.setattr(loop.logging, "warning", lambda text, *values: warnings.append(text % values))
    folder = {name.replace("train", "eval"): value for name, value in damaged.items()}
    config = make_config(data=folder | {"on_error": "skip", "max_bad_fraction": 0.1})
    weights = load_weights(undisturbed[1])
    weights = dataclasses.replace(weights, classes=tuple(Category(10 * i, f"kind {i}") for i in range(5)))
    evaluate.evaluate(config, weights)
    assert warnings[-1] == "1 damaged pictures count as if nothing had been found in them: ['picture_7.jpg']"


def test_a_config_read_back_is_the_config(undisturbed):
    config, workdir, _ = undisturbed
    assert json.dumps(loop.run_files.load_config(workdir).to_dict()) == json.dumps(config.to_dict())
    assert isinstance(loop.run_files.load_config(workdir), ml_collections.ConfigDict)


def empty_state(config, num_classes):
    shapes = start.template(config, step_functions(config, num_classes))
    return jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)


def test_a_new_run_starts_from_the_weights_of_another(undisturbed, tmp_path):
    """Here with 7 classes instead of 5: all but the class head is taken over, the head is left as it was made."""
    workdir = undisturbed[1]
    classes = tuple(Category(i, f"thing {i}") for i in range(7))
    state = start._start_from(load_initial(str(workdir)), empty_state(make_config(), 7), classes, tmp_path)
    variables = load_weights(workdir).variables
    expected = variables["params"]
    head, _ = state.params["class_embed"], expected.pop("class_embed")
    jax.tree.map(np.testing.assert_array_equal, {k: v for k, v in state.params.items() if k in expected}, expected)
    jax.tree.map(np.testing.assert_array_equal, state.constants, variables["constants"])
    jax.tree.map(np.testing.assert_array_equal, state.ema_params, state.params)
    assert head["kernel"].shape[-1] == 7
    assert not head["kernel"].any()
    assert int(state.step) == 0
    report = json.loads((tmp_path / "init.json").read_text())
    assert report["made_new"] == report["left_over"] == ["params/class_embed/bias", "params/class_embed/kernel"]
    assert len(report["loaded"]) == len(jax.tree.leaves(variables))


def test_starting_from_another_model_is_refused(undisturbed, tmp_path):
    config = make_config(model={"num_queries": 5, "decoder_layers": 1})
    initial = load_initial(str(undisturbed[1]))
    with pytest.raises(
        ValueError, match=r"config\.init=.*unused .*decoder_layers_1.*mis-shaped .*query_embed.*num_queries=7"
    ):
        start._start_from(initial, empty_state(config, 5), initial.classes, tmp_path)


def test_a_run_that_is_refused_leaves_no_report(undisturbed, tmp_path):
    config = make_config(model={"temperature": 30.0})
    config.init = str(undisturbed[1])
    with pytest.raises(ValueError, match=r"of another model: config\.model\.temperature is 30\.0, expected 10000\.0"):
        loop.train_and_evaluate(config, tmp_path / "run")
    assert not (tmp_path / "run" / "init.json").exists()
