"""Sinusoidal embeddings of the feature grid (the keys' positions) and of the reference points."""

import math

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from cdetr_jax.models.attention import along_last


def _sine(positions: Float[Array, "..."], features: int, temperature: float) -> Float[Array, "... F"]:
    """sin on even and cos on odd features of `positions / temperature^(2 floor(i/2) / features)`."""
    i = jnp.arange(features // 2).astype(float)
    angles = positions[..., None] / along_last(temperature ** (2.0 * i / features), positions[..., None])
    return jnp.stack([jnp.sin(angles), jnp.cos(angles)], axis=-1).reshape(*positions.shape, features)


def grid_embedding(is_pad: Bool[Array, "B h w"], width: int, temperature: float = 10000.0) -> Float[Array, "B h w D"]:
    """The keys' positions: each valid cell's count along y and x, as a fraction of the picture, times 2 pi.

    Source: `PositionEmbeddingSine` of the published code; (y, x) order, `width / 2` features each.
    """
    valid = (~is_pad).astype(float)  # float32; float64 where JAX has it switched on
    y, x = jnp.cumsum(valid, axis=1), jnp.cumsum(valid, axis=2)
    y = y / (y[:, -1:, :] + 1e-6) * (2 * math.pi)
    x = x / (x[:, :, -1:] + 1e-6) * (2 * math.pi)
    return jnp.concatenate([_sine(y, width // 2, temperature), _sine(x, width // 2, temperature)], axis=-1)


def point_embedding(
    points_xy: Float[Array, "... 2"], width: int, temperature: float = 10000.0
) -> Float[Array, "... D"]:
    """The reference points' positions in the same space, equation (5).

    Args:
      points_xy: (x, y) as fractions of the picture, that is, sigmoid(s).
      width: D; `width / 2` features for y, then as many for x.
      temperature: ratio of the lowest to the highest frequency; 10000 as published.
    """
    scaled = points_xy * (2 * math.pi)
    x, y = scaled[..., 0], scaled[..., 1]
    return jnp.concatenate([_sine(y, width // 2, temperature), _sine(x, width // 2, temperature)], axis=-1)
