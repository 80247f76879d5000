"""The whole detector: backbone, projection, transformer, class and box heads."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, UInt8

from cdetr_jax.models import position
from cdetr_jax.models.attention import MLP, Linear, along_last, torch_uniform
from cdetr_jax.models.resnet import ResNet
from cdetr_jax.models.transformer import Transformer
from cdetr_jax.structs import AnyArray, Predictions

MEAN_RGB = (0.485, 0.456, 0.406)
STD_RGB = (0.229, 0.224, 0.225)


class Stages(NamedTuple):
    """What the stages of one forward pass give, to look at or to test; `Predictions` is what training needs."""

    features: Float[Array, "B h w C"]
    is_pad: Bool[Array, "B h w"]
    pos: Float[Array, "B h w D"]
    memory: Float[Array, "B S D"]
    decoder_output: Float[Array, "L B Q D"]
    reference_points: Float[Array, "Q 2"]
    predictions: Predictions


def padding_mask(sizes_hw: Int[AnyArray, "B 2"], shape_hw: tuple[int, int]) -> Bool[Array, "B H W"]:
    """True outside of each picture's upper left `sizes_hw` pixels."""
    rows, columns = jnp.arange(shape_hw[0])[None, :, None], jnp.arange(shape_hw[1])[None, None, :]
    return (rows >= sizes_hw[:, 0, None, None]) | (columns >= sizes_hw[:, 1, None, None])


def normalize(images: UInt8[AnyArray, "B H W 3"], is_pad: Bool[Array, "B H W"]) -> Float[Array, "B H W 3"]:
    """ImageNet normalisation; padding is zero afterwards."""
    mean, std = (along_last(jnp.array(rgb), images) for rgb in (MEAN_RGB, STD_RGB))
    x = (images.astype(float) / 255.0 - mean) / std
    return jnp.where(is_pad[..., None], 0.0, x)


def inverse_sigmoid(x: Float[Array, "..."], eps: float = 1e-5) -> Float[Array, "..."]:
    """The logit of x, both sides of the fraction kept at `eps` or more."""
    x = jnp.clip(x, 0.0, 1.0)
    return jnp.log(jnp.maximum(x, eps) / jnp.maximum(1.0 - x, eps))


def resize_mask(mask: Bool[Array, "B H W"], shape_hw: tuple[int, int]) -> Bool[Array, "B h w"]:
    """Nearest neighbour, PyTorch's way: cell i looks at pixel floor(i H / h)."""
    rows = [i * mask.shape[1] // shape_hw[0] for i in range(shape_hw[0])]
    columns = [i * mask.shape[2] // shape_hw[1] for i in range(shape_hw[1])]
    return mask[:, jnp.array(rows)][:, :, jnp.array(columns)]


class DetectionTransformer(nn.Module):
    """Conditional DETR, or DETR with `decoder="detr"`. The defaults are the published model; recipes take them over.

    Attributes:
      num_classes: class logits C. With `class_loss="softmax"` one more is added, for "no object".
      box_offset: boxes are sigmoid(FFN(f) + [s, 0, 0]), equation (1); else sigmoid(FFN(f)).
      dtype: of the backbone's and the transformer's computation; heads and boxes are at least float32. float32 means
        at least that everywhere: float64 variables compute in float64 (`jax_enable_x64`).
      matmul_precision: of products and convolutions of float32 numbers on accelerators: `default`, the chip's fastest
        (TF32 on a GPU, bfloat16 on a TPU), `high` or `highest` (float32). CPUs always compute in full.
      The rest: see `ResNet` and `Transformer`.
    """

    decoder: str = "conditional"  # conditional (arXiv:2108.06152) | detr (arXiv:2005.12872)
    backbone: str = "resnet50"  # resnet18 | resnet34 | resnet50 | resnet101
    backbone_width: int = 64  # channels of the stem; 64 is torchvision's
    backbone_norm: str = "frozen_batch"  # frozen_batch (published) | group (to train without ImageNet weights)
    frozen_stages: int = 2  # 2: stem and layer1 are not trained (published); 0: everything is
    dc5: bool = False  # stage 5 dilated instead of strided: twice the resolution
    width: int = 256  # D
    num_heads: int = 8  # N
    ffn_width: int = 2048
    encoder_layers: int = 6
    decoder_layers: int = 6  # L
    num_queries: int = 300  # Q
    dropout: float = 0.1
    num_classes: int = 91  # class logits C; in a config 0: as many as the data needs
    class_loss: str = "focal"  # focal | softmax (adds a "no object" logit)
    box_offset: bool = True  # boxes are offsets to the reference point, equation (1)
    reference_point: str = "predicted"  # zero | learned | predicted, section 3.5
    spatial_query: str = "full"  # full | c | t | p | i: CSQ and CSQ-C/T/P/I of table 3
    transformation: str = "diagonal"  # identity | scalar | block | full | diagonal, figure 5
    temperature: float = 10000.0  # of the sine embeddings; 20 (arXiv:2201.12329) suits small feature grids
    norm_between_layers: bool = False  # True: as transformers' port with auxiliary_loss, for weights trained there
    local_gain: float = 0.0  # 0: published initialisation; 6: attention starts near the reference points
    # einsum | fused: as kernels that write no scores to memory, on TPUs and NVIDIA's GPUs; elsewhere the same.
    attention: str = "einsum"
    # Of float32 products on accelerators: default (TF32 on a GPU, bfloat16 on a TPU: the fastest) | high | highest.
    matmul_precision: str = "default"
    dtype: DTypeLike = jnp.float32  # in a config `compute_dtype`: float32 | bfloat16

    def stages(self, images: Float[Array, "B H W 3"], is_pad: Bool[Array, "B H W"], train: bool = False) -> Stages:
        """Runs the detector on normalised pictures and returns what every stage gives.

        Args:
          images: normalised, zero where `is_pad`.
          is_pad: True = padding.
          train: dropout is on; needs the rng `dropout`.
        """
        with jax.default_matmul_precision(self.matmul_precision):
            return self._stages(images, is_pad, train)

    @nn.compact
    def _stages(self, images: Float[Array, "B H W 3"], is_pad: Bool[Array, "B H W"], train: bool) -> Stages:
        features = ResNet(
            self.backbone,
            self.backbone_width,
            self.backbone_norm,
            self.frozen_stages,
            self.dc5,
            self.dtype,
            name="backbone",
        )(images)
        batch, h, w, _ = features.shape
        is_pad = resize_mask(is_pad, (h, w))
        pos = position.grid_embedding(is_pad, self.width, self.temperature)
        projected = Linear(self.width, torch_uniform, dtype=self.dtype, name="input_proj")(features)
        query_pos = self.param("query_embed", nn.initializers.normal(1.0), (self.num_queries, self.width))
        memory, decoder_output, points = Transformer(
            decoder=self.decoder,
            box_offset=self.box_offset,
            encoder_layers=self.encoder_layers,
            decoder_layers=self.decoder_layers,
            width=self.width,
            num_heads=self.num_heads,
            ffn_width=self.ffn_width,
            dropout=self.dropout,
            reference_point=self.reference_point,
            spatial_query=self.spatial_query,
            transformation=self.transformation,
            temperature=self.temperature,
            local_gain=self.local_gain,
            norm_between_layers=self.norm_between_layers,
            dtype=self.dtype,
            attention=self.attention,
            name="transformer",
        )(
            projected.reshape(batch, h * w, self.width),
            pos.reshape(batch, h * w, self.width),
            is_pad.reshape(batch, h * w),
            query_pos,
            train,
        )
        f = decoder_output.astype(jnp.promote_types(decoder_output.dtype, jnp.float32))
        focal = self.class_loss == "focal"
        logits = Linear(
            self.num_classes if focal else self.num_classes + 1,
            torch_uniform,
            # Every class starts at a score of 0.01 (focal loss, arXiv:1708.02002).
            nn.initializers.constant(-math.log(99.0)) if focal else None,
            name="class_embed",
        )(f)
        zeros = nn.initializers.zeros
        boxes = MLP((self.width, self.width, 4), torch_uniform, last_init=(zeros, zeros), name="bbox_embed")(f)
        if self.box_offset:
            offset = inverse_sigmoid(jax.nn.sigmoid(points))
            boxes = boxes + jnp.pad(offset, ((0, 0), (0, 2)))[None, None]  # equation (1)
        predictions = Predictions(logits=logits, boxes_cxcywh=jax.nn.sigmoid(boxes))
        return Stages(features, is_pad, pos, memory, decoder_output, points, predictions)

    def __call__(
        self, images: UInt8[AnyArray, "B H W 3"], sizes_hw: Int[AnyArray, "B 2"], train: bool = False
    ) -> Predictions:
        """Runs the detector on pictures as a `Batch` holds them: uint8, the real part in the upper left corner."""
        is_pad = padding_mask(sizes_hw, images.shape[1:3])
        return self.stages(normalize(images, is_pad), is_pad, train).predictions


def published_fields() -> dict[str, Any]:
    """The fields of `config.model` with the published model's values, `DetectionTransformer`'s defaults."""
    fields = {field.name: field.default for field in dataclasses.fields(DetectionTransformer)}
    dtype = fields.pop("dtype")
    del fields["parent"], fields["name"]
    return fields | {"compute_dtype": jnp.dtype(dtype).name}


def model_of(fields: Mapping[str, Any]) -> DetectionTransformer:
    """The detector of the fields of `config.model`."""
    fields = dict(fields)
    return DetectionTransformer(dtype=jnp.dtype(fields.pop("compute_dtype")), **fields)
