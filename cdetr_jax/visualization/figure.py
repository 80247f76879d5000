"""Matplotlib's figures, made and written without its state or a display."""

import os
from typing import TYPE_CHECKING

from cdetr_jax.files import whole_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def new_figure(width: float, height: float) -> "Figure":
    """An empty figure, sides in inches of 120 pixels."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # takes a second
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: "Figure", path: str | os.PathLike) -> None:
    """Writes a PNG, all of it or nothing."""
    with whole_file(path) as temporary:
        figure.savefig(temporary, format="png")
