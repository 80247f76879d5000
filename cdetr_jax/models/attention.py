"""Multi-head attention whose query/key width may exceed the value width, and the linear layers around it."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from cdetr_jax.models.elementwise import is_kept, keep, new_seed, relu
from cdetr_jax.structs import AnyArray


def compute_dtype(dtype: DTypeLike, like: AnyArray) -> jnp.dtype:
    """The dtype to compute in: float32 means at least that, so that float64 parameters compute in float64."""
    return jnp.promote_types(dtype, like.dtype) if dtype == jnp.float32 else jnp.dtype(dtype)


xavier_uniform = nn.initializers.xavier_uniform()
# PyTorch's default for a linear layer: uniform within 1/sqrt(fan_in).
torch_uniform = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
# Xavier over the packed [3 D, D] matrix that PyTorch's attention initialises as one.
packed_xavier_uniform = nn.initializers.variance_scaling(0.5, "fan_avg", "uniform")


def along_last(vector: Float[AnyArray, " D"], like: AnyArray) -> Float[AnyArray, "..."]:
    """The vector along the last axis of arrays with as many axes as `like`: nothing broadcasts by accident."""
    return vector.reshape((1,) * (like.ndim - 1) + (-1,))


@functools.partial(jax.checkpoint, prevent_cse=False)
def affine(
    x: Float[AnyArray, "... I"], kernel: Float[AnyArray, "I O"], bias: Float[AnyArray, " O"]
) -> Float[AnyArray, "... O"]:
    """`x W + b` in x's dtype. The backward pass keeps x and the parameters themselves, no copy in another dtype."""
    return x @ kernel.astype(x.dtype) + along_last(bias.astype(x.dtype), x)


class Linear(nn.Module):
    """`x W + b`; without a `bias_init` the bias is uniform within 1/sqrt(fan_in), PyTorch's default."""

    features: int
    kernel_init: nn.initializers.Initializer = xavier_uniform
    bias_init: nn.initializers.Initializer | None = None
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "... I"]) -> Float[Array, "... O"]:
        fan_in = x.shape[-1]
        kernel = self.param("kernel", self.kernel_init, (fan_in, self.features))
        bias = self.param("bias", self.bias_init or _uniform(fan_in**-0.5), (self.features,))
        return affine(x.astype(compute_dtype(self.dtype, kernel)), kernel, bias)


def _uniform(bound: float) -> nn.initializers.Initializer:
    return lambda rng, shape: jax.random.uniform(rng, shape, minval=-bound, maxval=bound)


class MLP(nn.Module):
    """Linear layers `layers_0, layers_1, ...` with ReLU between them: the papers' FFN.

    Attributes:
      features: width of each layer's output.
      kernel_init: of every layer.
      last_init: initialisers of the last layer's kernel and bias, if they differ.
    """

    features: tuple[int, ...]
    kernel_init: nn.initializers.Initializer = xavier_uniform
    last_init: tuple[nn.initializers.Initializer, nn.initializers.Initializer] | None = None
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "... I"]) -> Float[Array, "... O"]:
        last = len(self.features) - 1
        for i, features in enumerate(self.features):
            kernel_init, bias_init = (self.kernel_init, None) if self.last_init is None or i < last else self.last_init
            x = Linear(features, kernel_init, bias_init, self.dtype, name=f"layers_{i}")(x)
            if i < last:
                x = relu(x)
        return x


def attend(
    q: Float[Array, "B Q N d"],
    k: Float[Array, "B S N d"],
    v: Float[Array, "B S N e"],
    is_pad: Bool[Array, "B S"] | None,
    dropout: float = 0.0,
    rng: Array | None = None,
    form: str = "einsum",
) -> Float[Array, "B Q N e"]:
    """dropout(softmax(q k / sqrt(d))) v per head. `is_pad`: True = this key counts for nothing; no `rng`: no dropout.

    The scores are compared in at least float32 whatever the dtype. Nothing of their size is kept for the backward pass,
    which computes them again, and draws the same dropout from the same `rng` (as arXiv:2205.14135 does, section 3.1).

    Args:
      form: `einsum`, or `fused` (fused_attention.py), which on other devices than TPUs and NVIDIA's GPUs is the same.
    """
    # The precision is handed on: the backward pass is traced later, when the default may be another.
    precision = jax.config.jax_default_matmul_precision
    return _attend(q, k, v, is_pad, new_seed(rng, dropout), dropout, precision, form == "fused")


def attention_scores(
    q: Float[Array, "B Q N d"],
    k: Float[Array, "B S N d"],
    is_pad: Bool[Array, "B S"] | None,
    precision: str | None,
) -> Float[Array, "B N Q S"]:
    """q k / sqrt(d), in at least float32, and the lowest number where `is_pad`: softmax makes the weights of it."""
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    scores = jnp.einsum(
        "bqnd,bsnd->bnqs", q * q.shape[-1] ** -0.5, k, preferred_element_type=dtype, precision=precision
    )
    # Finite, so that a picture that is all padding gives numbers and not NaN.
    return scores if is_pad is None else jnp.where(is_pad[:, None, None, :], jnp.finfo(dtype).min, scores)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def _attend(q, k, v, is_pad, seed, dropout, precision, fused):
    return _attend_fwd(q, k, v, is_pad, seed, dropout, precision, fused)[0]


def _attend_fwd(q, k, v, is_pad, seed, dropout, precision, fused):
    forward = functools.partial(_forward, dropout=dropout, precision=precision)
    out, *statistics = _by_platform("forward", forward, fused, q, k, v, is_pad, seed)
    return out, (q, k, v, is_pad, seed, out, *statistics)


def _forward(q, k, v, is_pad, seed, *, dropout, precision):
    scores = attention_scores(q, k, is_pad, precision)
    largest = scores.max(-1)
    exponentials = jnp.exp(scores - largest[..., None])
    total = exponentials.sum(-1)
    weights = (exponentials / total[..., None]).astype(v.dtype)
    out = jnp.einsum("bnqs,bsne->bqne", _drop(weights, seed, dropout), v, precision=precision)
    return out, largest, total


def _attend_bwd(dropout, precision, fused, residuals, ct):
    *given, out, largest, total = residuals
    # The sum over s of weights * weights_ct, from what is there already.
    mean = jnp.einsum("bqne,bqne->bnq", ct, out, preferred_element_type=largest.dtype, precision=precision)
    backward = functools.partial(_backward, dropout=dropout, precision=precision)
    return *_by_platform("backward", backward, fused, *given, largest, total, mean, ct), None, None


def _backward(q, k, v, is_pad, seed, largest, total, mean, ct, *, dropout, precision):
    scores = attention_scores(q, k, is_pad, precision)
    weights = (jnp.exp(scores - largest[..., None]) / total[..., None]).astype(v.dtype)
    v_ct = jnp.einsum("bnqs,bqne->bsne", _drop(weights, seed, dropout), ct, precision=precision)
    weights_ct = jnp.einsum("bqne,bsne->bnqs", ct, v, preferred_element_type=scores.dtype, precision=precision)
    scores_ct = weights * (_drop(weights_ct, seed, dropout) - mean[..., None])
    if is_pad is not None:
        scores_ct = jnp.where(is_pad[:, None, None, :], 0, scores_ct)
    scores_ct, scale = scores_ct.astype(q.dtype), q.shape[-1] ** -0.5
    q_ct = jnp.einsum("bnqs,bsnd->bqnd", scores_ct, k * scale, precision=precision)
    k_ct = jnp.einsum("bnqs,bqnd->bsnd", scores_ct, q * scale, precision=precision)
    return q_ct, k_ct, v_ct


_attend.defvjp(_attend_fwd, _attend_bwd)


def _by_platform(name, einsums, fused, *arguments):
    """`fused` and where there are kernels: the function of this name with the keywords of `einsums`; else that."""
    if not fused:
        return einsums(*arguments)
    from cdetr_jax.models import fused_attention  # takes a third of a second

    kernels = functools.partial(getattr(fused_attention, name), **einsums.keywords)
    by_platform = {platform: functools.partial(kernels, platform=platform) for platform in fused_attention.PLATFORMS}
    return jax.lax.platform_dependent(*arguments, default=einsums, **by_platform)


def _drop(weights, seed, dropout):
    return weights if seed is None else keep(weights, is_kept(seed, weights.shape, dropout), dropout)


class Attend(nn.Module):
    """`attend`, then the output projection. Sows its queries and keys, for who wants to see where it looks."""

    dropout: float = 0.0
    dtype: DTypeLike = jnp.float32
    form: str = "einsum"

    @nn.compact
    def __call__(
        self,
        q: Float[Array, "B Q N d"],
        k: Float[Array, "B S N d"],
        v: Float[Array, "B S N e"],
        is_pad: Bool[Array, "B S"] | None,
        train: bool,
    ) -> Float[Array, "B Q D"]:
        """Attends from `q` to `k`, `v`; `is_pad`: True = this key counts for nothing. Returns width N * e."""
        rng = self.make_rng("dropout") if train and self.dropout > 0 else None
        self.sow("intermediates", "q", q)
        self.sow("intermediates", "k", k)
        out = attend(q, k, v, is_pad, self.dropout, rng, self.form)
        out = out.reshape(*out.shape[:2], -1)
        return Linear(out.shape[-1], bias_init=nn.initializers.zeros, dtype=self.dtype, name="out_proj")(out)


def split_heads(x: Float[Array, "B S D"], num_heads: int) -> Float[Array, "B S N d"]:
    """Cuts the width into heads."""
    return x.reshape(*x.shape[:-1], num_heads, -1)


class MultiHeadAttention(nn.Module):
    """The standard attention of the encoder and of DETR's decoder: plain q, k and v projections."""

    num_heads: int
    dropout: float = 0.0
    dtype: DTypeLike = jnp.float32
    form: str = "einsum"

    @nn.compact
    def __call__(
        self,
        q: Float[Array, "B Q D"],
        k: Float[Array, "B S D"],
        v: Float[Array, "B S D"],
        is_pad: Bool[Array, "B S"] | None,
        train: bool,
    ) -> Float[Array, "B Q D"]:
        """Projects, attends and projects back; `is_pad`: True = this key counts for nothing."""
        heads = []
        for name, x in (("q_proj", q), ("k_proj", k), ("v_proj", v)):
            linear = Linear(x.shape[-1], packed_xavier_uniform, nn.initializers.zeros, self.dtype, name=name)
            heads.append(split_heads(linear(x), self.num_heads))
        attend = Attend(self.dropout, self.dtype, self.form)
        nn.share_scope(self, attend)  # the output projection sits beside the others, as in PyTorch's module
        return attend(*heads, is_pad, train)
