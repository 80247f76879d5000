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

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image, ImageOps

from cdetr_jax import boxes
from cdetr_jax.data.plan import smallest_shape
from cdetr_jax.data.sources import PICTURE_ERRORS, bad_picture, decode_rgb, open_picture
from cdetr_jax.data.transforms import resize_for_evaluation
from cdetr_jax.device_memory import must_fit
from cdetr_jax.evaluation.attention_maps import PARTS, Attending, attending, attention_maps
from cdetr_jax.evaluation.postprocess import class_probs, detect
from cdetr_jax.structs import Detections
from cdetr_jax.visualization.attention import Attention
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
        self._model = weights.make_model()
        self._detect = jax.jit(functools.partial(detect, self._model, top_k=weights.top_k))

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

    def attention(
        self,
        picture: Picture,
        query: str | int | Sequence[float] = "best",
        *,
        threshold: float = 0.5,
        objects: int = 3,
        point: Sequence[float] | None = None,
    ) -> Attention:
        """Where the detector looks in a picture when it finds an object, in every layer and head.

        Args:
          picture: as in a call.
          query: "best": the best queries with a score of at least `threshold`, at most so many `objects`, or the best
            one if there is none; a query's number; or a box, left, top, right, bottom in pixels: of the queries whose
            box has an IoU of 0.5 or more with it the one with the best score, else the one with the highest IoU.
          point: (x, y) in pixels: the encoder's self-attention from there instead.
        Returns: maps of the decoder's cross-attention (or the encoder's self-attention); `draw` shows them.
        Raises: as a call; ValueError, if there is no such query, or the point is outside of the picture.
        """
        image = _as_array(picture, "the picture")
        size_px = np.array(image.shape[1::-1])
        if point is not None:
            point = _numbers(point, 2, "point")
            if not (point == point.clip(0, size_px)).all():
                raise ValueError(
                    f"point is {point.tolist()}, expected one in the picture of {size_px[0]} x {size_px[1]} pixels"
                )
            if not self._model.encoder_layers:
                raise ValueError("this detector has no encoder layer, so there is no attention from a point")
        side = "decoder" if point is None else "encoder"
        resized, shape_hw = self._resized(image)
        padded, sizes_hw = _padded([resized], shape_hw)
        with must_fit(*padded.shape[:3], "use a device with more, or JAX_PLATFORMS=cpu"):
            predicted, attends = _attend(self._model, self._variables, padded, sizes_hw)
            (probs, boxes_xyxy, points_xy), is_pad = jax.device_get((predicted, attends[side].is_pad[0]))
            grid_hw = np.array([(~is_pad).any(1).sum(), (~is_pad).any(0).sum()])  # without the padding
            size_in_cells = sizes_hw[0] * is_pad.shape / padded.shape[1:3]
            probs = np.where([category is not None for category in self.classes[: probs.shape[-1]]], probs[0], -1)
            boxes_xyxy_px = (boxes_xyxy[0] * np.tile(size_px, 2)).clip(0, np.tile(size_px, 2)).astype(np.float32)
            if point is None:
                queries = _chosen_queries(query, probs.max(1), boxes_xyxy_px, threshold, objects)
            else:
                row, column = np.minimum(np.round(point[::-1] / size_px[::-1] * size_in_cells), grid_hw - 1).astype(int)
                queries = [int(row * is_pad.shape[1] + column)]  # of the nearest cell, see `cell_sides`
            maps = [jax.device_get(_attention_maps(self._model, attends[side], np.array([[i]])))[0] for i in queries]
        maps = np.concatenate(maps, axis=2)[..., : grid_hw[0], : grid_hw[1]].astype(np.float32)
        if point is None:
            labels = probs[queries].argmax(1)
            of_queries = {
                "boxes_xyxy_px": boxes_xyxy_px[queries],
                "scores": probs[queries].max(1),
                "names": [self.classes[label].name for label in labels],
                "points_xy_px": (points_xy[queries] * size_px).astype(np.float32),
            }
        else:
            of_queries = {
                "boxes_xyxy_px": np.full((1, 4), np.nan, np.float32),
                "scores": np.full(1, np.nan, np.float32),
                "names": [""],
                "points_xy_px": point[None].astype(np.float32),
            }
        return Attention(
            image=image,
            side=side,
            model="Conditional DETR" if self._model.decoder == "conditional" else "DETR",
            **dict(zip(PARTS, maps, strict=True)),
            size_in_cells=tuple(size_in_cells.tolist()),
            queries=np.array(queries),
            **of_queries,
        )

    def _resized(self, image: np.ndarray) -> tuple[np.ndarray, tuple[int, int]]:
        """The picture as the detector wants it, and the padded shape for it."""
        sides = self._preprocessing
        resized = resize_for_evaluation(image, sides.short_side_px, sides.long_side_max_px, sides.shapes_hw)
        return resized, tuple(smallest_shape(np.array([resized.shape[:2]]), sides.shapes_hw)[0])

    def _find_all(self, images: Iterable[np.ndarray], threshold: float, batch_size: int) -> list[Objects]:
        found: list[Objects | None] = []
        waiting = collections.defaultdict(list)  # by padded shape
        for i, image in enumerate(images):
            found.append(None)
            resized, shape_hw = self._resized(image)
            together = waiting[shape_hw]
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
        padded, sizes_hw = _padded([resized for _, _, resized in pictures], shape_hw)
        original_sizes_hw = np.array([image.shape[:2] for _, image, _ in pictures], np.int32)
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


def _padded(pictures: Sequence[np.ndarray], shape_hw: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Pictures as one batch [B, H, W, 3] with zeros around, and their heights and widths [B, 2]."""
    padded = np.zeros((len(pictures), *shape_hw, 3), np.uint8)
    for row, picture in zip(padded, pictures, strict=True):
        row[: picture.shape[0], : picture.shape[1]] = picture
    return padded, np.array([picture.shape[:2] for picture in pictures], np.int32)


_attention_maps = jax.jit(attention_maps, static_argnames="model")


@functools.partial(jax.jit, static_argnames="model")
def _attend(model: nn.Module, variables: Any, images: Any, sizes_hw: Any) -> tuple[Any, dict[str, Attending]]:
    """Class scores [B, Q, K], boxes xyxy [B, Q, 4] and reference points [Q, 2] of the last layer, and `attending`."""
    stages, attends = attending(model, variables, images, sizes_hw)
    logits, boxes_cxcywh = stages.predictions.logits[-1], stages.predictions.boxes_cxcywh[-1]
    has_points = model.decoder == "conditional" or model.box_offset
    points_xy = jax.nn.sigmoid(stages.reference_points) if has_points else stages.reference_points * jnp.nan
    return (class_probs(logits, model.class_loss), boxes.cxcywh_to_xyxy(boxes_cxcywh), points_xy), attends


def _chosen_queries(
    query: Any, scores: np.ndarray, boxes_xyxy_px: np.ndarray, threshold: float, objects: int
) -> list[int]:
    """See `Detector.attention`."""
    if isinstance(query, str):
        if query != "best":
            raise ValueError(f"query is {query!r}, expected 'best', a query's number or a box of four numbers")
        order = np.argsort(-scores, kind="stable")[:objects]
        return [i for i in order.tolist() if scores[i] >= threshold] or order[:1].tolist()
    if isinstance(query, numbers.Integral):
        if not 0 <= query < len(scores):
            raise ValueError(f"query is {query}, expected a number from 0 to {len(scores) - 1}, or 'best', or a box")
        return [int(query)]
    box = _numbers(query, 4, "query")
    if not (box[:2] <= box[2:]).all():
        raise ValueError(f"query is {box.tolist()}, expected left, top, right, bottom of a box in pixels")
    iou = np.asarray(boxes.iou_and_union(jnp.asarray(boxes_xyxy_px), jnp.asarray(box[None], boxes_xyxy_px.dtype))[0])
    fits = iou >= 0.5
    return [int(np.argmax(np.where(fits, scores, 0) if fits.any() else iou))]


def _numbers(values: Any, count: int, name: str) -> np.ndarray:
    """The values as an array of so many numbers."""
    try:
        array = np.asarray(values, np.float64)
    except (TypeError, ValueError):
        array = np.zeros(0)
    if array.shape != (count,) or not np.isfinite(array).all():
        raise ValueError(f"{name} is {values!r}, expected {count} numbers, in pixels")
    return array


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
