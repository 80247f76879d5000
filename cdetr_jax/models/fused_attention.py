"""Attention whose scores never leave the chip, for TPUs and NVIDIA GPUs: `attend` of attention.py as Pallas kernels.

FlashAttention-2 (arXiv:2307.08691): each kernel goes through the scores of one head in blocks, and writes none of them
to memory. It has one block of queries (or of keys), the rows of its scores, and loops over the keys (the queries), the
columns. All arrays come with their features in rows, so that they fill a TPU's lanes.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu, triton
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, UInt32

from cdetr_jax.models.elementwise import is_kept_at

PLATFORMS = ("tpu", "cuda")  # of devices that run the kernels; those of AMD have not been tried


class _Settings(NamedTuple):
    """What all kernels know.

    Attributes:
      num_heads, num_queries, num_keys: N, Q and S, without padding.
      queries, keys: of one block.
      dtype: of scores and sums.
      platform: `tpu`, `cuda`, or `cpu`: there the kernels run as plain JAX, slowly, to be tested.
    """

    num_heads: int
    num_queries: int
    num_keys: int
    queries: int
    keys: int
    dropout: float
    precision: str | None
    dtype: DTypeLike
    platform: str

    @property
    def gain(self) -> float:
        """Of what dropout keeps."""
        return 1 / (1 - self.dropout)


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
    settings = _settings(q, k, seed, dropout, precision, platform)
    queries, keys = _queries_and_keys(q, k, v, is_pad, settings)
    of_query = jax.ShapeDtypeStruct((*queries[0].shape[:2], 1, queries[0].shape[-1]), settings.dtype)
    out = jax.ShapeDtypeStruct((*keys[1].shape[:3], queries[0].shape[-1]), v.dtype)
    products = q.shape[-1] + v.shape[-1]
    outputs = [out, of_query, of_query]
    out, largest, total = _run(_forward_kernel, "queries", seed, queries, keys, outputs, products, settings)
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
    settings = _settings(q, k, seed, dropout, precision, platform)
    queries, keys = _queries_and_keys(q, k, v, is_pad, settings)
    more = queries[0].shape[-1] - q.shape[1]
    queries += [jnp.pad(x[:, :, None], ((0, 0), (0, 0), (0, 0), (0, more))) for x in (largest, 1 / total, mean)]
    queries.append(_heads_first(ct * settings.gain, settings.queries))
    products = 2 * q.shape[-1] + v.shape[-1]
    (q_ct,) = _run(_queries_kernel, "queries", seed, queries, keys, queries[:1], products, settings)
    k_ct, v_ct = _run(_keys_kernel, "keys", seed, queries, keys, keys[:2], products + v.shape[-1], settings)
    q_ct, k_ct, v_ct = (_heads_last(x_ct, *x.shape[1::2]) for x_ct, x in ((q_ct, q), (k_ct, k), (v_ct, v)))
    if is_pad is not None:  # the weights of padding are 0, but in a picture that is nothing else
        q_ct, k_ct = (jnp.where(is_pad.all(1)[:, None, None, None], 0, x) for x in (q_ct, k_ct))
    return q_ct * q.shape[-1] ** -0.5, k_ct, v_ct


def _settings(q, k, seed, dropout, precision, platform) -> _Settings:
    if q.dtype == jnp.bfloat16:
        precision = "default"  # it has but one
    elif platform == "tpu" and precision == "high":
        precision = "highest"  # Mosaic has nothing between
    return _Settings(
        num_heads=q.shape[2],
        num_queries=q.shape[1],
        num_keys=k.shape[1],
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
        return _up(pl.cdiv(size, pl.cdiv(size, 512)), 128)
    return max(16, min(64, 4096 // pl.next_power_of_2(features)))


def _up(size: int, multiple: int) -> int:
    return pl.cdiv(size, multiple) * multiple


def _heads_first(x: Float[Array, "B L N d"], block: int) -> Float[Array, "B N D P"]:
    """Whole blocks, and as many features as Triton can multiply: a power of two, at least 16; zeros are added."""
    size, features = x.shape[1::2]
    more = max(16, pl.next_power_of_2(features)) - features, _up(size, block) - size
    return jnp.pad(x.transpose(0, 2, 3, 1), ((0, 0), (0, 0), (0, more[0]), (0, more[1])))


def _heads_last(x: Float[Array, "B N D P"], size: int, features: int) -> Float[Array, "B L N d"]:
    """Undoes `_heads_first`."""
    return x[:, :, :features, :size].transpose(0, 3, 1, 2)


def _queries_and_keys(q, k, v, is_pad, settings: _Settings) -> tuple[list[Array], list[Array]]:
    """[q], scaled, and [k, v, bias]: what is added to the scores, the lowest number where `is_pad`, -inf behind."""
    bias = jnp.zeros(k.shape[:2], settings.dtype)
    if is_pad is not None:
        bias = jnp.where(is_pad, jnp.finfo(settings.dtype).min, bias)
    k_, v_ = _heads_first(k, settings.keys), _heads_first(v, settings.keys)
    bias = jnp.pad(bias, ((0, 0), (0, k_.shape[-1] - k.shape[1])), constant_values=-jnp.inf)
    return [_heads_first(q * q.shape[-1] ** -0.5, settings.queries)], [k_, v_, bias[:, None, None]]


def _run(
    kernel: Callable[..., None],
    over: str,
    seed: Array | None,
    queries: Sequence[Array],
    keys: Sequence[Array],
    outputs: Sequence[jax.ShapeDtypeStruct | Array],
    products: int,
    settings: _Settings,
) -> Sequence[Array]:
    """The kernel for each picture, head and block of what it is `over`; of the other side it gets all.

    `outputs`: their shapes; `products`: to add up for every score.
    """

    def spec(x: Any, block: int | None) -> pl.BlockSpec:
        of_all_heads = x.shape[1] == 1
        shape = None, None, x.shape[2], block or x.shape[3]
        return pl.BlockSpec(shape, lambda b, n, i: (b, 0 if of_all_heads else n, 0, i if block else 0))

    of_queries = settings.queries if over == "queries" else None
    of_keys = settings.keys if over == "keys" else None
    length = (queries[0].shape[-1] // settings.queries) if of_queries else (keys[0].shape[-1] // settings.keys)
    on_tpu = settings.platform == "tpu"
    seed = jnp.zeros(2, jnp.uint32) if seed is None else seed
    inputs = [*((x, of_queries) for x in queries), *((x, of_keys) for x in keys)]
    scores = keys[0].shape[0] * settings.num_heads * settings.num_queries * settings.num_keys
    cost = pl.CostEstimate(
        flops=2 * products * scores,
        transcendentals=scores,
        bytes_accessed=sum(x.size * x.dtype.itemsize for x in (*queries, *keys, *outputs)),
    )
    return pl.pallas_call(
        functools.partial(kernel, settings=settings),
        grid=(*queries[0].shape[:2], length),
        in_specs=[
            pl.BlockSpec(memory_space=tpu.SMEM) if on_tpu else pl.BlockSpec((2,), lambda b, n, i: (0,)),
            *(spec(x, block) for x, block in inputs),
        ],
        out_specs=[spec(x, of_queries or of_keys) for x in outputs],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in outputs],
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=2) if settings.platform == "cuda" else None,
        cost_estimate=cost,
        interpret=settings.platform == "cpu",
    )(seed, *(x for x, _ in inputs))


def _forward_kernel(seed, q, k, v, bias, out, largest, total, *, settings):
    scores_of = _Scores(seed, settings, settings.queries, settings.keys, queries_axis=0)
    q = q[...]

    def add(i, carry):
        sums, largest, total = carry
        keys = pl.ds(i * settings.keys, settings.keys)
        scores = scores_of.products(q, k[:, keys]) + bias[:, keys]
        higher = jnp.maximum(largest, scores.max(1, keepdims=True))
        weights, shrunk = scores_of.exp(scores - higher), scores_of.exp(largest - higher)
        total = total * shrunk + weights.sum(1, keepdims=True)
        (weights,) = scores_of.drop(i, weights)
        return sums * shrunk + scores_of.sums(weights, v[:, keys]), higher, total

    column = jnp.zeros((settings.queries, 1), settings.dtype)
    start = jnp.zeros(out.shape[::-1], settings.dtype), column - jnp.inf, column
    sums, highest, sum_of_all = jax.lax.fori_loop(0, k.shape[1] // settings.keys, add, start)
    out[...] = (sums * (settings.gain / sum_of_all)).T.astype(out.dtype)
    largest[...], total[...] = highest.T, sum_of_all.T


def _queries_kernel(seed, q, largest, inverse, mean, ct, k, v, bias, q_ct, *, settings):
    scores_of = _Scores(seed, settings, settings.queries, settings.keys, queries_axis=0)
    q, ct = q[...], ct[...]
    largest, inverse, mean = largest[...].T, inverse[...].T, mean[...].T

    def add(i, q_ct):
        keys = pl.ds(i * settings.keys, settings.keys)
        k_ = k[:, keys]
        weights = scores_of.exp(scores_of.products(q, k_) + bias[:, keys] - largest) * inverse
        (weights_ct,) = scores_of.drop(i, scores_of.products(ct, v[:, keys]))
        return q_ct + scores_of.sums(weights * (weights_ct - mean), k_)

    sums = jax.lax.fori_loop(0, k.shape[1] // settings.keys, add, jnp.zeros(q.shape[::-1], settings.dtype))
    q_ct[...] = sums.T.astype(q_ct.dtype)


def _keys_kernel(seed, q, largest, inverse, mean, ct, k, v, bias, k_ct, v_ct, *, settings):
    scores_of = _Scores(seed, settings, settings.keys, settings.queries, queries_axis=1)
    k, v, bias = k[...], v[...], bias[...].T

    def add(i, carry):
        k_ct, v_ct = carry
        queries = pl.ds(i * settings.queries, settings.queries)
        q_, ct_ = q[:, queries], ct[:, queries]
        weights = scores_of.exp(scores_of.products(k, q_) + bias - largest[:, queries]) * inverse[:, queries]
        dropped, weights_ct = scores_of.drop(i, weights, scores_of.products(v, ct_))
        scores_ct = weights * (weights_ct - mean[:, queries])
        return k_ct + scores_of.sums(scores_ct, q_), v_ct + scores_of.sums(dropped, ct_)

    start = jnp.zeros(k.shape[::-1], settings.dtype), jnp.zeros(v.shape[::-1], settings.dtype)
    sums = jax.lax.fori_loop(0, q.shape[1] // settings.queries, add, start)
    k_ct[...], v_ct[...] = sums[0].T.astype(k_ct.dtype), sums[1].T.astype(v_ct.dtype)


class _Scores:
    """Blocks of the scores of the kernel's picture and head, of the kernel's rows and any columns."""

    def __init__(self, seed, settings, rows, columns, queries_axis):
        self.seed, self.settings = seed, settings
        self.shape, self.queries_axis = (rows, columns), queries_axis
        self.head = pl.program_id(0) * settings.num_heads + pl.program_id(1)
        self.first_row = pl.program_id(2) * rows

    def dot(self, a, b, axis):
        """The product over this axis of both."""
        axes = ((axis,), (axis,)), ((), ())
        return jax.lax.dot_general(a, b, axes, self.settings.precision, self.settings.dtype)

    def products(self, of_rows, of_columns):
        """Of each row's features with each column's."""
        return self.dot(of_rows, of_columns, 0)

    def sums(self, weights, of_columns):
        """Of the columns' features by weight, for each row."""
        return self.dot(weights.astype(of_columns.dtype), of_columns, 1)

    def exp(self, x):
        """exp(x). A GPU computes powers of 2, and `jnp.exp` there is twice as many instructions around one."""
        return jnp.exp(x) if self.settings.platform == "tpu" else jnp.exp2(x * np.log2(np.e).item())

    def drop(self, i, *blocks):
        """What `is_kept` keeps of the i-th block of columns, not yet scaled by `gain`; 0 elsewhere."""
        settings = self.settings
        if not settings.dropout:
            return blocks
        first = self.first_row, i * self.shape[1]
        number = [
            jax.lax.broadcasted_iota(jnp.uint32, self.shape, axis) + jnp.asarray(first[axis], jnp.uint32)
            for axis in (self.queries_axis, 1 - self.queries_axis)
        ]
        position = (self.head.astype(jnp.uint32) * settings.num_queries + number[0]) * settings.num_keys + number[1]
        kept = is_kept_at(position, self.seed, settings.dropout)
        return [jnp.where(kept, x, 0) for x in blocks]
