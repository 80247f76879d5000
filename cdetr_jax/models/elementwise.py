"""ReLU and dropout that keep for the backward pass no more than it needs.

As XLA cannot see across the two programs of a train step, what a derivative asks for is written to memory as it stands:
for `jax.nn.relu` a mask and a whole array of zeros beside the output that the next layer keeps anyway.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, UInt32


def new_seed(rng: Array | None, rate: float) -> UInt32[Array, "2"] | None:
    """What one dropout's mask is made from; None without an `rng` or a `rate`: no dropout."""
    return None if rng is None or rate == 0 else jax.random.bits(rng, (2,), "uint32")


def is_kept(seed: UInt32[Array, "2"], shape: tuple[int, ...], rate: float) -> Bool[Array, "..."]:
    """False for the fraction `rate` of all numbers: a hash of the marks of each one's row and column.

    JAX's generators write their bits to memory before they are read; a hash is computed where it is needed, in both
    passes, and never written.
    """
    row_marks, column_marks = jax.lax.optimization_barrier(marks(seed, shape))  # or they are computed for each number
    return are_kept(row_marks, column_marks, rate)


def marks(seed: UInt32[Array, "2"], shape: tuple[int, ...]) -> tuple[UInt32[Array, "... 1"], UInt32[Array, "... C"]]:
    """Random numbers, one for each row and one for each column. All axes but the last count as rows."""
    rows = _mixed(jnp.arange(math.prod(shape[:-1]), dtype=jnp.uint32) ^ seed[0])
    columns = _mixed(_mixed(jnp.arange(shape[-1], dtype=jnp.uint32) ^ seed[1]))  # twice: no column is like a row
    return rows.reshape(*shape[:-1], 1), columns.reshape((1,) * (len(shape) - 1) + (-1,))


def _mixed(x: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """One to one, and every bit depends on every bit: MurmurHash3's `fmix32`, https://github.com/aappleby/smhasher."""
    x = _nearly_mixed(x)
    return x ^ (x >> 16)


def _nearly_mixed(x: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """The same in the upper half, which decides whether it is above a bound."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    return (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)


def are_kept(row_marks: UInt32[Array, "..."], column_marks: UInt32[Array, "..."], rate: float) -> Bool[Array, "..."]:
    """The part of `is_kept` of these rows and columns."""
    return _nearly_mixed(row_marks ^ column_marks) >= jnp.uint32(round(rate * 2**32))


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
