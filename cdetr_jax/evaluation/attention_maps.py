"""Where a detector looks: the weights of its attention over a picture, and how much of them lies where at a box."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt8

from cdetr_jax.models.attention import along_last, attention_scores, split_heads
from cdetr_jax.models.detector import Stages, normalize, padding_mask
from cdetr_jax.structs import AnyArray

# What a score is the sum of, and the score itself: the maps of the paper's figures 1 and 4.
PARTS = ("spatial", "content", "combined")
# Where attention may lie at a box: see `region_shares`.
REGIONS = ("left", "top", "right", "bottom", "middle")


class Attending(NamedTuple):
    """What the attention of every layer (L, of the encoder or of the decoder) compares.

    Attributes:
      q, k: queries and keys, as the layers have them.
      p_k: the part of the keys that stands for their positions; the rest, k - p_k, stands for the picture's content.
      is_pad: True = padding.
    """

    q: Float[Array, "B L Q N d"]
    k: Float[Array, "B L S N d"]
    p_k: Float[Array, "B L S N d"]
    is_pad: Bool[Array, "B h w"]


def attending(
    model: nn.Module, variables: Any, images: UInt8[AnyArray, "B H W 3"], sizes_hw: Int[AnyArray, "B 2"]
) -> tuple[Stages, dict[str, Attending]]:
    """Runs a detector and keeps what decides where it looks.

    In Conditional DETR's cross-attention a key is a content and a position side by side; p_k is the latter. Elsewhere
    (DETR's cross-attention, the encoder's self-attention) it is W_k (content + position) + b; p_k is W_k position.
    In the conditional decoder's first layer the content has the position added, as published.
    Args:
      images, sizes_hw: as in a `Batch`.
    Returns: all stages; of the `decoder` the cross-attention, whose Q are the object queries; of the `encoder`, if it
      has layers, the self-attention, whose Q are the cells.
    """
    is_pad = padding_mask(sizes_hw, images.shape[1:3])
    stages, sown = model.apply(variables, normalize(images, is_pad), is_pad, method="stages", mutable="intermediates")
    conditional = model.decoder == "conditional"
    pos = stages.pos.reshape(len(images), -1, model.width)

    def of_layer(layer: str, attention: str) -> tuple[Array, Array, Array]:
        (q,), (k,) = (sown["intermediates"]["transformer"][layer][attention][name] for name in ("q", "k"))
        if attention == "cross_attn":
            return q, k, k.at[..., : k.shape[-1] // 2].set(0)
        kernel = variables["params"]["transformer"][layer][attention]["k_proj"]["kernel"]
        with jax.default_matmul_precision(model.matmul_precision):
            return q, k, split_heads(pos @ kernel, model.num_heads)

    found = {}
    for side, layers, attention in (
        ("decoder", model.decoder_layers, "cross_attn" if conditional else "multihead_attn"),
        ("encoder", model.encoder_layers, "self_attn"),
    ):
        parts = [of_layer(f"{side}_layers_{i}", attention) for i in range(layers)]
        if parts:
            found[side] = Attending(*(jnp.stack(part, axis=1) for part in zip(*parts, strict=True)), stages.is_pad)
    return stages, found


def attention_maps(
    model: nn.Module, attending: Attending, queries: Int[AnyArray, "B n"]
) -> Float[Array, "B P L n N h w"]:
    """Softmax over a picture's cells of p_q.p_k (spatial), of c_q.c_k (content), and of their sum (combined).

    The sum is what the forward pass attends with. All three have its scale, 1/sqrt(d). In DETR both p_q and c_q are
    c_q + o_q, the whole query. Only what is asked for is computed.
    Args:
      queries: the chosen ones of each picture.
    Returns: a map for each of `PARTS`, layer, query and head: it adds up to 1, and is 0 where there is padding.
    """
    height, width = attending.is_pad.shape[1:]

    def of_picture(arguments: tuple[Attending, Array]) -> Array:
        picture, chosen = arguments
        q = picture.q[:, chosen]
        is_pad = jnp.broadcast_to(picture.is_pad.reshape(1, -1), (len(q), height * width))
        precision = jax.config.jax_default_matmul_precision
        keys = (picture.p_k, picture.k - picture.p_k, picture.k)
        weights = [jax.nn.softmax(attention_scores(q, k, is_pad, precision), axis=-1) for k in keys]
        maps = jnp.stack(weights).swapaxes(2, 3)
        return maps.reshape(*maps.shape[:-1], height, width)

    with jax.default_matmul_precision(model.matmul_precision):
        return jax.lax.map(of_picture, (attending, jnp.asarray(queries)))


def region_shares(
    maps: Float[Array, "... h w"], boxes_xyxy: Float[Array, "... 4"], size_hw: Float[Array, " 2"]
) -> Float[Array, "... R"]:
    """How much of each map lies in each of `REGIONS` of its box, and at last in the box.

    `left` is where one is within a quarter of the box's width from its left side, to either side, and between its top
    and its bottom; `right`, `top`, `bottom` likewise. `middle` is the inner half of the box in both directions, so that
    it touches the four and overlaps none. A cell counts by the share of its area, see `cell_sides`.
    Args:
      boxes_xyxy: in cells.
      size_hw: the picture's height and width in cells.
    """
    x0, y0, x1, y1 = jnp.moveaxis(boxes_xyxy, -1, 0)
    dx, dy = (x1 - x0) / 4, (y1 - y0) / 4
    from_to_x = [(x0 - dx, x0 + dx), (x0, x1), (x1 - dx, x1 + dx), (x0, x1), (x0 + dx, x1 - dx), (x0, x1)]
    from_to_y = [(y0, y1), (y0 - dy, y0 + dy), (y0, y1), (y1 - dy, y1 + dy), (y0 + dy, y1 - dy), (y0, y1)]

    def covered(from_to: list[tuple[Array, Array]], cells: int, length: Array) -> Array:
        """Share of each row or column of cells between the two, [... R cells]."""
        low, high = (jnp.stack(each, axis=-1)[..., None] for each in zip(*from_to, strict=True))
        start, end = (along_last(side, low) for side in cell_sides(cells, length))
        inside = jnp.clip(jnp.minimum(high, end) - jnp.maximum(low, start), 0)
        return inside / jnp.where(end > start, end - start, 1)

    x, y = covered(from_to_x, maps.shape[-1], size_hw[1]), covered(from_to_y, maps.shape[-2], size_hw[0])
    return jnp.einsum("...hw,...rh,...rw->...r", maps, y, x)


def cell_sides(cells: int, length: Float[Array, ""]) -> tuple[Float[Array, " n"], Float[Array, " n"]]:
    """From where to where each row or column of cells sees the picture, in cells.

    A convolution of stride s puts the middle of cell i on pixel s i, not half a cell further, so it stands for i - 1/2
    to i + 1/2; the first from 0 on, the last one that holds a part of the picture up to the picture's end.
    Args:
      cells: rows or columns, with those of the padding.
      length: of the picture.
    """
    i = jnp.arange(cells).astype(length.dtype)
    return jnp.maximum(i - 0.5, 0), jnp.where(i + 1 < length, i + 0.5, length)


def centre_of_mass(maps: Float[Array, "... h w"]) -> Float[Array, "... 2"]:
    """(x, y) in cells of the middle of each map's weight."""
    x = jnp.einsum("...hw,w->...", maps, jnp.arange(maps.shape[-1]).astype(maps.dtype))
    y = jnp.einsum("...hw,h->...", maps, jnp.arange(maps.shape[-2]).astype(maps.dtype))
    return jnp.stack([x, y], axis=-1)
