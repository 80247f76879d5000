"""ReLU and dropout against JAX's own, and what they keep for the backward pass."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cdetr_jax.models.elementwise import dropout, is_kept, new_seed, relu

X = jnp.array(np.random.default_rng(0).normal(size=(3, 5, 7)).round(1), jnp.float32)  # some are 0
RATE = 0.25


def kept(function, *arguments):
    """Shapes and types of the arrays that a backward pass needs."""
    _, pullback = jax.eval_shape(lambda *x: jax.vjp(function, *x), *arguments)
    return [(x.shape, str(x.dtype)) for x in jax.tree.leaves(pullback)]


def test_relu_and_its_gradient():
    value, pullback = jax.vjp(relu, X)
    expected, expected_pullback = jax.vjp(jax.nn.relu, X)
    np.testing.assert_array_equal(value, expected)
    np.testing.assert_array_equal(pullback(X)[0], expected_pullback(X)[0])
    assert kept(relu, X) == [(X.shape, "float32")]


def test_relu_with_dropout_is_both_one_after_the_other():
    rng = jax.random.key(1)
    value, pullback = jax.vjp(lambda x: relu(x, RATE, rng), X)
    expected, expected_pullback = jax.vjp(lambda x: dropout(jax.nn.relu(x), RATE, rng), X)
    np.testing.assert_array_equal(value, expected)
    np.testing.assert_array_equal(pullback(X)[0], expected_pullback(X)[0])
    assert (value == 0).any()
    assert kept(lambda x: relu(x, RATE, rng), X) == [(X.shape, "float32")]


def test_dropout_scales_what_it_keeps_and_so_does_its_gradient():
    rng = jax.random.key(1)
    mask = np.asarray(is_kept(new_seed(rng, RATE), X.shape, RATE))
    value, pullback = jax.vjp(lambda x: dropout(x, RATE, rng), X)
    np.testing.assert_allclose(value, np.where(mask, X / 0.75, 0), rtol=1e-6)
    np.testing.assert_allclose(pullback(X)[0], np.where(mask, X / 0.75, 0), rtol=1e-6)
    assert kept(lambda x: dropout(x, RATE, rng), X) == [((2,), "uint32")]
    assert dropout(X, RATE, None) is X


@pytest.mark.parametrize("rate", [0.001, 0.1, 0.5])
def test_masks_look_random(rate):
    """The fraction that is dropped, of all and of each row and column; and no two masks or neighbours go together."""
    size = 1000
    masks = np.array([is_kept(jnp.array(seed, jnp.uint32), (size, size), rate) for seed in ((1, 2), (1, 3), (2, 2))])
    mean = 1 - rate
    deviation = (mean * rate) ** 0.5  # of one number
    for axis, count in ((None, 3 * size**2), (0, 3), (1, size), (2, size)):
        assert np.abs(masks.mean(axis) - mean).max() < 7 * deviation / count**0.5 or axis == 0
    noise = masks - mean
    first = noise[0]
    pairs = [
        (first, noise[1]),
        (first, noise[2]),
        (first[1:], first[:-1]),
        (first[:, 1:], first[:, :-1]),
        (first, first.T),
    ]
    for a, b in pairs:
        assert abs((a * b).mean()) < 6 * deviation**2 / size + 1e-5
    # The marks of a rectangle's corners always cancel out.
    corners = first[:-1, :-1] * first[:-1, 1:] * first[1:, :-1] * first[1:, 1:]
    assert abs(corners.mean()) < 6 * deviation**4 / size + 1e-5
    assert not np.array_equal(masks[0], masks[1])
