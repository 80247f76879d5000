"""The frozen records that the stages hand to each other, and the names of their axes.

Axes: `B` batch, `Q` queries, `T` padded targets, `C` classes, `L` decoder layers, `N` heads, `D` width,
`S` = `h*w` tokens, `K` kept detections, `H W` padded picture height and width in pixels.
"""

import dataclasses

import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int, UInt8


@dataclasses.dataclass(frozen=True)
class Category:
    """One object class as the data set names it: its own id (any integer) and its name."""

    id: int
    name: str

    @property
    def is_unnamed(self) -> bool:
        """Whether the name only repeats the id: the weights came without names."""
        return self.name == f"class {self.id}"


@dataclasses.dataclass(frozen=True)
class Record:
    """What a source knows of one picture without opening it. Everything is as annotated: unclipped, crowds kept.

    Attributes:
      image_id: the data set's own id.
      file_name: what an error message calls the picture.
      height, width: size in pixels, as annotated.
      boxes_xywh_px: [n, 4] float64, left, top, width, height in pixels.
      category_ids: [n] int64, the data set's own ids.
      is_crowd: [n] bool, True = region of many objects: left out of training, ignored by evaluation.
      areas: [n] float64, object area in square pixels, for the small, medium and large split of COCO AP.
    """

    image_id: int
    file_name: str
    height: int
    width: int
    boxes_xywh_px: np.ndarray
    category_ids: np.ndarray
    is_crowd: np.ndarray
    areas: np.ndarray


@struct.dataclass
class Targets:
    """The objects of each picture, padded to `T`.

    Attributes:
      labels: logit index of each object.
      boxes_cxcywh: fractions of the unpadded picture; padded rows hold zeros.
      valid: True = a real object.
    """

    labels: Int[Array, "B T"]
    boxes_cxcywh: Float[Array, "B T 4"]
    valid: Bool[Array, "B T"]


@struct.dataclass
class Batch:
    """Pictures of one static shape, as they travel to a device.

    Attributes:
      images: RGB, the picture in the upper left corner, padding to its right and below.
      sizes_hw: height and width in pixels of the real part.
      original_sizes_hw: height and width in pixels of the picture before resizing.
      index: position of the picture in its source; -1 = the whole row is padding and counts nowhere.
      targets: what is to be found.
    """

    images: UInt8[Array, "B H W 3"]
    sizes_hw: Int[Array, "B 2"]
    original_sizes_hw: Int[Array, "B 2"]
    index: Int[Array, "B"]
    targets: Targets


@struct.dataclass
class Predictions:
    """What every decoder layer says.

    Attributes:
      logits: class scores before the sigmoid (or, for the softmax loss, with "no object" as the last class).
      boxes_cxcywh: fractions of the unpadded picture, float32.
    """

    logits: Float[Array, "L B Q C"]
    boxes_cxcywh: Float[Array, "L B Q 4"]


@struct.dataclass
class Match:
    """The query that answers for each target, per layer; -1 for padded targets and those that got none."""

    queries: Int[Array, "L B T"]


@struct.dataclass
class Detections:
    """The best `K` (score, class) pairs of each picture, best first.

    Attributes:
      scores: in [0, 1].
      labels: logit index.
      boxes_xyxy_px: pixels of the original picture.
      queries: which query gave it.
    """

    scores: Float[Array, "B K"]
    labels: Int[Array, "B K"]
    boxes_xyxy_px: Float[Array, "B K 4"]
    queries: Int[Array, "B K"]
