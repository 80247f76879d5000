"""ReLU and dropout that keep for the backward pass no more than it needs.

As XLA cannot see across the two programs of a train step, what a derivative asks for is written to memory as it stands:
for `jax.nn.relu` a mask and a whole array of zeros beside the output that the next layer keeps anyway.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, UInt32


def new_seed(rng: Array | None, rate: float) -> UInt32[Array, "2"] | None:
    """What one dropout's mask is made from; None without an `rng` or a `rate`: no dropout."""
    return None if rng is None or rate == 0 else jax.random.bits(rng, (2,), "uint32")


def is_kept(seed: UInt32[Array, "2"], shape: tuple[int, ...], rate: float) -> Bool[Array, "..."]:
    """False for the fraction `rate` of all numbers.

    A hash of the seed and of each number's position, MurmurHash3's last step taken twice. JAX's generators write
    their bits to memory before they are read; a hash is computed where it is needed, in both passes, and never written.
    """
    stride, position = 1, jnp.zeros(shape, jnp.uint32)
    for axis in reversed(range(len(shape))):
        position += jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * jnp.uint32(stride)
        stride *= shape[axis]
    return is_kept_at(position, seed, rate)


def is_kept_at(position: UInt32[Array, "..."], seed: Any, rate: float) -> Bool[Array, "..."]:
    """The part of `is_kept` at these positions, counted from 0 in row-major order. `seed`: also as a kernel has it."""
    return _mixed(_mixed(position ^ seed[0]) ^ seed[1]) >= jnp.uint32(round(rate * 2**32))


def _mixed(x: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """One to one, and every bit depends on every bit: https://github.com/aappleby/smhasher, `fmix32`."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def keep(x: Float[Array, "..."], kept: Bool[Array, "..."], rate: float) -> Float[Array, "..."]:
    """What is kept, scaled so that the mean stays; 0 elsewhere."""
    return jnp.where(kept, x * (1 / (1 - rate)) if rate else x, 0)


def dropout(x: Float[Array, "..."], rate: float, rng: Array | None) -> Float[Array, "..."]:
    """Sets the fraction `rate` to 0 and scales the rest; without an `rng` returns x."""
    seed = new_seed(rng, rate)
    return x if seed is None else _dropout(x, seed, rate)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _dropout(x, seed, rate):
    return keep(x, is_kept(seed, x.shape, rate), rate)


_dropout.defvjp(
    lambda x, seed, rate: (_dropout(x, seed, rate), seed),
    lambda rate, seed, ct: (_dropout(ct, seed, rate), None),
)


def relu(x: Float[Array, "..."], rate: float = 0.0, rng: Array | None = None) -> Float[Array, "..."]:
    """max(x, 0), then dropout if there is an `rng`. The derivative is 0 at 0, as PyTorch has it.

    Derived from its output, which the next layer keeps anyway.
    """
    seed = new_seed(rng, rate)
    return _relu(x, seed, 0.0 if seed is None else rate)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _relu(x, seed, rate):
    y = jnp.maximum(x, 0)
    return y if seed is None else _dropout(y, seed, rate)


def _relu_fwd(x, seed, rate):
    y = _relu(x, seed, rate)
    return y, y


def _relu_bwd(rate, y, ct):
    return keep(ct, y > 0, rate), None


_relu.defvjp(_relu_fwd, _relu_bwd)
