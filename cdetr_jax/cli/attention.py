"""`cdetr attention`."""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from cdetr_jax.cli.predict import Names, find_pictures, picture_inputs, save_drawing
from cdetr_jax.cli.settings import change_config, read_config, set_up_logging
from cdetr_jax.data.sources import BadPictureError
from cdetr_jax.files import as_csv, as_path, whole_file, write_json, write_text

MEASURE = "attention"  # .json and .csv


def run(arguments: argparse.Namespace, fields: list[str]) -> None:
    """Draws where detectors look, or measures it over an evaluation set.

    Raises: ValueError, FileNotFoundError, as `cdetr predict`; ValueError, if arguments do not fit each other.
    """
    output = as_path(arguments.output)
    if arguments.measure:
        if arguments.pictures or arguments.from_eval or arguments.point:
            raise ValueError("--measure takes a whole evaluation set; leave out pictures, --from-eval and --point")
        _measure(arguments, fields, output)
    elif arguments.config or fields:
        raise ValueError(f"{arguments.config or fields[0]} is for --measure, which is not asked for")
    else:
        _draw(arguments, output)


def _draw(arguments: argparse.Namespace, output: Any) -> None:
    """A sheet and its maps for each object of each picture, as they come."""
    files = find_pictures(arguments.pictures, output)
    if not files and not arguments.from_eval:
        raise ValueError("name at least one picture or folder, or ask for some with --from-eval=N")
    names = Names(output, [path for path, _ in files if isinstance(path, Path)])
    set_up_logging()
    from cdetr_jax.inference import Detector
    from cdetr_jax.visualization.attention import attention_sheet

    weights = _load(arguments)
    inputs, detectors = picture_inputs(weights[0], files, arguments.from_eval), [Detector(each) for each in weights]
    settings = {"threshold": arguments.threshold, "objects": arguments.objects}
    drawn, unreadable = 0, 0
    for each in inputs:
        try:
            image = each.load()
        except BadPictureError as error:
            print(error, flush=True)
            unreadable += 1
            continue
        first = detectors[0].attention(image, arguments.query, point=arguments.point, **settings)
        for i in range(len(first)):
            where = {"point": arguments.point} if arguments.point else {"query": first.boxes_xyxy_px[i]}
            attentions = [first, *(detector.attention(image, **where) for detector in detectors[1:])]
            which = [i] + [0] * len(detectors[1:])
            models = [attention.model for attention in attentions]
            labels = models if len(set(models)) == len(models) else [each.source for each in weights]
            sheet = attention_sheet(
                attentions, which, arguments.layer, arguments.head, title=each.file_name, labels=labels
            )
            of_query = "point" if arguments.point else f"query{first.queries[i]}"
            path = names.path(f"{each.drawing}_{of_query}")
            save_drawing(sheet, path)
            with whole_file(path.with_suffix(".npz")) as temporary, temporary.open("wb") as file:
                np.savez_compressed(file, **_arrays(attentions, which))
            print(f"{each.file_name}: {first.title(i)} -> {path}", flush=True)
            drawn += 1
    print(f"{drawn} sheets of {len(inputs) - unreadable} pictures, with their maps as .npz: {output}")
    if unreadable:
        raise ValueError(f"{unreadable} of {len(inputs)} pictures could not be read, see above")


def _load(arguments: argparse.Namespace) -> list[Any]:
    from cdetr_jax.weights.load import load_weights

    return [load_weights(source, arguments.checkpoint, arguments.dc5) for source in arguments.weights]


def _arrays(attentions: list[Any], which: list[int]) -> dict[str, np.ndarray]:
    """One query's part of each detector's `Attention`; the second one's names end in _2, and so on."""
    arrays = {}
    for number, (attention, i) in enumerate(zip(attentions, which, strict=True), start=1):
        end = f"_{number}" if number > 1 else ""
        for name in ("spatial", "content", "combined"):
            arrays[name + end] = getattr(attention, name)[:, i]
        for name, values in (
            ("size_in_cells", attention.size_in_cells),
            ("query", attention.queries[i]),
            ("box_xyxy_px", attention.boxes_xyxy_px[i]),
            ("score", attention.scores[i]),
            ("name", attention.names[i]),
            ("point_xy_px", attention.points_xy_px[i]),
            ("side", attention.side),
            ("model", attention.model),
        ):
            arrays[name + end] = np.array(values)
    return arrays


def _measure(arguments: argparse.Namespace, fields: list[str], output: Any) -> None:
    """Prints a table for each of the weights, and writes all of it as JSON and CSV."""
    set_up_logging()
    given = read_config(arguments.config, fields) if arguments.config else None
    from cdetr_jax.training.attention import measure_attention

    measures = []
    for weights in _load(arguments):
        if given is None and weights.config is None:
            raise ValueError(
                f"{weights.source} does not say on which pictures to measure it; name a recipe, such as "
                "--config=conditional_detr_r50"
            )
        config = change_config(weights.config, fields) if given is None else given
        measure = measure_attention(config, weights, arguments.threshold)
        print(f"{weights.source}: {measure.format_table()}\n")
        measures.append({"weights": weights.source} | dataclasses.asdict(measure))
    rows = [{"weights": measure["weights"]} | row for measure in measures for row in measure["rows"]]
    write_json(output / f"{MEASURE}.json", measures)
    write_text(output / f"{MEASURE}.csv", as_csv([rows[0], *(row.values() for row in rows)]))
    print(f"spatial, content and combined attention: {output / MEASURE}.json and .csv")
