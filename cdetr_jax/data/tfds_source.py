"""A prepared TFDS set as a source: any with an image, objects/bbox and objects/label, such as coco/2017 or voc/2007.

Nothing here imports TensorFlow, which reading a prepared set does not need.
"""

import io
import os
import re
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import numpy as np
from PIL import Image

from cdetr_jax.data.cache import Table, cached_table, fingerprint_of, in_parallel
from cdetr_jax.data.coco_categories import COCO_CATEGORIES
from cdetr_jax.data.sources import PICTURE_ERRORS, bad_picture, open_checked, rgb_image
from cdetr_jax.records import Category, Record

_TABLE_VERSION = 1  # of the cached table; another one makes the tables anew
_CHUNK = 64  # records read at once


class TfdsSource:
    """One split of a prepared TFDS set, stored as array_record.

    Pictures are decoded by Pillow as in the other sources, and their sizes are the files' own, whatever an EXIF tag
    says, as TFDS's decoder has it. Boxes, labels and sizes are read once and kept beside the records.

    - Records come in order of `image/id` where the set has it, as those of a COCO folder do; else in the set's own
      order, with ids from 1.
    - Categories: if all the label names are COCO's, COCO's ids by name, 1 to 90. Else TFDS's label numbers, from 0.
    - Crowds: `objects/is_crowd` where the set has it; else none.
    - Boxes: TFDS stores fractions in float32. See `pixel_boxes`.
    - Areas: `objects/area` where the set has it, else width * height. See `object_areas`.
    """

    def __init__(self, name: str, data_dir: str | os.PathLike, split: str):
        """Opens a set that `cdetr prepare` made.

        Args:
          name: as TFDS has it, "coco/2017" or with a version "coco/2017:1.1.0"; the newest that is there without one.
            The config can be left out where only one is there.
          data_dir: TFDS's data_dir, the folder that holds the folder `coco`.
          split: as TFDS has it, "train", "train+validation" or "train[:1%]".
        Raises: ModuleNotFoundError, if TFDS is not installed; FileNotFoundError, if the set is not prepared;
          ValueError, if it has no such split, no boxes, or cannot be read at random; BadPictureError, if the size of a
          picture cannot be read.
        """
        tfds = import_tfds()
        folder = find_prepared(name, data_dir)
        builder = tfds.builder_from_directory(str(folder))
        objects = check_features(name, builder.info.features)
        self._title, self._folder = f"{name} {split}", folder
        self._examples = _open_records(builder, split, folder)
        label = objects["label"]
        names = label.names  # the numbers as texts, if the set does not name them
        names = [f"class {i}" if name == str(i) else name for i, name in enumerate(names)]
        label_ids = category_ids_of(names)
        self.categories = tuple(sorted(map(Category, label_ids, names), key=lambda category: category.id))

        path = folder / f"cdetr-{re.sub(r'[^A-Za-z0-9]+', '-', split)}.npz"
        what = f"boxes and picture sizes of {self._title}"
        table = cached_table(path, _fingerprint(folder, split), what, self._read)
        is_exact = objects.get("area") is None or np.issubdtype(objects["area"].np_dtype, np.floating)
        self._order, self.records = _records(table, np.array(label_ids, np.int64), is_exact)

    def __len__(self) -> int:
        return len(self.records)

    def load_image(self, i: int) -> np.ndarray:
        """Returns picture `i` as uint8 [H, W, 3] RGB. Raises: BadPictureError, if it is damaged."""
        return np.array(self.open_image(i))

    def open_image(self, i: int) -> Image.Image:
        """Returns picture `i` as a Pillow image of mode RGB. Raises: as `load_image`."""
        try:
            with open_checked(io.BytesIO(self._examples[self._order[i]]["image"])) as image:
                return rgb_image(image)
        except (*PICTURE_ERRORS, RuntimeError) as error:  # which array_record raises for damaged records
            raise bad_picture(f"{self._title}: {self.records[i].file_name}", error) from error

    def _read(self) -> Table:
        """Everything that is known of the pictures, in the set's own order; see `_records` for what is in it."""

        def read(keys: Sequence[int]) -> list[dict[str, Any]]:
            try:
                examples = self._examples.__getitems__(keys)
            except RuntimeError as error:
                raise ValueError(
                    f"{self._title}: records {keys[0]} to {keys[-1]} are damaged ({str(error)[:300]}); copy the "
                    f"set again, or delete {self._folder} and prepare the set again"
                ) from error
            return [self._read_row(*pair) for pair in zip(keys, examples, strict=True)]

        keys = range(len(self._examples))
        chunks = [keys[start : start + _CHUNK] for start in range(0, len(keys), _CHUNK)]
        rows = [row for chunk in in_parallel(read, chunks, self._title, f" x {_CHUNK} pictures") for row in chunk]
        columns = {name: [row[name] for row in rows] for name in (rows[0] if rows else ())}
        table = {"count": np.array([len(label) for label in columns.get("label", ())], np.int64)}
        for name in ("size_hw", "file_name", "image_id"):
            if name in columns:
                table[name] = np.array(columns[name])
        for name in ("bbox", "label", "is_crowd", "area"):
            if name in columns:
                table[name] = np.concatenate(columns[name])
        return table

    def _read_row(self, key: int, example: dict[str, Any]) -> dict[str, Any]:
        name = example.get("image/filename", f"record {key}".encode()).decode(errors="replace")
        try:
            with open_checked(io.BytesIO(example["image"])) as image:
                size_hw = image.height, image.width
        except PICTURE_ERRORS as error:
            advice = f"; its size is needed: delete {self._folder} and prepare the set again from sound files"
            raise bad_picture(f"{self._title}: {name}", error, advice) from error
        objects = example["objects"]
        row = {
            "file_name": name,
            "size_hw": size_hw,
            "bbox": np.asarray(objects["bbox"], np.float32).reshape(-1, 4),
            "label": np.asarray(objects["label"], np.int64).reshape(-1),
        }
        if row["label"].size and row["label"].min() < 0:
            raise ValueError(f"{self._title}: {name} has an object without a label; such sets cannot be used")
        if "image/id" in example:
            row["image_id"] = example["image/id"]
        for field in {"is_crowd", "area"} & objects.keys():
            row[field] = np.asarray(objects[field], np.float64 if field == "area" else bool).reshape(-1)
        return row


# ------------------------------------------------------------------------------------------------------ numbers


def pixel_boxes(fractions_yxyx: np.ndarray, heights: np.ndarray, widths: np.ndarray) -> np.ndarray:
    """Boxes as they were annotated, from TFDS's fractions.

    A float32 fraction times the size is off by up to 4e-5 pixels at 640. Where a box edge with two decimals, as
    annotations have them, gives the stored fraction, that is the edge, exactly; else the product is.
    Args:
      fractions_yxyx: [n, 4] float32 top, left, bottom, right.
      heights, widths: [n], of the picture of each box.
    Returns: [n, 4] float64 left, top, width, height in pixels.
    """
    sizes = np.stack([heights, widths, heights, widths], axis=-1).astype(np.float64)
    edges = fractions_yxyx.astype(np.float64) * sizes
    rounded = np.rint(edges * 100) / 100
    # Half a float32 step is what rounding takes, and a little for the division in float64.
    is_annotated = np.abs(rounded / sizes - fractions_yxyx) <= 0.51 * np.spacing(np.abs(fractions_yxyx))
    top, left, bottom, right = np.where(is_annotated, rounded, edges).T
    has_decimals = is_annotated[:, :2] & is_annotated[:, 2:]
    height, width = bottom - top, right - left
    height = np.where(has_decimals[:, 0], np.rint(height * 100) / 100, height)
    width = np.where(has_decimals[:, 1], np.rint(width * 100) / 100, width)
    return np.stack([left, top, width, height], axis=-1)


def object_areas(
    areas: np.ndarray, boxes_xywh_px: np.ndarray, heights: np.ndarray, widths: np.ndarray, is_exact: bool
) -> np.ndarray:
    """Areas as they were annotated, as well as they are known.

    TFDS's coco cuts COCO's areas to whole numbers, and COCO's limits between small, medium and large objects are whole
    numbers that belong to both sides: 1024.7 square pixels cut to 1024 would count as small, too. So such an area gets
    half a pixel back; but where it is that of the box, cut, the box's own area is taken. That is a whole number, 1024
    and not 1024.0003, where it is one to within what TFDS's float32 fractions lose.
    Args:
      areas: [n].
      boxes_xywh_px: [n, 4], as `pixel_boxes` has them.
      heights, widths: [n], of the picture of each box.
      is_exact: False, if they are cut to whole numbers.
    """
    if is_exact:
        return areas
    sides = boxes_xywh_px[:, 2:]
    filled = sides[:, 0] * sides[:, 1]
    is_annotated = (np.rint(sides * 100) / 100 == sides).all(-1)
    loss = 2.0**-23 * (sides[:, 0] * heights + sides[:, 1] * widths)  # a float32 step at each edge
    is_whole = np.abs(filled - areas) <= np.where(is_annotated, 1e-12 * areas, loss)
    return np.where(is_whole, areas, np.where(np.floor(filled) == areas, filled, areas + 0.5))


def category_ids_of(names: Sequence[str]) -> list[int]:
    """Category id of each TFDS label: COCO's own by name if all names are COCO's, else the label's number."""
    coco_ids = {category.name: category.id for category in COCO_CATEGORIES}
    return [coco_ids[name] for name in names] if set(names) <= coco_ids.keys() else list(range(len(names)))


def _records(table: Table, label_ids: np.ndarray, area_is_exact: bool) -> tuple[list[int], tuple[Record, ...]]:
    """The records, and the place of each in the set's own order.

    Args:
      table: for each picture `count` of objects, `size_hw`, `file_name`, perhaps `image_id`; for each object, all
        pictures' in a row, `bbox` as TFDS has it, `label`, perhaps `is_crowd` and `area`.
    """
    counts = table["count"]
    if not len(counts):
        return [], ()
    ids = table.get("image_id")
    if ids is None or ids.dtype.kind not in "iu" or len(np.unique(ids)) < len(ids):
        ids = np.arange(1, len(counts) + 1)
    heights, widths = (np.repeat(side, counts) for side in table["size_hw"].T)
    boxes = pixel_boxes(table["bbox"], heights, widths)
    category_ids = label_ids[table["label"]]
    crowds = table.get("is_crowd", np.zeros(len(boxes), bool))
    areas = boxes[:, 2] * boxes[:, 3]
    if "area" in table:
        areas = object_areas(table["area"], boxes, heights, widths, area_is_exact)

    ends = np.cumsum(counts)
    order = np.argsort(ids, kind="stable").tolist()
    ids, names, sizes = ids.tolist(), table["file_name"].tolist(), table["size_hw"].tolist()
    records = []
    for i in order:
        cut = slice(ends[i] - counts[i], ends[i])
        records.append(Record(ids[i], names[i], *sizes[i], boxes[cut], category_ids[cut], crowds[cut], areas[cut]))
    return order, tuple(records)


# --------------------------------------------------------------------------------------------------------- TFDS


def import_tfds() -> ModuleType:
    """TensorFlow Datasets. Raises: ModuleNotFoundError, saying what to install."""
    try:
        import array_record  # noqa: F401
        import tensorflow_datasets
    except ModuleNotFoundError as error:
        raise missing_package(error) from error
    return tensorflow_datasets


def missing_package(error: ImportError) -> ModuleNotFoundError:
    """The error to raise where a package of the extra is not there."""
    return ModuleNotFoundError(
        f"TFDS sets need a package that is not installed ({error}); install it with: pip install cdetr_jax[tfds]"
    )


def find_prepared(name: str, data_dir: str | os.PathLike) -> Any:
    """The folder of a prepared set, the newest version unless the name says one, as an etils path.

    Raises: FileNotFoundError, if it is not prepared; ValueError, if the name is none.
    """
    from etils import epath

    match = re.fullmatch(r"(\w+)(?:/([\w.-]+))?(?::(\d+\.\d+\.\d+))?", name)
    if not match:
        raise ValueError(f"config.data.tfds_name is {name!r}, expected a name such as coco/2017 or coco/2017:1.1.0")
    base, config, version = match.groups()
    parent = epath.Path(data_dir).expanduser() / base / (config or "")
    versions = _versions(parent)
    if not versions and not config and parent.exists():
        configs = {folder.name: found for folder in parent.iterdir() if (found := _versions(folder))}
        if len(configs) > 1:
            raise ValueError(
                f"{name} names no config, and {parent} has several: say which, one of "
                f"{', '.join(f'{base}/{config}' for config in sorted(configs))}"
            )
        versions = next(iter(configs.values()), {})
    wanted = tuple(map(int, version.split("."))) if version else max(versions, default=None)
    if wanted in versions:
        return versions[wanted]
    raise FileNotFoundError(
        f"{name} is not prepared in {data_dir}: there is no {parent / (version or '*')} with a prepared set; run "
        f"`cdetr prepare --dataset={name} --data_dir={data_dir}`, or set config.data.tfds_data_dir to where it is"
    )


def splits_of(name: str, data_dir: str | os.PathLike) -> list[str]:
    """Names of a prepared set's splits. Raises: as `TfdsSource`."""
    return list(import_tfds().builder_from_directory(str(find_prepared(name, data_dir))).info.splits)


def _versions(parent: Any) -> dict[tuple[int, ...], Any]:
    """The folders of prepared versions."""
    return {
        tuple(map(int, folder.name.split("."))): folder
        for folder in (parent.iterdir() if parent.is_dir() else ())
        if re.fullmatch(r"\d+\.\d+\.\d+", folder.name) and (folder / "features.json").exists()
    }


def check_features(name: str, features: Any) -> Any:
    """The features of one object. Raises: ValueError, if the set is not one of pictures with boxes and labels."""
    try:
        objects = features["objects"].feature
        has_all = "image" in features and {"bbox", "label"} <= set(objects.keys())
    except (AttributeError, KeyError, TypeError):
        has_all = False
    if not has_all or not hasattr(objects["label"], "num_classes"):
        raise ValueError(
            f"{name} cannot be trained on: it needs the features image, objects/bbox and objects/label, it has "
            f"{', '.join(features.keys())}"
        )
    form = getattr(objects["bbox"], "bbox_format", None)
    if form is not None and form.value != "REL_YXYX":
        raise ValueError(f"{name} has boxes of form {form.value}, only TFDS's usual REL_YXYX can be read")
    return dict(objects.items())


def _open_records(builder: Any, split: str, folder: Any) -> Any:
    """Random access to the examples, their pictures still encoded. Raises: ValueError, if there is no such split."""
    from tensorflow_datasets import decode, features

    encoded = {
        name: decode.SkipDecoding() for name, f in builder.info.features.items() if isinstance(f, features.Image)
    }
    try:
        return builder.as_data_source(split, decoders=encoded)
    except NotImplementedError:
        raise ValueError(
            f"{folder} holds {builder.info.file_format.value} files, which cannot be read at random; prepare the set "
            "as array_record in another data_dir with `cdetr prepare`"
        ) from None
    except (ValueError, KeyError) as error:
        splits = ", ".join(f"{name} with {info.num_examples} pictures" for name, info in builder.info.splits.items())
        raise ValueError(f"{folder} has no picture in a split {split!r}, it has {splits} ({error})") from error


def _fingerprint(folder: Any, split: str) -> str:
    """Of all files that TFDS wrote there, by name, size and time, and of what they say of themselves."""
    files = sorted(file for file in folder.iterdir() if not file.name.startswith((".", "cdetr-")))
    states = [(file.name, (state := file.stat()).length, int(state.mtime)) for file in files]
    texts = [file.read_text() for file in files if file.name.endswith((".json", ".txt"))]
    return fingerprint_of([_TABLE_VERSION, split, *states, *texts])
