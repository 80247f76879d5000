"""Heat over pictures and sheets of it: where which colour ends up, and what is refused."""

import numpy as np
import pytest
from PIL import Image

from cdetr_jax.visualization.attention import Attention, attention_sheet, heat_over

GREY = 128
L, N, H, W = 2, 3, 4, 5  # layers, heads, cells; the picture has 80 x 100 pixels, 20 a cell


def made(**changes):
    """One query whose maps are uniform, but for one of head 1 in the last layer."""
    maps = np.full((L, 1, N, H, W), 1 / (H * W), np.float32)
    spatial = maps.copy()
    spatial[-1, 0, 1] = 0
    spatial[-1, 0, 1, 1, 3] = 1
    fields = {
        "image": np.full((80, 100, 3), GREY, np.uint8),
        "side": "decoder",
        "model": "DETR",
        "spatial": spatial,
        "content": maps,
        "combined": maps,
        "size_in_cells": (4.0, 5.0),
        "queries": np.array([7]),
        "boxes_xyxy_px": np.array([[10, 50, 40, 70]], np.float32),
        "scores": np.array([0.875], np.float32),
        "names": ["cat"],
        "points_xy_px": np.array([[90, 70]], np.float32),
    }
    return Attention(**fields | changes)


def test_heat_is_where_the_cell_sees_the_picture():
    """Its middle is on pixel 20 of each cell's number."""
    attention = made()
    panel = np.asarray(heat_over(attention, 0, attention.spatial[-1, 0, 1], (500, 400), most=20)).astype(int)
    red, green, blue = panel[100, 300]
    assert red > 200
    assert max(green, blue) < 80
    brightness = panel[:320].sum(-1) - 3 * GREY  # above the point
    rows, columns = np.nonzero(np.abs(brightness * (np.arange(500) > 210)) > 60)
    np.testing.assert_allclose([rows.mean(), columns.mean()], [100, 300], atol=3)
    assert np.abs(panel[20, 50] - GREY).max() <= 1
    assert panel[350, 450].min() == 255  # the point
    side = panel[300, 45:56]  # of the box
    assert side.min() == 0
    assert side.max() == 255


def test_what_reaches_over_the_side_is_cut_off():
    """The picture ends a quarter of a cell after the middle of the last column, where the weight is."""
    weights = np.zeros((H, W), np.float32)
    weights[2, 4] = 1
    panel = np.asarray(heat_over(made(size_in_cells=(4.0, 4.25)), 0, weights, (425, 400), most=20)).astype(int)
    red = np.nonzero((panel[200, :, 0] > 180) & (panel[200, :, 1] < 90))[0]
    assert red.max() == 424
    assert abs(red[panel[200, red, 1].argmin()] - 400) < 8


def test_a_sheet_has_rows_of_parts_and_columns_of_heads_and_their_mean():
    one, two = made(), made(model="Conditional DETR", points_xy_px=np.full((1, 2), np.nan))
    sheet = one.draw()
    assert isinstance(sheet, Image.Image)
    assert attention_sheet([one, two], [0, 0]).height > 1.7 * sheet.height
    widths = [one.draw(head=head).width for head in ("all", 1, "mean")]
    assert widths[0] > 2 * widths[1]
    assert one.draw(layer=0).tobytes() != sheet.tobytes() == one.draw(layer=1).tobytes()
    pixels = np.asarray(sheet).astype(int)
    hot = (pixels[..., 0] > 215) & (pixels[..., 1:] < 60).all(-1)
    hot[-60:] = False  # the legend has red too
    columns = np.nonzero(hot.any(0))[0]
    assert len(columns)
    assert columns.max() - columns.min() < 100  # head 1 alone: on one scale the mean is a third as hot


def test_titles():
    assert made().title(0) == "cat 0.88, query 7"
    assert made(side="encoder").title(0) == "point 90,70"
    assert repr(made()) == "<Attention: decoder of DETR, 2 layers x 1 queries x 3 heads, 4 x 5 cells>"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layer": 2}, "layer is 2, expected 0 to 1, or -1 for the last one"),
        ({"layer": -3}, "layer is -3, expected 0 to 1"),
        ({"head": 3}, "head is 3, expected 0 to 2, all or mean"),
        ({"head": "best"}, "head is 'best', expected 0 to 2, all or mean"),
    ],
)
def test_a_layer_or_head_that_there_is_not(arguments, message):
    with pytest.raises(ValueError, match=message):
        made().draw(**arguments)
