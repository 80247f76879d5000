"""The encoder, DETR's decoder and the conditional decoder."""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from cdetr_jax.models import position
from cdetr_jax.models.attention import MLP, Attend, Linear, MultiHeadAttention, split_heads, xavier_uniform
from cdetr_jax.models.elementwise import dropout, relu

REFERENCE_POINTS = ("zero", "learned", "predicted")
SPATIAL_QUERIES = ("full", "c", "t", "p", "i")
TRANSFORMATIONS = ("identity", "scalar", "block", "full", "diagonal")


class AddAndNorm(nn.Module):
    """Post-norm residual: LayerNorm(x + dropout(y)), eps 1e-5."""

    dropout: float
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "B S D"], y: Float[Array, "B S D"], train: bool) -> Float[Array, "B S D"]:
        x = x + dropout(y, self.dropout, _dropout_rng(self, train))
        norm = layer_norm(self.dtype)
        nn.share_scope(self, norm)
        return norm(x)


def _dropout_rng(module: nn.Module, train: bool) -> Array | None:
    """A new key where dropout is on."""
    return module.make_rng("dropout") if train and module.dropout > 0 else None


def layer_norm(dtype: DTypeLike, name: str | None = None) -> nn.LayerNorm:
    """PyTorch's LayerNorm; the two-pass variance keeps float32 parity on large means."""
    dtype = None if dtype == jnp.float32 else dtype  # None: the dtype of input and parameters
    return nn.remat(nn.LayerNorm, prevent_cse=False)(epsilon=1e-5, dtype=dtype, use_fast_variance=False, name=name)


class TransformerLayer(nn.Module):
    """What every layer shares: widths, dropout, and the feed-forward block."""

    width: int
    num_heads: int
    ffn_width: int
    dropout: float
    dtype: DTypeLike
    attention: str = "einsum"

    def add_and_norm(self, name: str) -> AddAndNorm:
        """The residual connection called `name`."""
        return AddAndNorm(self.dropout, self.dtype, name=name)

    def attend(self, name: str) -> MultiHeadAttention:
        """A standard attention called `name`."""
        return MultiHeadAttention(self.num_heads, self.dropout, self.dtype, self.attention, name=name)

    def feed_forward(self, x: Float[Array, "B S D"], train: bool) -> Float[Array, "B S D"]:
        """Two linear layers with ReLU and dropout between."""
        y = Linear(self.ffn_width, dtype=self.dtype, name="linear1")(x)
        y = relu(y, self.dropout, _dropout_rng(self, train))
        return Linear(self.width, dtype=self.dtype, name="linear2")(y)


class EncoderLayer(TransformerLayer):
    """Self-attention over the feature grid with q = k = x + pos, v = x, then the feed-forward block."""

    @nn.compact
    def __call__(
        self, x: Float[Array, "B S D"], pos: Float[Array, "B S D"], is_pad: Bool[Array, "B S"], train: bool
    ) -> Float[Array, "B S D"]:
        q = x + pos
        x = self.add_and_norm("norm1")(x, self.attend("self_attn")(q, q, x, is_pad, train), train)
        return self.add_and_norm("norm2")(x, self.feed_forward(x, train), train)


class DetrDecoderLayer(TransformerLayer):
    """DETR's decoder layer: positions are added to contents before the projections."""

    @nn.compact
    def __call__(self, x, *, memory, pos, is_pad, query_pos, spatial_query, train):
        """As `ConditionalDecoderLayer`; `spatial_query` is not used."""
        del spatial_query
        q = x + query_pos
        x = self.add_and_norm("norm1")(x, self.attend("self_attn")(q, q, x, None, train), train)
        y = self.attend("multihead_attn")(x + query_pos, memory + pos, memory, is_pad, train)
        x = self.add_and_norm("norm2")(x, y, train)
        return self.add_and_norm("norm3")(x, self.feed_forward(x, train), train)


class ConditionalDecoderLayer(TransformerLayer):
    """The conditional decoder layer (section 3.3, figure 3).

    Cross-attention concatenates content and position per head, so that the score is `c_q.c_k + p_q.p_k`, equation
    (3). In the first layer, where the decoder embedding is still zero, both contents get their positions added.
    """

    is_first: bool = False
    local_gain: float = 0.0

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B Q D"],
        *,
        memory: Float[Array, "B S D"],
        pos: Float[Array, "B S D"],
        is_pad: Bool[Array, "B S"],
        query_pos: Float[Array, "B Q D"],
        spatial_query: Callable[[Array, Array], Array],
        train: bool,
    ) -> Float[Array, "B Q D"]:
        """One layer.

        Args:
          x: the decoder embedding f.
          memory, pos, is_pad: the encoder's output, the keys' positions, True = padding.
          query_pos: the object queries.
          spatial_query: from f and from the self-attention's output c_q to p_q, equation (4).
          train: dropout is on; needs the rng `dropout`.
        """

        def linear(name: str, inputs: Array, kernel_init: nn.initializers.Initializer = xavier_uniform) -> Array:
            return Linear(self.width, kernel_init, dtype=self.dtype, name=name)(inputs)

        def heads(inputs: Array) -> Array:
            return split_heads(inputs, self.num_heads)

        q = linear("sa_qcontent_proj", x) + linear("sa_qpos_proj", query_pos)
        k = linear("sa_kcontent_proj", x) + linear("sa_kpos_proj", query_pos)
        v = linear("sa_v_proj", x)
        y = Attend(self.dropout, self.dtype, self.attention, name="self_attn")(
            heads(q), heads(k), heads(v), None, train
        )
        c_q = self.add_and_norm("norm1")(x, y, train)

        position_init = _same_orthogonal(self.local_gain) if self.local_gain > 0 else xavier_uniform
        q_content = linear("ca_qcontent_proj", c_q)
        k_content = linear("ca_kcontent_proj", memory)
        k_pos = linear("ca_kpos_proj", pos, position_init)
        v = linear("ca_v_proj", memory)
        if self.is_first:
            q_content = q_content + linear("ca_qpos_proj", query_pos)
            k_content = k_content + k_pos
        q_pos = linear("ca_qpos_sine_proj", spatial_query(x, c_q), position_init)
        q = jnp.concatenate([heads(q_content), heads(q_pos)], axis=-1)
        k = jnp.concatenate([heads(k_content), heads(k_pos)], axis=-1)
        y = Attend(self.dropout, self.dtype, self.attention, name="cross_attn")(q, k, heads(v), is_pad, train)
        x = self.add_and_norm("norm2")(c_q, y, train)
        return self.add_and_norm("norm3")(x, self.feed_forward(x, train), train)


def _same_orthogonal(gain: float) -> nn.initializers.Initializer:
    """Always the same rotation: two projections that start from it keep the dot products of what they project."""

    def init(_: Array, shape: tuple[int, int]) -> Array:
        return jnp.asarray(gain * _rotation(shape), float)

    return init


@functools.cache  # Flax asks for it again, for its shape, whenever the model is traced
def _rotation(shape: tuple[int, int]) -> np.ndarray:
    return np.linalg.qr(np.random.default_rng(0).standard_normal(shape))[0]


class SpatialQuery(nn.Module):
    """(s, f) -> p_q, equations (4) and (6), in all the forms that the paper compares.

    Attributes:
      form: a member of `SPATIAL_QUERIES` (table 3): `full` lambda_q(f) p_s; `i` lambda_q(c_q) p_s; `t` lambda_q
        alone; `p` p_s alone; `c` the decoder embedding f itself.
      transformation: a member of `TRANSFORMATIONS` (figure 5): what the FFN predicts and how it acts on p_s.
      starts_as_identity: a scalar or diagonal T is 1 before training, instead of random.
    """

    form: str
    transformation: str
    width: int
    num_heads: int
    starts_as_identity: bool
    dtype: DTypeLike

    @nn.compact
    def __call__(
        self, f: Float[Array, "B Q D"], c_q: Float[Array, "B Q D"], p_s: Float[Array, "Q D"], is_first: bool
    ) -> Float[Array, "B Q D"]:
        """p_q. In the first layer T is the identity (lambda_q = 1), as in the published code."""
        p_s = jnp.broadcast_to(p_s, f.shape)
        if self.form == "c":
            return f
        if self.form == "p" or self.transformation == "identity":
            return p_s
        if is_first:
            return jnp.ones_like(p_s) if self.form == "t" else p_s
        head = self.width // self.num_heads
        outputs = {"scalar": 1, "diagonal": self.width, "block": self.width * head, "full": self.width**2}
        ones = (nn.initializers.zeros, nn.initializers.ones)
        last_init = ones if self.starts_as_identity and self.transformation in ("scalar", "diagonal") else None
        mlp = MLP((self.width, outputs[self.transformation]), last_init=last_init, dtype=self.dtype)
        nn.share_scope(self, mlp)
        t = mlp(c_q if self.form == "i" else f)
        if self.form == "t":
            return jnp.broadcast_to(t, p_s.shape)
        if self.transformation in ("scalar", "diagonal"):
            return t * p_s
        size = head if self.transformation == "block" else self.width
        blocks = t.reshape(*t.shape[:-1], -1, size, size)
        return jnp.einsum("bqnij,bqnj->bqni", blocks, p_s.reshape(*p_s.shape[:-1], -1, size)).reshape(p_s.shape)


class ReferencePoints(nn.Module):
    """The unnormalised reference point s of each query (sections 3.5 and 4.3).

    Attributes:
      form: a member of `REFERENCE_POINTS`: (0, 0); a free parameter; or predicted by a 2-layer FFN.
    """

    form: str

    @nn.compact
    def __call__(self, query_pos: Float[Array, "Q D"]) -> Float[Array, "Q 2"]:
        if self.form == "zero":
            return jnp.zeros((query_pos.shape[0], 2))
        if self.form == "learned":
            return self.param("points", nn.initializers.normal(1.0), (query_pos.shape[0], 2))
        mlp = MLP((query_pos.shape[-1], 2))
        nn.share_scope(self, mlp)
        return mlp(query_pos)


class Transformer(nn.Module):
    """Encoder and decoder.

    Attributes:
      decoder: `conditional` or `detr`.
      box_offset: the boxes will be offsets to the reference points, so DETR's decoder needs them too.
      reference_point, spatial_query, transformation: see the classes above.
      temperature: of the sine embeddings.
      local_gain: 0: Xavier, as published. Above, for training from random weights on few pictures: both position
        projections of the conditional cross-attention start as this gain times the same rotation, and T as the
        identity, so that `p_q.p_k` is highest at the query's reference point from the first step on.
      norm_between_layers: each decoder layer reads the normalised output of the one before, and the last output is
        normalised twice. Not as published: the form of weights that transformers trained with `auxiliary_loss`.
      width, num_heads, ffn_width, dropout, dtype, attention: of every layer; `attention` as `form` of `attend`.
    """

    decoder: str
    box_offset: bool
    encoder_layers: int
    decoder_layers: int
    width: int
    num_heads: int
    ffn_width: int
    dropout: float
    reference_point: str
    spatial_query: str
    transformation: str
    temperature: float
    local_gain: float
    norm_between_layers: bool
    dtype: DTypeLike
    attention: str = "einsum"

    @nn.compact
    def __call__(
        self,
        features: Float[Array, "B S D"],
        pos: Float[Array, "B S D"],
        is_pad: Bool[Array, "B S"],
        query_pos: Float[Array, "Q D"],
        train: bool,
    ) -> tuple[Float[Array, "B S D"], Float[Array, "L B Q D"], Float[Array, "Q 2"]]:
        """Returns the memory, every decoder layer's normalised output, and the reference points s (0 if unused)."""
        layer = {
            "width": self.width,
            "num_heads": self.num_heads,
            "ffn_width": self.ffn_width,
            "dropout": self.dropout,
            "dtype": self.dtype,
            "attention": self.attention,
        }
        memory = features
        for i in range(self.encoder_layers):
            memory = EncoderLayer(**layer, name=f"encoder_layers_{i}")(memory, pos, is_pad, train)

        conditional = self.decoder == "conditional"
        form = self.reference_point if conditional or self.box_offset else "zero"
        points = ReferencePoints(form, name="ref_point_head")(query_pos)
        p_s = position.point_embedding(jax.nn.sigmoid(points), self.width, self.temperature)  # equation (5)
        query_scale = SpatialQuery(
            self.spatial_query,
            self.transformation,
            self.width,
            self.num_heads,
            self.local_gain > 0,
            self.dtype,
            name="query_scale",
        )
        norm = layer_norm(self.dtype, name="decoder_norm")
        x = jnp.zeros((features.shape[0], *query_pos.shape), features.dtype)
        outputs = []
        for i in range(self.decoder_layers):
            special = {"is_first": i == 0, "local_gain": self.local_gain} if conditional else {}
            cls = ConditionalDecoderLayer if conditional else DetrDecoderLayer
            x = cls(**layer, **special, name=f"decoder_layers_{i}")(
                x,
                memory=memory,
                pos=pos,
                is_pad=is_pad,
                query_pos=jnp.broadcast_to(query_pos.astype(x.dtype), x.shape),
                spatial_query=lambda f, c_q, first=i == 0: query_scale(f, c_q, p_s, first),
                train=train,
            )
            outputs.append(norm(x))
            if self.norm_between_layers:
                x = outputs[-1]
        if self.norm_between_layers:
            outputs[-1] = norm(x)
        return memory, jnp.stack(outputs), points
