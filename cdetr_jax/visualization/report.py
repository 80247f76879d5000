"""What an evaluation says beyond AP: where a detector errs, as pictures, tables and one page."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from faster_coco_eval import mask
from PIL import Image

from cdetr_jax.data.sources import Source
from cdetr_jax.evaluation.coco_eval import SUMMARY, CocoMetrics, Results, format_number
from cdetr_jax.files import as_csv, whole_file, write_json, write_text
from cdetr_jax.records import Category, Record
from cdetr_jax.visualization.draw import contact_sheet, draw_boxes, xywh_to_xyxy
from cdetr_jax.visualization.figure import new_figure, save_figure
from cdetr_jax.visualization.page import Page

if TYPE_CHECKING:
    from matplotlib.figure import Figure

IOU = 0.5  # from which on a detection has found an object, everywhere below
WORST = 12  # pictures
MOST_TAGS = 15  # boxes of a picture that still get a tag each; more would hide it
FOUND, MISSED, FALSE, WRONG = (60, 180, 75), (230, 25, 75), (245, 130, 48), (240, 50, 230)  # green, red, orange, pink
NOTHING, IGNORED = -1, -2  # what a detection has found instead of an object


@dataclasses.dataclass(frozen=True)
class Matches:
    """Which detections of one picture have found which of its objects, as COCO pairs them at an IoU of 0.5.

    Attributes:
      record: the picture's annotations, of classes that count.
      boxes_xywh_px, category_ids, scores: the n detections, best first.
      objects: [n] the index of the object of its own class that each has found, `NOTHING`, or `IGNORED` in a crowd.
    """

    record: Record
    boxes_xywh_px: np.ndarray
    category_ids: np.ndarray
    scores: np.ndarray
    objects: np.ndarray

    def above(self, threshold: float) -> tuple[np.ndarray, np.ndarray, list[tuple[int, int]]]:
        """What goes wrong where detections below a score do not count.

        Returns: the objects that were missed and the detections that are false alarms, as indices, and of both those
          that lie on each other (IoU 0.5), which are one object taken for another: (object, detection), best first.
        """
        kept = self.scores >= threshold
        found = self.objects[kept & (self.objects >= 0)]
        missed = np.setdiff1d(np.flatnonzero(~self.record.is_crowd), found)
        alarms = np.flatnonzero(kept & (self.objects == NOTHING))
        overlap = _overlap(self.boxes_xywh_px[alarms], self.record.boxes_xywh_px[missed])
        pairs = _greedy(overlap, np.ones_like(overlap, bool))
        return missed, alarms, [(int(missed[o]), int(alarms[d])) for d, o in enumerate(pairs) if o >= 0]


def match(records: Sequence[Record], categories: Sequence[Category], results: Results) -> list[Matches]:
    """Pairs the detections of every picture with its objects: the best score first, each with the nearest that is left.

    Args:
      records: every picture that was evaluated.
      categories: the classes that count; objects and detections of others are left out.
      results: in COCO's format.
    """
    known = [category.id for category in categories]
    of_picture: dict[int, Results] = {record.image_id: [] for record in records}
    for result in results:
        if result["category_id"] in known:
            of_picture[result["image_id"]].append(result)
    return [_match(record, np.isin(record.category_ids, known), of_picture[record.image_id]) for record in records]


def _match(record: Record, counts: np.ndarray, results: Results) -> Matches:
    arrays = ("boxes_xywh_px", "category_ids", "is_crowd", "areas")
    record = dataclasses.replace(record, **{name: getattr(record, name)[counts] for name in arrays})
    results = sorted(results, key=lambda result: -result["score"])
    boxes = np.array([result["bbox"] for result in results], np.float64).reshape(-1, 4)
    category_ids = np.array([result["category_id"] for result in results], np.int64)
    overlap = _overlap(boxes, record.boxes_xywh_px, record.is_crowd)
    same_class = category_ids[:, None] == record.category_ids[None]
    objects = _greedy(overlap, same_class & ~record.is_crowd)
    in_crowd = (same_class & record.is_crowd & (overlap >= IOU)).any(1)
    objects[(objects == NOTHING) & in_crowd] = IGNORED
    scores = np.array([result["score"] for result in results], np.float64)
    return Matches(record, boxes, category_ids, scores, objects)


def _overlap(boxes_xywh: np.ndarray, others_xywh: np.ndarray, is_crowd: np.ndarray | None = None) -> np.ndarray:
    """[n, m] IoU; with a crowd the share of the box that lies in it."""
    if not len(boxes_xywh) or not len(others_xywh):
        return np.zeros((len(boxes_xywh), len(others_xywh)))
    crowd = np.zeros(len(others_xywh)) if is_crowd is None else is_crowd
    return np.asarray(mask.iou(boxes_xywh, others_xywh, crowd.astype(np.uint8)))


def _greedy(overlap: np.ndarray, may: np.ndarray) -> np.ndarray:
    """[n] for each row in turn the best column that is left and that it may take, or `NOTHING`."""
    overlap = np.where(may, overlap, 0.0)
    taken = np.full(len(overlap), NOTHING)
    for row in range(len(overlap)):
        if overlap.shape[1] and overlap[row].max() >= IOU:
            taken[row] = overlap[row].argmax()
            overlap[:, taken[row]] = 0
    return taken


@dataclasses.dataclass(frozen=True)
class Threshold:
    """Precision, recall and F1 of all detections with at least a score, for every score that occurs.

    Attributes: [n] each, the highest score first; `best`: the score with the best F1, halfway to the next lower one.
    """

    scores: np.ndarray
    precision: np.ndarray
    recall: np.ndarray
    f1: np.ndarray
    best: float


def thresholds(matches: Sequence[Matches], category_id: int | None = None) -> Threshold:
    """Of all classes together, or of one. Without a detection or an object the best threshold is 0.5 and F1 is 0."""
    scores, hits, objects = [np.zeros(0)], [np.zeros(0, bool)], 0
    for each in matches:
        counts = each.objects != IGNORED
        real = ~each.record.is_crowd
        if category_id is not None:
            counts, real = counts & (each.category_ids == category_id), real & (each.record.category_ids == category_id)
        scores.append(each.scores[counts])
        hits.append(each.objects[counts] >= 0)
        objects += real.sum()
    all_scores, all_hits = np.concatenate(scores), np.concatenate(hits)
    order = np.argsort(-all_scores, kind="stable")
    all_scores, found = all_scores[order], np.cumsum(all_hits[order])
    last = np.flatnonzero(np.append(np.diff(all_scores) != 0, True)) if len(all_scores) else np.zeros(0, int)
    score, found, kept = all_scores[last], found[last], last + 1
    f1 = 2 * found / np.maximum(kept + objects, 1)
    best = 0.5
    if found.any():
        i = int(f1.argmax())
        best = float(score[i] + (score[i + 1] if i + 1 < len(score) else score[i])) / 2
    return Threshold(score, found / np.maximum(kept, 1), found / max(objects, 1), f1, best)


def confusion(matches: Sequence[Matches], categories: Sequence[Category], threshold: float) -> np.ndarray:
    """[C + 1, C + 1] counts: row what it is, column what it was taken for; the last ones stand for nothing there."""
    place = {category.id: i for i, category in enumerate(categories)}
    nothing = len(place)
    counts = np.zeros((nothing + 1, nothing + 1), int)
    for each in matches:
        missed, alarms, wrong = each.above(threshold)
        for i in each.objects[(each.scores >= threshold) & (each.objects >= 0)]:
            row = place[int(each.record.category_ids[i])]
            counts[row, row] += 1
        rows, columns = dict.fromkeys(missed.tolist(), nothing), dict.fromkeys(alarms.tolist())
        for i, d in wrong:
            rows[i] = place[int(each.category_ids[d])]
            del columns[d]
        for i, column in rows.items():
            counts[place[int(each.record.category_ids[i])], column] += 1
        for d in columns:
            counts[nothing, place[int(each.category_ids[d])]] += 1
    return counts


def write_report(
    folder: Path, source: Source, results: Results, metrics: CocoMetrics, title: str, command: str
) -> float:
    """Writes `report.html`, and beside it as PNG, CSV and JSON all that is in it, and the detections (`results.json`).

    Args:
      folder: made if missing; the files in it are replaced.
      results, metrics: of the pictures of `source`.
      title, command: of the page, and what repeats it.
    Returns: the score with the best F1 over all classes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    categories = source.categories
    matches = match(source.records, categories, results)
    curve = thresholds(matches)
    counts = confusion(matches, categories, curve.best)
    rows = _class_rows(matches, categories, metrics, counts)
    totals = _totals(counts)
    header = list(rows[0])

    write_text(folder / "results.json", json.dumps(results) + "\n")
    said = {
        "pictures": len(source),
        "summary": metrics.summary,
        "threshold": curve.best,
        "at_threshold": totals,
        "classes": rows,
        "confusion": {"classes": [*metrics.per_class, "nothing"], "counts": counts.tolist()},
    }
    write_json(folder / "report.json", said)
    write_text(folder / "classes.csv", as_csv([header, *(row.values() for row in rows)]))
    names = [*metrics.per_class, "nothing"]
    named = [[name, *row] for name, row in zip(names, counts.tolist(), strict=True)]
    write_text(folder / "confusion.csv", as_csv([["is / taken for", *names], *named]))
    save_figure(_precision_recall(metrics), folder / "precision_recall.png")
    save_figure(_threshold_curves(curve), folder / "threshold.png")
    save_figure(_confusion_matrix(counts, names), folder / "confusion.png")
    worst, shown = worst_pictures(source, matches, curve.best)
    if worst is not None:
        with whole_file(folder / "worst.png") as temporary:
            worst.save(temporary, format="PNG")

    page = Page(title)
    page.text(
        f"{len(source)} pictures, {sum(metrics.boxes_per_class.values())} objects that count. AP as COCO defines it; "
        f"everything below that is said at a threshold counts a detection as right from an IoU of {IOU} on."
    )
    page.table(
        ["", "value", "meaning"],
        [[n, format_number(v).strip(), SUMMARY[n]] for n, v in metrics.summary.items()],
        of="words",
    )
    page.heading("Classes")
    page.text(
        f"Found, missed, false alarms, precision and recall at the score {curve.best:.3f}, which has the best F1."
    )
    page.table(header, [[_shown(value) for value in row.values()] for row in rows])
    page.heading("Precision and recall")
    page.picture(
        folder / "precision_recall.png", "Precision over recall of every class at an IoU of 0.5; black: their mean"
    )
    page.heading("Which score to ask for")
    page.text(
        f"All classes together: the best F1, {totals['F1']:.3f}, is at a score of {curve.best:.3f}: precision "
        f"{totals['precision']:.3f}, recall {totals['recall']:.3f}. To predict with it: --threshold={curve.best:.3f}"
    )
    page.picture(folder / "threshold.png", "Precision, recall and F1 over the lowest score that counts")
    page.heading("What is taken for what")
    page.picture(
        folder / "confusion.png",
        f"Rows: what it is; columns: what it was taken for at the score {curve.best:.3f}. The last row counts false "
        "alarms where nothing is, the last column what was missed",
    )
    page.heading("The worst pictures")
    if worst is None:
        page.text("At this score nothing was missed and there is no false alarm.")
    else:
        page.picture(
            folder / "worst.png",
            "The most misses and false alarms: green found, red missed, orange false alarm, pink taken for another "
            f"class. In reading order: {', '.join(shown)}",
        )
    page.heading("Again")
    page.command(command)
    page.save(folder / "report.html")
    return curve.best


def worst_pictures(
    source: Source, matches: Sequence[Matches], threshold: float
) -> tuple[Image.Image | None, list[str]]:
    """A sheet of the pictures with the most mistakes, the worst first, and their file names; None without a mistake."""
    mistakes = []
    for i, each in enumerate(matches):
        missed, alarms, wrong = each.above(threshold)
        mistakes.append((len(missed) + len(alarms) - len(wrong), i))
    worst = [i for count, i in sorted(mistakes, key=lambda pair: (-pair[0], pair[1]))[:WORST] if count]
    names = {category.id: category.name for category in source.categories}
    panels = [_draw_mistakes(source.load_image(i), matches[i], threshold, names) for i in worst]
    return (contact_sheet(panels, 3) if panels else None), [matches[i].record.file_name for i in worst]


def _draw_mistakes(image: np.ndarray, of: Matches, threshold: float, names: dict[int, str]) -> Image.Image:
    missed, alarms, wrong = of.above(threshold)
    taken_for = dict(wrong)
    boxes, labels, colours = [], [], []

    def add(box: np.ndarray, label: str, colour: tuple[int, int, int]) -> None:
        boxes.append(box)
        labels.append(label)
        colours.append(colour)

    for i in missed.tolist():
        name = names[int(of.record.category_ids[i])]
        if i in taken_for:
            d = taken_for[i]
            text = f"{name}, not {names[int(of.category_ids[d])]} {of.scores[d]:.2f}"
            add(of.record.boxes_xywh_px[i], text, WRONG)
        else:
            add(of.record.boxes_xywh_px[i], f"missed {name}", MISSED)
    for d in sorted(set(alarms.tolist()) - set(taken_for.values())):
        add(of.boxes_xywh_px[d], f"no {names[int(of.category_ids[d])]} {of.scores[d]:.2f}", FALSE)
    for d in np.flatnonzero((of.scores >= threshold) & (of.objects >= 0)).tolist():
        add(of.boxes_xywh_px[d], f"{names[int(of.category_ids[d])]} {of.scores[d]:.2f}", FOUND)
    if len(boxes) > MOST_TAGS:
        labels = ["" for _ in boxes]
    return draw_boxes(image, xywh_to_xyxy(boxes), labels, colours=colours)


def _class_rows(
    matches: Sequence[Matches], categories: Sequence[Category], metrics: CocoMetrics, counts: np.ndarray
) -> list[dict[str, Any]]:
    """One line a class, the columns by name."""
    rows = []
    for i, (name, category) in enumerate(zip(metrics.per_class, categories, strict=True)):
        found, missed = int(counts[i, i]), int(counts[i].sum() - counts[i, i])
        alarms = int(counts[:, i].sum() - counts[i, i])
        rows.append(
            {"class": name, "objects": metrics.boxes_per_class[name], **metrics.class_summary(name)}
            | {"found": found, "missed": missed, "false alarms": alarms}
            | _rates(found, missed, alarms)
            | {"best score": thresholds(matches, category.id).best}
        )
    return rows


def _totals(counts: np.ndarray) -> dict[str, Any]:
    """Of all classes together."""
    found = int(np.trace(counts))
    missed, alarms = int(counts[:-1].sum()) - found, int(counts[:, :-1].sum()) - found
    return {"found": found, "missed": missed, "false alarms": alarms} | _rates(found, missed, alarms)


def _rates(found: int, missed: int, alarms: int) -> dict[str, float]:
    """-1 where there is nothing to divide by, as in COCO's numbers."""

    def share(of: int) -> float:
        return found / of if of else -1.0

    f1 = 2 * found / (2 * found + missed + alarms) if found + missed + alarms else -1.0
    return {"precision": share(found + alarms), "recall": share(found + missed), "F1": f1}


def _shown(value: Any) -> str:
    return format_number(value).strip() if isinstance(value, float) else str(value)


def _precision_recall(metrics: CocoMetrics) -> "Figure":
    """A line a class; with many classes they are thin and grey, but for the three worst."""
    figure = new_figure(8, 5)
    axes = figure.subplots()
    recall = np.linspace(0, 1, 101)
    curves = {
        name: precision[0, :, 0] for name, precision in metrics.precision.items() if metrics.boxes_per_class[name]
    }
    few = len(curves) <= 10
    worst = sorted(curves, key=lambda name: curves[name].mean())[:3]
    for name, curve in curves.items():
        named = few or name in worst
        label = f"{name}  AP50 {curve.mean():.3f}" if named else None
        axes.plot(recall, curve, label=label, linewidth=1.5 if named else 0.6, color=None if named else "0.75")
    if curves:
        mean = np.mean(list(curves.values()), 0)
        axes.plot(recall, mean, label=f"mean  AP50 {mean.mean():.3f}", color="black", linewidth=2.5)
        axes.legend(loc="lower left")
    axes.set(xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02))
    axes.set_title("Precision over recall at IoU 0.5" + ("" if few else ", the three worst classes by name"))
    axes.grid(alpha=0.3)
    return figure


def _threshold_curves(curve: Threshold) -> "Figure":
    figure = new_figure(8, 4)
    axes = figure.subplots()
    for name in ("precision", "recall", "f1"):
        axes.step(curve.scores, getattr(curve, name), label=name.replace("f1", "F1"), where="pre")
    axes.axvline(curve.best, color="black", linestyle="--", linewidth=1, label=f"best F1 at {curve.best:.3f}")
    axes.set(xlabel="lowest score that counts", xlim=(0, 1), ylim=(0, 1.02))
    axes.legend(loc="lower center", ncols=4)
    axes.grid(alpha=0.3)
    return figure


def _confusion_matrix(counts: np.ndarray, names: Sequence[str]) -> "Figure":
    """Coloured by the share of the row; numbers and all names as long as they can be read."""
    side = min(max(4.5, 0.55 * len(names) + 2), 16)
    figure = new_figure(side, side * 0.92)
    axes = figure.subplots()
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    image = axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    size = 9 if len(names) <= 25 else 6
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize=size)
    axes.set_yticks(range(len(names)), names, fontsize=size)
    axes.set(xlabel="taken for", ylabel="is")
    if len(names) <= 25:
        for (i, j), count in np.ndenumerate(counts):
            if count:
                axes.text(
                    j,
                    i,
                    str(count),
                    ha="center",
                    va="center",
                    fontsize=9,
                    color="white" if share[i, j] > 0.5 else "black",
                )
    figure.colorbar(image, ax=axes, label="share of the row", shrink=0.7)
    return figure
