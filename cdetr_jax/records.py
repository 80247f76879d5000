"""What a data set says of its pictures. Apart from `structs`, because worker processes must not import JAX."""

import dataclasses

import numpy as np


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
