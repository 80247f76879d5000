"""A run's metrics file: reading it back, and drawing loss and AP over epochs."""

import json
import math
import os

from cdetr_jax.files import as_path, whole_file


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
    panels = {
        "Training loss": {"loss": _series(rows, "train", "loss")},
        "COCO average precision": {name: _series(rows, "eval", name) for name in ("AP", "AP50", "AP75")},
    }
    for lines in panels.values():
        for name in [name for name, (_, values) in lines.items() if not any(map(math.isfinite, values))]:
            del lines[name]
    panels = {title: lines for title, lines in panels.items() if lines}
    if not panels:
        raise ValueError(f"{metrics_jsonl} holds no loss and no AP yet; train until the first line is logged")

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.4 * len(panels)), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    all_axes = figure.subplots(len(panels), squeeze=False, sharex=True)[:, 0]
    for axes, (title, lines) in zip(all_axes, panels.items(), strict=True):
        for name, (epochs, values) in lines.items():
            few = len(values) < 40
            axes.plot(epochs, values, label=name, linewidth=1.5, marker="o" if few else None, markersize=4)
        axes.set_title(title)
        axes.grid(alpha=0.3)
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
    if "Training loss" in panels:
        all_axes[0].set_ylabel("loss (no unit)")
    if "COCO average precision" in panels:
        all_axes[-1].set_ylabel("AP (fraction, 0 to 1)")
        all_axes[-1].legend(loc="upper left", ncols=3)
    all_axes[-1].set_xlabel("epochs")
    with whole_file(output_png) as temporary:
        figure.savefig(temporary, format="png")


def _series(rows: list[dict], kind: str, name: str) -> tuple[list[float], list[float]]:
    """Epochs and values of one metric; what was not finite leaves a gap, and so does an AP of -1 (no object)."""
    found = [(row["epoch"], row[name]) for row in rows if row["kind"] == kind and name in row]
    values = [math.nan if value is None or (kind == "eval" and value < 0) else value for _, value in found]
    return [epoch for epoch, _ in found], values
