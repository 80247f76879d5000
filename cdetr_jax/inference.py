"""A trained detector in a few lines: load a workdir, call it on a picture."""

import collections
import concurrent.futures
import dataclasses
import functools
import numbers
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from PIL import Image, ImageOps

from cdetr_jax.data.plan import smallest_shape
from cdetr_jax.data.sources import PICTURE_ERRORS, bad_picture, decode_rgb, open_picture
from cdetr_jax.data.transforms import resize_for_evaluation
from cdetr_jax.device_memory import must_fit
from cdetr_jax.evaluation.postprocess import detect
from cdetr_jax.structs import Detections
from cdetr_jax.visualization.draw import draw_boxes
from cdetr_jax.weights.load import Weights, load_weights
from cdetr_jax.weights.torch_files import HUB_PREFIX

Picture = str | os.PathLike | Image.Image | np.ndarray | jax.Array


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Objects:
    """What was found in one picture, best first.

    Attributes:
      image: [H, W, 3] uint8 RGB, upright.
      boxes_xyxy_px: [n, 4] float32, left, top, right, bottom in pixels of `image`, clipped to it.
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

    def __repr__(self) -> str:
        height, width = self.image.shape[:2]
        return f"<Objects: {self.summary()} in a picture of {width} x {height} pixels>"

    def __getitem__(self, chosen: np.ndarray) -> "Objects":
        """Some of them, by a mask [n] or by indices: `objects[objects.scores > 0.7]`."""
        kept = np.arange(len(self))[chosen].reshape(-1)
        return dataclasses.replace(
            self,
            boxes_xyxy_px=self.boxes_xyxy_px[kept],
            scores=self.scores[kept],
            class_ids=self.class_ids[kept],
            names=[self.names[i] for i in kept],
        )

    def crops(self) -> list[Image.Image]:
        """The part of the picture in each box, whole pixels, at least one."""
        height, width = self.image.shape[:2]
        crops = []
        for left, top, right, bottom in self.boxes_xyxy_px:
            x, y = min(int(left), width - 1), min(int(top), height - 1)
            crops.append(Image.fromarray(self.image[y : max(round(bottom), y + 1), x : max(round(right), x + 1)]))
        return crops

    def summary(self) -> str:
        """How many of which class, the best found first: "2 dog, 1 cat", or "nothing"."""
        counts = collections.Counter(self.names)
        return ", ".join(f"{count} {name}" for name, count in counts.items()) or "nothing"

    def draw(self) -> Image.Image:
        """The picture with the boxes, names and scores drawn over it."""
        return draw_boxes(self.image, self.boxes_xyxy_px, self.names, self.scores, class_names=self.class_names)

    def to_supervision(self) -> Any:
        """The same as `supervision.Detections`, with the names under data["class_name"].

        Raises: ModuleNotFoundError, without the supervision package.
        """
        try:
            import supervision
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "to_supervision needs the supervision package: install it with `pip install supervision`"
            ) from error
        return supervision.Detections(
            xyxy=self.boxes_xyxy_px,
            confidence=self.scores,
            class_id=self.class_ids,
            data={"class_name": np.array(self.names, dtype=str)},
        )


class Detector:
    """A trained detector. Make one with `Detector.from_pretrained`."""

    def __init__(self, weights: Weights):
        self.classes = weights.classes
        self._preprocessing = weights.preprocessing
        self._variables = jax.device_put(weights.variables)
        self._detect = jax.jit(functools.partial(detect, weights.make_model(), top_k=weights.top_k))

    @classmethod
    def from_pretrained(cls, source: str | os.PathLike, checkpoint: str = "best") -> "Detector":
        """Loads a detector.

        Args:
          source: a workdir of `cdetr train`, a folder or file of published weights (see `load_weights`), or a hub
            name such as "microsoft/conditional-detr-resnet-50".
          checkpoint: of a workdir: `best` by AP, or `latest`.
        Raises: as `load_weights`.
        """
        source = os.fspath(source)
        if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*(@[\w.-]+)?", source) or os.path.exists(source):
            return cls(load_weights(source, checkpoint))
        try:
            return cls(load_weights(HUB_PREFIX + source, checkpoint))
        except OSError as error:
            raise OSError(f"there is no file or folder {source} here, and as a model of the hub: {error}") from error

    def __call__(
        self, picture: Picture | Iterable[Picture], threshold: float = 0.5, batch_size: int = 8
    ) -> Objects | list[Objects]:
        """Finds the objects of one picture, or of each of several. A picture may have any size.

        Args:
          picture: path, PIL image, or uint8 array [H, W, 3] whose channels are red, green, blue (OpenCV's are not: turn
            them with `array[..., ::-1]`); or a list, tuple or generator of those. A file and a PIL image are turned as
            their EXIF tag says.
          threshold: lowest score, 0 to 1.
          batch_size: pictures of a list that run together, where as many have the same padded shape; the rest run one
            by one, so that a shape is compiled for two sizes of batch at most.
        Raises: BadPictureError (a ValueError), if a file or PIL image cannot be decoded; ValueError, if an array is no
          picture; TypeError, if it is something else.
        """
        if not isinstance(threshold, numbers.Real) or not 0 <= threshold <= 1:
            raise ValueError(f"threshold is {threshold!r}, expected a score from 0 to 1")
        if not isinstance(batch_size, numbers.Integral) or batch_size < 1:
            raise ValueError(f"batch_size is {batch_size!r}, expected a whole number, at least 1")
        if not isinstance(picture, (list, tuple, Iterator)):
            return self._find_all([_as_array(picture, "the picture")], threshold, 1)[0]
        return self._find_all((_as_array(one, f"picture {i}") for i, one in enumerate(picture)), threshold, batch_size)

    def warm_up(self, batch_size: int = 1) -> None:
        """Compiles the detector for all padded shapes, several at once, so that no later call has to.

        Args:
          batch_size: of the calls on lists that will come; single pictures are compiled for as well.
        """

        def compile_for(batch: int, shape_hw: tuple[int, int]) -> None:
            sizes_hw = np.full((batch, 2), shape_hw, np.int32)
            self._detect(self._variables, np.zeros((batch, *shape_hw, 3), np.uint8), sizes_hw, sizes_hw)

        wanted = [(batch, tuple(shape_hw)) for shape_hw in self._preprocessing.shapes_hw for batch in {1, batch_size}]
        with concurrent.futures.ThreadPoolExecutor(thread_name_prefix="compile") as threads:
            list(threads.map(compile_for, *zip(*wanted, strict=True)))

    def _find_all(self, images: Iterable[np.ndarray], threshold: float, batch_size: int) -> list[Objects]:
        found: list[Objects | None] = []
        waiting = collections.defaultdict(list)  # by padded shape
        sides = self._preprocessing
        for i, image in enumerate(images):
            found.append(None)
            resized = resize_for_evaluation(image, sides.short_side_px, sides.long_side_max_px, sides.shapes_hw)
            shape_hw = smallest_shape(np.array([resized.shape[:2]]), sides.shapes_hw)[0]
            together = waiting[tuple(shape_hw)]
            together.append((i, image, resized))
            if len(together) == batch_size:
                self._find(together, shape_hw, threshold, found)
                together.clear()
        for shape_hw, rest in waiting.items():
            for one in rest:
                self._find([one], shape_hw, threshold, found)
        return found

    def _find(
        self,
        pictures: list[tuple[int, np.ndarray, np.ndarray]],
        shape_hw: Sequence[int],
        threshold: float,
        found: list[Objects | None],
    ) -> None:
        """Runs (place in `found`, picture, resized picture) as one batch."""
        padded = np.zeros((len(pictures), *shape_hw, 3), np.uint8)
        for row, (_, _, resized) in zip(padded, pictures, strict=True):
            row[: resized.shape[0], : resized.shape[1]] = resized
        sizes_hw, original_sizes_hw = (
            np.array([entry[which].shape[:2] for entry in pictures], np.int32) for which in (2, 1)
        )
        remedy = "give fewer pictures a call" if len(padded) > 1 else "use a device with more, or JAX_PLATFORMS=cpu"
        with must_fit(*padded.shape[:3], remedy):
            detections = jax.device_get(self._detect(self._variables, padded, sizes_hw, original_sizes_hw))
        for row, (i, image, _) in enumerate(pictures):
            found[i] = self._objects(image, jax.tree.map(lambda x, row=row: x[row], detections), threshold)

    def _objects(self, image: np.ndarray, found: Detections, threshold: float) -> Objects:
        known = np.array([self.classes[label] is not None for label in found.labels])
        kept = (found.scores >= threshold) & known
        categories = [self.classes[label] for label in found.labels[kept]]
        height, width = image.shape[:2]
        return Objects(
            image=image,
            boxes_xyxy_px=found.boxes_xyxy_px[kept].clip(0, np.array([width, height] * 2, np.float32)),
            scores=found.scores[kept],
            class_ids=np.array([category.id for category in categories], np.int64),
            names=[category.name for category in categories],
            class_names=[category.name for category in self.classes if category is not None],
        )


def _as_array(picture: Picture, name: str) -> np.ndarray:
    """The picture as uint8 [H, W, 3] RGB, upright. `name`: for the errors, where it has none of its own."""
    if isinstance(picture, (str, os.PathLike)):
        return open_picture(picture)
    if isinstance(picture, Image.Image):
        try:
            image = decode_rgb(ImageOps.exif_transpose(picture))
        except PICTURE_ERRORS as error:
            raise bad_picture(name, error) from error
    elif hasattr(picture, "__array__"):  # NumPy, JAX, PyTorch
        image = np.asarray(picture)
    else:
        raise TypeError(
            f"{name} is of type {type(picture).__name__}, expected a path, a PIL image or a uint8 array [H, W, 3]"
        )
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3 or not image.size:
        raise ValueError(
            f"{name} is {image.dtype} {list(image.shape)}, expected a uint8 array [H, W, 3] that is not empty, its "
            "channels in the order red, green, blue"
        )
    return image
