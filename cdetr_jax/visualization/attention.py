"""Where a detector looks, as data and as sheets in the manner of figures 1 and 4 of arXiv:2108.06152."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from cdetr_jax.evaluation.attention_maps import PARTS
from cdetr_jax.visualization.draw import outline

# Heat from least to most: blue, cyan, yellow, red.
HEAT = ((0, 0, 160), (0, 90, 255), (0, 230, 230), (255, 230, 0), (255, 0, 0))
SHEET_WIDTH_PX, MIN_PANEL_PX, MAX_PANEL_PX = 1800, 150, 420
GAP_PX, LINE_PX = 6, 22
_SCALE, _UNIT, _LEGEND_PX = "weight of a cell", "times that of a uniform map", 480


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Attention:
    """Where a detector looks in one picture, with every layer and head, for n of its queries.

    The queries are the decoder's object queries, and the maps its cross-attention's; or the one query is a point of the
    picture, and the maps are the encoder's self-attention's.

    Attributes:
      image: [H, W, 3] uint8 RGB, upright.
      side: `decoder` or `encoder`.
      model: "Conditional DETR" or "DETR".
      spatial, content, combined: [L, n, N, h, w] float32, of layer, query and head a map over the cells of the picture,
        without the padding. It adds up to 1. Combined is what the detector used; see `attention_maps`.
      size_in_cells: height and width of the picture; the last cells may reach over its sides.
      queries: [n] int, their numbers; of a point, its cell's.
      boxes_xyxy_px: [n, 4] float32, the queries' last boxes, in pixels of `image`, clipped to it; NaN of a point.
      scores: [n] float32, of each query's best class; NaN of a point.
      names: the n names of those classes; "" of a point.
      points_xy_px: [n, 2] float32, the queries' reference points, or the point; NaN if the decoder has none.
    """

    image: np.ndarray
    side: str
    model: str
    spatial: np.ndarray
    content: np.ndarray
    combined: np.ndarray
    size_in_cells: tuple[float, float]
    queries: np.ndarray
    boxes_xyxy_px: np.ndarray
    scores: np.ndarray
    names: list[str]
    points_xy_px: np.ndarray

    def __len__(self) -> int:
        return len(self.queries)

    def __repr__(self) -> str:
        layers, number, heads, height, width = self.spatial.shape
        return (
            f"<Attention: {self.side} of {self.model}, {layers} layers x {number} queries x {heads} heads, "
            f"{height} x {width} cells>"
        )

    def title(self, i: int) -> str:
        """What the i-th query is."""
        if self.side == "encoder":
            x, y = self.points_xy_px[i]
            return f"point {x:g},{y:g}"
        return f"{self.names[i]} {self.scores[i]:.2f}, query {self.queries[i]}"

    def draw(self, i: int = 0, layer: int = -1, head: int | str = "all") -> Image.Image:
        """A sheet of the i-th query; see `attention_sheet`."""
        return attention_sheet([self], [i], layer, head)


def attention_sheet(
    attentions: Sequence[Attention],
    which: Sequence[int],
    layer: int = -1,
    head: int | str = "all",
    *,
    title: str = "",
    labels: Sequence[str] | None = None,
) -> Image.Image:
    """Rows spatial, content and combined, each of every detector; columns heads. One colour scale for all maps.

    The scale is in times what a map that is alike everywhere would have, so that grids of different sizes compare. Box
    and reference point are the query's own.
    Args:
      attentions: of one picture, one or several detectors'.
      which: of each of them, the query's place in it.
      layer: from 0, or from the end if negative.
      head: a number, from 0; "all": every head and then their mean; "mean".
      title: goes before the query's own in the first line.
      labels: of the detectors; None: "DETR" or "Conditional DETR".

    Returns: RGB picture.
    Raises: ValueError, if there is no such layer or head.
    """
    rows, columns = [], []
    labels = [attention.model for attention in attentions] if labels is None else labels
    for part in PARTS:
        for attention, i, label in zip(attentions, which, labels, strict=True):
            maps, names = _chosen(getattr(attention, part), i, layer, head)
            columns = max(columns, names, key=len)
            rows.append((f"{part}\n{label}" if len(attentions) > 1 else part, attention, i, maps))
    first, layers = attentions[0], len(attentions[0].spatial)
    which_layer = f"{first.side} layer {layer % layers} (0 to {layers - 1})"
    words = [title, first.title(which[0]), which_layer, *([] if len(attentions) > 1 else labels)]
    return _sheet(rows, columns, ", ".join(filter(None, words)))


def _chosen(maps: np.ndarray, i: int, layer: int, head: int | str) -> tuple[np.ndarray, list[str]]:
    """The maps [columns, h, w] of a query, and the columns' names. Raises: ValueError."""
    layers, heads = maps.shape[0], maps.shape[2]
    if not -layers <= layer < layers:
        raise ValueError(f"layer is {layer}, expected 0 to {layers - 1}, or -1 for the last one")
    maps = maps[layer, i]
    if head == "mean":
        return maps.mean(axis=0, keepdims=True), ["mean of the heads"]
    if head == "all":
        return np.concatenate([maps, maps.mean(axis=0, keepdims=True)]), [*(f"head {n}" for n in range(heads)), "mean"]
    if not isinstance(head, int) or not 0 <= head < heads:
        raise ValueError(f"head is {head!r}, expected 0 to {heads - 1}, all or mean")
    return maps[head : head + 1], [f"head {head}"]


def _sheet(rows: Sequence[tuple[str, Attention, int, np.ndarray]], columns: Sequence[str], title: str) -> Image.Image:
    """Rows of (name, attention, query's place in it, maps [columns, h, w])."""
    font = ImageFont.load_default(size=15)
    left = GAP_PX + math.ceil(max(font.getlength(line) for name, *_ in rows for line in name.split("\n"))) + 2 * GAP_PX
    left = max(left, math.ceil(font.getlength(_SCALE)) + 3 * GAP_PX)
    top = 2 * LINE_PX + GAP_PX
    height, width = rows[0][1].image.shape[:2]
    side = np.clip((SHEET_WIDTH_PX - left) / len(columns) - GAP_PX, MIN_PANEL_PX, MAX_PANEL_PX)
    size = tuple(max(round(length * side / max(height, width)), 1) for length in (width, height))
    most = max((maps * maps[0].size).max() for *_, maps in rows)
    texts = math.ceil(max(font.getlength(title) + 2 * GAP_PX, left + _LEGEND_PX + font.getlength(_UNIT) + 60))
    sheet_size = (
        max(left + len(columns) * (size[0] + GAP_PX), texts),
        top + len(rows) * (size[1] + GAP_PX) + 3 * LINE_PX,
    )
    sheet = Image.new("RGB", sheet_size, "white")
    pen = ImageDraw.Draw(sheet)
    pen.text((GAP_PX, LINE_PX / 2), title, fill="black", font=font, anchor="lm")
    for column, name in enumerate(columns):
        x = left + column * (size[0] + GAP_PX) + size[0] / 2
        pen.text((x, 1.5 * LINE_PX), name, fill="black", font=font, anchor="mm")
    for row, (name, attention, i, maps) in enumerate(rows):
        y = top + row * (size[1] + GAP_PX)
        pen.multiline_text((GAP_PX, y + size[1] / 2), name, fill="black", font=font, anchor="lm")
        for column, weights in enumerate(maps):
            panel = heat_over(attention, i, weights, size, most)
            sheet.paste(panel, (left + column * (size[0] + GAP_PX), y))
    _legend(sheet, (left, sheet.height - round(2.6 * LINE_PX)), most, font)
    return sheet


def heat_over(attention: Attention, i: int, weights: np.ndarray, size: tuple[int, int], most: float) -> Image.Image:
    """The picture in grey, with a map [h, w] of the i-th query over it, its box and its point.

    Args:
      size: width and height of the drawing, pixels.
      most: what is drawn hottest, in times the mean of a map.
    """
    height, width = attention.image.shape[:2]
    grey = Image.fromarray(attention.image).convert("L").resize(size, Image.Resampling.LANCZOS)
    cells_high, cells_wide = attention.size_in_cells
    box = (0.5, 0.5, cells_wide + 0.5, cells_high + 0.5)  # a cell's middle is half a cell before where Pillow has it
    heat = Image.fromarray(np.pad(weights * weights.size / most, ((0, 1), (0, 1)), mode="edge").astype(np.float32))
    heat = np.asarray(heat.resize(size, Image.Resampling.BICUBIC, box=box), np.float64)
    panel = Image.fromarray(_coloured(heat, np.asarray(grey, np.float64)))
    pen = ImageDraw.Draw(panel)
    scale = np.array([size[0] / width, size[1] / height])
    if np.isfinite(attention.boxes_xyxy_px[i]).all():
        corners = np.clip(np.round(attention.boxes_xyxy_px[i] * np.tile(scale, 2)), 0, np.tile(size, 2) - 1)
        outline(pen, corners.astype(int), (255, 255, 255), max(1, max(size) // 200))
    if np.isfinite(attention.points_xy_px[i]).all():
        (x, y), radius = attention.points_xy_px[i] * scale, max(3, max(size) // 60)
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill="white", outline="black")
    return panel


def _coloured(heat: np.ndarray, grey: np.ndarray) -> np.ndarray:
    """uint8 [H, W, 3]: heat 0 to 1 over brightness 0 to 255. Colours go by the root, so that what is faint shows."""
    level = np.sqrt(np.clip(heat, 0, 1))
    stops = np.linspace(0, 1, len(HEAT))
    colours = np.stack([np.interp(level, stops, channel) for channel in zip(*HEAT, strict=True)], axis=-1)
    opacity = 0.8 * np.clip(1.8 * level - 0.1, 0, 1)[..., None]  # no heat: the grey picture as it is
    return np.round((1 - opacity) * grey[..., None] + opacity * colours).astype(np.uint8)


def _legend(sheet: Image.Image, corner: tuple[int, int], most: float, font: Any) -> None:
    """The colours with their values."""
    (left, top), thick = corner, LINE_PX - 6
    heat = np.tile(np.linspace(0, 1, _LEGEND_PX) ** 2, (thick, 1))
    sheet.paste(Image.fromarray(_coloured(heat, np.full(heat.shape, 150.0))), (left, top))
    pen = ImageDraw.Draw(sheet)
    pen.text((GAP_PX, top + thick / 2), _SCALE, fill="black", font=font, anchor="lm")
    for part in (0, 0.25, 0.5, 0.75, 1):
        value = float(f"{most * part**2:.2g}") if part < 1 else most
        x = left + (_LEGEND_PX - 1) * math.sqrt(value / most)
        pen.line((x, top + thick, x, top + thick + 5), fill="black")
        pen.text((x, top + thick + 7), f"{value:.3g}", fill="black", font=font, anchor="ma")
    pen.text((left + _LEGEND_PX + 30, top + thick + 7), _UNIT, fill="black", font=font, anchor="la")
