"""`cdetr data`: a look at a data set before it is trained on."""

import argparse
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cdetr_jax import build
from cdetr_jax.cli.data_flag import STARTS, changed, choices
from cdetr_jax.cli.settings import read_config, set_up_logging
from cdetr_jax.data.findings import Finding, look_through
from cdetr_jax.data.folders import Layout, divide, find_layout
from cdetr_jax.data.plan import real_pixels, real_pixels_otherwise, train_plan
from cdetr_jax.data.sources import BadPictureError, PictureFolder, open_image
from cdetr_jax.files import check_writable_folder, write_json
from cdetr_jax.visualization.draw import contact_sheet, draw_annotated

SHEET, SHEET_COLUMNS = 16, 4
SHOWN_CLASSES, SHOWN_PLACES = 30, 3


def run(arguments: argparse.Namespace) -> None:
    """Prints what is in a folder and what is wrong with it; ends with status 1 if something is.

    Raises: ValueError, FileNotFoundError, if no data set is recognised.
    """
    set_up_logging()
    output = Path(arguments.output) if arguments.output else None
    if output:
        check_writable_folder(output)
    layout = find_layout(arguments.folder)
    print(layout.describe(), flush=True)
    splits, findings = _read(layout)
    findings += look_through(splits)
    facts = {split: _facts(source) for split, source in splits.items()}
    print(f"\n{_facts_table(facts)}")
    if "train" in splits and (padding := _padding(splits["train"])):
        print(f"\n{padding}")
    print(f"\n{_findings_text(findings)}")
    if output and splits:
        output.mkdir(parents=True, exist_ok=True)
        _sheet(next(iter(splits.values()))).save(output / "annotated.png")
        found = [finding._asdict() for finding in findings]
        write_json(output / "data.json", {"what": layout.describe(), "splits": facts, "findings": found})
        print(f"\npictures as annotated  {output / 'annotated.png'}\nall numbers            {output / 'data.json'}")
    if findings:
        sys.exit(1)


def _read(layout: Layout) -> tuple[dict[str, PictureFolder], list[Finding]]:
    """The splits that can be read, and why the others cannot."""
    splits, findings = {}, []
    for split, read in layout.splits.items():
        try:
            source = read()
            splits |= divide(source, seed=0) if layout.must_be_divided else {split: source}
        except (ValueError, OSError) as error:
            place, _, reason = str(error).partition(": ")
            findings.append(Finding(f"{split} cannot be read: {reason}", place))
    return splits, findings


def _facts(source: PictureFolder) -> dict[str, Any]:
    """What there is in a split, in numbers."""
    records = source.records
    counts = np.array([len(record.category_ids) for record in records])
    boxes = np.concatenate([np.zeros((0, 4)), *(record.boxes_xywh_px for record in records)])
    sizes = Counter((record.height, record.width) for record in records)
    of_class = Counter(np.concatenate([[], *(record.category_ids for record in records)]).astype(int).tolist())
    return {
        "pictures": len(records),
        "pictures without objects": int((counts == 0).sum()),
        "objects": int(counts.sum()),
        "most objects in a picture": int(counts.max(initial=0)),
        "sizes of pictures": len(sizes),
        "most frequent size (HxW)": "{}x{}".format(*sizes.most_common(1)[0][0]) if sizes else "",
        "short sides (5 %, half, 95 %)": _quantiles([min(record.height, record.width) for record in records]),
        "object sides (5 %, half, 95 %)": _quantiles(np.sqrt(np.maximum(boxes[:, 2] * boxes[:, 3], 0))),
        "classes": {category.name: of_class[category.id] for category in source.categories},
    }


def _quantiles(values: Sequence[float] | np.ndarray) -> str:
    return ", ".join(f"{value:.0f}" for value in np.quantile(values, (0.05, 0.5, 0.95))) if len(values) else ""


def _facts_table(facts: Mapping[str, dict[str, Any]]) -> str:
    """A column for each split; classes with the most objects first."""
    if not facts:
        return "no split can be read"
    names = [name for name in next(iter(facts.values())) if name != "classes"]
    rows = [["", *facts], *[[name, *(str(of[name]) for of in facts.values())] for name in names]]
    total = Counter()
    for of in facts.values():
        total.update(of["classes"])
    classes = [name for name, _ in total.most_common()]
    rows += [["", *[""] * len(facts)], [f"objects of {len(classes)} classes", *[""] * len(facts)]]
    rows += [
        ["  " + name, *(str(of["classes"].get(name, 0)) for of in facts.values())] for name in classes[:SHOWN_CLASSES]
    ]
    if len(classes) > SHOWN_CLASSES:
        rows += [[f"  and {len(classes) - SHOWN_CLASSES} more", *[""] * len(facts)]]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        (
            f"{row[0]:<{widths[0]}}"
            + "".join(f"  {cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True))
        ).rstrip()
        for row in rows
    )


def _padding(source: PictureFolder) -> str:
    """What an epoch's padded shapes would waste with the recipe for one's own pictures."""
    recipe = STARTS[0][0]
    config = read_config(recipe, [])
    config = changed(config, {field: value for field, value, _ in choices(config, source, device_count=1)})
    try:
        plan = train_plan(build.make_plan_settings(config, source), epoch=0)
    except ValueError:  # nothing to train on, which the findings say
        return ""
    shapes = sorted({tuple(shape) for shape in plan.shapes_hw.tolist()})
    other = real_pixels_otherwise(plan, config.data.long_side_max_px)
    side = config.data.long_side_max_px
    return (
        f"padding of {recipe} in batches of {config.train.batch_size}: {1 - real_pixels(plan):.0%} of the pixels with "
        f"{len(shapes)} padded shapes, {', '.join('{}x{}'.format(*shape) for shape in shapes)};\n"
        f"all padded to {side}x{side}: {1 - other['square']:.0%}; each batch to its largest: {1 - other['random']:.0%}"
    )


def _findings_text(findings: Iterable[Finding]) -> str:
    """A paragraph for each kind, with the first places."""
    kinds: dict[str, list[str]] = {}
    for what, place in findings:
        kinds.setdefault(what, []).append(place)
    if not kinds:
        return "nothing wrong was found"
    lines = ["wrong:"]
    for what, places in kinds.items():
        lines += [f"  {len(places)} x {what}", *[f"      {place}" for place in places[:SHOWN_PLACES]]]
        lines += [f"      and {len(places) - SHOWN_PLACES} more"] * (len(places) > SHOWN_PLACES)
    return "\n".join(lines)


def _sheet(source: PictureFolder) -> Any:
    """Some pictures with their boxes, the same at every call."""
    names = {category.id: category.name for category in source.categories}
    panels = []
    for i in np.random.default_rng(0).permutation(len(source)).tolist():
        try:
            picture = np.array(open_image(source, i))
        except BadPictureError:
            continue
        record = source.records[i]
        labels = [names[category_id] for category_id in record.category_ids.tolist()]
        panels.append(draw_annotated(picture, record.boxes_xywh_px, labels, names=list(names.values())))
        if len(panels) == SHEET:
            break
    return contact_sheet(panels, SHEET_COLUMNS)
