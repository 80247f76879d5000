"""YOLO data sets: a data.yaml, and for each picture a text file with a line for each box."""

import functools
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from absl import logging

from cdetr_jax.data.cache import in_parallel
from cdetr_jax.data.sources import (
    SPLITS,
    PictureFolder,
    files_in,
    one_of_each_name,
    pictures_in,
    plain_record,
    read_text,
    sizes_in_headers,
)
from cdetr_jax.records import Category


def open_yolo(file: Path) -> dict[str, Callable[[], PictureFolder]]:
    """The splits of a data.yaml, each with a function that reads it; without `val`, perhaps only one.

    Raises: ValueError, FileNotFoundError, naming the key and its line.
    """
    text = read_text(file)
    try:
        content = yaml.load(text, yaml.BaseLoader)  # texts as they are written: a class may be called 1 or no
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or error
        raise ValueError(f"{file}:{mark.line + 1 if mark else 1}: not valid YAML: {problem}") from error
    content = content if isinstance(content, dict) else {}

    def place(key: str) -> str:
        found = re.search(rf"^{key}\s*:", text, re.MULTILINE)
        return f"{file}:{text.count(chr(10), 0, found.start()) + 1}: {key}" if found else f"{file}: key {key!r}"

    names = content.get("names")
    by_index = {str(i): name for i, name in enumerate(names)} if isinstance(names, list) else names
    if (
        not by_index
        or not isinstance(by_index, dict)
        or not all(re.fullmatch("[0-9]+", i) and isinstance(name, str) for i, name in by_index.items())
    ):
        raise ValueError(f"{place('names')} is {_short(names)}, expected the classes, as a list or by index")
    names = {int(i): name for i, name in by_index.items()}
    if "nc" in content and content["nc"] != str(len(names)):
        raise ValueError(f"{place('nc')} is {content['nc']}, but names has {len(names)} classes; correct one of them")
    keypoints = content.get("kpt_shape")
    columns = 5 + math.prod(map(int, keypoints)) if isinstance(keypoints, list) else 5
    roots = [file.parent / content["path"], Path(content["path"])] if content.get("path") else []
    roots.append(file.parent)
    splits = {}
    for split, spellings in SPLITS.items():
        key = next((key for key in spellings.split("|") if content.get(key)), None)
        if key is None and split == "train":
            raise ValueError(f"{place(split)} is missing, expected a folder of pictures, or several, or a list of them")
        if key is None:
            continue
        values = content[key] if isinstance(content[key], list) else [content[key]]
        found = [_resolve(roots, str(value)) for value in values]
        if None in found and split != "test":  # whose key often stays where its pictures were not exported
            value = values[found.index(None)]
            tried = ", ".join(map(str, roots))
            raise FileNotFoundError(
                f"{place(key)} is {value!r}: no such folder or list in {tried}"
                + "; correct it, or take it out, and a part of the training pictures is held out" * (split != "train")
            )
        if None not in found:
            splits[split] = functools.partial(_read, file, split, found, roots, names, columns)
    return splits


def _resolve(roots: Sequence[Path], value: str) -> Path | None:
    """Where a split or picture is. Roboflow writes ../train/images and means train/images; Windows has backslashes."""
    value = value.replace("\\", "/")
    tried = (root / text for root in roots for text in (re.sub(r"^(\.\./)+", "", value), value))
    return next((path for path in tried if path.exists()), None)


def _read(
    file: Path, split: str, places: Sequence[Path], roots: Sequence[Path], names: dict[int, str], columns: int
) -> PictureFolder:
    """Pictures with a .txt each: a line is the class and fractions of the picture, cx cy w h or a polygon's x y ..."""
    paths = [
        path
        for place in places
        for path in (_listed(place, roots) if place.is_file() else pictures_in(place, deep=True))
    ]
    paths = list(dict.fromkeys(paths))
    if not paths:
        raise ValueError(f"{file}: no pictures in {', '.join(map(str, places))}, its {split} split")
    root = file.parent
    one_of_each_name(paths)
    labels = [_label_of(path, root) for path in paths]
    _refuse_orphans(labels, paths, [place for place in places if place.is_dir()], root)
    found = in_parallel(functools.partial(_read_label, names=names, columns=columns), labels, "label files")
    unlabelled = [path for path, rows in zip(labels, found, strict=True) if rows is None]
    if len(unlabelled) == len(paths):
        raise ValueError(f"{file}: none of the {len(paths)} pictures of {split} has a label file such as {labels[0]}")
    if unlabelled:
        logging.warning(
            "%s: %d of %d pictures of %s have no label file and count as empty; the first that is missing is %s",
            *(file, len(unlabelled), len(paths), split, unlabelled[0]),
        )
    file_names = [str(path.relative_to(root) if path.is_relative_to(root) else path) for path in paths]
    sizes = sizes_in_headers(root, file_names, f"{file}.{split}.sizes.npz", turned=True)
    records, places_of = [], []
    for i, (name, size_hw, rows) in enumerate(zip(file_names, sizes, found, strict=True)):
        table = np.array(rows or [], np.float64).reshape(-1, 6)
        boxes = table[:, 2:] * np.tile(size_hw[::-1], 2)
        records.append(plain_record(i + 1, name, size_hw, boxes, table[:, 1].astype(np.int64)))
        places_of.append((str(labels[i]), table[:, 0].astype(np.int64)))
    categories = [Category(i, name) for i, name in names.items()]
    return PictureFolder(root, records, categories, file, places=places_of, turned=True)


def _listed(file: Path, roots: Sequence[Path]) -> list[Path]:
    """The pictures that a .txt lists. Raises: FileNotFoundError, at the first that is not there."""
    found = []
    for number, line in enumerate(read_text(file).splitlines(), 1):
        if line.strip():
            path = _resolve([file.parent, *roots], line.strip())
            if path is None:
                raise FileNotFoundError(f"{file}:{number}: no such picture, {file.parent / line.strip()}")
            found.append(path)
    return found


def _label_of(picture: Path, root: Path) -> Path:
    """The last folder `images` inside of the root gives way to `labels`; else the label is beside its picture."""
    parts = picture.parts
    if "images" in parts[len(root.parts) if picture.is_relative_to(root) else 0 : -1]:
        last = len(parts) - 2 - parts[-2::-1].index("images")
        parts = (*parts[:last], "labels", *parts[last + 1 :])
    return Path(*parts).with_suffix(".txt")


def _refuse_orphans(labels: Sequence[Path], pictures: Sequence[Path], places: Sequence[Path], root: Path) -> None:
    """Raises ValueError, naming it, if there is a label file without a picture. Places: folders of the split."""
    folders = {picture.parent for picture in pictures}
    known = {*labels, *(_label_of(path, root) for folder in folders for path in pictures_in(folder))}
    texts = {text for folder in {label.parent for label in labels} for text in files_in(folder, (".txt",))}
    texts |= {
        text for place in places for text in files_in(_label_of(place / "a.jpg", root).parent, (".txt",), deep=True)
    }
    orphans = [text for text in sorted(texts - known) if text.parent not in folders or _is_label(text)]
    orphans = [text for text in orphans if text.name != "classes.txt"]
    if orphans:
        raise ValueError(
            f"{orphans[0]}: a label file without a picture"
            + f", as are {len(orphans) - 1} more" * (len(orphans) > 1)
            + "; add the picture or delete the file"
        )


def _is_label(file: Path) -> bool:
    """Whether a text beside pictures is of boxes, and not a list or a word about the data set."""
    return re.match(rb"\s*\d+(\s+[\d.eE+-]+){4}", file.read_bytes()) is not None


def _read_label(file: Path, names: dict[int, str], columns: int) -> list[tuple[float, ...]] | None:
    """Rows of line, class, left, top, width, height, in fractions; None, if there is no such file.

    Raises: ValueError, naming the line.
    """
    try:
        text = read_text(file)
    except FileNotFoundError:
        return None
    rows = []
    for number, line in enumerate(text.splitlines(), 1):
        if not (words := line.split()):
            continue

        def wrong(expected: str, number: int = number, line: str = line) -> ValueError:
            return ValueError(f"{file}:{number}: {_short(line)}, expected {expected}")

        try:
            label, *values = map(float, words)
        except ValueError:
            raise wrong("numbers: the class and cx cy w h") from None
        if label not in names:
            raise wrong(f"a class of data.yaml, one of {min(names)} to {max(names)}")
        is_box = len(words) in (5, columns)
        if not is_box and (len(words) < 7 or len(words) % 2 == 0):
            raise wrong("the class and 4 numbers, cx cy w h, or the corners of a polygon")
        values = values[:4] if is_box else values
        if not all(-0.01 <= value <= 1.01 for value in values):  # a NaN neither
            raise wrong(
                "fractions of the picture, from 0 to 1; these look like pixels" * (max(values) > 1.01) or "0 to 1"
            )
        if is_box:
            cx, cy, width, height = values
            rows.append((number, label, cx - width / 2, cy - height / 2, width, height))
        else:
            left, top, right, bottom = (f(values[axis::2]) for f in (min, max) for axis in (0, 1))
            rows.append((number, label, left, top, right - left, bottom - top))
    return rows


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:60]}...'"
