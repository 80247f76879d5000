"""Boxes over pictures, and sheets of pictures, drawn with Pillow alone."""

import math
import zlib
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

# Colours that stay apart from each other and from most photographs.
PALETTE = (
    (230, 25, 75),  # red
    (60, 180, 75),  # green
    (255, 225, 25),  # yellow
    (0, 130, 200),  # blue
    (245, 130, 48),  # orange
    (145, 30, 180),  # purple
    (70, 240, 240),  # cyan
    (240, 50, 230),  # magenta
    (190, 245, 40),  # lime
    (250, 190, 212),  # pink
    (0, 140, 130),  # teal
    (200, 170, 255),  # lavender
    (170, 100, 40),  # brown
    (170, 255, 195),  # mint
    (90, 105, 255),  # indigo
)

MIN_SHORT_SIDE_PX = 320  # smaller pictures are enlarged, so that letters are readable
MAX_LONG_SIDE_PX = 2000  # but never beyond this


def draw_boxes(
    image: np.ndarray,
    boxes_xyxy_px: np.ndarray,
    labels: Sequence[str],
    scores: Sequence[float] | None = None,
    *,
    class_names: Sequence[str] | None = None,
    colours: Sequence[tuple[int, int, int]] | None = None,
) -> Image.Image:
    """Draws boxes with a tag of name and score; line and letters grow with the picture.

    A picture whose short side is below 320 pixels is enlarged by a whole factor first.
    Args:
      image: [H, W, 3] uint8, RGB.
      boxes_xyxy_px: [n, 4], left, top, right, bottom in pixels of `image`; what lies outside is cut off.
      labels: n class names; one that is empty gets no tag.
      scores: n numbers in [0, 1], best first (the first tags get the best places), or None for annotations.
      class_names: all names of a data set with few classes (at most 15). With them every class has its own colour, the
        same in all pictures; without them classes of one picture differ, but may change colours between pictures.
      colours: n RGB colours to use instead.

    Returns: RGB picture.
    Raises: ValueError, if the image is not uint8 RGB or the numbers of boxes, labels and scores differ.
    """
    boxes = np.asarray(boxes_xyxy_px, np.float64).reshape(-1, 4)
    if len(labels) != len(boxes) or (scores is not None and len(scores) != len(boxes)):
        raise ValueError(
            f"{len(boxes)} boxes, {len(labels)} labels and {'no' if scores is None else len(scores)} scores; "
            "every box needs one label, and one score unless scores is None"
        )
    if colours is None:
        of_class = class_colours(labels if class_names is None else [*class_names, *labels])
        colours = [of_class[label] for label in labels]
    picture, factor = _enlarge(image)
    pen = ImageDraw.Draw(picture)
    line_px, font = _line_and_font(picture)
    last = np.array([picture.width, picture.height] * 2) - 1
    corners = np.clip(np.round(boxes * factor), 0, last).astype(int)

    area = (corners[:, 2] - corners[:, 0]) * (corners[:, 3] - corners[:, 1])
    for i in np.argsort(-area, kind="stable"):  # small boxes over large ones
        outline(pen, corners[i], colours[i], line_px)

    tags, taken = [], np.zeros((0, 4))
    for i, label in enumerate(labels):
        if not label:
            continue
        text = label if scores is None else f"{label} {scores[i]:.2f}"
        text, size = _fit(text, font, picture.width)
        place = _place(corners[i], size, picture.size, taken)
        taken = np.concatenate([taken, [place]])
        tags.append((text, place, colours[i]))
    for text, place, colour in reversed(tags):  # the first tag on top
        pen.rectangle(tuple(place), fill=colour)
        middle = ((place[0] + place[2]) / 2, (place[1] + place[3]) / 2)
        pen.text(middle, text, fill=_ink(colour), font=font, anchor="mm")
    return picture


def tagged(picture: Image.Image, text: str) -> Image.Image:
    """The picture with a line of text in its upper left corner."""
    picture = picture.copy()
    pen, (_, font) = ImageDraw.Draw(picture), _line_and_font(picture)
    text, (width, height) = _fit(text, font, picture.width)
    pen.rectangle((0, 0, width, height), fill=(0, 0, 0))
    pen.text((width / 2, height / 2), text, fill=(255, 255, 255), font=font, anchor="mm")
    return picture


def draw_annotated(
    image: np.ndarray,
    boxes_xywh_px: np.ndarray,
    labels: Sequence[str],
    scores: Sequence[float] | None = None,
    *,
    names: Sequence[str],
) -> Image.Image:
    """`draw_boxes` of [n, 4] left, top, width, height; `names`: all of a data set, few have a colour each."""
    class_names = sorted(names) if len(names) <= len(PALETTE) else None
    return draw_boxes(image, xywh_to_xyxy(boxes_xywh_px), labels, scores, class_names=class_names)


def xywh_to_xyxy(boxes_xywh: np.ndarray) -> np.ndarray:
    """Left, top, width, height [n, 4] (or an empty list) as left, top, right, bottom."""
    boxes = np.asarray(boxes_xywh, np.float64).reshape(-1, 4)
    return np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)


def contact_sheet(images: Sequence[Image.Image], columns: int, *, cell_px: int = 480, gap_px: int = 6) -> Image.Image:
    """Puts pictures side by side, row after row, on white.

    Args:
      images: pictures of any size; one that is larger than the cell is shrunk, none is enlarged.
      columns: pictures in a row.
      cell_px: longest side of a picture on the sheet.
      gap_px: white space around each picture.

    Returns: RGB picture, as wide as its widest picture needs.
    Raises: ValueError, if there is no picture or no column.
    """
    if not images or columns < 1:
        raise ValueError(f"{len(images)} pictures in {columns} columns; a sheet needs at least one of each")
    small = [image.convert("RGB") for image in images]
    for image in small:
        image.thumbnail((cell_px, cell_px), Image.Resampling.LANCZOS)
    rows = [small[i : i + columns] for i in range(0, len(small), columns)]
    cell_width = max(image.width for image in small)
    heights = [max(image.height for image in row) for row in rows]
    sheet = Image.new(
        "RGB", (len(rows[0]) * (cell_width + gap_px) + gap_px, sum(heights) + gap_px * (len(rows) + 1)), "white"
    )
    top = gap_px
    for row, height in zip(rows, heights, strict=True):
        for i, image in enumerate(row):
            left = gap_px + i * (cell_width + gap_px)
            sheet.paste(image, (left + (cell_width - image.width) // 2, top + (height - image.height) // 2))
        top += height + gap_px
    return sheet


def class_colours(names: Sequence[str]) -> dict[str, tuple[int, int, int]]:
    """An RGB colour per name: the name's hash picks it, a clash moves on to the next free one.

    So neither order nor repetition of the names matters, and up to 15 names never share a colour.
    """
    colours, free = {}, list(range(len(PALETTE)))
    for name in sorted(set(names)):
        free = free or list(range(len(PALETTE)))
        wish = zlib.crc32(name.encode()) % len(PALETTE)
        slot = min(free, key=lambda slot: (slot - wish) % len(PALETTE))
        free.remove(slot)
        colours[name] = PALETTE[slot]
    return colours


def _enlarge(image: np.ndarray) -> tuple[Image.Image, int]:
    """The picture, enlarged by a whole factor where it is too small for letters, and the factor."""
    image = np.asarray(image)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
        raise ValueError(f"image is {image.dtype} {image.shape}, expected uint8 [H, W, 3] in RGB")
    short, long = sorted(image.shape[:2])
    factor = max(1, min(math.ceil(MIN_SHORT_SIDE_PX / short), MAX_LONG_SIDE_PX // long))
    picture = Image.fromarray(image)
    if factor > 1:
        picture = picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.BICUBIC)
    return picture, factor


def _line_and_font(picture: Image.Image) -> tuple[int, ImageFont.FreeTypeFont | ImageFont.ImageFont]:
    """Line width in pixels and font for a picture of this size."""
    long = max(picture.size)
    return max(3, round(long / 200)), ImageFont.load_default(size=max(13, round(long / 42)))


def outline(pen: ImageDraw.ImageDraw, corners: np.ndarray, colour: tuple[int, int, int], line_px: int) -> None:
    """A coloured frame with a thin dark edge on both sides, to stand out on a ground of the same colour."""
    left, top, right, bottom = (int(value) for value in corners)
    pen.rectangle((left - 1, top - 1, right + 1, bottom + 1), outline=(0, 0, 0), width=line_px + 2)
    pen.rectangle((left, top, right, bottom), outline=colour, width=line_px)


def _fit(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> tuple[str, tuple[int, int]]:
    """The text, cut in its middle until the tag is no wider than `width`, and the tag's width and height."""
    margin = 4
    keep = len(text)
    shown = text
    while keep > 1 and font.getlength(shown) + 2 * margin >= width:
        keep -= 1
        shown = text[: keep - keep // 2] + ".." + text[len(text) - keep // 2 :]
    ascent_to_descent = font.getbbox("Ag")
    return shown, (math.ceil(font.getlength(shown)) + 2 * margin, math.ceil(ascent_to_descent[3]) + 2)


def _place(corners: np.ndarray, tag: tuple[int, int], picture: tuple[int, int], taken: np.ndarray) -> np.ndarray:
    """Corners of a tag inside the picture: of the places at the box, the first that covers other tags least."""
    left, top, right, bottom = corners
    width, height = tag
    candidates = np.array(
        [
            (left, top - height),  # on the box
            (left, top),  # inside, at the top
            (left, bottom),  # below
            (left, bottom - height),  # inside, at the bottom
            (right - width, top - height),
            (right - width, top),
            (right - width, bottom),
            (right - width, bottom - height),
        ],
        np.float64,
    )
    candidates = np.clip(candidates, 0, np.maximum(0, np.array(picture) - 1 - np.array(tag)))
    places = np.concatenate([candidates, candidates + np.array(tag)], axis=1)
    overlap = np.minimum(places[:, None, 2:], taken[None, :, 2:]) - np.maximum(places[:, None, :2], taken[None, :, :2])
    covered = np.maximum(overlap, 0).prod(axis=-1).sum(axis=1)
    return places[np.argmin(covered)]


def _ink(colour: tuple[int, int, int]) -> tuple[int, int, int]:
    """Black or white, whichever is easier to read on the colour."""
    luminance = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2]
    return (0, 0, 0) if luminance > 140 else (255, 255, 255)
