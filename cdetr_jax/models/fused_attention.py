"""Attention whose scores never leave the chip, for TPUs and NVIDIA GPUs: `attend` of attention.py as Pallas kernels.

FlashAttention-2 (arXiv:2307.08691): each kernel goes through the scores of one head in blocks, and writes none of them
to memory. It has one block of queries (or of keys), the rows of its scores, and loops over the keys (the queries), the
columns. All arrays come with their features in rows, so that they fill a TPU's lanes.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, UInt32

from cdetr_jax.models.elementwise import are_kept, marks

PLATFORMS = ("tpu", "cuda")  # of devices that run the kernels; those of AMD have not been tried


def forward(
    q: Float[Array, "B Q N d"],
    k: Float[Array, "B S N d"],
    v: Float[Array, "B S N e"],
    is_pad: Bool[Array, "B S"] | None,
    seed: UInt32[Array, "2"] | None,
    dropout: float,
    precision: str | None,
    platform: str,
) -> tuple[Float[Array, "B Q N e"], Float[Array, "B N Q"], Float[Array, "B N Q"]]:
    """Returns the result and, of each query, the largest score and the sum of exp(score - largest).

    Args:
      q, k, v, is_pad: as of `attend`. seed, dropout: as of `is_kept`.
      precision: of products of float32 numbers.
      platform: `tpu`, `cuda` or, slow, `cpu`.
    """
    kernels = _kernels(q, k, seed, dropout, precision, platform)
    queries, keys = _queries_and_keys(q, k, v, is_pad, seed, kernels)
    of_query = jax.ShapeDtypeStruct(queries[1].shape, kernels.dtype)
    out = jax.ShapeDtypeStruct((*keys[1].shape[:3], queries[0].shape[-1]), v.dtype)
    width = q.shape[-1] + v.shape[-1]
    out, largest, total = _run(kernels.forward, kernels, queries, keys, [out, of_query, of_query], width)
    return _heads_last(out, q.shape[1], v.shape[-1]), largest[:, :, 0, : q.shape[1]], total[:, :, 0, : q.shape[1]]


def backward(
    q: Float[Array, "B Q N d"],
    k: Float[Array, "B S N d"],
    v: Float[Array, "B S N e"],
    is_pad: Bool[Array, "B S"] | None,
    seed: UInt32[Array, "2"] | None,
    largest: Float[Array, "B N Q"],
    total: Float[Array, "B N Q"],
    mean: Float[Array, "B N Q"],
    ct: Float[Array, "B Q N e"],
    dropout: float,
    precision: str | None,
    platform: str,
) -> tuple[Float[Array, "B Q N d"], Float[Array, "B S N d"], Float[Array, "B S N e"]]:
    """The cotangents of q, k and v. `mean`: of the weights' cotangents, by weight; the rest as `forward` has it."""
    kernels = _kernels(q, k, seed, dropout, precision, platform)
    queries, keys = _queries_and_keys(q, k, v, is_pad, seed, kernels)
    queries += [_whole_blocks(x[:, :, None], kernels.queries) for x in (largest, 1 / total, mean)]
    queries.append(_heads_first(ct * kernels.gain, kernels.queries))
    width = 2 * q.shape[-1] + v.shape[-1]
    (q_ct,) = _run(kernels.of_queries, kernels, queries, keys, queries[:1], width)
    k_ct, v_ct = _run(kernels.of_keys, kernels, queries, keys, keys[:2], width + v.shape[-1])
    q_ct, k_ct, v_ct = (_heads_last(x_ct, *x.shape[1::2]) for x_ct, x in ((q_ct, q), (k_ct, k), (v_ct, v)))
    if is_pad is not None:  # the weights of padding are 0, but in a picture that is nothing else
        q_ct, k_ct = (jnp.where(is_pad.all(1)[:, None, None, None], 0, x) for x in (q_ct, k_ct))
    return q_ct * q.shape[-1] ** -0.5, k_ct, v_ct


def _kernels(q, k, seed, dropout, precision, platform) -> "_Kernels":
    if q.dtype == jnp.bfloat16:
        precision = "default"  # it has but one
    elif platform == "tpu" and precision == "high":
        precision = "highest"  # Mosaic has nothing between
    return _Kernels(
        queries=_block(q.shape[1], q.shape[-1], platform),
        keys=_block(k.shape[1], q.shape[-1], platform),
        dropout=0.0 if seed is None else dropout,
        precision=precision,
        dtype=jnp.promote_types(q.dtype, jnp.float32),
        platform=platform,
    )


def _block(size: int, features: int, platform: str) -> int:
    """Triton wants a power of two, and a GPU has little memory inside; a TPU wants full lanes, and few blocks."""
    if platform == "tpu":
        return pl.cdiv(pl.cdiv(size, pl.cdiv(size, 512)), 128) * 128
    return max(16, min(64, 4096 // pl.next_power_of_2(features)))


def _whole_blocks(x: Array, block: int, value: float = 0) -> Array:
    """Makes the last axis a multiple of the block."""
    return jnp.pad(x, (*((0, 0),) * (x.ndim - 1), (0, -x.shape[-1] % block)), constant_values=value)


def _heads_first(x: Float[Array, "B L N d"], block: int) -> Float[Array, "B N D P"]:
    """Whole blocks of as many features as Triton can multiply: a power of two, at least 16; zeros are added."""
    more = max(16, pl.next_power_of_2(x.shape[-1])) - x.shape[-1]
    return _whole_blocks(jnp.pad(x.transpose(0, 2, 3, 1), ((0, 0), (0, 0), (0, more), (0, 0))), block)


def _heads_last(x: Float[Array, "B N D P"], size: int, features: int) -> Float[Array, "B L N d"]:
    """Undoes `_heads_first`."""
    return x[:, :, :features, :size].transpose(0, 3, 1, 2)


def _queries_and_keys(q, k, v, is_pad, seed, kernels: "_Kernels") -> tuple[list[Array], list[Array]]:
    """[q, marks] with q scaled, [k, v, bias, marks]; the bias is the lowest number for padding, -inf behind the end."""
    batch, num_queries, num_heads, width = q.shape
    num_keys = k.shape[1]
    bias = jnp.zeros((batch, num_keys), kernels.dtype)
    if is_pad is not None:
        bias = jnp.where(is_pad, jnp.finfo(kernels.dtype).min, bias)
    seed = jnp.zeros(2, jnp.uint32) if seed is None else seed
    of_queries, of_keys = marks(seed, (batch, num_heads, num_queries, num_keys))
    of_keys = jnp.broadcast_to(of_keys, (batch, 1, 1, num_keys))
    queries = [
        _heads_first(q * width**-0.5, kernels.queries),
        _whole_blocks(of_queries[:, :, None, :, 0], kernels.queries),
    ]
    keys = [_heads_first(k, kernels.keys), _heads_first(v, kernels.keys)]
    return queries, [
        *keys,
        _whole_blocks(bias[:, None, None], kernels.keys, -jnp.inf),
        _whole_blocks(of_keys, kernels.keys),
    ]


def _run(
    kernel: Callable[..., None],
    kernels: "_Kernels",
    queries: Sequence[Array],
    keys: Sequence[Array],
    outputs: Sequence[jax.ShapeDtypeStruct | Array],
    width: int,
) -> Sequence[Array]:
    """The kernel for each picture, head and block of what it gives an output for; of the other side it gets all.

    `outputs`: their shapes. `width`: how many products there are of each score.
    """

    def spec(x: Any, block: int | None) -> pl.BlockSpec:
        of_all_heads = x.shape[1] == 1
        shape = None, None, x.shape[2], block or x.shape[3]
        return pl.BlockSpec(shape, lambda b, n, i: (b, 0 if of_all_heads else n, 0, i if block else 0))

    size = outputs[0].shape[-1]
    is_of_keys = kernel == kernels.of_keys
    block = kernels.keys if is_of_keys else kernels.queries
    specs = [spec(x, None if is_of_keys else block) for x in queries] + [
        spec(x, block if is_of_keys else None) for x in keys
    ]
    scores = queries[0].shape[0] * queries[0].shape[1] * queries[0].shape[-1] * keys[0].shape[-1]
    return pl.pallas_call(
        kernel,
        grid=(*queries[0].shape[:2], size // block),
        in_specs=specs,
        out_specs=[spec(x, block) for x in outputs],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in outputs],
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=2) if kernels.platform == "cuda" else None,
        cost_estimate=pl.CostEstimate(
            flops=2 * width * scores,
            transcendentals=scores,
            bytes_accessed=sum(x.size * x.dtype.itemsize for x in (*queries, *keys, *outputs)),
        ),
        interpret=kernels.platform == "cpu",
        name=f"attention_{kernel.__name__}",  # in profiles
    )(*queries, *keys)


class _Kernels(NamedTuple):
    """The kernels and what they know.

    Attributes:
      queries, keys: of one block.
      dtype: of scores and sums.
      platform: `tpu`, `cuda`, or `cpu`: there the kernels run as plain JAX, slowly, to be tested.
    """

    queries: int
    keys: int
    dropout: float
    precision: str | None
    dtype: DTypeLike
    platform: str

    def forward(self, q, marks, k, v, bias, marks_of_keys, out, largest, total):
        """Of one block of queries."""
        q, marks = q[...], marks[...].T

        def add(i, carry):
            sums, largest, total = carry
            keys = pl.ds(i * self.keys, self.keys)
            scores = self.products(q, k[:, keys]) + bias[:, keys]
            higher = jnp.maximum(largest, scores.max(1, keepdims=True))
            weights, shrunk = self.exp(scores - higher), self.exp(largest - higher)
            total = total * shrunk + weights.sum(1, keepdims=True)
            (weights,) = self.drop(marks, marks_of_keys[:, keys], weights)
            return sums * shrunk + self.sums(weights, v[:, keys]), higher, total

        column = jnp.zeros((self.queries, 1), self.dtype)
        start = jnp.zeros(out.shape[::-1], self.dtype), column - jnp.inf, column
        sums, highest, sum_of_all = jax.lax.fori_loop(0, k.shape[1] // self.keys, add, start)
        out[...] = (sums * (self.gain / sum_of_all)).T.astype(out.dtype)
        largest[...], total[...] = highest.T, sum_of_all.T

    def of_queries(self, q, marks, largest, inverse, mean, ct, k, v, bias, marks_of_keys, q_ct):
        """The cotangents of one block of queries, without the scale of q. `inverse`: 1 / total."""
        q, ct = q[...], ct[...]
        marks, largest, inverse, mean = (x[...].T for x in (marks, largest, inverse, mean))

        def add(i, q_ct):
            keys = pl.ds(i * self.keys, self.keys)
            k_ = k[:, keys]
            weights = self.exp(self.products(q, k_) + bias[:, keys] - largest) * inverse
            (weights_ct,) = self.drop(marks, marks_of_keys[:, keys], self.products(ct, v[:, keys]))
            return q_ct + self.sums(weights * (weights_ct - mean), k_)

        sums = jax.lax.fori_loop(0, k.shape[1] // self.keys, add, jnp.zeros(q.shape[::-1], self.dtype))
        q_ct[...] = sums.T.astype(q_ct.dtype)

    def of_keys(self, q, marks_of_queries, largest, inverse, mean, ct, k, v, bias, marks, k_ct, v_ct):
        """The cotangents of one block of keys and values."""
        k, v, bias, marks = k[...], v[...], bias[...].T, marks[...].T

        def add(i, carry):
            k_ct, v_ct = carry
            queries = pl.ds(i * self.queries, self.queries)
            q_, ct_ = q[:, queries], ct[:, queries]
            weights = self.exp(self.products(k, q_) + bias - largest[:, queries]) * inverse[:, queries]
            weights_ct = self.products(v, ct_)
            dropped, weights_ct = self.drop(marks, marks_of_queries[:, queries], weights, weights_ct)
            scores_ct = weights * (weights_ct - mean[:, queries])
            return k_ct + self.sums(scores_ct, q_), v_ct + self.sums(dropped, ct_)

        start = jnp.zeros(k.shape[::-1], self.dtype), jnp.zeros(v.shape[::-1], self.dtype)
        sums = jax.lax.fori_loop(0, q.shape[1] // self.queries, add, start)
        k_ct[...], v_ct[...] = sums[0].T.astype(k_ct.dtype), sums[1].T.astype(v_ct.dtype)

    @property
    def gain(self):
        """Of what dropout keeps; q_ct, k_ct and v_ct have it from ct."""
        return 1 / (1 - self.dropout)

    def dot(self, a, b, axis):
        """The product over this axis of both."""
        return jax.lax.dot_general(a, b, (((axis,), (axis,)), ((), ())), self.precision, self.dtype)

    def products(self, of_rows, of_columns):
        """Of each row's features with each column's."""
        return self.dot(of_rows, of_columns, 0)

    def sums(self, weights, of_columns):
        """Of the columns' features by weight, for each row."""
        return self.dot(weights.astype(of_columns.dtype), of_columns, 1)

    def exp(self, x):
        """exp(x). A GPU computes powers of 2, and `jnp.exp` there is twice as many instructions around one."""
        return jnp.exp(x) if self.platform == "tpu" else jnp.exp2(x * np.log2(np.e).item())

    def drop(self, marks, marks_of_columns, *blocks):
        """What dropout keeps, not yet scaled by `gain`; 0 elsewhere."""
        if not self.dropout:
            return blocks
        kept = are_kept(marks, marks_of_columns, self.dropout)
        return [jnp.where(kept, x, 0) for x in blocks]
