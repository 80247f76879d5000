"""The train step: devices, accumulation, moving average, dropout, and pictures without targets.

Most tests run a stand-in for the detector that compiles in a moment; what they check is the step, which
only sees a module that makes `Predictions`. All batches have one shape, so that the tests share compiled programs.
"""

import dataclasses
import functools
import os
import pathlib
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cdetr_jax.losses.criterion import LossSettings
from cdetr_jax.matching.assign import NonFiniteCostError
from cdetr_jax.matching.cost import CostSettings
from cdetr_jax.models import resnet
from cdetr_jax.models.detector import DetectionTransformer
from cdetr_jax.structs import Batch, Losses, Predictions, Targets
from cdetr_jax.training import parallel
from cdetr_jax.training.optimizer import make_optimizer
from cdetr_jax.training.step import StepFunctions, TrainState, new_rng

LAYERS, QUERIES, CLASSES, COLUMNS, SHAPE = 2, 5, 3, 7, (4, 6)
EMA_DECAY = 0.75
# Float32 sums in another order; Adam divides by the gradient's size and so keeps relative errors.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


class StandIn(nn.Module):
    """A detector of the least kind: two linear layers on all pixels."""

    num_queries: int = QUERIES
    class_loss: str = "focal"
    num_logits: int = CLASSES
    dropout: float = 0.0
    pooled: bool = False  # then it takes pictures of any size

    @nn.compact
    def __call__(self, images, sizes_hw, train=False):
        x = (images.mean((1, 2)) if self.pooled else images.reshape(len(images), -1)) / 255.0 - 0.5
        x = nn.Dropout(self.dropout, deterministic=not train)(nn.tanh(nn.Dense(7, name="backbone")(x)))
        features = self.num_logits + 4
        x = nn.Dense(LAYERS * self.num_queries * features, name="heads")(x)
        x = x.reshape(-1, LAYERS, self.num_queries, features).swapaxes(0, 1)
        return Predictions(logits=x[..., :-4], boxes_cxcywh=nn.sigmoid(x[..., -4:]))


def make_functions(model, class_loss="focal", ema_decay=EMA_DECAY, frozen=()):
    shared = {"class_loss": class_loss, "focal_alpha": 0.25, "focal_gamma": 2.0}
    return StepFunctions(
        model=model,
        optimizer=make_optimizer(
            lr=optax.constant_schedule(1e-2),
            backbone_lr=optax.constant_schedule(1e-3),
            weight_decay=1e-2,
            clip_norm=0.1,
            frozen_modules=frozen,
        ),
        cost_settings=CostSettings(class_cost=2.0, l1_cost=5.0, giou_cost=2.0, **shared),
        loss_settings=LossSettings(class_weight=2.0, l1_weight=5.0, giou_weight=2.0, no_object_weight=0.1, **shared),
        ema_decay=ema_decay,
        top_k=10,
        frozen_modules=frozen,
    )


@functools.cache
def make_trainer(devices=1, class_loss="focal", dropout=0.0):
    """The stand-in's trainer, compiled once for all tests."""
    functions = make_functions(StandIn(dropout=dropout), class_loss)
    return functions, parallel.Trainer(functions, jax.local_devices()[:devices])


def make_state(functions, shape=SHAPE, seed=0):
    """What `StepFunctions.init` makes, from NumPy's random numbers: no initialiser is compiled."""
    empty = jax.eval_shape(lambda: functions.init(new_rng(0), shape))
    rng = np.random.default_rng(seed)
    params = jax.tree.map(lambda s: jnp.array(rng.normal(scale=0.3, size=s.shape), s.dtype), empty.params)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        constants=jax.tree.map(lambda s: jnp.array(rng.uniform(0.5, 1, s.shape), s.dtype), empty.constants),
        opt_state=functions.optimizer.init(params),
        ema_params=params if functions.ema_decay > 0 else None,
        rng=jax.random.key_data(new_rng(seed)),
    )


def make_batch(counts=(3, 0, 2, 1), shape=SHAPE, seed=0):
    rng = np.random.default_rng(seed)
    size, columns = len(counts), COLUMNS
    valid = np.arange(columns)[None, :] < np.array(counts)[:, None]
    sizes = np.tile(np.array(shape, np.int32), (size, 1))
    boxes = np.concatenate([rng.uniform(0.3, 0.7, (size, columns, 2)), rng.uniform(0.1, 0.5, (size, columns, 2))], -1)
    targets = Targets(
        labels=np.where(valid, rng.integers(0, CLASSES - 1, (size, columns)), 0).astype(np.int32),
        boxes_cxcywh=np.where(valid[..., None], boxes, 0).astype(np.float32),
        valid=valid,
    )
    images = rng.integers(0, 256, (size, *shape, 3)).astype(np.uint8)
    return Batch(images, sizes, 2 * sizes, np.arange(size, dtype=np.int32), targets)


def cut(batch, micro_batches):
    """Micro-batches, in order."""
    size = len(batch.images) // micro_batches
    return [jax.tree.map(lambda x, i=i: x[i * size : (i + 1) * size], batch) for i in range(micro_batches)]


def run(functions, trainer, micro_batches, *, steps=5, shape=SHAPE):
    """Returns the mean losses of each step, gradient norms and the last weights."""
    state = trainer.replicate(make_state(functions, shape))
    history, norms = [], []
    for _ in range(steps):
        state, metrics = trainer.step(state, micro_batches)
        history.append(jax.tree.map(np.asarray, metrics.losses))
        norms.append(np.asarray(metrics.grad_norm))
        assert metrics.is_finite
    for leaf in jax.tree.leaves(state.params):
        for shard in leaf.addressable_shards:
            np.testing.assert_array_equal(shard.data, leaf)  # the devices agree
    assert int(state.step) == steps
    return history, np.array(norms), parallel.unreplicate(state.params)


def assert_same(actual, expected):
    # Not the class error: it is a mean over micro-batches and devices, whatever the number of matches in each.
    for a, b in zip(actual[0], expected[0], strict=True):
        for name in ("total", "class_loss", "l1_loss", "giou_loss", "cardinality_error"):
            np.testing.assert_allclose(getattr(a, name), getattr(b, name), **CLOSE, err_msg=name)
    np.testing.assert_allclose(actual[1], expected[1], rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **CLOSE), actual[2], expected[2])


@pytest.mark.parametrize("class_loss", ["focal", "softmax"])
def test_devices_and_accumulation_change_nothing(class_loss):
    batch = make_batch()
    one, two = make_trainer(1, class_loss), make_trainer(2, class_loss)
    whole = run(*one, [batch])
    assert whole[0][0].total > whole[0][-1].total  # it learns
    assert_same(run(*two, [batch]), whole)
    assert_same(run(*one, cut(batch, 2)), whole)
    assert_same(run(*one, cut(batch, 4)), whole)
    if class_loss == "focal":  # both at once
        assert_same(run(*two, cut(batch, 2)), whole)


FOUR_DEVICES = """
import jax
jax.config.update("jax_platforms", "cpu")
import test_step
assert jax.local_device_count() == 4
one, four = (test_step.run(*test_step.make_trainer(devices), [test_step.make_batch()]) for devices in (1, 4))
test_step.assert_same(four, one)
print("the same")
"""


def test_four_devices_change_nothing():
    """In a process of its own: the number of virtual devices is fixed when JAX starts."""
    here = pathlib.Path(__file__).parent
    env = dict(os.environ, XLA_FLAGS="--xla_force_host_platform_device_count=4")
    env["PYTHONPATH"] = os.pathsep.join([str(here), str(here.parents[1])])
    done = subprocess.run([sys.executable, "-c", FOUR_DEVICES], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "the same"


@pytest.mark.slow
def test_devices_change_nothing_for_the_detector():
    model = DetectionTransformer(
        backbone="resnet18",
        backbone_width=4,
        width=8,
        num_heads=2,
        ffn_width=11,
        encoder_layers=1,
        decoder_layers=2,
        num_queries=QUERIES,
        num_classes=CLASSES,
        dropout=0.0,
    )
    shape = (64, 96)
    frozen = resnet.frozen_modules("resnet18", 2)
    functions = make_functions(model, frozen=frozen)
    batch = make_batch(shape=shape)
    batch = batch.replace(sizes_hw=np.array([[64, 96], [33, 96], [64, 50], [40, 70]], np.int32))
    one, two = (
        run(functions, parallel.Trainer(functions, jax.local_devices()[:devices]), [batch], shape=shape)
        for devices in (1, 2)
    )
    assert_same(two, one)
    start = make_state(functions, shape).params["backbone"]
    for name, before in start.items():
        moved = [
            np.abs(a - b).max() for a, b in zip(*map(jax.tree.leaves, (one[2]["backbone"][name], before)), strict=True)
        ]
        assert max(moved) == 0 if name in frozen else min(moved) > 0


@pytest.mark.parametrize("class_loss", ["focal", "softmax"])
def test_a_batch_without_any_target(class_loss):
    history, norms, params = run(*make_trainer(1, class_loss), [make_batch((0, 0, 0, 0))], steps=2)
    assert np.isfinite(norms).all()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))
    for losses in history:
        assert losses.total > 0
        np.testing.assert_array_equal(losses.l1_loss, np.zeros(LAYERS))
        np.testing.assert_array_equal(losses.giou_loss, np.zeros(LAYERS))
        assert losses.class_error == 0


@pytest.mark.parametrize("class_loss", ["focal", "softmax"])
def test_more_targets_than_queries(class_loss):
    batch = make_batch((7, 1, 0, 6))
    one, two = (run(*make_trainer(devices, class_loss), [batch], steps=2) for devices in (1, 2))
    assert np.isfinite(one[1]).all()
    assert_same(two, one)


def test_counts_are_over_all_parts_of_each_device():
    _, trainer = make_trainer(2)
    placed = [trainer.put(micro_batch) for micro_batch in cut(make_batch((3, 0, 2, 7)), 2)]
    counts = trainer.counts(placed)
    # Device 0 sees pictures 0 and 2, device 1 pictures 1 and 3; five queries cannot answer for seven targets.
    np.testing.assert_array_equal(counts.targets, [5, 7])
    np.testing.assert_array_equal(counts.matched, [5, 5])
    np.testing.assert_array_equal(counts.queries, [2 * QUERIES, 2 * QUERIES])


def test_errors_are_means_over_parts():
    """Four micro-batches that are all the same picture have that picture's errors."""
    functions, trainer = make_trainer(1)
    micro_batch = jax.tree.map(lambda x: x[:1], make_batch())
    history, _, _ = run(functions, trainer, [micro_batch] * 4, steps=1)
    again, _, _ = run(functions, trainer, [micro_batch], steps=1)
    assert again[0].class_error > 0
    np.testing.assert_allclose(history[0].class_error, again[0].class_error, rtol=1e-6)
    np.testing.assert_allclose(history[0].cardinality_error, again[0].cardinality_error, rtol=1e-6)


def test_moving_average_follows_its_formula():
    functions, trainer = make_trainer(2)
    start = make_state(functions)
    expected = jax.tree.map(np.asarray, start.params)
    state = trainer.replicate(start)
    for _ in range(3):
        state, _ = trainer.step(state, [make_batch()])
        params = parallel.unreplicate(state.params)
        expected = jax.tree.map(lambda ema, new: EMA_DECAY * ema + (1 - EMA_DECAY) * new, expected, params)
        actual = parallel.unreplicate(state.ema_params)
        # Two roundings per step, in float32.
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), actual, expected)
    evaluated = parallel.unreplicate(state.eval_variables["params"])
    jax.tree.map(np.testing.assert_array_equal, evaluated, actual)
    assert np.abs(actual["heads"]["bias"] - params["heads"]["bias"]).max() > 1e-3


def test_micro_batches_of_different_shapes_weigh_what_their_targets_do():
    functions = make_functions(StandIn(pooled=True))
    trainer = parallel.Trainer(functions, jax.local_devices()[:1])
    micro_batches = [make_batch((3, 1)), make_batch((2, 0), shape=(8, 3), seed=1)]

    def total(micro_batches):
        return float(trainer.step(trainer.replicate(make_state(functions)), micro_batches)[1].losses.total)

    alone = [total([micro_batch]) for micro_batch in micro_batches]
    assert abs(alone[0] - alone[1]) > 0.1
    np.testing.assert_allclose(total(micro_batches), (4 * alone[0] + 2 * alone[1]) / 6, **CLOSE)


def test_another_number_of_targets_leaves_the_network_compiled(monkeypatch):
    originals = {name: getattr(StepFunctions, name) for name in ("forward", "cost", "loss", "backward")}
    compiled = []
    for name in originals:

        def noted(self, *arguments, name=name):
            compiled.append(name)
            return originals[name](self, *arguments)

        monkeypatch.setattr(StepFunctions, name, noted)
    functions = make_functions(StandIn())
    trainer = parallel.Trainer(functions, jax.local_devices()[:1])
    first, second = cut(make_batch(), 2)
    _, metrics = trainer.step(trainer.replicate(make_state(functions)), [first, second])
    assert sorted(compiled) == ["backward", "cost", "forward", "loss"]
    compiled.clear()
    wider = jax.tree.map(lambda x: np.pad(x, [(0, 0), (0, 4)] + [(0, 0)] * (x.ndim - 2)), second.targets)
    micro_batches = [first, second.replace(targets=wider)]
    _, wider_metrics = trainer.step(trainer.replicate(make_state(functions)), micro_batches)
    assert sorted(compiled) == ["cost", "loss"]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **CLOSE), wider_metrics, metrics)


def test_what_is_compiled_ahead_is_what_runs():
    functions = make_functions(StandIn())
    trainer = parallel.Trainer(functions, jax.local_devices()[:2])
    state = trainer.replicate(make_state(functions))
    for i in range(2):
        trainer.number(i)
    programs = [*trainer.train_programs(state, 1, SHAPE, COLUMNS, accumulates=True)]
    programs.append(trainer.detect_program(state.eval_variables, 2, SHAPE, COLUMNS))
    compiled = [program.compiled for program in programs]
    assert len(compiled) == 8
    events = []
    jax.monitoring.register_event_duration_secs_listener(lambda name, _, **__: events.append(name))
    try:
        state, _ = trainer.step(state, cut(make_batch(), 2))
        trainer.detect(state.eval_variables, make_batch())
    finally:
        jax.monitoring.clear_event_listeners()
    assert not [name for name in events if "compile" in name or "trace" in name]


def test_the_next_micro_batch_is_on_its_way_before_the_host_matches_this_one(monkeypatch):
    functions, trainer = make_trainer()
    calls = []
    for name in ("forward", "match", "backward"):
        original = getattr(trainer, name)
        monkeypatch.setattr(trainer, name, lambda *x, f=original, name=name: (calls.append(name), f(*x))[1])
    trainer.step(trainer.replicate(make_state(functions)), cut(make_batch(), 4))
    assert calls == ["forward"] + 3 * ["forward", "match", "backward"] + ["match", "backward"]


def test_what_goes_from_forward_to_backward():
    """R50 in bfloat16, 2 pictures of 800x1088 with dropout: by shapes alone, nothing is computed."""
    functions = make_functions(DetectionTransformer(dtype=jnp.bfloat16))
    state = jax.eval_shape(lambda: functions.init(new_rng(0), (64, 64))).network
    images, sizes = jax.ShapeDtypeStruct((1, 2, 800, 1088, 3), jnp.uint8), jax.ShapeDtypeStruct((1, 2, 2), jnp.int32)
    state = jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, *x.shape), x.dtype), state)
    assert len(jax.tree.leaves(state)) == 376 + 53 * 4 + 2  # parameters, frozen batch norms, the step's number, the key
    forward = jax.pmap(functions.forward, "devices", devices=jax.local_devices()[:1])
    _, residuals = jax.eval_shape(forward, state, images, sizes, jax.ShapeDtypeStruct((1,), jnp.int32))
    arrays = residuals.arrays
    assert len(arrays) <= 360
    assert sum(x.size * x.dtype.itemsize for x in arrays) < 0.6 * 2**30
    shapes = {x.shape[1:] for x in arrays}
    assert (2, 850, 2048) in shapes  # the feed-forward block's
    assert not {shape for shape in shapes if shape[-2:] in ((850, 850), (300, 850), (300, 300))}
    kernels = {x.shape[1:] for path, x in jax.tree_util.tree_leaves_with_path(state.params) if path[-1].key == "kernel"}
    assert (2048, 256) in kernels
    assert not kernels & shapes
    assert max(x.size for x in arrays) == 2 * 200 * 272 * 256  # the frozen part's output: nothing of its inside


def test_dropout_masks_follow_seed_step_micro_batch_and_device():
    functions, trainer = make_trainer(2, dropout=0.5)
    same = jax.tree.map(lambda x: np.repeat(x[:1], 4, axis=0), make_batch())  # both devices see the same pictures

    def logits(seed, step, micro_batch):
        state = make_state(functions)
        state = state.replace(rng=jax.random.key_data(new_rng(seed)), step=jnp.array(step, jnp.int32))
        batch, number = trainer.put(same).batch, trainer.number(micro_batch)
        return np.asarray(trainer.forward(trainer.replicate(state), batch.images, batch.sizes_hw, number)[0].logits)

    base = logits(0, 0, 0)
    np.testing.assert_array_equal(logits(0, 0, 0), base)
    assert (base[0] != base[1]).any()
    others = [logits(1, 0, 0), logits(0, 1, 0), logits(0, 0, 1)]
    for other in others:
        assert (other != base).any()
    assert (others[1] != others[2]).any()


def test_steps_with_dropout_repeat():
    with_dropout = make_trainer(2, dropout=0.5)
    first, second = (run(*with_dropout, [make_batch()], steps=2) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, first[2], second[2])
    without = run(*make_trainer(2), [make_batch()], steps=2)
    assert not np.allclose(first[2]["heads"]["bias"], without[2]["heads"]["bias"])


def test_only_gradients_of_what_is_trained_are_reduced():
    functions = make_functions(StandIn(), frozen=("conv1",))
    params = {"backbone": {"conv1": jnp.ones(3), "layer2": jnp.ones(5)}, "heads": jnp.ones((2, 7))}
    state = TrainState(jnp.int32(0), params, {}, functions.optimizer.init(params), params, jnp.zeros(4, jnp.uint32))
    losses = Losses(*[jnp.zeros(()) for _ in dataclasses.fields(Losses)])
    made = jax.make_jaxpr(functions.apply, axis_env=[("devices", 2)])(state, params, losses)
    reduced = [variable.aval.size for equation in made.eqns if equation.primitive.name.startswith("psum")
               for variable in equation.invars]  # fmt: skip
    assert sorted(reduced) == [5, 14]


def test_detection_has_no_dropout_and_keeps_the_order():
    found = []
    for functions, trainer in (make_trainer(1), make_trainer(2, dropout=0.5)):
        found.append(trainer.detect(trainer.replicate(make_state(functions).eval_variables), make_batch()))
    assert found[0].scores.shape == (4, 10)
    np.testing.assert_array_equal(found[0].labels, found[1].labels)
    np.testing.assert_allclose(found[0].boxes_xyxy_px, found[1].boxes_xyxy_px, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("devices", "micro_batches", "row"), [(1, 1, 3), (2, 1, 3), (2, 1, 0), (1, 2, 3), (2, 2, 2)])
def test_not_finite_predictions_name_the_row_of_the_batch(devices, micro_batches, row):
    """`row` is the only picture with a target, whose cost is NaN: the row is counted over all of them."""
    functions, trainer = make_trainer(devices)
    state = make_state(functions)
    bad = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), state.params)
    batch = make_batch([2 * (i == row) for i in range(4)])
    with pytest.raises(NonFiniteCostError, match=rf"decoder layer 0 is not finite in row {row} of the batch"):
        trainer.step(trainer.replicate(state.replace(params=bad)), cut(batch, micro_batches))


def test_a_step_moves_nothing_to_or_from_the_devices_unasked():
    """Pictures, targets and match go out and the cost comes back, each in one transfer that is asked for."""
    functions, trainer = make_trainer(2)
    state = trainer.replicate(make_state(functions))
    placed = [trainer.put(batch) for batch in cut(make_batch(), 2)]
    on_host = dataclasses.replace(placed[0], batch=jax.tree.map(np.asarray, placed[0].batch))
    state, _ = trainer.step(state, placed)  # compiles
    with jax.transfer_guard("disallow"):
        state, metrics = trainer.step(state, placed)
        assert metrics.is_finite.addressable_data(0).shape == ()
        with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
            trainer.step(state, [on_host])


@pytest.mark.parametrize("field", ["total", "giou_loss", "grad_norm"])
def test_one_flag_tells_that_a_step_is_not_finite(field):
    functions, trainer = make_trainer(1)
    state = trainer.replicate(make_state(functions))
    grads = jax.tree.map(lambda x: jnp.zeros((1, *x.shape)), state.params)
    nothing = jnp.zeros(LAYERS)
    losses = Losses(jnp.ones(()), nothing, nothing, nothing, jnp.zeros(()), nothing)
    if field != "grad_norm":
        losses = losses.replace(**{field: getattr(losses, field) * jnp.nan})
    else:
        grads = jax.tree.map(lambda x: jnp.full_like(x, jnp.inf), grads)
    assert not trainer.apply(state, grads, losses)[1].is_finite


def test_a_batch_that_does_not_divide_is_named():
    _, trainer = make_trainer(2)
    with pytest.raises(ValueError, match="a batch of 3 pictures does not divide among 2 devices"):
        trainer.shard(make_batch((1, 1, 1)))


def test_init_makes_a_whole_state():
    state = make_functions(StandIn(), ema_decay=0.9).init(new_rng(0), SHAPE)
    assert int(state.step) == 0
    assert state.params["heads"]["kernel"].shape == (7, LAYERS * QUERIES * (CLASSES + 4))
    jax.tree.map(np.testing.assert_array_equal, state.ema_params, state.params)
    assert state.constants == {}
    other = make_functions(StandIn(), ema_decay=0.0).init(new_rng(1), SHAPE)
    assert other.ema_params is None
    assert (other.rng != state.rng).any()
    assert (other.params["heads"]["kernel"] != state.params["heads"]["kernel"]).any()
