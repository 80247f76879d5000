"""The whole detector: counts of the published configurations, its input and its initial state."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cdetr_jax.models import detector, resnet
from cdetr_jax.models.detector import DetectionTransformer, inverse_sigmoid, normalize, padding_mask, resize_mask

IMAGE = jax.ShapeDtypeStruct((1, 64, 96, 3), jnp.uint8)


def shapes(**settings):
    return jax.eval_shape(DetectionTransformer(**settings).init, jax.random.key(0), IMAGE, jnp.array([[64, 96]]))


def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


DETR = {"decoder": "detr", "class_loss": "softmax", "box_offset": False, "num_queries": 100}
# Convolutions of the backbone and channels of its batch norms, as tests/models/test_resnet.py counts them.
R50, R101 = (23_454_912, 26_560), (42_394_816, 52_672)
# Convolutions of the stem and of layer1, which are not trained.
FROZEN = 7 * 7 * 3 * 64 + (64 * 64 + 9 * 64 * 64 + 2 * 64 * 256) + 2 * (2 * 64 * 256 + 9 * 64 * 64)


def literal_count(decoder, queries, width=256, ffn=2048):
    """Everything but the backbone, from the architecture alone."""
    square, norm = width * width + width, 2 * width
    feed_forward = width * ffn + ffn + ffn * width + width
    total = 2048 * width + width + queries * width  # projection, object queries
    total += 6 * (4 * square + feed_forward + 2 * norm)
    if decoder == "detr":
        total += 6 * (8 * square + feed_forward + 3 * norm) + norm
        return total + width * 92 + 92 + 2 * square + 4 * width + 4
    total += 6 * (12 * square + feed_forward + 3 * norm) + square + norm
    total += 2 * square + square + 2 * width + 2  # lambda_q's FFN, the reference points' FFN
    return total + width * 91 + 91 + 2 * square + 4 * width + 4


# Settings, parameters, backbone, the paper's count in millions.
PUBLISHED = {
    "conditional R50": ({}, 43_418_401, R50, 44),
    "conditional DC5-R50": ({"dc5": True}, 43_418_401, R50, 44),
    "conditional R101": ({"backbone": "resnet101"}, 62_358_305, R101, 63),
    "conditional DC5-R101": ({"backbone": "resnet101", "dc5": True}, 62_358_305, R101, 63),
    "DETR R50": (DETR, 41_524_768, R50, 41),
    "DETR R101": ({**DETR, "backbone": "resnet101"}, 60_464_672, R101, 60),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts_of_the_published_configurations(name):
    settings, params, (convolutions, channels), millions = PUBLISHED[name]
    variables = shapes(**settings)
    literal = convolutions + literal_count(settings.get("decoder", "conditional"), settings.get("num_queries", 300))
    assert count(variables["params"]) == literal == params
    assert count(variables["constants"]) == 4 * channels
    # The paper's table rounds up or down; batch norm's weight and bias count there, its statistics do not.
    assert abs(params + 2 * channels - millions * 1e6) < 1e6


def test_trained_parameters_are_those_that_the_published_training_logs_count():
    """The published code prints the number of parameters that it trains: without batch norm, stem and layer1."""
    for settings, trained in (({}, 43_196_001), (DETR, 41_302_368)):
        params = shapes(**settings)["params"]
        frozen = sum(count(params["backbone"].get(name, {})) for name in resnet.frozen_modules("resnet50", 2))
        assert frozen == FROZEN
        assert count(params) - frozen == trained


def test_padding_mask():
    mask = np.asarray(padding_mask(jnp.array([[1, 3], [2, 0], [0, 0], [2, 3]]), (2, 3)))
    expected = [
        [[False, False, False], [True, True, True]],
        [[True, True, True], [True, True, True]],
        [[True, True, True], [True, True, True]],
        [[False, False, False], [False, False, False]],
    ]
    np.testing.assert_array_equal(mask, expected)


def test_normalize():
    images = jnp.array([[[[0, 0, 0], [255, 255, 255], [100, 50, 200]]]], jnp.uint8)
    is_pad = jnp.array([[[False, False, False]]])
    expected = [
        [-0.485 / 0.229, -0.456 / 0.224, -0.406 / 0.225],
        [(1 - 0.485) / 0.229, (1 - 0.456) / 0.224, (1 - 0.406) / 0.225],
        [(100 / 255 - 0.485) / 0.229, (50 / 255 - 0.456) / 0.224, (200 / 255 - 0.406) / 0.225],
    ]
    # A difference of numbers near 0.5, over 0.22, in float32.
    np.testing.assert_allclose(normalize(images, is_pad)[0, 0], expected, rtol=1e-5, atol=1e-6)
    padded = normalize(images, jnp.array([[[False, True, True]]]))[0, 0]
    np.testing.assert_allclose(padded, [expected[0], [0, 0, 0], [0, 0, 0]], rtol=1e-5)


def test_inverse_sigmoid_clamps_both_sides():
    x = jnp.array([0.0, 1e-9, 1e-5, 0.25, 0.5, 1.0, -3.0, 7.0])
    end = np.log(1e-5)
    expected = [end, end, np.log(1e-5 / (1 - 1e-5)), np.log(1 / 3), 0.0, -end, end, -end]
    np.testing.assert_allclose(inverse_sigmoid(x), expected, rtol=1e-6, atol=1e-7)
    middle = jnp.linspace(-5, 5, 11)
    # The logit magnifies float32's rounding of the sigmoid near 1 by e^5.
    np.testing.assert_allclose(inverse_sigmoid(jax.nn.sigmoid(middle)), middle, atol=1e-4)
    gradient = jax.vmap(jax.grad(lambda s: inverse_sigmoid(jax.nn.sigmoid(s))))(jnp.array([-200.0, -50.0, 0.0, 50.0]))
    np.testing.assert_allclose(gradient, [0.0, 0.0, 1.0, 0.0], atol=1e-6)


def test_resize_mask_looks_at_the_nearest_pixel():
    """Cell i of h looks at pixel floor(i H / h)."""
    mask = jnp.arange(7) >= 5
    by_columns = resize_mask(jnp.broadcast_to(mask, (1, 3, 7)), (1, 4))[0, 0]
    np.testing.assert_array_equal(by_columns, [False, False, False, True])  # pixels 0, 1, 3, 5
    by_rows = resize_mask(jnp.broadcast_to(mask[:, None], (1, 7, 3)), (3, 1))[0, :, 0]
    np.testing.assert_array_equal(by_rows, [False, False, False])  # pixels 0, 2, 4


# --- a tiny detector -------------------------------------------------------------------------------------------------

TINY = {
    "backbone": "short",
    "backbone_width": 4,
    "width": 12,
    "num_heads": 3,
    "ffn_width": 13,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "num_queries": 7,
    "num_classes": 5,
    "dropout": 0.0,
}
HEADS = ("class_embed", "bbox_embed")


@pytest.fixture(scope="module", autouse=True)
def short():
    """A backbone with one block per stage."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(resnet.STAGE_SIZES, "short", (1, 1, 1, 1))
        patch.setitem(resnet.BOTTLENECK, "short", False)
        yield


def make_variables(**settings):
    """Random values; the heads as they are initialised."""
    model = DetectionTransformer(**TINY | settings)
    images, sizes = jnp.zeros((1, 64, 96, 3), jnp.uint8), jnp.array([[64, 96]])
    empty = jax.eval_shape(model.init, jax.random.key(0), images, sizes)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda s: jnp.array(rng.normal(scale=0.3, size=s.shape), s.dtype), empty["params"])
    # Only what is returned is compiled.
    heads = jax.jit(lambda key: {name: model.init(key, images, sizes)["params"][name] for name in HEADS})
    params |= heads(jax.random.key(0))
    constants = jax.tree.map(lambda s: jnp.array(rng.uniform(0.5, 1.0, s.shape), s.dtype), empty["constants"])
    return {"params": params, "constants": constants}


@pytest.fixture(scope="module")
def variables():
    return make_variables()


@pytest.fixture(scope="module")
def pictures():
    images = np.random.default_rng(1).integers(0, 256, (3, 64, 96, 3)).astype(np.uint8)
    return images, np.array([[64, 96], [0, 0], [33, 70]], np.int32)  # the second row is padding only


@functools.cache
def runner(**settings):
    return jax.jit(functools.partial(DetectionTransformer(**TINY | settings).apply, train=False))


@pytest.fixture(scope="module")
def predictions(variables, pictures):
    return jax.tree.map(np.asarray, runner()(variables, *pictures))


def test_a_wholly_padded_row_is_finite_and_disturbs_nobody(variables, pictures, predictions):
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(predictions))
    images, sizes = pictures
    other = images.copy()
    other[1] = 255 - other[1]
    same = runner()(variables, other, sizes)
    jax.tree.map(np.testing.assert_array_equal, same, predictions)


def test_initial_boxes_sit_at_the_reference_points(variables, pictures, predictions):
    last = variables["params"]["bbox_embed"]["layers_2"]
    jax.tree.map(lambda x: np.testing.assert_array_equal(x, np.zeros_like(x)), last)
    query_pos = np.asarray(variables["params"]["query_embed"])
    first, second = (variables["params"]["transformer"]["ref_point_head"][f"layers_{i}"] for i in range(2))
    hidden = np.maximum(query_pos @ np.asarray(first["kernel"]) + np.asarray(first["bias"]), 0)
    points = 1 / (1 + np.exp(-(hidden @ np.asarray(second["kernel"]) + np.asarray(second["bias"]))))
    assert len(np.unique(points.round(3))) > 7
    boxes = predictions.boxes_cxcywh
    assert boxes.shape == (2, 3, 7, 4)
    # sigmoid of the logit of a sigmoid, in float32.
    np.testing.assert_allclose(boxes[..., :2], np.broadcast_to(points, (2, 3, 7, 2)), atol=1e-6)
    np.testing.assert_array_equal(boxes[..., 2:], np.full((2, 3, 7, 2), 0.5))


def test_initial_class_scores_are_one_percent(variables, predictions):
    head = variables["params"]["class_embed"]
    np.testing.assert_allclose(jax.nn.sigmoid(head["bias"]), np.full(5, 0.01), rtol=1e-5)
    # Uniform within 1/sqrt(fan_in), as PyTorch's linear layers are: some of 60 draws come near the bound.
    kernel = np.abs(head["kernel"])
    assert 0.9 * 12**-0.5 < kernel.max() <= 12**-0.5
    scores = 1 / (1 + np.exp(-predictions.logits))
    assert 0.003 < np.median(scores) < 0.03


def test_class_logits_per_loss():
    assert shapes(**TINY)["params"]["class_embed"]["kernel"].shape == (12, 5)
    softmax = shapes(**TINY | {"class_loss": "softmax"})["params"]["class_embed"]
    assert softmax["kernel"].shape == (12, 6)  # and "no object"


def test_without_box_offset_boxes_start_in_the_middle(pictures):
    settings = {"decoder": "detr", "class_loss": "softmax", "box_offset": False}
    predictions = runner(**settings)(make_variables(**settings), *pictures)
    np.testing.assert_array_equal(predictions.boxes_cxcywh, np.full((2, 3, 7, 4), 0.5))


def test_bfloat16_keeps_parameters_and_outputs_float32(variables, pictures, predictions):
    settings = {"dtype": jnp.bfloat16}
    low_shapes = shapes(**TINY | settings)
    assert {leaf.dtype for leaf in jax.tree.leaves(low_shapes)} == {jnp.dtype(jnp.float32)}
    # The box head as it starts would give constant boxes.
    rng, head = np.random.default_rng(3), variables["params"]["bbox_embed"]
    last = {k: jnp.array(rng.normal(scale=0.3, size=x.shape), jnp.float32) for k, x in head["layers_2"].items()}
    trained = jax.tree.map(lambda x: x, variables)
    trained["params"]["bbox_embed"]["layers_2"] = last
    full, low = runner()(trained, *pictures), runner(**settings)(trained, *pictures)
    for name in ("logits", "boxes_cxcywh"):
        low_value, value = np.asarray(getattr(low, name)), np.asarray(getattr(full, name))
        assert low_value.dtype == np.float32
        # bfloat16 keeps 8 bits (2^-9 of rounding) and some thirty layers add up their errors: a few percent of the
        # spread of the values.
        error = np.abs(low_value - value)[:, [0, 2]]
        spread = value[:, [0, 2]].std()
        assert 0 < error.mean() < 0.05 * spread


def test_constants_are_published():
    assert detector.MEAN_RGB == (0.485, 0.456, 0.406)
    assert detector.STD_RGB == (0.229, 0.224, 0.225)
