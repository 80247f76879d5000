"""What a folder of annotated pictures is, COCO, YOLO or Pascal VOC, and each of its splits as a source."""

import dataclasses
import functools
import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from cdetr_jax.data.coco import CocoFolder
from cdetr_jax.data.joined import moved
from cdetr_jax.data.sources import SPLITS, PictureFolder, files_in, split_name
from cdetr_jax.data.voc import read_convention, read_voc
from cdetr_jax.data.yolo import open_yolo
from cdetr_jax.files import write_json
from cdetr_jax.records import Category

Reader = Callable[[], PictureFolder]

HELD_OUT = 0.2  # of the pictures, where a folder has no split to evaluate on ...
MOST_HELD_OUT = 5000  # ... but no more than COCO has

EXPECTED = (
    "a COCO folder (train2017/, val2017/, annotations/instances_*.json, or train/_annotations.coco.json and valid/), "
    "YOLO (data.yaml, images/, labels/), Pascal VOC (Annotations/*.xml, JPEGImages/, also in VOC2007/ and other years, "
    "or XML beside the pictures), or pictures with one COCO JSON"
)


@dataclasses.dataclass(frozen=True)
class Layout:
    """A folder that was recognised.

    Attributes:
      what: says what it is.
      splits: `train`, `validation`, `test` as far as they are there, each with a function that reads it; or one that
        is still to be divided.
    """

    what: str
    splits: dict[str, Reader]

    @property
    def must_be_divided(self) -> bool:
        """Whether there is nothing to evaluate on but a part of what there is."""
        return len(self.splits) == 1 and "test" not in self.splits

    def describe(self) -> str:
        """One line: what was found."""
        splits = ", ".join(self.splits)
        divided = f"; {HELD_OUT:.0%} of its pictures are held out for evaluation" * self.must_be_divided
        return f"{self.what}: {splits}{divided}" if splits != "all" else f"{self.what}, without a split{divided}"


def find_layout(folder: str | os.PathLike) -> Layout:
    """Finds out what a folder is; a data.yaml or a JSON may be named itself.

    Raises: FileNotFoundError, if it is not there; ValueError, if it is none of `EXPECTED`, or its data.yaml is wrong.
    """
    folder = Path(folder)
    if folder.is_file() and folder.suffix in (".yaml", ".yml"):
        return _yolo(folder)
    if folder.is_file() and folder.suffix == ".json":
        return Layout(f"{folder} is a COCO JSON", {"all": _coco(*_pictures_of(folder))})
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; expected {EXPECTED}")
    for find in (_find_yolo, _find_coco, _find_voc):
        if found := find(folder):
            return found
    inner = [path for path in folder.iterdir() if path.is_dir() and not path.name.startswith((".", "__MACOSX"))]
    if len(inner) == 1:  # as archives are unpacked
        return find_layout(inner[0])
    if years := {path: found for path in sorted(inner) if path.name.startswith("VOC") and (found := _find_voc(path))}:
        return _years(folder, years)
    if labels := [
        path for path in files_in(folder, (".txt",), deep=True) if "labels" in path.parts[len(folder.parts) : -1]
    ]:
        raise ValueError(
            f"{folder}: it has YOLO labels ({labels[0].relative_to(folder)}) but no data.yaml; write one with names: "
            "[the classes, by index], train: images/train, val: images/val"
        )
    names = ", ".join(sorted(path.name for path in folder.iterdir())[:5]) or "nothing"
    raise ValueError(f"{folder}: no data set was recognised in it; it holds {names}; expected {EXPECTED}")


def read_split(folder: str | os.PathLike, split: str, seed: int = 0, split_file: str = "") -> PictureFolder:
    """One split of a folder as a source; where there is none to evaluate on, a part that a seed decides.

    Args:
      split: `train`, `validation` or `test`.
      seed, split_file: see `divide`.
    Raises: ValueError, FileNotFoundError, naming file and line, if there is no such split or its files are wrong;
      BadPictureError, if a picture's size is needed and cannot be read.
    """
    layout, split = find_layout(folder), split_name(split)
    if layout.must_be_divided:
        [read] = layout.splits.values()
        parts = divide(read(), seed, split_file)
        if split in parts:
            return parts[split]
        raise ValueError(f"{layout.what}: it has no split {split!r}; expected one of {', '.join(parts)}")
    if split not in layout.splits:
        raise ValueError(f"{layout.what}: it has no split {split!r}, only {', '.join(layout.splits)}")
    return layout.splits[split]()


def divide(source: PictureFolder, seed: int, split_file: str = "") -> dict[str, PictureFolder]:
    """Training and evaluation parts of a source.

    Which pictures are held out depends on the seed and the names of all. What Roboflow made of one picture
    (`name.rf.*`) stays together.
    Args:
      split_file: JSON with the pictures' names; used if it is there, else written; "": neither.
    Raises: ValueError, if the file does not fit the pictures, or there is but one picture.
    """
    names = [record.file_name for record in source.records]
    if split_file and Path(split_file).is_file():
        parts = json.loads(Path(split_file).read_text(encoding="utf-8"))
        if unknown := set(names) ^ {name for part in ("train", "validation") for name in parts[part]}:
            raise ValueError(
                f"{split_file}: {min(unknown)!r} and {len(unknown) - 1} more are in this file but not in "
                f"{source.annotations}, or the reverse; use the same pictures, or delete the file for another split"
            )
    else:
        originals: dict[str, list[str]] = {}
        for name in names:
            originals.setdefault(name.partition(".rf.")[0], []).append(name)
        order = sorted(originals, key=lambda name: hashlib.sha256(f"{seed} {name}".encode()).digest())
        if len(order) < 2:
            raise ValueError(f"{source.annotations}: {len(names)} pictures, too few to hold some out for evaluation")
        wanted, held_out = min(math.ceil(HELD_OUT * len(names)), MOST_HELD_OUT), []
        for name in order[1:]:
            if len(held_out) < wanted:
                held_out += originals[name]
        parts = {"seed": seed, "train": sorted(set(names) - set(held_out)), "validation": sorted(held_out)}
        if split_file:
            write_json(split_file, parts)
    held_out = set(parts["validation"])
    chosen = {"train": [], "validation": []}
    for i, name in enumerate(names):
        chosen["validation" if name in held_out else "train"].append(i)
    return {part: source.part(indices) for part, indices in chosen.items()}


def _find_coco(folder: Path) -> Layout | None:
    """Roboflow's folders with a JSON each; JSON files with their splits' names; or one JSON."""
    exports = {split_name(file.parent.name): file for file in sorted(folder.glob("*/_annotations.coco.json"))}
    if exports:
        what = f"{folder} is a COCO folder of Roboflow's"
        return Layout(what, _in_order({name: _coco(file.parent, file) for name, file in exports.items()}))
    files = [file for place in ("annotations", ".") for file in sorted((folder / place).glob("*.json"))]
    files = [file for file in files if file.name.startswith("instances_")] or [
        file for file in files if not re.match("(captions|person_keypoints|panoptic|stuff|image_info)_", file.name)
    ]
    splits: dict[str, list[Path]] = {}
    for file in files:
        words = re.split(r"[^a-z]+", file.stem.lower())
        of = [name for name, spellings in SPLITS.items() if any(re.fullmatch(spellings, word) for word in words)]
        splits.setdefault(of[0] if len(of) == 1 else "all", []).append(file)
    if len(splits) > 1:
        splits.pop("all", None)  # a JSON of something else
    if several := [group for group in splits.values() if len(group) > 1]:
        names = ", ".join(str(file.relative_to(folder)) for file in several[0])
        raise ValueError(
            f"{folder}: which of {names} is to be used? move the others away, or name folders and files: "
            "--config.data.source=coco_folder --config.data.train_images=... --config.data.train_annotations=..."
        )
    if not splits:
        return None
    return Layout(
        f"{folder} is a COCO folder", _in_order({name: _coco(*_pictures_of(f)) for name, [f] in splits.items()})
    )


def _coco(images: Path, annotations: Path) -> Reader:
    return functools.partial(CocoFolder, images, annotations)


def _in_order(splits: dict[str, Reader]) -> dict[str, Reader]:
    return {name: splits[name] for name in sorted(splits, key=[*SPLITS, *splits].index)}


def _pictures_of(file: Path) -> tuple[Path, Path]:
    """The folder of the pictures that an instances JSON is about, and the JSON. Raises: ValueError."""
    with file.open("rb") as stream:
        first = re.search(rb'"file_name"\s*:\s*"((?:[^"\\]|\\.)+)"', stream.read(2**20) or b"")
        first = first or re.search(rb'"file_name"\s*:\s*"((?:[^"\\]|\\.)+)"', file.read_bytes())
    name = json.loads(b'"' + first[1] + b'"').replace("\\", "/") if first else ""
    roots = [file.parent.parent, file.parent] if file.parent.name == "annotations" else [file.parent]
    split = file.stem.removeprefix("instances_")
    places = [root / place for root in roots for place in (split, f"images/{split}", f"{split}/images", "images", ".")]
    for root in roots:  # train.json beside train2017/, or whatever else there is
        places += sorted(path for path in root.iterdir() if path.is_dir())
    for place in places:
        if name and (place / name).is_file():
            return place, file
    if name:  # perhaps the first one is missing: the reading says so
        return next((place for place in places if place.is_dir()), file.parent), file
    raise ValueError(f"{file}: it names no picture (no file_name); expected a COCO instances JSON")


def _find_yolo(folder: Path) -> Layout | None:
    files = [folder / "data.yaml"] if (folder / "data.yaml").is_file() else []
    files = files or [file for ext in ("yaml", "yml") for file in sorted(folder.glob(f"*.{ext}")) if _has_names(file)]
    if len(files) > 1:
        raise ValueError(f"{folder}: which of {', '.join(file.name for file in files)}? name it: --data={files[0]}")
    return _yolo(files[0]) if files else None


def _has_names(file: Path) -> bool:
    return bool(re.search("^names:", file.read_text(encoding="utf-8", errors="replace"), re.MULTILINE))


def _yolo(file: Path) -> Layout:
    return Layout(f"{file.parent} is a YOLO data set ({file.name})", open_yolo(file))


def _find_voc(folder: Path) -> Layout | None:
    """The devkit's folders with lists of the splits; Roboflow's with XML beside the pictures; or one folder."""
    annotations = next(
        (path for path in (folder / "Annotations", folder / "annotations") if files_in(path, (".xml",), deep=True)),
        None,
    )
    if annotations:
        convention = functools.cache(functools.partial(read_convention, [annotations]))
        names = ("JPEGImages", "images", "Images", "imgs", ".")
        pictures = next(folder / name for name in names if (folder / name).is_dir())
        lists = {file.stem: file for file in (folder / "ImageSets" / "Main").glob("*.txt")}
        found = {
            split: next((lists[n] for n in spellings.split("|") if n in lists), None)
            for split, spellings in SPLITS.items()
        }
        found["train"] = found["train"] or lists.get("trainval")
        splits = {
            split: functools.partial(read_voc, annotations, pictures, convention, file)
            for split, file in found.items()
            if file
        }
        splits = splits or {"all": functools.partial(read_voc, annotations, pictures, convention)}
        return Layout(f"{folder} is a Pascal VOC folder", splits)
    places = [path for path in (folder, *sorted(folder.iterdir())) if path.is_dir() and files_in(path, (".xml",))]
    places = places[:1] if folder in places else places
    convention = functools.cache(functools.partial(read_convention, places))
    splits = {
        "all" if path == folder else split_name(path.name): functools.partial(read_voc, path, path, convention)
        for path in places
    }
    return Layout(f"{folder} holds Pascal VOC's XML beside the pictures", _in_order(splits)) if splits else None


def _years(folder: Path, years: dict[Path, Layout]) -> Layout:
    """VOC2007, VOC2012, ...: a split is that of all years with it. Raises: ValueError, if only some have splits."""
    readers: dict[str, list[Reader]] = {}
    for layout in years.values():
        for split, read in layout.splits.items():
            readers.setdefault(split, []).append(read)
    if "all" in readers and len(readers) > 1:
        path = next(path for path, layout in years.items() if "all" in layout.splits)
        raise ValueError(f"{path}: it has no lists of its splits, ImageSets/Main/*.txt, as another year has")
    what = f"{folder} holds Pascal VOC's {', '.join(path.name for path in years)}"
    return Layout(
        what, _in_order({split: functools.partial(_as_one, folder, several) for split, several in readers.items()})
    )


def _as_one(folder: Path, readers: Sequence[Reader]) -> PictureFolder:
    """Several sources in a folder, with classes of the same names, as one."""
    sources = [read() for read in readers]
    ids = {name: i for i, name in enumerate(sorted({c.name for source in sources for c in source.categories}), 1)}
    records, places = [], []
    for source in sources:
        new_ids = {category.id: ids[category.name] for category in source.categories}
        shift, prefix = len(records), f"{source.folder.relative_to(folder)}/"
        records += [moved(record, new_ids, shift, prefix) for record in source.records]
        places += source.places
    return PictureFolder(folder, records, [Category(i, name) for name, i in ids.items()], folder, places=places)
