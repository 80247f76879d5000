"""A trained detector in a few lines: load a workdir, call it on a picture."""

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from PIL import Image

from cdetr_jax import build
from cdetr_jax.checkpoints import workdir as run_files
from cdetr_jax.data.plan import smallest_shape
from cdetr_jax.data.sources import decode_rgb, open_picture
from cdetr_jax.data.transforms import resize_for_evaluation
from cdetr_jax.evaluation.postprocess import postprocess
from cdetr_jax.training.loop import load_state
from cdetr_jax.visualization.draw import draw_boxes

Picture = str | os.PathLike | Image.Image | np.ndarray


@dataclasses.dataclass(frozen=True)
class Objects:
    """What was found in one picture, best first.

    Attributes:
      image: [H, W, 3] uint8 RGB, upright.
      boxes_xyxy_px: [n, 4] float32, left, top, right, bottom in pixels of `image`.
      scores: [n] float32, in [0, 1].
      class_ids: [n] int64, the data set's own category ids.
      names: the n class names.
      class_names: all names that the detector knows.
    """

    image: np.ndarray
    boxes_xyxy_px: np.ndarray
    scores: np.ndarray
    class_ids: np.ndarray
    names: list[str]
    class_names: list[str]

    def __len__(self) -> int:
        return len(self.scores)

    def draw(self) -> Image.Image:
        """The picture with the boxes, names and scores drawn over it."""
        return draw_boxes(self.image, self.boxes_xyxy_px, self.names, self.scores, class_names=self.class_names)


class Detector:
    """A trained detector. Make one with `Detector.from_workdir`."""

    def __init__(self, model: Any, variables: Any, classes: build.ClassTable, settings: dict[str, Any]):
        self.classes = classes
        self._settings = settings

        @jax.jit
        def detect(variables: Any, images: np.ndarray, sizes_hw: np.ndarray, original_sizes_hw: np.ndarray) -> Any:
            predictions = model.apply(variables, images, sizes_hw)
            return postprocess(predictions, original_sizes_hw, class_loss=model.class_loss, top_k=settings["top_k"])

        self._variables = jax.device_put(variables)
        self._detect = detect

    @classmethod
    def from_workdir(cls, workdir: str | os.PathLike, checkpoint: str = "best") -> "Detector":
        """Loads a trained workdir.

        Args:
          workdir: of `cdetr train`.
          checkpoint: `best` by AP, or `latest`.
        Raises: FileNotFoundError, ValueError, if the folder holds no trained detector.
        """
        config = run_files.load_config(workdir)
        classes = run_files.load_classes(workdir)
        state, _ = load_state(config, workdir, len(classes), checkpoint)
        settings = {
            "short_side_px": config.data.eval_short_side_px,
            "long_side_max_px": config.data.long_side_max_px,
            "shapes": config.data.eval_shapes,
            "top_k": config.eval.top_k,
        }
        return cls(build.make_model(config, len(classes)), state.eval_variables, classes, settings)

    def __call__(self, picture: Picture | Sequence[Picture], threshold: float = 0.5) -> Objects | list[Objects]:
        """Finds the objects of one picture, or of each of a list.

        Args:
          picture: path, PIL image, or uint8 array [H, W, 3] RGB; a file's EXIF rotation is applied.
          threshold: lowest score.
        Raises: BadPictureError, if a file is not a picture; ValueError, if an array is not one.
        """
        if isinstance(picture, (list, tuple)):
            return [self(one, threshold) for one in picture]
        image = _as_array(picture)
        resized = resize_for_evaluation(image, self._settings["short_side_px"], self._settings["long_side_max_px"])
        size_hw = np.array([resized.shape[:2]], np.int32)
        shape_hw = smallest_shape(size_hw, self._settings["shapes"])[0]
        padded = np.zeros((1, *shape_hw, 3), np.uint8)
        padded[0, : resized.shape[0], : resized.shape[1]] = resized
        original_hw = np.array([image.shape[:2]], np.int32)
        found = jax.tree.map(lambda x: np.asarray(x)[0], self._detect(self._variables, padded, size_hw, original_hw))
        known = np.array([self.classes[label] is not None for label in found.labels])
        kept = (found.scores >= threshold) & known
        categories = [self.classes[label] for label in found.labels[kept]]
        return Objects(
            image=image,
            boxes_xyxy_px=found.boxes_xyxy_px[kept],
            scores=found.scores[kept],
            class_ids=np.array([category.id for category in categories], np.int64),
            names=[category.name for category in categories],
            class_names=[category.name for category in self.classes if category is not None],
        )


def _as_array(picture: Picture) -> np.ndarray:
    if isinstance(picture, Image.Image):
        return decode_rgb(picture)
    if isinstance(picture, np.ndarray):
        if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[-1] != 3:
            raise ValueError(f"a picture is a uint8 array [H, W, 3]; this is {picture.dtype} {list(picture.shape)}")
        return picture
    return open_picture(picture)
