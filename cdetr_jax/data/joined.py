"""Several sources as one."""

import bisect
import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np
from absl import logging
from PIL import Image

from cdetr_jax.data.sources import Source, missing_files, open_image
from cdetr_jax.records import Category, Record


class JoinedSource:
    """The pictures of several sources, one source after the other.

    Categories are the same where their names are; a later source's ids give way to an earlier one's, and where an
    earlier source has given an id to another name, the later one's name gets a free id. Image ids stay as
    they are, unless a source has one that an earlier one has, too: then all of its ids are moved up by a power of ten.
    In the same way file names that occur in an earlier source get the source's title in front.
    """

    def __init__(self, parts: Sequence[tuple[str, Source]]):
        """Joins sources, each with a title for error messages.

        Raises: ValueError, if two categories of one source have the same name.
        """
        self._sources = [source for _, source in parts]
        self._starts = [0, *itertools.accumulate(map(len, self._sources))]
        joint: dict[str, Category] = {}  # by name
        records: list[Record] = []
        image_ids, file_names = set(), set()
        for title, source in parts:
            ids = _merge(joint, title, source.categories)
            new_ids = [record.image_id for record in source.records]
            shift = 0
            if not image_ids.isdisjoint(new_ids):
                shift = 10 ** len(str(max(image_ids) - min(new_ids)))
            new_names = [record.file_name for record in source.records]
            prefix = "" if file_names.isdisjoint(new_names) else f"{title}: "
            if shift or prefix or any(old != new for old, new in ids.items()):
                records += [moved(record, ids, shift, prefix) for record in source.records]
            else:
                records += source.records
            image_ids.update(image_id + shift for image_id in new_ids)
            file_names.update(prefix + name for name in new_names)
        self.records = tuple(records)
        self.categories = tuple(sorted(joint.values(), key=lambda c: c.id))

    def __len__(self) -> int:
        return len(self.records)

    def load_image(self, i: int) -> np.ndarray:
        """Returns picture `i` as uint8 [H, W, 3] RGB. Raises: as its source."""
        return np.array(self.open_image(i))

    def open_image(self, i: int) -> Image.Image:
        """Returns picture `i` as a Pillow image of mode RGB. Raises: as its source."""
        part = bisect.bisect_right(self._starts, i) - 1
        return open_image(self._sources[part], i - self._starts[part])

    def missing_files(self) -> list[str]:
        """Paths of the pictures that are not there."""
        return [path for source in self._sources for path in missing_files(source)]


def _merge(joint: dict[str, Category], title: str, categories: Sequence[Category]) -> dict[int, int]:
    """Adds a source's categories by name. Returns: the joint id of each of its ids."""
    taken = {category.id for category in joint.values()}
    highest = max([*taken, *(category.id for category in categories)])
    seen: dict[str, int] = {}
    ids = {}
    for category in categories:
        if category.name in seen:
            raise ValueError(
                f"{title} has two categories {category.name!r}, {seen[category.name]} and {category.id}; several "
                "sources are joined by the names of their categories: rename one of them"
            )
        seen[category.name] = category.id
        if category.name in joint:
            ids[category.id] = joint[category.name].id
            continue
        ids[category.id] = category.id
        if category.id in taken:
            highest += 1
            logging.info("category %s of %s gets the id %d: %d is taken", category.name, title, highest, category.id)
            ids[category.id] = highest
        joint[category.name] = Category(ids[category.id], category.name)
    return ids


def moved(record: Record, ids: dict[int, int], shift: int, prefix: str) -> Record:
    """A record among those of another source: `ids` by its own category ids, `shift` added to its image id."""
    return dataclasses.replace(
        record,
        image_id=record.image_id + shift,
        file_name=prefix + record.file_name,
        category_ids=np.array([ids[i] for i in record.category_ids.tolist()], np.int64),
    )
