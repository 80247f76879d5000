"""`cdetr predict`."""

import argparse
import contextlib
import difflib
import functools
import glob
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, PngImagePlugin

from cdetr_jax.cli.predict_video import (
    SOFTWARE,
    VIDEOS,
    as_json_line,
    check_for_video,
    find_in_video,
    is_drawn_video,
    is_live,
    is_video,
    parts,
)
from cdetr_jax.cli.settings import set_up_logging
from cdetr_jax.data.sources import PICTURE_ERRORS, BadPictureError, files_in, is_address, open_picture
from cdetr_jax.files import as_csv, as_path, growing_list, growing_text, whole_file, write_text

SHEET_PICTURES = 16
UNREAD = (".heic", ".heif", ".jxl", ".dng", ".cr2", ".cr3", ".nef", ".arw")  # pictures that Pillow does not read
# Where what was found goes, by its form.
RESULTS = {"coco": "predictions.json", "jsonl": "predictions.jsonl", "csv": "predictions.csv", "yolo": "labels"}


class PictureInput(NamedTuple):
    """A picture: its id in predictions.json, what it is called, the wish for its drawing's name, how it is read."""

    image_id: int
    file_name: str
    drawing: str
    load: Callable[[], np.ndarray]


class Names:
    """Names for what is written: each once, and none of a file that is there already and is not a drawing of ours."""

    def __init__(self, output: Any, inputs: list[Path], suffix: str = ".png"):
        self._output, self._suffix = output, suffix
        self._taken: set[str] = set()
        self._inputs = {_identity(path) for path in inputs}

    def path(self, name: str) -> Any:
        """Where to write what wants this name, without its suffix; a number is added where it is not free."""
        number, unique = 1, name
        while unique.casefold() in self._taken or self._is_theirs(self._output / f"{unique}{self._suffix}"):
            number += 1
            unique = f"{name}_{number}"
        self._taken.add(unique.casefold())  # one file on some systems, whatever its letters' case
        return self._output / f"{unique}{self._suffix}"

    def is_input(self, path: Any) -> bool:
        """Whether this is one of the pictures, through a link or under another spelling, too."""
        return isinstance(path, Path) and path.exists() and _identity(path) in self._inputs

    def _is_theirs(self, path: Any) -> bool:
        is_ours = {".png": _is_drawing, ".mp4": is_drawn_video}.get(self._suffix)
        return is_ours is not None and path.exists() and (self.is_input(path) or not is_ours(path))


def run(arguments: argparse.Namespace) -> None:
    """Draws the objects of each picture and writes what was found, both as they come.

    Raises: ValueError, after all pictures, if one of them could not be read, and at once if an argument is wrong;
      FileNotFoundError, if there is none; ModuleNotFoundError, for a video without PyAV.
    """
    output = as_path(arguments.output)
    files = find_pictures(arguments.pictures, output)
    if not files and not arguments.from_eval:
        raise ValueError("name at least one picture or folder, or ask for some with --from-eval=N")
    names = Names(output, [path for path, _ in files if isinstance(path, Path)])
    for results in (output / name for name in RESULTS.values()):
        if names.is_input(results):
            raise ValueError(f"{results} is one of the pictures, and would be written over; name another --output")
    videos = [(source, name) for source, name in files if is_video(source)]
    for source, _ in videos:
        check_for_video(source, output)
        if is_live(source) and (len(files) > 1 or arguments.from_eval):
            raise ValueError(f"{source} runs until it is stopped; name it alone")
    set_up_logging()
    import jax

    from cdetr_jax.inference import Detector
    from cdetr_jax.visualization.draw import contact_sheet
    from cdetr_jax.weights.load import load_weights

    weights = load_weights(arguments.weights, arguments.checkpoint, arguments.dc5)
    inputs = picture_inputs(weights, [each for each in files if each not in videos], arguments.from_eval)
    detector = Detector(weights)
    class_names = [category.name for category in detector.classes if category is not None]
    _check_classes(arguments.classes or [], class_names)
    batch = arguments.batch or (1 if jax.default_backend() == "cpu" else 8)

    def find(images: list[np.ndarray]) -> list[Any]:
        found = detector(images, arguments.threshold, batch)
        if not arguments.classes:
            return found
        return [objects[np.isin(objects.names, arguments.classes)] for objects in found]

    video_names = Names(output, [path for path, _ in files if isinstance(path, Path)], ".mp4")
    for source, name in videos:
        print(find_in_video(source, find, batch, video_names.path(name)), flush=True)
    if not inputs:
        return
    sheet_path = names.path("sheet")
    sheet: list[Image.Image] = []
    num_objects, unreadable = 0, 0
    with _results_files(output, arguments.save, class_names) as add_results, _progress(len(inputs)) as progress:
        # A few batches at a time, in which pictures of one padded shape come together.
        for together in parts(inputs, 1 if batch == 1 else 4 * batch):
            read: list[tuple[PictureInput, np.ndarray]] = []
            for each in together:
                try:
                    read.append((each, each.load()))
                except BadPictureError as error:
                    progress.write(str(error))
                    unreadable += 1
            try:
                found = find([image for _, image in read])
            except Exception as error:
                sizes = (f"{each.file_name}, {image.shape[1]} x {image.shape[0]} pixels" for each, image in read)
                error.add_note("with " + "; ".join(sizes))
                raise
            for (each, _), objects in zip(read, found, strict=True):
                drawing, path = objects.draw(), names.path(each.drawing)
                save_drawing(drawing, path)
                if len(sheet) < SHEET_PICTURES:
                    sheet.append(drawing)
                if arguments.crops:
                    for name, crop in zip(objects.names, objects.crops(), strict=True):
                        save_drawing(crop, names.path(f"crops/{each.drawing}_{_as_file_name(name)}"))
                add_results(each, objects)
                num_objects += len(objects)
                progress.write(f"{each.file_name}: {objects.summary()} -> {path}")
            progress.update(len(together))
    if len(sheet) > 1:
        save_drawing(contact_sheet(sheet, columns=4), sheet_path)
        print(f"{len(sheet)} of the pictures on one sheet: {sheet_path}")
    written = ", ".join(str(output / RESULTS[form]) for form in arguments.save)
    print(f"{num_objects} objects in {len(inputs) - unreadable} pictures: {written}")
    if unreadable:
        raise ValueError(f"{unreadable} of {len(inputs)} pictures could not be read, see above")


def _progress(total: int) -> Any:
    """A bar on a terminal; `write` puts a line above it, in a file or pipe the line alone."""
    from tqdm import tqdm

    bar = tqdm(total=total, unit=" pictures", disable=None)
    bar.write = lambda text: tqdm.write(text, file=sys.stdout)
    return bar


def _check_classes(wanted: list[str], known: list[str]) -> None:
    """Raises ValueError at a name that the detector does not know."""
    by_lower = {name.lower(): name for name in known}
    for name in wanted:
        if name not in known:
            similar = [by_lower[found] for found in difflib.get_close_matches(name.lower(), by_lower, n=1)]
            more = "" if len(known) <= 100 else f" and {len(known) - 100} more"
            meant = f"did you mean {similar[0]}?" if similar else f"it knows {', '.join(known[:100])}{more}"
            raise ValueError(f"--classes: the detector does not know {name!r}; {meant}")


@contextlib.contextmanager
def _results_files(
    output: Any, forms: Sequence[str], class_names: list[str]
) -> Iterator[Callable[[PictureInput, Any], None]]:
    """Gives a function that adds a picture's objects to the files that were asked for."""
    with contextlib.ExitStack() as files:
        adders: list[Callable[[PictureInput, Any], None]] = []
        if "coco" in forms:
            add_items = files.enter_context(growing_list(output / RESULTS["coco"]))
            adders.append(lambda each, objects: add_items(_coco(objects, each)))
        if "jsonl" in forms:
            add_line = files.enter_context(growing_text(output / RESULTS["jsonl"]))
            adders.append(lambda each, objects: add_line(as_json_line({"file_name": each.file_name}, objects)))
        if "csv" in forms:
            add_rows = files.enter_context(growing_text(output / RESULTS["csv"]))
            add_rows("file_name,class_id,class_name,score,left,top,right,bottom\n")
            adders.append(lambda each, objects: add_rows(_csv(objects, each)))
        if "yolo" in forms:
            write_text(output / RESULTS["yolo"] / "classes.txt", "".join(f"{name}\n" for name in class_names))
            labels = Names(output / RESULTS["yolo"], [], ".txt")
            adders.append(lambda each, objects: _write_yolo(labels.path(each.drawing), objects, class_names))

        def add(each: PictureInput, objects: Any) -> None:
            for adder in adders:
                adder(each, objects)

        yield add


def _coco(objects: Any, each: PictureInput) -> list[dict[str, Any]]:
    """A picture's objects in COCO's results format, with the names beside the ids."""
    left_top, right_bottom = np.split(objects.boxes_xyxy_px.astype(np.float64), 2, axis=1)
    boxes_xywh = np.concatenate([left_top, right_bottom - left_top], axis=1)
    columns = (objects.class_ids.tolist(), boxes_xywh.tolist(), objects.scores.tolist(), objects.names)
    return [
        {
            "image_id": each.image_id,
            "category_id": class_id,
            "bbox": box,
            "score": score,
            "file_name": each.file_name,
            "category_name": name,
        }
        for class_id, box, score, name in zip(*columns, strict=True)
    ]


def _csv(objects: Any, each: PictureInput) -> str:
    columns = (objects.class_ids.tolist(), objects.names, objects.scores.tolist(), objects.boxes_xyxy_px.tolist())
    return as_csv([each.file_name, *row, *box] for *row, box in zip(*columns, strict=True))


def _write_yolo(path: Any, objects: Any, class_names: list[str]) -> None:
    """A line an object: class, counted from 0 in classes.txt; centre and size as fractions of the picture; score."""
    height, width = objects.image.shape[:2]
    left_top, right_bottom = np.split(objects.boxes_xyxy_px / np.array([width, height] * 2), 2, axis=1)
    boxes_cxcywh = np.concatenate([(left_top + right_bottom) / 2, right_bottom - left_top], axis=1)
    lines = [
        " ".join([str(class_names.index(name)), *(f"{value:.6f}" for value in (*box, score))]) + "\n"
        for name, score, box in zip(objects.names, objects.scores, boxes_cxcywh, strict=True)
    ]
    write_text(path, "".join(lines))


def save_drawing(drawing: Image.Image, path: Any) -> None:
    """Writes a PNG that says that it is ours."""
    info = PngImagePlugin.PngInfo()
    info.add_text("Software", SOFTWARE)
    with whole_file(path) as temporary:
        drawing.save(temporary, format="PNG", pnginfo=info, compress_level=1)  # twice as fast, 2 % larger


def _is_drawing(path: Any) -> bool:
    """Whether a file is what `_save` wrote."""
    try:
        with path.open("rb") as file, Image.open(file) as image:
            return image.info.get("Software") == SOFTWARE
    except PICTURE_ERRORS:
        return False


def _identity(path: Path) -> tuple[int, int]:
    """The same for all names of a file."""
    found = path.stat()
    return found.st_dev, found.st_ino


def find_pictures(arguments: list[str], output: Any) -> list[tuple[Path | str, str]]:
    """The pictures, and those inside of the folders without the output's; with a wish for the drawing's name.

    A folder's own tree is kept in the drawings. A pattern stands for what it matches; an address and, where no file has
    its name, a camera for itself.
    """
    extensions = (*Image.registered_extensions(), *VIDEOS)
    own = output.resolve() if isinstance(output, Path) else None
    found: list[tuple[Path | str, str]] = []
    words: list[Path | str] = []
    for word in arguments:
        if is_address(word) or (is_live(word) and not Path(word).exists()):
            words.append(word)
        else:
            words += map(Path, [word] if Path(word).exists() else sorted(glob.glob(word, recursive=True)) or [word])
    for path in words:
        if isinstance(path, str):
            address = re.sub(r"\w+://(.*@)?", "", path.partition("?")[0])  # without user and password
            found.append((path, _as_file_name(address if is_live(path) else Path(address).stem) or "picture"))
            continue
        if path.is_dir():
            if own is not None and own.exists() and own.samefile(path):
                raise ValueError(
                    f"--output={output} is the folder of the pictures; name another one, such as {path / 'found'}"
                )
            outside = own is None or not own.is_relative_to(path.resolve())
            files = [
                file
                for file in files_in(path, (*extensions, *UNREAD), deep=True)
                if outside or not file.resolve().is_relative_to(own)
            ]
            inside = [file for file in files if file.suffix.lower() in extensions]
            if left_out := [file for file in files if file.suffix.lower() not in extensions]:
                print(f"{path}: {len(left_out)} files cannot be read and are left out, the first is {left_out[0]}")
            if not inside:
                raise FileNotFoundError(f"there are no pictures in the folder {path}")
            found += [(file, str(file.relative_to(path).with_suffix(""))) for file in inside]
        elif path.exists():
            found.append((path, path.stem))
        else:
            raise FileNotFoundError(f"there is no picture or folder {path}")
    return found


def _as_file_name(text: str) -> str:
    return re.sub(r"[^-.\w]+", "_", text)


def picture_inputs(weights: Any, files: list[tuple[Path | str, str]], from_eval: int) -> list[PictureInput]:
    """Files, and after them the first pictures of the run's evaluation set, which keep their ids."""
    inputs, first_id = [], 1
    if from_eval:
        if weights.config is None:
            raise ValueError(
                f"--from-eval needs the workdir of a run, and {weights.source} is none; name pictures instead"
            )
        from cdetr_jax.build import make_source

        source = make_source(weights.config, "eval")
        for i, record in enumerate(source.records[:from_eval]):
            drawing = f"eval_{Path(record.file_name).stem}"
            load = functools.partial(source.load_image, i)
            inputs.append(PictureInput(record.image_id, record.file_name, drawing, load))
        first_id = max(1, 1 + max(record.image_id for record in source.records))
    named = [
        PictureInput(image_id, str(path), drawing, functools.partial(open_picture, path))
        for image_id, (path, drawing) in enumerate(files, start=first_id)
    ]
    return named + inputs
