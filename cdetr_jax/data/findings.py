"""What is wrong with a data set, by looking at every picture and every box."""

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cdetr_jax.data.cache import in_parallel
from cdetr_jax.data.sources import BadPictureError, PictureFolder, clip_to_picture

BEYOND_PX = 1.0  # a box may end so far outside of its picture, by rounding


class Finding(NamedTuple):
    """Something that is wrong: what, and where, as a file with its line where there is one."""

    what: str
    place: str


def look_through(splits: Mapping[str, PictureFolder]) -> Iterator[Finding]:
    """Finds what is wrong in splits and between them. Decodes every picture.

    In order: missing or damaged pictures; boxes that are empty, outside or given twice; pictures that are there twice,
    above all in several splits; classes that are evaluated but not trained.
    """
    for source in splits.values():
        yield from _bad_pictures(source)
    for source in splits.values():
        yield from _bad_boxes(source)
    for first, others in same_pictures(splits):
        names = sorted({first.split, *(other.split for other in others)})
        what = (
            f"the same picture in {' and '.join(names)}" if len(names) > 1 else f"the same picture twice in {names[0]}"
        )
        yield Finding(what, ", ".join(str(where.path) for where in (first, *others)))
    if "train" in splits:
        trained = {category.name for category in used_categories(splits["train"])}
        for split, source in splits.items():
            for category in used_categories(source):
                if category.name not in trained:
                    yield Finding("a class without a training object", f"{category.name!r} of {split}")


def used_categories(source: PictureFolder) -> list[Any]:
    """The categories that some object has."""
    used = set(np.concatenate([[], *(record.category_ids for record in source.records)]).tolist())
    return [category for category in source.categories if category.id in used]


def _bad_pictures(source: PictureFolder) -> Iterator[Finding]:
    def damage(i: int) -> str | None:
        try:
            source.open_image(i)
        except BadPictureError as error:
            return str(error)
        return None

    for message in in_parallel(damage, range(len(source)), "pictures"):
        if message:
            yield Finding("a missing picture" if "no such file" in message else "a damaged picture", message)


def _bad_boxes(source: PictureFolder) -> Iterator[Finding]:
    for i, record in enumerate(source.records):
        boxes, size = record.boxes_xywh_px, (record.width, record.height)
        _, is_inside = clip_to_picture(boxes, record.height, record.width)
        seen: dict[tuple[float, ...], int] = {}
        for k, (label, (left, top, width, height)) in enumerate(zip(record.category_ids, boxes.tolist(), strict=True)):
            place = source.place_of(i, k)
            shown = f"{left:g}, {top:g}, {width:g} x {height:g}, in {size[0]} x {size[1]} pixels"
            outside = max(-left, -top, left + width - size[0], top + height - size[1])
            if min(width, height) <= 0:
                yield Finding("an empty box", f"{place} ({shown})")
            elif max(width, height) < 1:
                yield Finding("a box smaller than a pixel: fractions where pixels belong?", f"{place} ({shown})")
            elif not is_inside[k] or outside > BEYOND_PX:
                yield Finding("a box outside of its picture", f"{place} ({shown})")
            key = (int(label), *np.round([left, top, width, height], 2).tolist())
            if seen.setdefault(key, k) != k:
                yield Finding("a box that is there twice", f"{place}, as {source.place_of(i, seen[key])}")


class Where(NamedTuple):
    """A picture file and the split that it is in."""

    split: str
    path: Path


def same_pictures(splits: Mapping[str, PictureFolder], across: bool = False) -> list[tuple[Where, list[Where]]]:
    """Picture files with the same content: the first of each, and the others.

    Files are told apart by size, then by some bytes of their middle, and only then by all of them.
    Args:
      across: only those that are in several splits; costs less.
    """
    files = [
        Where(split, source.folder / record.file_name) for split, source in splits.items() for record in source.records
    ]
    groups = [[file for file in files if file.path.is_file()]]
    for key in (_size, _middle, _digest):
        groups = [group for some in groups for group in _grouped(some, key)]
        if across:
            groups = [group for group in groups if len({where.split for where in group}) > 1]
    return [(group[0], group[1:]) for group in groups]


def _grouped(files: Sequence[Where], key: Callable[[Path], Any]) -> list[list[Where]]:
    groups = defaultdict(list)
    for file, value in zip(files, in_parallel(lambda file: key(file.path), files, "contents"), strict=True):
        groups[value].append(file)
    return [group for group in groups.values() if len(group) > 1]


def _size(path: Path) -> int:
    return path.stat().st_size


def _middle(path: Path) -> bytes:
    with path.open("rb") as file:
        file.seek(path.stat().st_size // 2)
        return file.read(4096)


def _digest(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def leaks(splits: Mapping[str, PictureFolder]) -> str:
    """One line about the pictures that several splits share; empty, if there is none."""
    shared = same_pictures(splits, across=True)
    if not shared:
        return ""
    first, others = shared[0]
    other = next(other for other in others if other.split != first.split)
    return f"{len(shared)} pictures are in both {first.split} and {other.split}, such as {first.path} and {other.path}"
