"""Attention whose scores never leave the chip, for TPUs and NVIDIA GPUs: `attend` of attention.py as Pallas kernels.

FlashAttention-2 (arXiv:2307.08691): each kernel goes through the scores of one head in blocks, and writes none of them
to memory. A block has the keys in its rows and the queries in its columns; q, k and v have their features in rows.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu, triton
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, UInt32

from cdetr_jax.models.elementwise import is_kept_at, keep

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
    for x, padding in ((largest, 0), (total, 1), (mean, 0)):
        queries.append(jnp.pad(x[:, :, None], ((0, 0), (0, 0), (0, 0), (0, more)), constant_values=padding))
    queries.append(_heads_first(ct, settings.queries))
    products = 2 * q.shape[-1] + v.shape[-1]
    (q_ct,) = _run(_queries_kernel, "queries", seed, queries, keys, queries[:1], products, settings)
    k_ct, v_ct = _run(_keys_kernel, "keys", seed, queries, keys, keys[:2], products + v.shape[-1], settings)
    return (
        _heads_last(q_ct, *q.shape[1::2]) * q.shape[-1] ** -0.5,
        _heads_last(k_ct, *k.shape[1::2]),
        _heads_last(v_ct, *v.shape[1::2]),
    )


def _settings(q, k, seed, dropout, precision, platform) -> _Settings:
    if q.dtype == jnp.bfloat16:
        precision = "default"  # it has but one
    elif platform == "tpu" and precision == "high":
        precision = "highest"  # Mosaic has nothing between
    return _Settings(
        num_heads=q.shape[2],
        num_queries=q.shape[1],
        num_keys=k.shape[1],
        queries=_block(q.shape[1], platform),
        keys=_block(k.shape[1], platform),
        dropout=0.0 if seed is None else dropout,
        precision=precision,
        dtype=jnp.promote_types(q.dtype, jnp.float32),
        platform=platform,
    )


def _block(size: int, platform: str) -> int:
    """Triton wants a power of two; a TPU full lanes, and few blocks."""
    return _up(pl.cdiv(size, pl.cdiv(size, 512)), 128) if platform == "tpu" else 64


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
    return [_heads_first(q * q.shape[-1] ** -0.5, settings.queries)], [k_, v_, bias[:, None, :, None]]


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
        if x.shape[-1] == 1:  # the bias, of all heads: as a column it is added to all queries
            return pl.BlockSpec((None, None, block or x.shape[2], 1), lambda b, n, i: (b, 0, i if block else 0, 0))
        return pl.BlockSpec((None, None, x.shape[2], block or x.shape[3]), lambda b, n, i: (b, n, 0, i if block else 0))

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
    block = _Block(seed, settings)
    queries = pl.program_id(2)
    q = q[...]

    def add(i, carry):
        sums, largest, total = carry
        keys = pl.ds(i * settings.keys, settings.keys)
        scores = block.dot(k[:, keys], q, 0, 0) + bias[keys, :]
        higher = jnp.maximum(largest, scores.max(0, keepdims=True))
        weights, shrunk = jnp.exp(scores - higher), jnp.exp(largest - higher)
        total = total * shrunk + weights.sum(0, keepdims=True)
        weights = block.drop(i, queries, weights)[0].astype(v.dtype)
        return sums * shrunk + block.dot(v[:, keys], weights, 1, 0), higher, total

    row = jnp.zeros(largest.shape, settings.dtype)
    start = jnp.zeros(out.shape, settings.dtype), row - jnp.inf, row
    sums, largest[...], total[...] = jax.lax.fori_loop(0, k.shape[1] // settings.keys, add, start)
    out[...] = (sums / total[...]).astype(out.dtype)


def _queries_kernel(seed, q, largest, total, mean, ct, k, v, bias, q_ct, *, settings):
    block = _Block(seed, settings)
    queries = pl.program_id(2)
    of_queries = q[...], largest[...], total[...], mean[...], ct[...]

    def add(i, q_ct):
        keys = pl.ds(i * settings.keys, settings.keys)
        of_keys = k[:, keys], v[:, keys], bias[keys, :]
        return q_ct + block.dot(of_keys[0], block.cotangents(i, queries, of_queries, of_keys)[1], 1, 0)

    start = jnp.zeros(q.shape, settings.dtype)
    q_ct[...] = jax.lax.fori_loop(0, k.shape[1] // settings.keys, add, start).astype(q_ct.dtype)


def _keys_kernel(seed, q, largest, total, mean, ct, k, v, bias, k_ct, v_ct, *, settings):
    block = _Block(seed, settings)
    keys = pl.program_id(2)
    of_keys = k[...], v[...], bias[...]

    def add(i, carry):
        queries = pl.ds(i * settings.queries, settings.queries)
        of_queries = [x[:, queries] for x in (q, largest, total, mean, ct)]
        weights, scores_ct = block.cotangents(keys, i, of_queries, of_keys)
        return (
            carry[0] + block.dot(of_queries[0], scores_ct, 1, 1),
            carry[1] + block.dot(of_queries[-1], weights, 1, 1),
        )

    start = jnp.zeros(k.shape, settings.dtype), jnp.zeros(v.shape, settings.dtype)
    sums = jax.lax.fori_loop(0, q.shape[1] // settings.queries, add, start)
    k_ct[...], v_ct[...] = sums[0].astype(k_ct.dtype), sums[1].astype(v_ct.dtype)


class _Block:
    """One block of scores, [keys, queries], of the kernel's picture and head."""

    def __init__(self, seed, settings):
        self.seed, self.settings = seed, settings
        self.head = pl.program_id(0) * settings.num_heads + pl.program_id(1)

    def dot(self, a, b, axis_a, axis_b):
        """The product over an axis of each."""
        axes = ((axis_a,), (axis_b,)), ((), ())
        return jax.lax.dot_general(a, b, axes, self.settings.precision, self.settings.dtype)

    def drop(self, keys, queries, *blocks):
        """Dropout with the mask of `is_kept`, the keys'th and queries'th block of it."""
        settings = self.settings
        if not settings.dropout:
            return blocks
        first = keys * settings.keys, queries * settings.queries
        key, query = (
            jax.lax.broadcasted_iota(jnp.uint32, blocks[0].shape, axis) + jnp.asarray(first[axis], jnp.uint32)
            for axis in (0, 1)
        )
        position = (self.head.astype(jnp.uint32) * settings.num_queries + query) * settings.num_keys + key
        kept = is_kept_at(position, self.seed, settings.dropout)
        return [keep(x, kept, settings.dropout) for x in blocks]

    def cotangents(self, keys, queries, of_queries, of_keys):
        """The weights after dropout, and the cotangent of the scores."""
        (q, largest, total, mean, ct), (k, v, bias) = of_queries, of_keys
        weights = jnp.exp(self.dot(k, q, 0, 0) + bias - largest) / total
        dropped, weights_ct = self.drop(keys, queries, weights, self.dot(v, ct, 0, 0))
        scores_ct = jnp.where(bias < 0, 0, weights * (weights_ct - mean))
        return dropped.astype(v.dtype), scores_ct.astype(q.dtype)
