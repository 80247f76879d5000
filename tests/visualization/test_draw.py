"""Boxes, tags, sheets and attention maps: where which colour ends up."""

import numpy as np
import pytest
from PIL import Image

from cdetr_jax.visualization.draw import PALETTE, class_colours, contact_sheet, draw_boxes, tagged

GREY = 128


def blank(height, width):
    return np.full((height, width, 3), GREY, np.uint8)


def changed(picture):
    """[H, W] bool: where a drawing on a blank picture differs from it."""
    return (np.asarray(picture) != GREY).any(axis=-1)


def test_box_has_its_class_colour_on_every_side_and_leaves_the_inside_alone():
    picture = np.asarray(draw_boxes(blank(400, 500), [[100, 150, 300, 350]], ["cat"]))
    colour = class_colours(["cat"])["cat"]
    for y, x in [(250, 101), (250, 299), (349, 200), (151, 250)]:
        assert tuple(picture[y, x]) == colour, (y, x)
    assert (picture[160:340, 110:290] == GREY).all()
    assert (picture[:100] == GREY).all()
    assert (picture[360:] == GREY).all()


def test_tag_sits_on_the_box_and_holds_letters_in_contrast():
    picture = np.asarray(draw_boxes(blank(400, 500), [[100, 150, 300, 350]], ["cat"], [0.875]))
    colour = class_colours(["cat"])["cat"]
    tag = picture[134:149, 100:160].reshape(-1, 3)
    is_fill = (tag == colour).all(axis=-1)
    ink = tag[~is_fill]
    assert 0.5 < is_fill.mean() < 0.95
    assert np.abs(ink.astype(int) - colour).sum(axis=-1).max() > 250


def test_score_is_part_of_the_tag():
    box = [[100, 150, 300, 350]]
    with_score = changed(draw_boxes(blank(400, 500), box, ["cat"], [0.5]))[130:149].any(axis=0).sum()
    without = changed(draw_boxes(blank(400, 500), box, ["cat"]))[130:149].any(axis=0).sum()
    assert with_score > without + 20
    other = draw_boxes(blank(400, 500), box, ["cat"], [0.75])
    assert other.tobytes() != draw_boxes(blank(400, 500), box, ["cat"], [0.5]).tobytes()


@pytest.mark.parametrize(("height", "width", "factor"), [(96, 97, 4), (319, 400, 2), (320, 400, 1), (30, 700, 2)])
def test_small_pictures_are_enlarged_by_a_whole_factor(height, width, factor):
    picture = draw_boxes(blank(height, width), np.zeros((0, 4)), [])
    assert picture.size == (width * factor, height * factor)
    assert not changed(picture).any()


def test_boxes_follow_the_enlargement():
    picture = np.asarray(draw_boxes(blank(96, 96), [[10, 40, 60, 80]], ["cat"]))
    colour = class_colours(["cat"])["cat"]
    assert tuple(picture[300, 40]) == colour  # left side: x = 4 * 10
    assert tuple(picture[320, 150]) == colour  # bottom: y = 4 * 80
    assert tuple(picture[300, 36]) == (GREY,) * 3


def test_line_and_letters_grow_with_the_picture():
    def tag_height(height, width):
        box = [[0.3 * width, 0.5 * height, 0.7 * width, 0.9 * height]]
        column = changed(draw_boxes(blank(height, width), box, ["cat"]))[: int(0.5 * height), int(0.3 * width) + 2]
        return column.sum()

    assert tag_height(800, 1333) > 1.5 * tag_height(320, 400) > 18


@pytest.mark.parametrize("box", [[-50, -60, 20, 10], [480, 380, 900, 900], [0, 0, 500, 400], [250, 395, 250, 395]])
def test_tag_stays_inside_the_picture(box):
    lonely = changed(draw_boxes(blank(400, 500), [[200, 200, 300, 300]], ["platelets"], [0.5]))
    tag_px = lonely[:199].sum()
    inside = changed(draw_boxes(blank(400, 500), [box], ["platelets"], [0.5])).sum()
    assert inside >= tag_px


def test_a_name_wider_than_the_picture_is_cut_and_keeps_its_score():
    box, name = [[10, 60, 90, 90]], "an extremely long class name that nobody could ever hope to fit in a small picture"
    drawn = changed(draw_boxes(blank(96, 96), box, [name], [0.5]))
    tag_rows = drawn[:238].any(axis=1)
    columns = drawn[:238][tag_rows].any(axis=0)
    assert 340 < columns.sum() <= 384
    other_score = draw_boxes(blank(96, 96), box, [name], [0.25])
    assert other_score.tobytes() != draw_boxes(blank(96, 96), box, [name], [0.5]).tobytes()


def test_tags_of_two_boxes_in_one_place_do_not_cover_each_other():
    box = [100, 150, 300, 350]
    picture = np.asarray(draw_boxes(blank(400, 500), [box, box], ["cat", "dog"]))
    colours = class_colours(["cat", "dog"])
    on_the_box, inside_it = picture[136:147, 102:126], picture[156:166, 104:126]
    assert (on_the_box == colours["cat"]).all(axis=-1).mean() > 0.4
    assert (inside_it == colours["dog"]).all(axis=-1).mean() > 0.4


def test_a_class_keeps_its_colour_whatever_the_order():
    assert class_colours(["b", "a", "a"]) == class_colours(["a", "b"])
    names = [f"class {i}" for i in range(len(PALETTE))]
    assert len(set(class_colours(names).values())) == len(PALETTE)
    assert set(class_colours([*names, "one more"])) == {*names, "one more"}
    assert class_colours(["RBC"])["RBC"] == (0, 130, 200)  # the same in every process


def test_class_names_fix_the_colours_over_pictures():
    names = [f"class {i}" for i in range(len(PALETTE))]
    expected = class_colours(names)
    for name in names:
        picture = np.asarray(draw_boxes(blank(400, 500), [[100, 150, 300, 350]], [name], class_names=names))
        assert tuple(picture[250, 101]) == expected[name]


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="1 boxes, 2 labels and no scores"):
        draw_boxes(blank(400, 500), [[0, 0, 9, 9]], ["a", "b"])
    with pytest.raises(ValueError, match="1 boxes, 1 labels and 0 scores"):
        draw_boxes(blank(400, 500), [[0, 0, 9, 9]], ["a"], [])
    with pytest.raises(ValueError, match=r"image is float64 \(4, 5, 3\), expected uint8"):
        draw_boxes(np.zeros((4, 5, 3)), [], [])


def test_contact_sheet_places_row_after_row():
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    images = [Image.new("RGB", size, c) for size, c in zip([(50, 30), (40, 40), (200, 100)], colours, strict=True)]
    sheet = np.asarray(contact_sheet(images, 2, cell_px=100, gap_px=4))
    assert sheet.shape == (4 + 40 + 4 + 50 + 4, 4 + 100 + 4 + 100 + 4, 3)  # the third is halved
    assert tuple(sheet[24, 54]) == colours[0]
    assert tuple(sheet[24, 158]) == colours[1]
    assert tuple(sheet[73, 54]) == colours[2]
    assert tuple(sheet[73, 158]) == (255, 255, 255)
    assert (sheet == colours[0]).all(axis=-1).sum() == 50 * 30  # not enlarged
    assert images[2].size == (200, 100)  # the caller's picture is untouched
    with pytest.raises(ValueError, match="0 pictures in 2 columns"):
        contact_sheet([], 2)


def test_a_tag_is_in_the_upper_left_corner_of_a_copy():
    picture = Image.fromarray(blank(200, 300))
    drawn = changed(tagged(picture, "spatial: cat 0.50"))
    assert not changed(picture).any()
    assert drawn[:10, :60].mean() > 0.95
    assert not drawn[30:].any()


def test_a_box_may_have_a_colour_of_its_own_and_no_tag():
    boxes = [[100, 150, 300, 350], [100, 20, 200, 80]]
    picture = draw_boxes(blank(400, 500), boxes, ["", ""], colours=[(1, 2, 3), (250, 240, 230)])
    assert [picture.getpixel(place) for place in ((101, 250), (101, 50))] == [(1, 2, 3), (250, 240, 230)]
    assert not changed(picture)[100:140].any(), "a tag would be here"
