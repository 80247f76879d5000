"""`cdetr predict`."""

import argparse
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from cdetr_jax.checkpoints.workdir import write_json
from cdetr_jax.cli.settings import set_up_logging
from cdetr_jax.data.sources import BadPictureError
from cdetr_jax.files import as_path, whole_file

SHEET_PICTURES = 16


class _Input(NamedTuple):
    """A picture: its id in predictions.json, what it is called, what the drawing is called, and where it is."""

    image_id: int
    file_name: str
    drawing: str
    picture: Path | np.ndarray


def run(arguments: argparse.Namespace) -> None:
    """Draws the objects of each picture and writes predictions.json.

    Raises: ValueError, after all pictures, if one of them could not be read; FileNotFoundError, if there is none.
    """
    if not 0 <= arguments.threshold <= 1:
        raise ValueError(f"--threshold is {arguments.threshold}, expected a score from 0 to 1")
    output = as_path(arguments.output)
    inputs = _from_files(arguments.pictures)
    if not inputs and arguments.from_eval <= 0:
        raise ValueError("name at least one picture or folder, or ask for some with --from-eval=N")
    set_up_logging()
    from cdetr_jax.inference import Detector
    from cdetr_jax.visualization.draw import contact_sheet
    from cdetr_jax.weights.load import load_weights

    weights = load_weights(arguments.weights, arguments.checkpoint, arguments.dc5)
    inputs += _from_evaluation(weights, arguments.from_eval)
    detector = Detector(weights)
    results: list[dict[str, Any]] = []
    sheet: list[Image.Image] = []
    unreadable = 0
    for each in inputs:
        try:
            objects = detector(each.picture, arguments.threshold)
        except BadPictureError as error:
            print(f"{each.file_name}: not read: {error}")
            unreadable += 1
            continue
        path = output / f"{each.drawing}.png"
        drawing = objects.draw()
        with whole_file(path) as temporary:
            drawing.save(temporary, format="PNG")
        if len(sheet) < SHEET_PICTURES:
            sheet.append(drawing)
        for class_id, name, score, (left, top, right, bottom) in zip(
            objects.class_ids.tolist(),
            objects.names,
            objects.scores.tolist(),
            objects.boxes_xyxy_px.tolist(),
            strict=True,
        ):
            box = [left, top, right - left, bottom - top]
            result = {"image_id": each.image_id, "category_id": class_id, "bbox": box, "score": score}
            results.append(result | {"file_name": each.file_name, "category_name": name})
        print(f"{each.file_name}: {_summary(objects.names)} -> {path}")
    write_json(output / "predictions.json", results)
    if len(sheet) > 1:
        with whole_file(output / "sheet.png") as temporary:
            contact_sheet(sheet, columns=4).save(temporary, format="PNG")
    print(f"{len(results)} objects in {len(inputs) - unreadable} pictures: {output / 'predictions.json'}")
    if unreadable:
        raise ValueError(f"{unreadable} of {len(inputs)} pictures could not be read, see above")


def _summary(names: list[str]) -> str:
    counts = {name: names.count(name) for name in names}
    return ", ".join(f"{count} {name}" for name, count in counts.items()) or "nothing"


def _from_files(arguments: list[str]) -> list[_Input]:
    """The pictures and those inside of the folders, numbered from 1; a folder's own tree is kept in the drawings."""
    extensions = tuple(Image.registered_extensions())
    found: list[tuple[Path, str]] = []
    for path in map(Path, arguments):
        if path.is_dir():
            inside = sorted(file for file in path.rglob("*") if file.suffix.lower() in extensions)
            if not inside:
                raise FileNotFoundError(f"there are no pictures in the folder {path}")
            found += [(file, str(file.relative_to(path).with_suffix(""))) for file in inside]
        elif path.exists():
            found.append((path, path.stem))
        else:
            raise FileNotFoundError(f"there is no picture or folder {path}")
    taken: set[str] = set()
    inputs = []
    for image_id, (path, name) in enumerate(found, start=1):
        unique, number = name, 2
        while unique in taken:  # two folders may hold the same names
            unique, number = f"{name}_{number}", number + 1
        taken.add(unique)
        inputs.append(_Input(image_id, str(path), unique, path))
    return inputs


def _from_evaluation(weights: Any, count: int) -> list[_Input]:
    """The first pictures of the run's evaluation set, with their own ids."""
    if count <= 0:
        return []
    if weights.config is None:
        raise ValueError(f"--from-eval needs the workdir of a run, and {weights.source} is none; name pictures instead")
    from cdetr_jax.build import make_source

    source = make_source(weights.config, "eval")
    return [
        _Input(record.image_id, record.file_name, f"eval_{Path(record.file_name).stem}", source.load_image(i))
        for i, record in enumerate(source.records[:count])
    ]
