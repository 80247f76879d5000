"""Metrics files: reading them back, and drawing loss and AP over epochs, of one run or of several."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from cdetr_jax.files import as_path
from cdetr_jax.visualization.figure import new_figure, save_figure

_LOSS, _AP = "Training loss", "COCO average precision"
_MOST_INSIDE = 5  # lines whose legend is put into a panel; a longer one would cover them
_LABELS = {_LOSS: "loss (no unit)"}  # of the y axis; the others' panels show AP


class Series(NamedTuple):
    """One metric over epochs; what was not finite, and an AP of -1 (no object), is NaN and leaves a gap."""

    epochs: list[float]
    values: list[float]


def series(rows: Sequence[dict], kind: str, name: str) -> Series:
    """One metric of the rows of a metrics file, of kind "train" or "eval"."""
    found = [(row["epoch"], row[name]) for row in rows if row["kind"] == kind and name in row]
    values = [math.nan if value is None or (kind == "eval" and value < 0) else value for _, value in found]
    return Series([epoch for epoch, _ in found], values)


def read_metrics(path: str | os.PathLike) -> list[dict]:
    """Reads a metrics file, one JSON object a line, in the order of writing.

    Args:
      path: what `training.metrics.MetricsFile` wrote. A last line that a killed process left half-written is skipped.

    Returns: one dict per line, {"step": int, "epoch": float, "kind": "train" | "eval", ...}; None stands for a number
      that was not finite.
    Raises: ValueError, if any other line is not JSON; FileNotFoundError.
    """
    lines = as_path(path).read_bytes().split(b"\n")
    while lines and not lines[-1].strip():
        lines.pop()
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            if number == len(lines):
                break
            raise ValueError(f"{path}, line {number}, is not JSON: {line[:80]!r}; remove the line") from error
    return rows


def training_curve(metrics_jsonl: str | os.PathLike, output_png: str | os.PathLike) -> None:
    """Draws the training loss and, once there is one, AP on the evaluation data over epochs.

    Args:
      metrics_jsonl: metrics file; uses "loss" of the lines of kind "train", "AP", "AP50" and "AP75" of kind "eval".
      output_png: picture to write.

    Raises: ValueError, if the file holds neither a loss nor an AP; FileNotFoundError.
    """
    rows = read_metrics(metrics_jsonl)
    aps = {name: [series(rows, "eval", name)] for name in ("AP", "AP50", "AP75")}
    panels = {_LOSS: {"loss": [series(rows, "train", "loss")]}, _AP: aps}
    if not draw_panels(panels, output_png):
        raise ValueError(f"{metrics_jsonl} holds no loss and no AP yet; train until the first line is logged")


def compare_runs(metrics_jsonl: Mapping[str, str | os.PathLike], output_png: str | os.PathLike) -> None:
    """Draws the training loss and AP of several runs over epochs, each under its name.

    Raises: ValueError, if none holds a loss or an AP; FileNotFoundError.
    """
    rows = {name: read_metrics(path) for name, path in metrics_jsonl.items()}
    metrics = {_LOSS: ("train", "loss"), _AP: ("eval", "AP")}
    panels = {
        title: {name: [series(of_run, *metric)] for name, of_run in rows.items()} for title, metric in metrics.items()
    }
    if not draw_panels(panels, output_png):
        raise ValueError(f"{', '.join(map(str, metrics_jsonl.values()))}: no loss and no AP yet")


def draw_panels(
    panels: Mapping[str, Mapping[str, Sequence[Series]]], output_png: str | os.PathLike, columns: int = 1
) -> bool:
    """Draws panels of lines over epochs, with a legend where there is more than one line.

    Args:
      panels: title, then label, then the repetitions (seeds), of which the mean is drawn over those epochs that all
        have, and a band from the lowest to the highest.
      output_png: picture to write.
      columns: panels side by side.

    Returns: whether there was anything to draw; else nothing is written.
    """
    panels = {title: _means(lines) for title, lines in panels.items()}
    panels = {title: lines for title, lines in panels.items() if lines}
    if not panels:
        return False
    rows = -(-len(panels) // columns)
    figure = new_figure(8 if columns == 1 else 6 * columns, 3.4 * rows)
    all_axes = figure.subplots(rows, columns, squeeze=False, sharex=True).reshape(-1)
    for axes, (title, lines) in zip(all_axes, panels.items(), strict=False):
        for label, (epochs, mean, low, high) in lines.items():
            few = len(mean) < 40
            [line] = axes.plot(epochs, mean, label=label, linewidth=1.5, marker="o" if few else None, markersize=4)
            if low != high:
                axes.fill_between(epochs, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
        axes.set_title(title)
        axes.grid(alpha=0.3)
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
        axes.set_ylabel(_LABELS.get(title, "AP (fraction, 0 to 1)"))
        if title != _LOSS or len(lines) > 1:
            beside = {"loc": "center left", "bbox_to_anchor": (1, 0.5)}
            axes.legend(**beside if len(lines) > _MOST_INSIDE else {"loc": "best"})
    for axes in all_axes[len(panels) :]:
        axes.set_visible(False)
    for axes in all_axes[max(0, len(panels) - columns) : len(panels)]:
        axes.set_xlabel("epochs")
        axes.xaxis.set_tick_params(labelbottom=True)
    save_figure(figure, output_png)
    return True


def _means(lines: Mapping[str, Sequence[Series]]) -> dict[str, tuple[list[float], ...]]:
    """Epochs, mean, lowest and highest of each line that has a number."""
    means = {}
    for label, repetitions in lines.items():
        begun = [dict(zip(*each, strict=True)) for each in repetitions if any(map(math.isfinite, each.values))]
        epochs = sorted(set.intersection(*map(set, begun))) if begun else []
        if epochs:
            values = [[each[epoch] for each in begun] for epoch in epochs]
            mean = [sum(each) / len(each) for each in values]
            means[label] = epochs, mean, list(map(min, values)), list(map(max, values))
    return means
