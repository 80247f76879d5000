"""The frozen records that the stages hand to each other, and the names of their axes.

Shapes are those inside of a function of one device; between such functions there is an axis of devices before them.

Axes: `B` batch, `Q` queries, `T` padded targets, `C` classes, `L` decoder layers, `N` heads, `D` width,
`S` = `h*w` tokens, `K` kept detections, `H W` padded picture height and width in pixels.
"""

import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int, UInt8

from cdetr_jax.records import Category, Record

AnyArray = Array | np.ndarray  # where a function is also called outside of a compiled program

__all__ = [
    "AnyArray",
    "Batch",
    "Category",
    "Counts",
    "Detections",
    "Losses",
    "Match",
    "Predictions",
    "Record",
    "Targets",
]


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
    index: Int[Array, " B"]
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
class Counts:
    """What the losses are divided by, counted over everything that one optimiser step sees on this device.

    Attributes:
      targets: real objects.
      matched: real objects that have a query (fewer than `targets` where an image has more objects than queries).
      queries: pictures times queries.
      micro_batches: calls of `criterion` whose losses are added up.
    """

    targets: Float[Array, ""]
    matched: Float[Array, ""]
    queries: Float[Array, ""]
    micro_batches: Float[Array, ""] | float = 1.0


@struct.dataclass
class Losses:
    """The total and its terms per decoder layer, unweighted; the errors are for the log only.

    All of them are parts of an optimiser step's: those of its micro-batches add up.

    Attributes:
      class_error: percent of the matched queries whose best class is wrong, last layer.
      cardinality_error: how far the number of queries whose best class is not the last one is from the number of
        targets, mean over pictures (the published code's definition).
    """

    total: Float[Array, ""]
    class_loss: Float[Array, " L"]
    l1_loss: Float[Array, " L"]
    giou_loss: Float[Array, " L"]
    class_error: Float[Array, ""]
    cardinality_error: Float[Array, " L"]


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
