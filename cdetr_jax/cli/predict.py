"""`cdetr predict`."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, PngImagePlugin

from cdetr_jax.cli.settings import set_up_logging
from cdetr_jax.data.sources import PICTURE_ERRORS, BadPictureError, open_picture
from cdetr_jax.files import as_path, growing_list, whole_file

SHEET_PICTURES = 16
RESULTS = "predictions.json"
SOFTWARE = "cdetr predict"  # what a drawing of ours says in its "Software" field


class _Input(NamedTuple):
    """A picture: its id in predictions.json, what it is called, the wish for its drawing's name, how it is read."""

    image_id: int
    file_name: str
    drawing: str
    load: Callable[[], np.ndarray]


class _Names:
    """Names for what is written: each once, and none of a file that is there already and is not a drawing of ours."""

    def __init__(self, output: Any, inputs: list[Path]):
        self._output = output
        self._taken: set[str] = set()
        self._inputs = {_identity(path) for path in inputs}

    def path(self, name: str) -> Any:
        """Where to write a drawing that wants this name, without `.png`; a number is added where it is not free."""
        number, unique = 1, name
        while unique.casefold() in self._taken or self._is_theirs(self._output / f"{unique}.png"):
            number += 1
            unique = f"{name}_{number}"
        self._taken.add(unique.casefold())  # one file on some systems, whatever its letters' case
        return self._output / f"{unique}.png"

    def is_input(self, path: Any) -> bool:
        """Whether this is one of the pictures, through a link or under another spelling, too."""
        return isinstance(path, Path) and path.exists() and _identity(path) in self._inputs

    def _is_theirs(self, path: Any) -> bool:
        return path.exists() and (self.is_input(path) or not _is_drawing(path))


def run(arguments: argparse.Namespace) -> None:
    """Draws the objects of each picture and writes predictions.json, both as they come.

    Raises: ValueError, after all pictures, if one of them could not be read, and at once if an argument is wrong;
      FileNotFoundError, if there is none.
    """
    output = as_path(arguments.output)
    files = _find(arguments.pictures, output)
    if not files and not arguments.from_eval:
        raise ValueError("name at least one picture or folder, or ask for some with --from-eval=N")
    names = _Names(output, [path for path, _ in files])
    if names.is_input(output / RESULTS):
        raise ValueError(f"{output / RESULTS} is one of the pictures, and would be written over; name another --output")
    set_up_logging()
    from cdetr_jax.inference import Detector
    from cdetr_jax.visualization.draw import contact_sheet
    from cdetr_jax.weights.load import load_weights

    weights = load_weights(arguments.weights, arguments.checkpoint, arguments.dc5)
    from_eval, first_id = _from_evaluation(weights, arguments.from_eval)
    inputs = [
        _Input(image_id, str(path), drawing, lambda path=path: open_picture(path))
        for image_id, (path, drawing) in enumerate(files, start=first_id)
    ] + from_eval
    detector = Detector(weights)
    sheet_path = names.path("sheet")
    sheet: list[Image.Image] = []
    num_objects, unreadable = 0, 0
    with growing_list(output / RESULTS) as add_results:
        for each in inputs:
            try:
                image = each.load()
            except BadPictureError as error:
                print(error, flush=True)
                unreadable += 1
                continue
            try:
                objects = detector(image, arguments.threshold)
            except Exception as error:
                height, width = image.shape[:2]
                error.add_note(f"with {each.file_name}, {width} x {height} pixels")
                raise
            drawing, path = objects.draw(), names.path(each.drawing)
            _save(drawing, path)
            if len(sheet) < SHEET_PICTURES:
                sheet.append(drawing)
            add_results(_results(objects, each))
            num_objects += len(objects)
            print(f"{each.file_name}: {objects.summary()} -> {path}", flush=True)
    if len(sheet) > 1:
        _save(contact_sheet(sheet, columns=4), sheet_path)
        print(f"{len(sheet)} of the pictures on one sheet: {sheet_path}")
    print(f"{num_objects} objects in {len(inputs) - unreadable} pictures: {output / RESULTS}")
    if unreadable:
        raise ValueError(f"{unreadable} of {len(inputs)} pictures could not be read, see above")


def _results(objects: Any, each: _Input) -> list[dict[str, Any]]:
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


def _save(drawing: Image.Image, path: Any) -> None:
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


def _find(arguments: list[str], output: Any) -> list[tuple[Path, str]]:
    """The pictures, and those inside of the folders without the output's; with a wish for the drawing's name.

    A folder's own tree is kept in the drawings.
    """
    extensions = tuple(Image.registered_extensions())
    own = output.resolve() if isinstance(output, Path) else None
    found: list[tuple[Path, str]] = []
    for path in map(Path, arguments):
        if path.is_dir():
            if own is not None and own.exists() and own.samefile(path):
                raise ValueError(
                    f"--output={output} is the folder of the pictures; name another one, such as {path / 'found'}"
                )
            outside = own is None or not own.is_relative_to(path.resolve())
            inside = sorted(
                file
                for file in path.rglob("*")
                if file.suffix.lower() in extensions
                and file.is_file()
                and (outside or not file.resolve().is_relative_to(own))
            )
            if not inside:
                raise FileNotFoundError(f"there are no pictures in the folder {path}")
            found += [(file, str(file.relative_to(path).with_suffix(""))) for file in inside]
        elif path.exists():
            found.append((path, path.stem))
        else:
            raise FileNotFoundError(f"there is no picture or folder {path}")
    return found


def _from_evaluation(weights: Any, count: int) -> tuple[list[_Input], int]:
    """The first pictures of the run's evaluation set, with their own ids, and the first id that is free."""
    if not count:
        return [], 1
    if weights.config is None:
        raise ValueError(f"--from-eval needs the workdir of a run, and {weights.source} is none; name pictures instead")
    from cdetr_jax.build import make_source

    source = make_source(weights.config, "eval")
    inputs = [
        _Input(
            record.image_id,
            record.file_name,
            f"eval_{Path(record.file_name).stem}",
            lambda i=i: source.load_image(i),
        )
        for i, record in enumerate(source.records[:count])
    ]
    return inputs, max(1, 1 + max(record.image_id for record in source.records))
