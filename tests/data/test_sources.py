import json
import logging
import re

import numpy as np
import pytest
from PIL import Image

from cdetr_jax.data import sources
from cdetr_jax.data.coco import CocoFolder
from cdetr_jax.data.sources import BadPictureError, decode_rgb, open_picture
from cdetr_jax.structs import Category

# ------------------------------------------------------------------------------------------- annotation files


def test_records_in_order_of_image_id_with_boxes_as_annotated(content, write):
    source = CocoFolder(*write(content))
    assert source.categories == (Category(2, "oak"), Category(700, "kite"))
    assert [(r.image_id, r.file_name) for r in source.records] == [
        (-3, "a.png"),
        (11, "b.png"),
        (90_000_000_007, "c.png"),
    ]
    crowd, two, none = source.records
    np.testing.assert_array_equal(two.boxes_xywh_px, [[1, 2, 10.5, 20], [5, 6, 7, 8]])
    np.testing.assert_array_equal(two.category_ids, [700, 2])
    np.testing.assert_array_equal(two.is_crowd, [False, False])
    np.testing.assert_array_equal(two.areas, [210, 9.5])  # width * height where no area is given
    np.testing.assert_array_equal(crowd.is_crowd, [True])
    assert two.boxes_xywh_px.dtype == np.float64
    assert none.boxes_xywh_px.shape == (0, 4)
    assert (source.load_image(0) == 20).all()  # the second picture that was written
    assert (source.load_image(2) == 0).all()


def test_records_without_annotations(content, write):
    content["annotations"] = []
    assert [len(r.areas) for r in CocoFolder(*write(content)).records] == [0, 0, 0]


def test_values_that_can_mean_one_thing_only(content, write):
    """As exporters write them: whole numbers with a point, numbers as text, null for what need not be there."""
    expected = CocoFolder(*write(content))
    for image in content["images"]:
        image |= {"id": str(image["id"]), "width": 40.0, "height": "30"}
    for category in content["categories"]:
        category["id"] = float(category["id"])
    one, crowd, other = content["annotations"]
    one |= {"image_id": "11", "category_id": "700.0", "bbox": ["1", "2.0", "10.5", 20], "iscrowd": None, "area": None}
    crowd |= {"image_id": -3.0, "category_id": "2", "iscrowd": "1", "area": "77"}
    other |= {"iscrowd": 0.0, "area": "9.5"}
    found = CocoFolder(*write(content))
    assert found.categories == expected.categories
    for one, other in zip(found.records, expected.records, strict=True):
        assert one.image_id == other.image_id
        assert type(one.width) is type(one.image_id) is int
        assert (one.height, one.width) == (30, 40)
        for name in ("boxes_xywh_px", "category_ids", "is_crowd", "areas"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


def test_categories_of_one_name_are_reported(content, write, caplog):
    content["categories"] += [{"id": 5, "name": "oak"}]
    with caplog.at_level(logging.WARNING):
        CocoFolder(*write(content))
    assert "instances.json: categories 2 and 5 are both called 'oak' and are two classes" in caplog.text


def test_missing_size_is_read_from_the_file(content, write):
    del content["images"][1]["height"], content["images"][2]["width"]
    assert {(r.height, r.width) for r in CocoFolder(*write(content)).records} == {(30, 40)}


def test_missing_size_of_a_missing_file_names_both(content, write):
    del content["images"][1]["height"]
    folder, file = write(content)
    (folder / "a.png").unlink()
    with pytest.raises(BadPictureError, match=r"a\.png: .*no such file.*instances\.json: images\[1\] \(id -3"):
        CocoFolder(folder, file)


def test_boxes_without_area_are_kept_and_reported_once(content, write, caplog):
    content["annotations"][0]["bbox"] = [5, 5, -3, 10]
    content["annotations"] += [
        {"id": 40, "image_id": -3, "category_id": 2, "bbox": [50, 5, 9, 9]},  # beyond the right border
        {"id": 41, "image_id": -3, "category_id": 2, "bbox": [5, 5, 0, 9]},
        {"id": 42, "image_id": -3, "category_id": 2, "bbox": [35, 5, 9, 9]},  # reaches out, has area
        {"id": 43, "image_id": -3, "category_id": 2, "bbox": [5, 5, 0, 0], "iscrowd": 1},
    ]
    with caplog.at_level(logging.WARNING):
        source = CocoFolder(*write(content))
    assert len(source.records[0].boxes_xywh_px) == 5
    (message,) = [record.getMessage() for record in caplog.records]
    assert re.search(
        r"instances\.json: 3 of 7 boxes .* annotation 40 of a\.png \(40 x 30 pixels\): bbox \[50, 5, 9, 9\]", message
    )


def _edit(path, value):
    """Returns a function that sets (or, with ..., deletes) what lies at a path of keys in the instances."""

    def edit(content):
        *parents, last = path
        for key in parents:
            content = content[key]
        if value is ...:
            del content[last]
        else:
            content[last] = value

    return edit


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["categories"], ..., "'categories' is missing, expected a list"),
        (["images"], ..., "'images' is missing, expected a list"),
        (["annotations"], ..., "'annotations' is missing, expected a list"),
        (["annotations"], {}, "'annotations' is a dict, expected a list"),
        (["annotations", 1], 3, r"annotations\[1\] is a int, expected an object"),
        (["images", 1, "id"], 11, r"images\[1\] \(id 11, file_name a.png\) and images\[2\] .* have the same id"),
        (["images", 1, "id"], "80.5", r"images\[1\] .*: field 'id' is \"80.5\", expected a whole number"),
        (["images", 1, "id"], 80.5, "field 'id' is 80.5, expected a whole number"),
        (["images", 1, "id"], 2.0**60, "field 'id' is .*e.18, expected a whole number"),  # one of many
        (["images", 1, "id"], "7a", "field 'id' is \"7a\", expected a whole number"),
        (["images", 1, "id"], None, "field 'id' is null, expected a whole number"),
        (["images", 1, "id"], True, "field 'id' is true, expected a whole number"),
        (["images", 1, "id"], ..., r"images\[1\] \(file_name a.png\): field 'id' is missing"),
        (["images", 0, "file_name"], None, "field 'file_name' is null, expected a text"),
        (["images", 0, "height"], 30.5, r"file_name c.png\): field 'height' is 30.5, expected a whole number of pix"),
        (["images", 0, "width"], 0, "field 'width' is 0, expected a whole number of pixels"),
        (["categories", 1, "id"], 700, r"categories\[0\] .* and categories\[1\] .* have the same id"),
        (["categories", 1, "name"], 5, "field 'name' is 5, expected a text"),
        (
            ["annotations", 2, "image_id"],
            12,
            r"annotations\[2\] \(id 3\): field 'image_id' is 12, expected the id of o",
        ),
        (["annotations", 2, "category_id"], 3, r"\(id 3\): field 'category_id' is 3, expected the id of a category"),
        (["annotations", 2, "category_id"], 2**70, "expected the id of a category"),
        (["annotations", 0, "bbox"], ..., r"\(id 1\): field 'bbox' is missing, expected 4 finite numbers"),
        (["annotations", 0, "bbox"], [1, 2, 3], r"field 'bbox' is \[1, 2, 3\], expected 4 finite numbers"),
        (["annotations", 0, "bbox"], [1, 2, 3, float("nan")], r"field 'bbox' is \[1, 2, 3, NaN\], expected 4 finite"),
        (["annotations", 0, "bbox"], [1, 2, 3, float("inf")], "expected 4 finite numbers"),
        (["annotations", 0, "bbox"], [1, 2, 3, "4,5"], "expected 4 finite numbers"),
        (["annotations", 0, "iscrowd"], 2, "field 'iscrowd' is 2, expected 0 or 1"),
        (["annotations", 0, "area"], "big", "field 'area' is \"big\", expected a number"),
    ],
)
def test_wrong_entries_are_named(content, write, path, value, message):
    arguments = write(content)
    _edit(path, value)(content)
    arguments[1].write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"instances\.json: .*" + message):
        CocoFolder(*arguments)


@pytest.mark.parametrize(
    ("text", "message"),
    [('{"images": [', "not valid JSON .*complete"), ("[]", "the top level is a list"), ("\x00", "not valid JSON")],
)
def test_wrong_files_are_named(write, text, message):
    with pytest.raises(ValueError, match=r"instances\.json: " + message):
        CocoFolder(*write(text))


def test_missing_folder_and_missing_file(content, write, tmp_path):
    folder, file = write(content)
    with pytest.raises(FileNotFoundError, match=r"elsewhere: no such folder of pictures; .*instances\.json"):
        CocoFolder(tmp_path / "elsewhere", file)
    with pytest.raises(FileNotFoundError, match=r"other\.json: no such annotation file"):
        CocoFolder(folder, tmp_path / "other.json")


# ---------------------------------------------------------------------------------------------- picture files


def test_decode_gray_and_16_bit():
    gray = np.array([[0, 7, 255]], np.uint8)
    np.testing.assert_array_equal(decode_rgb(Image.fromarray(gray)), np.repeat(gray[..., None], 3, -1))
    deep = np.array([[0, 255, 256, 40_000, 65_535]], np.uint16)
    expected = np.repeat(np.array([[[0], [0], [1], [156], [255]]], np.uint8), 3, -1)
    np.testing.assert_array_equal(decode_rgb(Image.fromarray(deep)), expected)
    np.testing.assert_array_equal(decode_rgb(Image.fromarray(deep.astype(np.int32))), expected)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "RGB", "RGBA", "P", "CMYK", "YCbCr", "I", "I;16"])
def test_decode_gives_three_uint8_channels_in_every_mode(mode):
    pixels = decode_rgb(Image.new(mode, (5, 3)))
    assert (pixels.shape, pixels.dtype) == ((3, 5, 3), np.uint8)
    assert pixels.flags.writeable


def test_decode_drops_alpha_and_resolves_palettes():
    rgba = np.array([[[10, 20, 30, 0], [40, 50, 60, 128]]], np.uint8)
    np.testing.assert_array_equal(decode_rgb(Image.fromarray(rgba)), rgba[..., :3])
    palette = Image.new("P", (1, 1), 1)
    palette.putpalette([0, 0, 0, 200, 100, 50])
    palette.info["transparency"] = b"\x00\x80"
    np.testing.assert_array_equal(decode_rgb(palette), [[[200, 100, 50]]])


def test_decode_refuses_floats():
    with pytest.raises(ValueError, match="floating-point"):
        decode_rgb(Image.new("F", (2, 2)))


def test_files_of_other_kinds(content, write):
    folder, file = write(content)
    deep = np.full((30, 40), 40_000, np.uint16)
    Image.fromarray(deep).save(folder / "a.png")
    Image.new("CMYK", (40, 30), (0, 255, 255, 0)).save(folder / "b.png", "JPEG")  # pure red ink
    Image.new("L", (40, 30), 90).save(folder / "c.png")
    source = CocoFolder(folder, file)
    assert (source.load_image(0) == 156).all()
    np.testing.assert_allclose(source.load_image(1)[15, 20], [254, 0, 0], atol=3)  # JPEG is lossy
    assert (source.load_image(2) == 90).all()


def _save_turned(path, pixels):
    """Stores [H, W] pixels so that EXIF orientation 6, a quarter turn clockwise to be shown, gives them back."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.rot90(pixels)).save(path, exif=exif)


def test_exif_turn_follows_the_annotated_size(content, write):
    folder, file = write(content)
    upright = np.zeros((30, 40), np.uint8)
    upright[:10, :10] = 200
    _save_turned(folder / "a.png", upright)  # stored 40 x 30, shown as annotated
    _save_turned(folder / "b.png", np.rot90(upright))  # stored as annotated
    source = CocoFolder(folder, file)
    np.testing.assert_array_equal(source.load_image(0)[..., 0], upright)
    np.testing.assert_array_equal(source.load_image(1)[..., 0], np.rot90(upright, 2))
    np.testing.assert_array_equal(open_picture(folder / "b.png")[..., 0], np.rot90(upright))


def test_other_size_than_annotated(content, write):
    folder, file = write(content)
    Image.new("RGB", (40, 31)).save(folder / "b.png")
    # Damage to a header looks just so, and may be skipped; max_bad_fraction finds wrong annotations.
    with pytest.raises(BadPictureError, match=r"b\.png: the picture is 40 x 31 pixels .*annotated as 40 x 30"):
        CocoFolder(folder, file).load_image(1)


@pytest.mark.parametrize("error", [RuntimeError, TypeError, KeyError, OverflowError])
def test_whatever_pillow_raises_is_a_bad_picture(error, content, write, monkeypatch):
    def fail(_):
        raise error("surprise")

    folder, file = write(content)
    source = CocoFolder(folder, file)
    monkeypatch.setattr(sources, "rgb_image", fail)
    with pytest.raises(BadPictureError, match=r"b\.png: cannot read .*surprise"):
        source.load_image(1)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")  # it is an error here, with or without it
@pytest.mark.parametrize(
    ("name", "cause"),
    [
        ("missing", "no such file"),
        ("text", "cannot identify image file"),
        ("empty", "cannot identify image file"),
        ("truncated", "truncated"),
        ("bomb", "40 x 30 pixels are more than PIL.Image.MAX_IMAGE_PIXELS"),
        ("worse bomb", "exceeds limit"),
    ],
)
def test_bad_pictures_are_named(content, write, monkeypatch, name, cause):
    folder, file = write(content)
    path = folder / "b.png"
    if name == "missing":
        path.unlink()
    elif name == "text":
        path.write_text("not a picture")
    elif name == "truncated":
        Image.effect_noise((40, 30), 50).save(path)
        path.write_bytes(path.read_bytes()[:700])
    elif name == "empty":
        path.write_bytes(b"")
    else:
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", {"bomb": 40 * 30 - 1, "worse bomb": 40 * 30 // 2 - 1}[name])
    message = rf"{re.escape(str(path))}: cannot read this picture \(.*{cause}"
    with pytest.raises(BadPictureError, match=message):
        CocoFolder(folder, file).load_image(1)
    with pytest.raises(BadPictureError, match=message):
        open_picture(path)
