"""`attend` against the same formula differentiated by JAX, and what it keeps for the backward pass."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cdetr_jax.models import fused_attention
from cdetr_jax.models.attention import Linear, attend
from cdetr_jax.models.elementwise import is_kept, new_seed

B, Q, S, N, D, E = 2, 5, 7, 3, 8, 4
DROPOUT = 0.25
IS_PAD = jnp.arange(S)[None] >= jnp.array([[S], [4]])


def inputs(dtype, queries=Q, keys=S, widths=(D, E)):
    rng = np.random.default_rng(0)
    shapes = (queries, N, widths[0]), (keys, N, widths[0]), (keys, N, widths[1])
    return [jnp.array(rng.normal(size=(B, *shape)), dtype) for shape in shapes]


def plain(q, k, v, is_pad, rng):
    """Left to JAX to differentiate."""
    scores = jnp.einsum("bqnd,bsnd->bnqs", q, k) / D**0.5
    if is_pad is not None:
        scores = jnp.where(is_pad[:, None, None, :], -jnp.inf, scores)
    weights = jax.nn.softmax(scores, axis=-1)
    if rng is not None:
        weights = jnp.where(is_kept(new_seed(rng, DROPOUT), weights.shape, DROPOUT), weights / (1 - DROPOUT), 0)
    return jnp.einsum("bnqs,bsne->bqne", weights, v)


@pytest.mark.parametrize("is_pad", [None, IS_PAD], ids=["whole", "padded"])
@pytest.mark.parametrize("seed", [None, 1], ids=["no_dropout", "dropout"])
def test_values_and_gradients(is_pad, seed):
    with jax.enable_x64(True):
        rng = None if seed is None else jax.random.key(seed, impl="rbg")
        arguments = inputs(jnp.float64)
        value, pullback = jax.vjp(lambda q, k, v: attend(q, k, v, is_pad, DROPOUT, rng), *arguments)
        expected, expected_pullback = jax.vjp(lambda q, k, v: plain(q, k, v, is_pad, rng), *arguments)
        assert value.dtype == jnp.float64
        ct = jnp.array(np.random.default_rng(1).normal(size=value.shape))
        for actual, wanted in zip((value, *pullback(ct)), (expected, *expected_pullback(ct)), strict=True):
            np.testing.assert_allclose(actual, wanted, rtol=1e-12, atol=1e-13)


@pytest.fixture
def kernels(monkeypatch):
    """Those of the fused attention, without a device for them as plain JAX."""
    if jax.default_backend() == "cpu":
        monkeypatch.setattr(fused_attention, "PLATFORMS", ("cpu",))


@pytest.mark.parametrize("is_exact", [True, False], ids=["exact", "bfloat16"])
@pytest.mark.parametrize(
    ("padded", "seed", "widths"),
    [(0, None, (24, 32)), (50, 1, (72, 36)), (150, 1, (4, 4))],  # in blocks of 64, 32 and 64
    ids=["whole", "padded_dropout", "all_padding_dropout"],
)
def test_fused_attention_is_the_same(kernels, padded, seed, widths, is_exact):
    """On an accelerator: make test-kernels."""
    is_pad = jnp.arange(150)[None] >= jnp.array([[150], [150 - padded]]) if padded else None
    exact, bound = (jnp.float64, 1e-13) if jax.default_backend() == "cpu" else (jnp.float32, 1e-5)
    # The einsums round the weights and their cotangents to bfloat16, 0.004; the kernels sum in float32.
    dtype, bound = (exact, bound) if is_exact else (jnp.bfloat16, 0.01)
    with jax.enable_x64(dtype == jnp.float64), jax.default_matmul_precision("highest"):
        rng = None if seed is None else jax.random.key(seed, impl="rbg")
        arguments = inputs(dtype, queries=70, keys=150, widths=widths)
        results = []
        for form in ("einsum", "fused"):

            @jax.jit
            def run(ct, *arguments, form=form):
                value, pullback = jax.vjp(lambda q, k, v: attend(q, k, v, is_pad, DROPOUT, rng, form), *arguments)
                return value, *pullback(ct)

            ct = jnp.array(np.random.default_rng(1).normal(size=(B, 70, N, widths[1])), dtype)
            results.append(run(ct, *arguments))
        for expected, actual in zip(*results, strict=True):
            assert actual.dtype == dtype
            error = np.asarray(actual, np.float64) - np.asarray(expected, np.float64)
            assert np.linalg.norm(error) <= bound * np.linalg.norm(np.asarray(expected, np.float64))


def test_fused_attention_is_made_of_kernels_where_there_are_some():
    def gradients(*arguments):
        value, pullback = jax.vjp(lambda q, k, v: attend(q, k, v, IS_PAD, form="fused"), *arguments)
        return pullback(value)

    program = jax.jit(gradients).trace(*inputs(jnp.float32))
    assert str(program.jaxpr).count("pallas_call[") == 3 * len(fused_attention.PLATFORMS)
    assert program.lower(lowering_platforms=("tpu",)).as_text().count("tpu_custom_call") == 3
    assert "custom_call" not in program.lower(lowering_platforms=("cpu",)).as_text()


def test_a_picture_that_is_all_padding_looks_at_everything_alike():
    q, k, v = inputs(jnp.float32)
    value, pullback = jax.vjp(lambda q, k, v: attend(q, k, v, jnp.ones((B, S), bool)), q, k, v)
    np.testing.assert_allclose(value, np.broadcast_to(v.mean(1, keepdims=True), value.shape), rtol=1e-5, atol=1e-6)
    q_ct, k_ct, v_ct = pullback(jnp.ones_like(value))
    assert not q_ct.any()
    assert not k_ct.any()
    np.testing.assert_allclose(v_ct, np.full(v.shape, Q / S), rtol=1e-5)


def test_bfloat16_is_close_to_float32():
    arguments = inputs(jnp.bfloat16)
    exact = [x.astype(jnp.float32) for x in arguments]
    rng = jax.random.key(1, impl="rbg")
    results = []
    for values in (arguments, exact):
        value, pullback = jax.vjp(lambda q, k, v: attend(q, k, v, IS_PAD, DROPOUT, rng), *values)
        results.append((value, *pullback(jnp.ones_like(value))))
    for actual, wanted in zip(*results, strict=True):
        assert actual.dtype == jnp.bfloat16
        error = np.asarray(actual, np.float32) - wanted
        assert np.linalg.norm(error) < 0.01 * np.linalg.norm(wanted)  # a number in bfloat16 is off by up to 0.004


def test_nothing_of_the_size_of_the_scores_is_kept():
    arguments = inputs(jnp.bfloat16, queries=11)
    rng = jax.random.key(1, impl="rbg")
    _, pullback = jax.eval_shape(
        lambda *x: jax.vjp(lambda q, k, v: attend(q, k, v, IS_PAD, DROPOUT, rng), *x), *arguments
    )
    shapes = [x.shape for x in jax.tree.leaves(pullback)]
    assert (B, N, 11) in shapes  # the largest score of each query
    assert (B, N, 11, S) not in shapes


def test_a_linear_layer_keeps_its_parameters_as_they_are():
    """No copy in bfloat16: the train step hands the parameters to both of its programs."""
    x = jnp.ones((B, S, D), jnp.bfloat16)
    params = Linear(E).init(jax.random.key(0), x)["params"]
    linear = Linear(E, dtype=jnp.bfloat16)
    _, pullback = jax.eval_shape(lambda p: jax.vjp(lambda p: linear.apply({"params": p}, x), p), params)
    assert {(leaf.shape, str(leaf.dtype)) for leaf in jax.tree.leaves(pullback)} <= {
        (x.shape, "bfloat16"),
        ((D, E), "float32"),
    }
