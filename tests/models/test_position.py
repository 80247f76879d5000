"""The sinusoidal embeddings against literal loops."""

import math

import jax.numpy as jnp
import numpy as np

from cdetr_jax.models import position

# Angles up to 2 pi in float32 against float64: a few units in the last place of the angle.
FLOAT32 = 3e-6


def literal_sine(angle, features):
    """Feature by feature: sin on even, cos on odd ones, frequencies 10000^(2 floor(i / 2) / features)."""
    values = []
    for i in range(features):
        scaled = angle / 10000.0 ** (2 * (i // 2) / features)
        values.append(math.sin(scaled) if i % 2 == 0 else math.cos(scaled))
    return values


def test_grid_embedding_is_the_literal_loop():
    width, h, w = 12, 5, 7
    sizes = [(5, 7), (3, 4), (1, 1)]
    is_pad = np.ones((len(sizes), h, w), bool)
    expected = np.zeros((len(sizes), h, w, width))
    for b, (rows, columns) in enumerate(sizes):
        is_pad[b, :rows, :columns] = False
        for y in range(h):
            for x in range(w):
                # Counts of valid cells up to here and in all; a column or row of padding counts none.
                up_to_y, all_y = (min(y + 1, rows), rows) if x < columns else (0, 0)
                up_to_x, all_x = (min(x + 1, columns), columns) if y < rows else (0, 0)
                angle_y = up_to_y / (all_y + 1e-6) * 2 * math.pi
                angle_x = up_to_x / (all_x + 1e-6) * 2 * math.pi
                expected[b, y, x] = literal_sine(angle_y, width // 2) + literal_sine(angle_x, width // 2)
    np.testing.assert_allclose(position.grid_embedding(jnp.array(is_pad), width), expected, atol=FLOAT32)


def test_grid_embedding_of_valid_cells_does_not_depend_on_the_padding():
    tight = position.grid_embedding(jnp.zeros((1, 3, 5), bool), 8)
    is_pad = np.ones((1, 7, 11), bool)
    is_pad[:, :3, :5] = False
    np.testing.assert_array_equal(position.grid_embedding(jnp.array(is_pad), 8)[:, :3, :5], tight)


def test_grid_embedding_has_y_before_x():
    pos = np.asarray(position.grid_embedding(jnp.zeros((1, 3, 5), bool), 8))[0]
    np.testing.assert_array_equal(pos[:, 0, :4], pos[:, 4, :4])  # y features are constant along a row
    np.testing.assert_array_equal(pos[0, :, 4:], pos[2, :, 4:])  # x features along a column
    assert (pos[0, 0, :4] != pos[1, 0, :4]).any()
    assert (pos[0, 0, 4:] != pos[0, 1, 4:]).any()


def test_point_embedding_is_the_literal_loop():
    points = np.array([[0.0, 0.0], [1.0, 0.25], [0.3, 0.9], [0.5, 1.0]])
    expected = [
        literal_sine(y * 2 * math.pi, 6) + literal_sine(x * 2 * math.pi, 6) for x, y in points
    ]  # points are (x, y), features (y, x)
    actual = position.point_embedding(jnp.array(points, jnp.float32), 12)
    np.testing.assert_allclose(actual, expected, atol=FLOAT32)


def test_a_point_embeds_like_the_cell_that_ends_there():
    """Equation (5): the same space as the keys' positions, so p_q.p_k can point at a cell."""
    h, w = 4, 5
    grid = np.asarray(position.grid_embedding(jnp.zeros((1, h, w), bool), 16))[0]
    points = np.array([[[(x + 1) / w, (y + 1) / h] for x in range(w)] for y in range(h)], np.float32)
    # The grid's 1e-6 in the divisor shifts an angle of up to 2 pi by up to 2 pi * 1e-6.
    np.testing.assert_allclose(position.point_embedding(jnp.array(points), 16), grid, atol=1e-5)
