"""Forward, matching, losses, gradients, optimiser steps and post-processing against the published PyTorch code.

`reference/*.npz` holds what that code gave in float64, on a CPU with dropout 0, for the weights, pictures and targets
that `reference/formula.py` builds from names and shapes alone. Ours runs in float64 too, so that a bound tells a
mistake from rounding, which in float32 grows through ties of ReLU, max-pool and matching. Two tests look at float32.
"""

import json
import pathlib
import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from cdetr_jax.evaluation.postprocess import postprocess
from cdetr_jax.losses.criterion import LossSettings, criterion
from cdetr_jax.matching.assign import assign
from cdetr_jax.matching.cost import CostSettings, matching_cost
from cdetr_jax.models import fused_attention
from cdetr_jax.models.detector import DetectionTransformer, padding_mask
from cdetr_jax.models.resnet import frozen_modules
from cdetr_jax.structs import Batch, Counts, Losses, Match, Targets
from cdetr_jax.training import parallel
from cdetr_jax.training.optimizer import make_optimizer
from cdetr_jax.training.step import StepFunctions, TrainState, new_rng
from cdetr_jax.weights.torch_convert import OFFICIAL, from_torch, torch_name

REFERENCE = pathlib.Path(__file__).parent / "reference"
sys.path.insert(0, str(REFERENCE))
import formula  # noqa: E402

# Largest relative errors in float64, the project's promise. Rounding alone gives 1e-13 forward, and what it makes of
# AdamW's first steps, which divide a gradient by its own size, stays far below too. A gradient that is zero in exact
# arithmetic holds rounding noise on both sides, so a part of the global norm is added to its bound.
FORWARD, GRADIENT, GRADIENT_NOISE, STEPS, DELTAS = 1e-9, 1e-7, 1e-14, 1e-7, 1e-6
# A tensor whose gradient is less than this part of the global norm has none in exact arithmetic: biases of keys, to
# which softmax is blind, and weights that only see the first decoder layer's zero content. There is nothing between
# 5e-18, float64's rounding, and 3e-9.
NO_GRADIENT = 1e-12
# Float32 forward: measured below 3e-6; other CPUs and thread counts add up in other orders.
FORWARD_FLOAT32 = 1e-4
# Float32 gradients, all of them as one vector: measured 1 - cosine 8e-7 and norm 1e-5. Single entries flip at ties.
COSINE_FLOAT32, NORM_FLOAT32 = 1e-4, 1e-3


class NormalizedDetector(DetectionTransformer):
    """Takes pictures that are normalised already, as the reference was run with."""

    def __call__(self, images, sizes_hw, train=False):
        return self.stages(images, padding_mask(sizes_hw, images.shape[1:3]), train).predictions


class Case(NamedTuple):
    expected: dict
    is_detr: bool
    model: NormalizedDetector
    variables: dict
    batch: Batch


def load_case(name: str) -> Case:
    expected = dict(np.load(REFERENCE / f"{name}.npz"))
    meta = json.loads(str(expected["meta"]))
    is_detr = name.startswith("detr")
    model = NormalizedDetector(
        decoder="detr" if is_detr else "conditional",
        class_loss="softmax" if is_detr else "focal",
        box_offset=not is_detr,
        dc5=meta["dilation"],
        encoder_layers=meta["enc"],
        decoder_layers=meta["dec"],
        num_queries=meta["queries"],
        dropout=0.0,
        matmul_precision="highest",
    )
    sizes = [tuple(map(int, size.split("x"))) for size in meta["sizes"].split(",")]
    shape = np.max(sizes, axis=0)
    images = np.zeros((len(sizes), *shape, 3), np.float32)
    for i, picture in enumerate(formula.images(sizes, meta["seed"])):
        images[i, : sizes[i][0], : sizes[i][1]] = picture.transpose(1, 2, 0)
    counts = [int(count) for count in meta["counts"].split(",")]
    targets = Targets(
        labels=np.zeros((len(sizes), max(counts)), np.int32),
        boxes_cxcywh=np.zeros((len(sizes), max(counts), 4), np.float32),
        valid=np.arange(max(counts))[None, :] < np.array(counts)[:, None],
    )
    for i, target in enumerate(formula.targets(counts, 91, meta["seed"])):
        targets.labels[i, : counts[i]] = target["labels"]
        targets.boxes_cxcywh[i, : counts[i]] = target["boxes"]
    sizes = np.array(sizes, np.int32)
    batch = Batch(
        images=images, sizes_hw=sizes, original_sizes_hw=2 * sizes, index=np.arange(len(sizes)), targets=targets
    )
    empty = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 64, 64, 3)), jnp.array([[64, 64]])))
    manifest = json.loads((REFERENCE / f"manifest_{name}.json").read_text())
    variables = from_torch(formula.state_dict(manifest, meta["seed"]), empty, OFFICIAL)
    variables = jax.tree.map(lambda x: np.asarray(x, np.float64), variables)
    return Case(expected, is_detr, model, variables, batch)


@pytest.fixture(scope="module", autouse=True)
def float64():
    """Compiled in full, too: LLVM makes a loop of a convolution in float64, which takes minutes if not optimised."""
    settings = {"jax_enable_x64": True, "jax_disable_most_optimizations": False}
    before = {name: jax.config.values[name] for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture(scope="module", params=["official_r50", "official_r50_dc5", "detr_r50"])
def case(request, float64):
    return load_case(request.param)


# What takes longer, such as a backward pass of half a minute to a minute; `.ci/run` looks at the slow ones too. Without
# those the gradients of one model are compared, and AdamW with a literal one (training/test_optimizer.py).
longer_cases = pytest.mark.parametrize(
    "case",
    ["official_r50", *(pytest.param(name, marks=pytest.mark.slow) for name in ("official_r50_dc5", "detr_r50"))],
    indirect=True,
    scope="module",
)


def run_stages(case, variables):
    is_pad = padding_mask(case.batch.sizes_hw, case.batch.images.shape[1:3])
    run = jax.jit(lambda variables, images, mask: case.model.apply(variables, images, mask, method="stages"))
    return jax.tree.map(np.asarray, run(variables, case.batch.images, is_pad))


@pytest.fixture(scope="module")
def stages(case):
    return run_stages(case, case.variables)


def cost_settings(case):
    return CostSettings(
        class_loss=case.model.class_loss,
        class_cost=1.0 if case.is_detr else 2.0,
        l1_cost=5.0,
        giou_cost=2.0,
        focal_alpha=0.25,
        focal_gamma=2.0,
    )


def loss_settings(case):
    return LossSettings(
        class_loss=case.model.class_loss,
        class_weight=1.0 if case.is_detr else 2.0,
        l1_weight=5.0,
        giou_weight=2.0,
        focal_alpha=0.25,
        focal_gamma=2.0,
        no_object_weight=0.1,
    )


def assert_close(actual, expected, bound):
    error = np.abs(actual - expected).max() / np.abs(expected).max()
    assert error <= bound, f"relative error {error:.2g}"


def assert_stages(case, stages, bound):
    expected = case.expected
    assert_close(stages.features.transpose(0, 3, 1, 2)[:, ::64], expected["feature"], bound)
    np.testing.assert_array_equal(stages.is_pad, expected["feature_mask"])
    assert_close(stages.pos.transpose(0, 3, 1, 2)[:, ::8], expected["pos"], bound)
    assert_close(stages.memory[:, :, ::16], expected["memory"], bound)
    assert_close(stages.decoder_output[-1][:, :, ::16], expected["hs_last"], bound)
    assert_close(stages.predictions.logits[-1], expected["logits_last"], bound)
    assert_close(stages.predictions.boxes_cxcywh, expected["boxes"], bound)
    checksum = np.abs(stages.predictions.logits.astype(np.float64)).sum(axis=(1, 2, 3))
    np.testing.assert_allclose(checksum, expected["logits_checksum"], rtol=bound)
    if not case.is_detr:
        points = np.asarray(jax.nn.sigmoid(stages.reference_points))
        for row in expected["reference_points"]:
            assert_close(points, row, bound)


def test_every_stage_of_the_forward_pass(case, stages):
    assert {x.dtype for x in jax.tree.leaves(stages)} == {np.dtype(bool), np.dtype(np.float64)}
    assert_stages(case, stages, FORWARD)


@pytest.fixture
def fused(case, monkeypatch):
    """The case with the fused attention, whose kernels run as plain JAX."""
    monkeypatch.setattr(fused_attention, "PLATFORMS", ("cpu",))
    return case._replace(model=case.model.clone(attention="fused"))


@longer_cases
def test_every_stage_of_the_forward_pass_with_fused_attention(fused):
    assert_stages(fused, run_stages(fused, fused.variables), FORWARD)


@longer_cases
def test_the_forward_pass_in_float32(case):
    with jax.enable_x64(False):
        stages = run_stages(case, jax.tree.map(np.float32, case.variables))
    assert {x.dtype for x in jax.tree.leaves(stages)} == {np.dtype(bool), np.dtype(np.float32)}
    assert_stages(case, stages, FORWARD_FLOAT32)


def matched_queries(case, stages):
    cost = jax.jit(lambda p, t: matching_cost(p, t, cost_settings(case)))(stages.predictions, case.batch.targets)
    return assign(np.asarray(cost), case.batch.targets.valid)


def test_the_same_matches_in_every_layer_and_image(case, stages):
    queries = matched_queries(case, stages)
    for layer, image in np.ndindex(*queries.shape[:2]):
        query, target = case.expected[f"match_{layer}_{image}"]
        np.testing.assert_array_equal(queries[layer, image, target], query)
        assert (queries[layer, image] >= 0).sum() == len(query)


def test_every_loss_term_of_every_layer(case, stages):
    match = Match(queries=matched_queries(case, stages))
    num_targets = float(case.batch.targets.valid.sum())
    counts = Counts(
        targets=jnp.array(num_targets),
        matched=jnp.array(num_targets),
        queries=jnp.array(float(np.prod(stages.predictions.logits.shape[1:3]))),
    )
    losses = jax.jit(lambda p, t, m, c: criterion(p, t, m, c, loss_settings(case)))(
        stages.predictions, case.batch.targets, match, counts
    )
    terms = {
        "loss_ce": losses.class_loss,
        "loss_bbox": losses.l1_loss,
        "loss_giou": losses.giou_loss,
        "cardinality_error": losses.cardinality_error,
    }
    last = case.model.decoder_layers - 1
    for name, value in zip(case.expected["loss_names"], case.expected["loss_values"], strict=True):
        if name == "class_error":
            actual = losses.class_error
        else:
            term, _, layer = name.rpartition("_") if name[-1].isdigit() else (name, "", last)
            actual = terms[term][int(layer)]
        np.testing.assert_allclose(actual, value, rtol=FORWARD, err_msg=name)
    np.testing.assert_allclose(losses.total, case.expected["total_loss_0"], rtol=FORWARD)


def test_identical_detections(case, stages):
    predictions = jax.tree.map(jnp.asarray, stages.predictions)
    sizes = jnp.asarray(case.batch.original_sizes_hw)
    found = postprocess(predictions, sizes, class_loss=case.model.class_loss, top_k=100)
    for image in range(len(sizes)):
        scores, labels, boxes = (case.expected[f"post_{image}_{key}"] for key in ("scores", "labels", "boxes"))
        # The published DETR code leaves its detections in the order of the queries.
        order = np.argsort(-scores, kind="stable") if case.is_detr else np.arange(len(scores))
        assert_close(np.asarray(found.scores[image]), scores[order], FORWARD)
        np.testing.assert_array_equal(found.labels[image], labels[order])
        assert_close(np.asarray(found.boxes_xyxy_px[image]), boxes[order], FORWARD)


def by_official_name(params):
    """Norms per official tensor: the three parts of a packed projection count together."""
    squares = {}
    for path, leaf in traverse_util.flatten_dict(params, sep="/").items():
        name, _ = torch_name(path, OFFICIAL)
        squares.setdefault(name, []).append((np.asarray(leaf, np.float64) ** 2).sum())
    return {name: np.sqrt(sum(values)) for name, values in squares.items()}


def start(case, variables):
    """A trainer on one device, and its first state."""
    lr, backbone_lr = (lambda step, value=value: jnp.asarray(value) for value in (1e-4, 1e-5))
    optimizer = make_optimizer(
        lr=lr,
        backbone_lr=backbone_lr,
        weight_decay=1e-4,
        clip_norm=0.1,
        frozen_modules=frozen_modules("resnet50", 2),
    )
    functions = StepFunctions(case.model, optimizer, cost_settings(case), loss_settings(case), 0.0, 100)
    state = TrainState(
        step=jnp.zeros((), jnp.int32),
        params=variables["params"],
        constants=variables["constants"],
        opt_state=optimizer.init(variables["params"]),
        ema_params=None,
        rng=jax.random.key_data(new_rng(0)),
    )
    return parallel.Trainer(functions, jax.local_devices()[:1]), state


def gradients(trainer, state, placed, match=None):
    """The gradients and losses of a replicated state, and their match: the given one, or SciPy's."""
    network = state.network  # as `Trainer.step` has it, whose compilations these are
    predictions, residuals = trainer.forward(network, placed.batch.images, placed.batch.sizes_hw, trainer.number(0))
    match = match or trainer.match(trainer.cost(predictions, placed.batch.targets), placed)
    cotangents, losses = trainer.loss(predictions, placed.batch.targets, match, trainer.counts([placed]))
    return trainer.backward(network, residuals, cotangents), losses, match


def of_the_device(grads):
    """What the only device has, as NumPy arrays."""
    return jax.tree.map(lambda x: np.array(x[0]), grads)


class Step(NamedTuple):
    """A first step up to its update, on the device."""

    trainer: parallel.Trainer
    state: TrainState
    placed: parallel.Placed
    grads: dict
    losses: Losses
    match: Match


@pytest.fixture(scope="module")
def first_step(case):
    trainer, state = start(case, case.variables)
    state, placed = trainer.replicate(state), trainer.put(case.batch)
    grads, losses, match = gradients(trainer, state, placed)
    return Step(trainer, state, placed, grads, losses, match)


@longer_cases
def test_the_gradient_of_every_tensor(case, first_step):
    assert_gradients(case, first_step.grads)


@pytest.mark.slow
@longer_cases
def test_the_gradient_of_every_tensor_with_fused_attention(fused):
    trainer, state = start(fused, fused.variables)
    assert_gradients(fused, gradients(trainer, trainer.replicate(state), trainer.put(fused.batch))[0])


def assert_gradients(case, grads):
    norms = by_official_name(of_the_device(grads))
    trainable = list(map(str, case.expected["trainable"]))
    noise = GRADIENT_NOISE * case.expected["grad_global_norm_0"]
    for name, norm in zip(trainable, case.expected["grad_norms"], strict=True):
        np.testing.assert_allclose(norms[name], norm, rtol=GRADIENT, atol=noise, err_msg=name)
    assert all(norm == 0 for name, norm in norms.items() if name not in trainable), "frozen stages have gradients"


@pytest.mark.slow
@longer_cases
def test_three_optimizer_steps(case, first_step):
    trainer, placed = first_step.trainer, first_step.placed
    state, step_metrics = trainer.apply(first_step.state, first_step.grads, first_step.losses)
    metrics_of_steps = [step_metrics]
    for _ in range(2):
        state, step_metrics = trainer.step(state, [placed])
        metrics_of_steps.append(step_metrics)
    for step, metrics in enumerate(metrics_of_steps):
        np.testing.assert_allclose(metrics.losses.total, case.expected[f"total_loss_{step}"], rtol=STEPS)
        np.testing.assert_allclose(metrics.grad_norm, case.expected[f"grad_global_norm_{step}"], rtol=STEPS)
    params = parallel.unreplicate(state.params)
    deltas = by_official_name(jax.tree.map(np.subtract, params, case.variables["params"]))
    trainable = list(map(str, case.expected["trainable"]))
    # AdamW makes steps of full size also of rounding noise: tensors with no other gradient are left out.
    has_gradient = case.expected["grad_norms"] > NO_GRADIENT * case.expected["grad_global_norm_0"]
    assert has_gradient.mean() > 0.88
    for name, norm in np.array([trainable, case.expected["delta_norms"]], object).T[has_gradient]:
        np.testing.assert_allclose(deltas[name], norm, rtol=DELTAS, err_msg=name)
    assert all(delta == 0 for name, delta in deltas.items() if name not in trainable), "frozen stages moved"


@pytest.mark.slow
@pytest.mark.parametrize("case", ["official_r50"], indirect=True, scope="module")
def test_how_far_float32_gradients_are_from_the_truth(case, first_step):
    """For the same match, whose near-ties are another matter."""
    truth, match = of_the_device(first_step.grads), first_step.match
    with jax.enable_x64(False):
        trainer, state = start(case, jax.tree.map(np.float32, case.variables))
        grads, *_ = gradients(trainer, trainer.replicate(state.network), trainer.put(case.batch), match)
        grads = of_the_device(grads)
    ours, exact = (
        np.concatenate([leaf.ravel().astype(np.float64) for leaf in jax.tree.leaves(tree)]) for tree in (grads, truth)
    )
    norm, exact_norm = np.linalg.norm(ours), np.linalg.norm(exact)
    assert 1 - ours @ exact / (norm * exact_norm) <= COSINE_FLOAT32
    np.testing.assert_allclose(norm, exact_norm, rtol=NORM_FLOAT32)
