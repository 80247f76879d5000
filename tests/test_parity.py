"""Forward, matching, losses, gradients, optimiser steps and post-processing against the published PyTorch code.

`reference/*.npz` holds what that code gave, on a CPU in float32 with dropout 0, for the weights, pictures and targets
that `reference/formula.py` builds from names and shapes alone.
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

from cdetr_jax.checkpoints.torch_convert import OFFICIAL, from_torch, torch_name
from cdetr_jax.evaluation.postprocess import postprocess
from cdetr_jax.losses.criterion import Counts, criterion
from cdetr_jax.matching.assign import assign
from cdetr_jax.matching.cost import matching_cost
from cdetr_jax.models.detector import DetectionTransformer, padding_mask
from cdetr_jax.models.resnet import frozen_modules
from cdetr_jax.structs import Batch, Match, Targets
from cdetr_jax.training import parallel
from cdetr_jax.training.optimizer import make_optimizer
from cdetr_jax.training.step import StepFunctions, TrainState, new_rng

REFERENCE = pathlib.Path(__file__).parent / "reference"
sys.path.insert(0, str(REFERENCE))
import formula  # noqa: E402

# Largest relative error. Both sides are float32 and add up in different orders; measured: below 3e-6 forward, 3e-4 in
# gradient norms. The bounds are the project's promise, with room for another CPU's summation order.
FORWARD, GRADIENT, STEPS, DELTAS = 1e-4, 1e-3, 1e-3, 1e-2


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
    return Case(expected, is_detr, model, variables, batch)


@pytest.fixture(scope="module", params=["official_r50", "official_r50_dc5", "detr_r50"])
def case(request):
    return load_case(request.param)


@pytest.fixture(scope="module")
def stages(case):
    is_pad = padding_mask(case.batch.sizes_hw, case.batch.images.shape[1:3])
    run = jax.jit(lambda variables, images, mask: case.model.apply(variables, images, mask, method="stages"))
    return jax.tree.map(np.asarray, run(case.variables, case.batch.images, is_pad))


def cost_settings(case):
    return {
        "class_loss": case.model.class_loss,
        "class_cost": 1.0 if case.is_detr else 2.0,
        "l1_cost": 5.0,
        "giou_cost": 2.0,
        "focal_alpha": 0.25,
        "focal_gamma": 2.0,
    }


def loss_settings(case):
    return {
        "class_loss": case.model.class_loss,
        "class_weight": 1.0 if case.is_detr else 2.0,
        "l1_weight": 5.0,
        "giou_weight": 2.0,
        "focal_alpha": 0.25,
        "focal_gamma": 2.0,
        "no_object_weight": 0.1,
    }


def assert_close(actual, expected, bound):
    error = np.abs(actual - expected).max() / np.abs(expected).max()
    assert error <= bound, f"relative error {error:.2g}"


def test_every_stage_of_the_forward_pass(case, stages):
    expected = case.expected
    assert_close(stages.features.transpose(0, 3, 1, 2)[:, ::64], expected["feature"], FORWARD)
    np.testing.assert_array_equal(stages.is_pad, expected["feature_mask"])
    assert_close(stages.pos.transpose(0, 3, 1, 2)[:, ::8], expected["pos"], FORWARD)
    assert_close(stages.memory[:, :, ::16], expected["memory"], FORWARD)
    assert_close(stages.decoder_output[-1][:, :, ::16], expected["hs_last"], FORWARD)
    assert_close(stages.predictions.logits[-1], expected["logits_last"], FORWARD)
    assert_close(stages.predictions.boxes_cxcywh, expected["boxes"], FORWARD)
    checksum = np.abs(stages.predictions.logits.astype(np.float64)).sum(axis=(1, 2, 3))
    np.testing.assert_allclose(checksum, expected["logits_checksum"], rtol=FORWARD)
    if not case.is_detr:
        points = np.asarray(jax.nn.sigmoid(stages.reference_points))
        for row in expected["reference_points"]:
            assert_close(points, row, FORWARD)


def matched_queries(case, stages):
    cost = jax.jit(lambda p, t: matching_cost(p, t, **cost_settings(case)))(stages.predictions, case.batch.targets)
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
    losses = jax.jit(lambda p, t, m, c: criterion(p, t, m, c, **loss_settings(case)))(
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
        scores, labels, boxes = scores[order], labels[order], boxes[order]
        assert_close(np.asarray(found.scores[image]), scores, FORWARD)
        # The formula's weights give neighbours whose scores differ in a float32's last bits only: those may swap.
        for row, box in enumerate(boxes):
            twins = np.abs(scores - scores[row]) <= 5e-6 * scores[row]
            same = twins & (np.asarray(found.labels[image]) == labels[row])
            error = np.abs(np.asarray(found.boxes_xyxy_px[image]) - box).max(-1)[same].min(initial=np.inf)
            assert error <= FORWARD * np.abs(boxes).max() or twins[-1], f"detection {row}"


# A gradient smaller than this part of the global norm is what float32 cancellation leaves over (measured noise: 1e-11
# of the global norm). It takes in what has no gradient in exact arithmetic: the biases of keys, to which softmax is
# blind, and the weights that only see the first decoder layer's zero content.
NOISE = 5e-8


def by_official_name(params):
    """Norms per official tensor: the three parts of a packed projection count together."""
    squares = {}
    for path, leaf in traverse_util.flatten_dict(params, sep="/").items():
        name, _ = torch_name(path, OFFICIAL)
        squares.setdefault(name, []).append((np.asarray(leaf, np.float64) ** 2).sum())
    return {name: np.sqrt(sum(values)) for name, values in squares.items()}


def test_gradients_and_three_optimizer_steps(case):
    lr, backbone_lr = (lambda step, value=value: jnp.asarray(value) for value in (1e-4, 1e-5))
    optimizer = make_optimizer(
        lr=lr,
        backbone_lr=backbone_lr,
        weight_decay=1e-4,
        clip_norm=0.1,
        frozen_modules=frozen_modules("resnet50", 2),
    )
    functions = StepFunctions(case.model, optimizer, cost_settings(case), loss_settings(case), 0.0, 100)
    params = case.variables["params"]
    state = TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        constants=case.variables["constants"],
        opt_state=optimizer.init(params),
        ema_params=None,
        rng=jax.random.key_data(new_rng(0)),
    )
    trainer = parallel.Trainer(functions, jax.local_devices()[:1])
    state = trainer.replicate(state)

    part = trainer.shard(case.batch)
    predictions, pullback = trainer.forward(state, part.images, part.sizes_hw, 0)
    match = trainer.match(trainer.price(predictions, part.targets), part)
    cotangents, _ = trainer.loss(predictions, part.targets, match, trainer.counts([part]))
    grads = trainer.backward(pullback, cotangents)
    norms = by_official_name(jax.tree.map(lambda x: np.asarray(x).mean(0), grads))
    trainable = list(map(str, case.expected["trainable"]))
    floor = NOISE * case.expected["grad_global_norm_0"]
    has_gradient = dict(zip(trainable, case.expected["grad_norms"] > floor, strict=True))
    assert sum(has_gradient.values()) >= 0.88 * len(trainable)
    for name, norm in zip(trainable, case.expected["grad_norms"], strict=True):
        if has_gradient[name]:
            np.testing.assert_allclose(norms[name], norm, rtol=GRADIENT, err_msg=name)
        else:
            assert norms[name] < 2 * floor, name

    for step in range(3):
        state, losses, grad_norm = trainer.step(state, [case.batch])
        np.testing.assert_allclose(np.mean(losses.total), case.expected[f"total_loss_{step}"], rtol=STEPS)
        np.testing.assert_allclose(grad_norm[0], case.expected[f"grad_global_norm_{step}"], rtol=STEPS)
    trained = parallel.first(state.params)
    deltas = by_official_name(jax.tree.map(np.subtract, trained, jax.tree.map(np.asarray, params)))
    for name, norm in zip(trainable, case.expected["delta_norms"], strict=True):
        if has_gradient[name]:
            np.testing.assert_allclose(deltas[name], norm, rtol=DELTAS, err_msg=name)
    assert all(delta == 0 for name, delta in deltas.items() if name not in trainable), "frozen stages moved"
