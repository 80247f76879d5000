"""The transformer: literal NumPy layers, every published form, and what must not change its results."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from cdetr_jax.models import position
from cdetr_jax.models.detector import DetectionTransformer
from cdetr_jax.models.transformer import (
    REFERENCE_POINTS,
    SPATIAL_QUERIES,
    TRANSFORMATIONS,
    ConditionalDecoderLayer,
    DetrDecoderLayer,
    EncoderLayer,
    SpatialQuery,
    Transformer,
)

D, N, F, Q, H, W = 12, 3, 13, 5, 2, 7
S = H * W
HEAD = D // N
PUBLISHED = {
    field.name: field.default
    for field in dataclasses.fields(DetectionTransformer)
    if field.name in Transformer.__dataclass_fields__ and field.name not in ("parent", "name")
}
SIZES = {"width": D, "num_heads": N, "ffn_width": F, "dropout": 0.0}
# Layer norm keeps everything at size 1; float32 sums of some dozen terms in another order.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def numbers(tree, seed=0):
    """Random values in the tree's shapes, the scales of norms around 1: 0.3 keeps attention away from one-hot."""
    rng = np.random.default_rng(seed)

    def value(path, s):
        return jnp.array(rng.normal(float(path[-1].key == "scale"), 0.3, s.shape), s.dtype)

    return jax.tree_util.tree_map_with_path(value, tree)


def make(**settings):
    return Transformer(**{**PUBLISHED, "encoder_layers": 1, "decoder_layers": 2, **SIZES, **settings})


def inputs(sizes=((H, W), (1, 4), (2, 3)), shape=(H, W), seed=1):
    """Features, positions, padding and object queries; a picture's features do not depend on the padding."""
    rng = np.random.default_rng(seed)
    features = np.zeros((len(sizes), *shape, D), np.float32)
    is_pad = np.ones((len(sizes), *shape), bool)
    for i, (h, w) in enumerate(sizes):
        features[i, :h, :w] = rng.normal(size=(h, w, D))
        is_pad[i, :h, :w] = False
    pos = position.grid_embedding(jnp.array(is_pad), D)
    flat = [jnp.asarray(x).reshape(len(sizes), shape[0] * shape[1], *x.shape[3:]) for x in (features, pos, is_pad)]
    query_pos = jnp.array(np.random.default_rng(2).normal(size=(Q, D)), jnp.float32)
    return (*flat, query_pos, False)


def parameters(model, args):
    """Random ones of a module that is called with `args`; no initialiser is compiled."""
    return numbers(jax.eval_shape(lambda rng: model.init(rng, *args)["params"], jax.random.key(0)))


# --- literal NumPy ---------------------------------------------------------------------------------------------------


def linear(p, x):
    return x @ np.asarray(p["kernel"], np.float64) + np.asarray(p["bias"], np.float64)


def norm(p, x):
    centred = x - x.mean(-1, keepdims=True)
    scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
    return scaled * np.asarray(p["scale"], np.float64) + np.asarray(p["bias"], np.float64)


def softmax(x):
    x = np.exp(x - x.max())
    return x / x.sum()


def attention(scores, v, is_pad):
    """`scores` [N, Q, S]; v [S, D]. Returns each head's weighted values side by side."""
    out = np.zeros((scores.shape[1], D))
    for head, q in np.ndindex(scores.shape[:2]):
        weights = np.zeros(scores.shape[2])
        weights[~is_pad] = softmax(scores[head, q, ~is_pad])
        part = slice(head * HEAD, (head + 1) * HEAD)
        out[q, part] = weights @ v[:, part]
    return out


def dots(q, k):
    """Per head, the dot product of every query with every key."""
    return np.array([[[q[i, h] @ k[j, h] for j in range(len(k))] for i in range(len(q))] for h in map(part, range(N))])


def part(head):
    return slice(head * HEAD, (head + 1) * HEAD)


def feed_forward(p, x):
    return linear(p["linear2"], np.maximum(linear(p["linear1"], x), 0))


def literal_encoder(p, x, pos, is_pad):
    a = p["self_attn"]
    scores = dots(linear(a["q_proj"], x + pos), linear(a["k_proj"], x + pos)) / np.sqrt(HEAD)
    y = linear(a["out_proj"], attention(scores, linear(a["v_proj"], x), is_pad))
    x = norm(p["norm1"], x + y)
    return norm(p["norm2"], x + feed_forward(p, x))


def literal_detr(p, x, memory, pos, is_pad, query_pos):
    a, nothing = p["self_attn"], np.zeros(len(x), bool)
    scores = dots(linear(a["q_proj"], x + query_pos), linear(a["k_proj"], x + query_pos)) / np.sqrt(HEAD)
    x = norm(p["norm1"], x + linear(a["out_proj"], attention(scores, linear(a["v_proj"], x), nothing)))
    a = p["multihead_attn"]
    scores = dots(linear(a["q_proj"], x + query_pos), linear(a["k_proj"], memory + pos)) / np.sqrt(HEAD)
    x = norm(p["norm2"], x + linear(a["out_proj"], attention(scores, linear(a["v_proj"], memory), is_pad)))
    return norm(p["norm3"], x + feed_forward(p, x))


def literal_conditional(p, x, memory, pos, is_pad, query_pos, spatial_query, is_first):
    q = linear(p["sa_qcontent_proj"], x) + linear(p["sa_qpos_proj"], query_pos)
    k = linear(p["sa_kcontent_proj"], x) + linear(p["sa_kpos_proj"], query_pos)
    scores = dots(q, k) / np.sqrt(HEAD)
    y = attention(scores, linear(p["sa_v_proj"], x), np.zeros(len(x), bool))
    content = norm(p["norm1"], x + linear(p["self_attn"]["out_proj"], y))

    c_q, c_k = linear(p["ca_qcontent_proj"], content), linear(p["ca_kcontent_proj"], memory)
    p_q, p_k = linear(p["ca_qpos_sine_proj"], spatial_query), linear(p["ca_kpos_proj"], pos)
    if is_first:
        c_q, c_k = c_q + linear(p["ca_qpos_proj"], query_pos), c_k + p_k
    scores = (dots(c_q, c_k) + dots(p_q, p_k)) / np.sqrt(2 * HEAD)  # equation (3)
    y = attention(scores, linear(p["ca_v_proj"], memory), is_pad)
    x = norm(p["norm2"], content + linear(p["cross_attn"]["out_proj"], y))
    return norm(p["norm3"], x + feed_forward(p, x))


LAYER = {**SIZES, "dtype": jnp.float32}


def layer_inputs():
    features, pos, is_pad, query_pos, _ = inputs()
    rng = np.random.default_rng(3)
    batch = len(features)
    x = jnp.array(rng.normal(size=(batch, Q, D)), jnp.float32)
    spatial = jnp.array(rng.normal(size=(batch, Q, D)), jnp.float32)
    kwargs = {
        "memory": features,
        "pos": pos,
        "is_pad": is_pad,
        "query_pos": jnp.broadcast_to(query_pos, x.shape),
        "spatial_query": lambda f, c_q: spatial,
        "train": False,
    }
    return x, spatial, kwargs


def test_encoder_layer_is_the_literal_one():
    features, pos, is_pad, _, _ = inputs()
    layer = EncoderLayer(**LAYER)
    params = parameters(layer, (features, pos, is_pad, False))
    actual = layer.apply({"params": params}, features, pos, is_pad, False)
    for i in range(len(features)):
        expected = literal_encoder(params, *(np.asarray(x[i]) for x in (features, pos, is_pad)))
        np.testing.assert_allclose(actual[i], expected, **CLOSE)


def apply_layer(layer, x, kwargs):
    params = numbers(jax.eval_shape(lambda rng: layer.init(rng, x, **kwargs), jax.random.key(0))["params"])
    return params, np.asarray(layer.apply({"params": params}, x, **kwargs))


@pytest.mark.parametrize("is_first", [True, False])
def test_the_conditional_score_is_content_plus_position(is_first):
    """Equation (3), and all of the layer around it."""
    x, spatial, kwargs = layer_inputs()
    params, actual = apply_layer(ConditionalDecoderLayer(**LAYER, is_first=is_first), x, kwargs)
    assert ("ca_qpos_proj" in params) == is_first
    for i in range(len(x)):
        memory, pos, is_pad, query_pos = (np.asarray(kwargs[k][i]) for k in ("memory", "pos", "is_pad", "query_pos"))
        expected = literal_conditional(
            params, np.asarray(x[i]), memory, pos, is_pad, query_pos, np.asarray(spatial[i]), is_first
        )
        np.testing.assert_allclose(actual[i], expected, **CLOSE)


def test_detr_decoder_layer_is_the_literal_one():
    x, _, kwargs = layer_inputs()
    params, actual = apply_layer(DetrDecoderLayer(**LAYER), x, kwargs)
    for i in range(len(x)):
        memory, pos, is_pad, query_pos = (np.asarray(kwargs[k][i]) for k in ("memory", "pos", "is_pad", "query_pos"))
        expected = literal_detr(params, np.asarray(x[i]), memory, pos, is_pad, query_pos)
        np.testing.assert_allclose(actual[i], expected, **CLOSE)


# --- spatial queries -------------------------------------------------------------------------------------------------

# Outputs of the FFN that predicts T.
OUTPUTS = {"scalar": 1, "diagonal": D, "block": D * HEAD, "full": D * D}


def literal_t(params, source, transformation):
    """The matrix T of each query, equation (6), from its FFN."""
    t = linear(params["layers_1"], np.maximum(linear(params["layers_0"], source), 0))
    if transformation == "scalar":
        return t * np.eye(D)
    if transformation == "diagonal":
        return np.diag(t)
    if transformation == "full":
        return t.reshape(D, D)
    matrix = np.zeros((D, D))
    for head in range(N):
        matrix[part(head), part(head)] = t.reshape(N, HEAD, HEAD)[head]
    return matrix


def spatial_inputs():
    rng = np.random.default_rng(5)
    f, c_q = (jnp.array(rng.normal(size=(2, Q, D)), jnp.float32) for _ in range(2))
    return f, c_q, jnp.array(rng.normal(size=(Q, D)), jnp.float32)


@pytest.mark.parametrize(
    ("form", "transformation"),
    [
        *itertools.product(("full", "i"), TRANSFORMATIONS),
        ("t", "diagonal"),
        ("t", "scalar"),
        ("c", "diagonal"),
        ("p", "diagonal"),
    ],
)
def test_spatial_query_is_the_literal_transformation(form, transformation):
    module = SpatialQuery(form, transformation, D, N, False, jnp.float32)
    f, c_q, p_s = spatial_inputs()
    params = numbers(jax.eval_shape(lambda k: module.init(k, f, c_q, p_s, False), jax.random.key(0)).get("params", {}))
    p_q = np.asarray(module.apply({"params": params}, f, c_q, p_s, False))
    first = np.asarray(module.apply({"params": params}, f, c_q, p_s, True))
    has_ffn = form in ("full", "i", "t") and transformation != "identity"
    assert set(params) == ({"layers_0", "layers_1"} if has_ffn else set())
    if has_ffn:
        assert params["layers_1"]["kernel"].shape == (D, OUTPUTS[transformation])
    assert p_q.shape == f.shape
    for b, q in np.ndindex(2, Q):
        point, embedding = np.asarray(p_s[q]), np.asarray(f[b, q])
        if form == "c":
            expected = expected_first = embedding
        elif not has_ffn:
            expected = expected_first = point
        else:
            t = literal_t(params, np.asarray(c_q[b, q]) if form == "i" else embedding, transformation)
            # CSQ-T is lambda_q alone, which is what diagonal T does to ones.
            expected = t @ (np.ones(D) if form == "t" else point)
            expected_first = np.ones(D) if form == "t" else point
        np.testing.assert_allclose(p_q[b, q], expected, **CLOSE)
        np.testing.assert_array_equal(first[b, q], np.asarray(expected_first, np.float32))


# --- the whole transformer -------------------------------------------------------------------------------------------


def linear_count(inputs, outputs):
    return inputs * outputs + outputs


def literal_counts(reference_point, spatial_query, transformation):
    """What each submodule of a conditional transformer with two decoder layers and no encoder holds."""
    square, norm, ffn = linear_count(D, D), 2 * D, linear_count(D, F) + linear_count(F, D)
    # Self-attention: content and position for q and k, v, output. Cross-attention: content for q and k, k's
    # position, the spatial query's projection, v, output.
    decoder = 6 * square + 6 * square + ffn + 3 * norm
    counts = {
        "decoder_layers_0": decoder + square,  # the object query's projection
        "decoder_layers_1": decoder,
        "decoder_norm": norm,
    }
    if reference_point != "zero":
        counts["ref_point_head"] = 2 * Q if reference_point == "learned" else square + linear_count(D, 2)
    if spatial_query in ("full", "i", "t") and transformation != "identity":
        counts["query_scale"] = square + linear_count(D, OUTPUTS[transformation])
    return counts


FORMS = [
    *((point, "full", "diagonal") for point in REFERENCE_POINTS),
    *(("predicted", query, "diagonal") for query in SPATIAL_QUERIES if query != "full"),
    *(("predicted", "full", t) for t in TRANSFORMATIONS if t != "diagonal"),
]


@pytest.mark.parametrize(("reference_point", "spatial_query", "transformation"), FORMS)
def test_every_form_has_its_parameters_and_finite_gradients(reference_point, spatial_query, transformation):
    model = make(
        encoder_layers=0, reference_point=reference_point, spatial_query=spatial_query, transformation=transformation
    )
    args = inputs()
    params = parameters(model, args)
    held = {name: sum(leaf.size for leaf in jax.tree.leaves(tree)) for name, tree in params.items()}
    assert held == literal_counts(reference_point, spatial_query, transformation)

    def total(params):
        memory, outputs, points = model.apply({"params": params}, *args)
        return (outputs**3).sum() + (points**2).sum(), (memory, outputs, points)

    # Eager: the forms share nearly all of their operations, which compile once.
    grads, (memory, outputs, points) = jax.grad(total, has_aux=True)(params)
    assert memory.shape == (3, S, D)
    assert outputs.shape == (2, 3, Q, D)
    assert all(np.isfinite(x).all() for x in (memory, outputs, points))
    for path, grad in traverse_util.flatten_dict(grads, sep="/").items():
        assert np.isfinite(grad).all(), path
    moving = [name for name in ("ref_point_head", "query_scale") if name in grads]
    for leaf in jax.tree.leaves([grads[name] for name in moving]):
        assert np.abs(leaf).max() > 0
    if reference_point == "zero":
        np.testing.assert_array_equal(points, np.zeros((Q, 2)))
    if reference_point == "learned":
        np.testing.assert_array_equal(points, params["ref_point_head"]["points"])


def test_detr_has_neither_reference_points_nor_spatial_queries_of_its_own():
    args = inputs()
    plain = parameters(make(decoder="detr", box_offset=False), args)
    assert set(plain) == {"encoder_layers_0", "decoder_layers_0", "decoder_layers_1", "decoder_norm"}
    square, norm, ffn = linear_count(D, D), 2 * D, linear_count(D, F) + linear_count(F, D)
    sizes = {name: sum(leaf.size for leaf in jax.tree.leaves(tree)) for name, tree in plain.items()}
    assert sizes["encoder_layers_0"] == 4 * square + ffn + 2 * norm
    assert sizes["decoder_layers_0"] == sizes["decoder_layers_1"] == 8 * square + ffn + 3 * norm
    assert set(parameters(make(decoder="detr", box_offset=True), args)) == {*plain, "ref_point_head"}


@pytest.fixture(scope="module", params=["conditional", "detr"])
def decoder(request):
    """A transformer, its parameters, and the function that runs it, compiled."""
    model = make(decoder=request.param)
    params = parameters(model, inputs())
    return model, params, jax.jit(lambda *args: model.apply({"params": params}, *args, False))


def test_jit_equals_eager(decoder):
    model, params, run = decoder
    args = inputs()
    for actual, expected in zip(run(*args[:-1]), model.apply({"params": params}, *args), strict=True):
        np.testing.assert_allclose(actual, expected, **CLOSE)


def test_padding_changes_nothing(decoder):
    _, _, run = decoder
    memory, outputs, points = run(*inputs()[:-1])
    padded_memory, padded_outputs, padded_points = run(*inputs(shape=(H + 1, W + 4))[:-1])
    grid, padded_grid = memory.reshape(-1, H, W, D), padded_memory.reshape(-1, H + 1, W + 4, D)
    for i, (h, w) in enumerate([(H, W), (1, 4), (2, 3)]):
        np.testing.assert_allclose(padded_grid[i, :h, :w], grid[i, :h, :w], **CLOSE)
    np.testing.assert_allclose(padded_outputs, outputs, **CLOSE)
    np.testing.assert_array_equal(padded_points, points)


def test_contents_of_the_padding_change_nothing(decoder):
    _, _, run = decoder
    features, pos, is_pad, query_pos, _ = inputs()
    _, outputs, _ = run(features, pos, is_pad, query_pos)
    noise = jnp.array(np.random.default_rng(7).normal(scale=100.0, size=features.shape), jnp.float32)
    _, actual, _ = run(jnp.where(is_pad[..., None], noise, features), pos, is_pad, query_pos)
    np.testing.assert_allclose(actual, outputs, **CLOSE)


def test_permuted_queries_permute_outputs(decoder):
    _, _, run = decoder
    features, pos, is_pad, query_pos, _ = inputs()
    memory, outputs, points = run(features, pos, is_pad, query_pos)
    order = np.array([3, 0, 4, 2, 1])
    same_memory, permuted, permuted_points = run(features, pos, is_pad, query_pos[order])
    np.testing.assert_array_equal(same_memory, memory)
    np.testing.assert_allclose(permuted, outputs[:, :, order], **CLOSE)
    np.testing.assert_allclose(permuted_points, points[order], **CLOSE)
    assert np.abs(permuted - outputs).max() > 1e-2


def test_a_picture_does_not_depend_on_its_neighbours(decoder):
    _, _, run = decoder
    features, pos, is_pad, query_pos, _ = inputs()
    memory, outputs, _ = run(features, pos, is_pad, query_pos)
    order = np.array([2, 2, 0])  # other neighbours in other places
    other_memory, other_outputs, _ = run(features[order], pos[order], is_pad[order], query_pos)
    np.testing.assert_allclose(other_memory, memory[order], **CLOSE)
    np.testing.assert_allclose(other_outputs, outputs[:, order], **CLOSE)


def test_a_picture_that_is_all_padding_is_finite(decoder):
    _, _, run = decoder
    features, pos, is_pad, query_pos, _ = inputs()
    run_memory, run_outputs, _ = run(features, pos, is_pad.at[1].set(True), query_pos)
    _, outputs, _ = run(features, pos, is_pad, query_pos)
    assert np.isfinite(run_memory).all()
    assert np.isfinite(run_outputs).all()
    np.testing.assert_allclose(run_outputs[:, [0, 2]], outputs[:, [0, 2]], **CLOSE)


def test_bfloat16_keeps_parameters_and_reference_points_float32():
    """How close its results are, tests/models/test_detector.py asks."""
    args = inputs()
    model = make(dtype=jnp.bfloat16)
    (_, outputs, points), variables = jax.eval_shape(lambda rng: model.init_with_output(rng, *args), jax.random.key(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype(jnp.float32)}
    assert (outputs.dtype, points.dtype) == (jnp.bfloat16, jnp.float32)


def test_dropout_needs_train_and_changes_results():
    x, _, kwargs = layer_inputs()
    layer = ConditionalDecoderLayer(**LAYER | {"dropout": 0.5})
    params, still = apply_layer(layer, x, kwargs)
    _, without = apply_layer(ConditionalDecoderLayer(**LAYER), x, kwargs)
    np.testing.assert_array_equal(still, without)
    runs = [
        layer.apply(
            {"params": params}, x, **kwargs | {"train": True}, rngs={"dropout": jax.random.key(seed, impl="rbg")}
        )
        for seed in (0, 0, 1)
    ]
    np.testing.assert_array_equal(runs[0], runs[1])
    assert np.abs(runs[0] - runs[2]).max() > 0.1
    assert np.abs(runs[0] - still).max() > 0.1


def test_local_gain_starts_attention_at_the_reference_points():
    """Both position projections start as the same rotation, T as the identity: p_q.p_k is gain^2 p_s.p_k."""
    model = make(encoder_layers=0, width=16, num_heads=2, ffn_width=8, temperature=20.0, local_gain=3.0)
    features, pos = jnp.zeros((1, 5, 16)), jnp.zeros((1, 5, 16))
    params = model.init(jax.random.key(0, impl="rbg"), features, pos, jnp.zeros((1, 5), bool), jnp.ones((3, 16)), False)
    params = jax.tree.map(np.asarray, params["params"])
    for layer in ("decoder_layers_0", "decoder_layers_1"):
        queries = params[layer]["ca_qpos_sine_proj"]["kernel"]
        keys = params[layer]["ca_kpos_proj"]["kernel"]
        # A rotation in float32: orthogonal to a few units in the last place.
        np.testing.assert_allclose(queries @ keys.T, 9.0 * np.eye(16), atol=1e-5)
    np.testing.assert_array_equal(params["query_scale"]["layers_1"]["kernel"], 0.0)
    np.testing.assert_array_equal(params["query_scale"]["layers_1"]["bias"], 1.0)
