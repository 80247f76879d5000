"""Attention maps against plain NumPy and the forward pass's own outputs, and where they lie at a box, by hand."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cdetr_jax.evaluation.attention_maps import (
    REGIONS,
    attending,
    attention_maps,
    cell_sides,
    centre_of_mass,
    region_shares,
)
from cdetr_jax.models import detector
from cdetr_jax.models.attention import Attend, Linear
from cdetr_jax.models.detector import DetectionTransformer

B, N, D, Q = 2, 2, 16, 5
SMALL = {
    "width": D,
    "num_heads": N,
    "ffn_width": 12,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "num_queries": Q,
    "num_classes": 3,
}
DETR = {"decoder": "detr", "class_loss": "softmax", "box_offset": False}
SIZES = np.array([[64, 96], [30, 62]], np.int32)
IMAGES = np.random.default_rng(0).integers(0, 256, (B, 64, 96, 3), np.uint8)
QUERIES = np.array([[3, 0], [1, 4]])
CLOSE = {"rtol": 1e-5, "atol": 1e-6}  # sums of some dozen float32 in another order


class Patches(nn.Module):
    """In the backbone's place: the means of 32 x 32 pixels."""

    @nn.compact
    def __call__(self, images):
        return images.reshape(len(images), 2, 32, 3, 32, 3).mean((2, 4))


@pytest.fixture(scope="module", autouse=True)
def no_backbone():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(detector, "ResNet", lambda *_, name: Patches(name=name))
        yield


def made(**settings):
    """A small detector and random variables; 0.3 keeps attention away from one-hot."""
    model = DetectionTransformer(**SMALL | settings)
    shapes = jax.eval_shape(model.init, jax.random.key(0), IMAGES, SIZES)
    rng = np.random.default_rng(1)
    return model, jax.tree.map(lambda s: rng.normal(0, 0.3, s.shape).astype(np.float32), shapes)


CONDITIONAL = {"norm_between_layers": True, "spatial_query": "i"}


@pytest.fixture(scope="module", params=[CONDITIONAL, DETR], ids=["conditional", "detr"])
def case(request):
    """Variables, maps of both sides, and every linear layer's output, by its path."""
    model, variables = made(**request.param)

    apply = DetectionTransformer.apply
    outputs = []

    def apply_and_keep(self, *arguments, **settings):
        result = apply(self, *arguments, **settings, capture_intermediates=lambda m, _: isinstance(m, Linear | Attend))
        outputs[:] = [result[1]["intermediates"]["transformer"]]
        return result

    def run(variables):
        stages, attends = attending(model, variables, IMAGES, SIZES)
        return stages, {side: attention_maps(model, each, QUERIES) for side, each in attends.items()}, *outputs

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DetectionTransformer, "apply", apply_and_keep)
        stages, maps, outputs = jax.tree.map(np.asarray, jax.jit(run)(variables))
    assert np.isfinite(stages.predictions.logits).all()
    return model, variables["params"]["transformer"], stages, maps, outputs


def output(outputs, *path):
    for name in path:
        outputs = outputs[name]
    return outputs["__call__"][0]


def softmax(dots, is_pad):
    """dots [B n N S]."""
    dots = np.where(is_pad.reshape(B, 1, 1, -1), -np.inf, dots)
    weights = np.exp(dots - dots.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def heads(x):
    return x.astype(np.float64).reshape(B, -1, N, D // N)


def dots(q, k):
    chosen = np.stack([q[i, QUERIES[i]] for i in range(B)])
    return np.einsum("bqnd,bsnd->bqns", chosen, k)


def test_maps_are_softmaxes_of_both_parts_and_of_their_sum(case):
    model, params, stages, maps, outputs = case
    for i in range(2):
        layer = f"decoder_layers_{i}"
        if model.decoder == "conditional":
            q, k, p_q, p_k = (
                heads(output(outputs, layer, f"ca_{name}_proj"))
                for name in ("qcontent", "kcontent", "qpos_sine", "kpos")
            )
            if i == 0:  # the contents have their positions added
                q, k = q + heads(output(outputs, layer, "ca_qpos_proj")), k + p_k
            parts = dots(p_q, p_k), dots(q, k)
            scale = (2 * D // N) ** -0.5
        else:
            q, p = heads(output(outputs, layer, "multihead_attn", "q_proj")), params[layer]["multihead_attn"]["k_proj"]
            p_k = heads(stages.pos.reshape(B, -1, D) @ p["kernel"])
            parts = dots(q, p_k), dots(q, heads(stages.memory @ p["kernel"] + p["bias"]))
            scale = (D // N) ** -0.5
        for part, expected in enumerate((*parts, sum(parts))):
            found = maps["decoder"][:, part, i]
            np.testing.assert_allclose(found.reshape(B, 2, N, -1), softmax(scale * expected, stages.is_pad), **CLOSE)


def test_the_combined_map_is_what_the_forward_pass_attends_with(case):
    """The values that it weighs give the attention's own output."""
    model, params, _, maps, outputs = case
    names = {"decoder": ("cross_attn", "ca_v_proj") if model.decoder == "conditional" else ("multihead_attn", None)}
    for side, layer in (("decoder", 0), ("decoder", 1), ("encoder", 0)):
        name, v = names.get(side, ("self_attn", None))
        of_layer, layer_params = outputs[f"{side}_layers_{layer}"], params[f"{side}_layers_{layer}"]
        v = output(of_layer, v) if v else output(of_layer, name, "v_proj")
        out_proj = layer_params[name]["out_proj"]
        weights = maps[side][:, 2, layer].reshape(B, 2, N, -1)
        weighted = np.einsum("bqns,bsne->bqne", weights, heads(v)).reshape(B, 2, D)
        expected = np.stack([output(of_layer, name)[i, QUERIES[i]] for i in range(B)])
        np.testing.assert_allclose(weighted @ out_proj["kernel"] + out_proj["bias"], expected, **CLOSE)


def test_maps_add_up_to_one_and_leave_the_padding_out(case):
    _, _, stages, maps, _ = case
    assert stages.is_pad.any()
    for each in maps.values():
        np.testing.assert_allclose(each.sum((-1, -2)), 1, rtol=1e-6)
        assert not np.moveaxis(each, 0, -3)[..., stages.is_pad].any()


def test_who_does_not_ask_gets_the_same_program(monkeypatch):
    model, variables = made()

    def program():
        return jax.jit(lambda v: model.apply(v, IMAGES, SIZES)).lower(variables).as_text()

    assert set(variables) == {"params"}
    with_sow = program()
    monkeypatch.setattr(Attend, "sow", lambda *_: None)
    assert program() == with_sow


# ------------------------------------------------------------------------------------------------ where it lies


def test_cells_stand_for_what_is_around_their_middles():
    start, end = cell_sides(5, jnp.array(3.25))
    np.testing.assert_allclose(start[:4], [0, 0.5, 1.5, 2.5])
    np.testing.assert_allclose(end[:4], [0.5, 1.5, 2.5, 3.25])


shares_of = jax.jit(region_shares)


def one_hot(y, x):
    maps = np.zeros((7, 11), np.float32)
    maps[y, x] = 1
    return maps


# A box from 2 to 6 and from 1 to 5: the bands reach 1 to either side, its middle is 3 to 5 and 2 to 4.
EXPECTED = {
    (3, 2): {"left": 1, "box": 0.5},
    (3, 6): {"right": 1, "box": 0.5},
    (1, 4): {"top": 1, "box": 0.5},
    (5, 4): {"bottom": 1, "box": 0.5},
    (3, 4): {"middle": 1, "box": 1},
    (3, 3): {"left": 0.5, "middle": 0.5, "box": 1},
    (1, 2): {"left": 0.5, "top": 0.5, "box": 0.25},  # a corner belongs to both
    (6, 10): {},
}


def test_shares_of_single_cells():
    maps = jnp.array([one_hot(*cell) for cell in EXPECTED])
    boxes = jnp.broadcast_to(jnp.array([2.0, 1, 6, 5]), (len(maps), 4))
    for shares, expected in zip(shares_of(maps, boxes, jnp.array([7.0, 11])), EXPECTED.values(), strict=True):
        found = dict(zip((*REGIONS, "box"), shares.tolist(), strict=True))
        assert found == pytest.approx(dict.fromkeys(found, 0) | expected)


def test_a_box_that_is_the_picture_holds_everything():
    rng = np.random.default_rng(0)
    maps = np.zeros((2, 3, 7, 11), np.float32)
    maps[..., :5, :8] = rng.dirichlet(np.ones(40), (2, 3)).reshape(2, 3, 5, 8)
    box = jnp.broadcast_to(jnp.array([0, 0, 7.25, 4.5]), (2, 3, 4))
    shares = shares_of(jnp.array(maps), box, jnp.array([4.5, 7.25]))
    np.testing.assert_allclose(shares[..., -1], 1, rtol=1e-6)
    assert shares.shape == (2, 3, len(REGIONS) + 1)


def test_the_centre_of_mass_is_x_and_y_of_cells():
    maps = 0.25 * one_hot(1, 4) + 0.75 * one_hot(5, 8)
    np.testing.assert_allclose(centre_of_mass(jnp.array(maps)), [7, 4])
