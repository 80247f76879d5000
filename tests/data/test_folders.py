"""COCO, YOLO and Pascal VOC folders: what they are is found out, all give the same boxes, broken ones are named."""

import json
import re

import exports
import numpy as np
import pytest
import yaml
from PIL import Image

from cdetr_jax.data.findings import leaks, look_through
from cdetr_jax.data.folders import divide, find_layout, read_split

SPLITS = {"train": "train", "validation": "valid"}


@pytest.fixture
def yolo(tmp_path):
    exports.yolo(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", exports.FORMATS)
def test_every_format_gives_the_same_boxes_classes_and_pictures(name, tmp_path):
    exports.FORMATS[name](tmp_path)
    assert list(find_layout(tmp_path).splits) == ["train", "validation"]
    for split, spelling in SPLITS.items():
        source = read_split(tmp_path, split)
        names = {category.id: category.name for category in source.categories}
        assert set(names.values()) == ({"oak"} if name.startswith("voc") and split != "train" else set(exports.NAMES))
        expected = {picture[0]: picture for picture in exports.PICTURES[spelling]}
        assert len(source) == len(expected)
        for i, record in enumerate(source.records):
            _, width, height, objects = expected[record.file_name.rpartition("/")[2]]
            assert (record.width, record.height) == (width, height)
            assert source.load_image(i).shape == (height, width, 3)
            assert [names[label] for label in record.category_ids.tolist()] == [label for label, *_ in objects]
            boxes = np.array([[x, y, r - x, b - y] for _, x, y, r, b in objects], float).reshape(-1, 4)
            np.testing.assert_allclose(record.boxes_xywh_px, boxes, atol=1e-12)
            np.testing.assert_allclose(record.areas, boxes[:, 2] * boxes[:, 3], atol=1e-12)
            assert not record.is_crowd.any()


def test_what_is_found_is_said_in_a_line(tmp_path, yolo):
    assert find_layout(yolo).describe() == f"{yolo} is a YOLO data set (data.yaml): train, validation"
    assert find_layout(yolo / "data.yaml").describe() == find_layout(yolo).describe()
    outer = tmp_path / "unpacked"
    exports.voc(outer / "archive")
    assert find_layout(outer).describe() == f"{outer / 'archive'} is a Pascal VOC folder: train, validation"
    (outer / "archive" / "ImageSets").rename(tmp_path / "away")
    assert find_layout(outer).describe().endswith("without a split; 20% of its pictures are held out for evaluation")


def test_a_folder_that_is_none_is_refused(tmp_path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(
        ValueError, match=r"no data set was recognised in it; it holds notes.txt; expected a COCO folder"
    ):
        find_layout(tmp_path)
    with pytest.raises(FileNotFoundError, match="none: no such folder"):
        find_layout(tmp_path / "none")


def test_yolo_reads_polygons_lists_several_folders_and_a_root(yolo):
    (yolo / "valid" / "labels" / "c.txt").write_text("1 0.2 0.1 0.6 0.1 0.6 0.5\n")
    (yolo / "listed.txt").write_text("./train/images/a.png\ntrain/images/b.png\n")
    content = {"path": str(yolo), "names": {0: "kite", 1: "oak"}, "train": "listed.txt", "val": ["valid/images"]}
    away = yolo / "elsewhere" / "mine.yaml"
    away.parent.mkdir()
    away.write_text(yaml.dump(content | {"val": ["valid/images", "train/images"]}))
    [polygon, *_] = read_split(away, "val").records
    np.testing.assert_allclose(polygon.boxes_xywh_px, [[10, 3, 20, 12]])
    assert len(read_split(away, "val")) == 4
    assert [record.file_name.rpartition("/")[2] for record in read_split(away, "train").records] == ["a.png", "b.png"]
    assert read_split(away, "train").load_image(0).shape == (30, 40, 3)


def test_yolo_as_other_programs_write_it(yolo, tmp_path):
    expected = [record.boxes_xywh_px.tolist() for record in read_split(yolo, "train").records]
    place = tmp_path / "images" / "mine"  # a folder of this name outside of the set means nothing
    for split in ("train", "valid"):
        for path in (yolo / split).glob("*/*"):
            text = path.suffix == ".txt"
            to = place / split / path.name
            to.parent.mkdir(parents=True, exist_ok=True)
            to.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n") if text else path.read_bytes())
    (place / "train" / "._a.txt").write_bytes(b"\0")  # macOS's
    (place / "train" / "README.txt").write_text("what this is")
    (place / "list.txt").write_bytes(b"\xef\xbb\xbf.\\train\\a.png\r\ntrain\\b.png\r\ntrain\\empty.png\r\n")
    (place / "data.yaml").write_bytes(b"\xef\xbb\xbftrain: list.txt\r\nnc: '2'\r\nnames: {'0': yes, '1': no}\r\n")
    (tmp_path / "images" / "__MACOSX").mkdir()
    layout = find_layout(tmp_path / "images")
    assert layout.describe().endswith("train; 20% of its pictures are held out for evaluation")
    source = layout.splits["train"]()
    assert [record.boxes_xywh_px.tolist() for record in source.records] == expected
    assert [category.name for category in source.categories] == ["yes", "no"]
    (place / "train" / "z.txt").write_text("0 0.5 0.5 0.1 0.1\n")
    with pytest.raises(ValueError, match=r"z.txt: a label file without a picture"):
        layout.splits["train"]()
    (place / "data.yaml").write_bytes("names: [k\u00e4fer]".encode("latin1"))
    with pytest.raises(ValueError, match=r"data.yaml: not a text in UTF-8"):
        find_layout(place)


def test_roboflows_dots_mean_the_folder_itself_and_links_to_folders_are_followed(yolo):
    exports.yolo(yolo / "mine")
    (yolo / "store").mkdir()
    Image.new("RGB", (40, 30)).save(yolo / "store" / "z.png")
    (yolo / "mine" / "train" / "images" / "more").symlink_to(yolo / "store")
    (yolo / "mine" / "train" / "images" / "more" / "round").symlink_to(yolo / "mine")
    source = read_split(yolo / "mine", "train")
    assert (source.folder, len(source)) == (yolo / "mine", 5)  # with what the last link leads to, each once
    assert "train/images/more/z.png" in [record.file_name for record in source.records]


def test_yolo_boxes_are_of_the_picture_turned_by_its_exif_tag(yolo):
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down: the size alone does not show it
    path = yolo / "valid" / "images" / "c.png"
    Image.open(path).save(path, exif=exif)
    stored = np.array(Image.open(path))
    np.testing.assert_array_equal(read_split(yolo, "validation").load_image(0), stored[::-1, ::-1])


@pytest.mark.parametrize(
    ("file", "line", "expected"),
    [
        ("train/labels/a.txt", "2 0.5 0.5 0.1 0.1", r"a.txt:1: '2 0.5.*', expected a class of data.yaml"),
        ("train/labels/a.txt", "\n0 20 15 10 8", r"a.txt:2: .*expected fractions.* look like pixels"),
        ("train/labels/a.txt", "0 nan 0.5 0.1 0.1", r"a.txt:1: .*expected 0 to 1"),
        ("train/labels/a.txt", "0 0.5 0.5 0.1", r"a.txt:1: .*expected the class and 4 numbers"),
        ("train/labels/a.txt", "kite 0.5 0.5 0.1 0.1", r"a.txt:1: .*expected numbers"),
        ("train/labels/z.txt", "0 0.5 0.5 0.1 0.1", r"z.txt: a label file without a picture"),
        ("data.yaml", "train: train/images\nval: valid/images\n", r"data.yaml: key 'names' is None, expected"),
        ("data.yaml", "names: [a]\nval: valid/images\n", r"data.yaml: key 'train' is missing"),
        ("data.yaml", "names: [a]\n\ntrain: none/images\nval: b", r"data.yaml:3: train is 'none/images': no "),
        ("data.yaml", "names: [a, b]\nnc: 3\ntrain: a\nval: b", r"data.yaml:2: nc is 3, but names has 2 classes"),
        ("data.yaml", "names: [a\ntrain: a", r"data.yaml:2: not valid YAML"),
        ("list.txt", "./train/images/a.png\nnone.png\n", r"list.txt:2: no such picture"),
        ("train/labels/deep/z.txt", "0 0.5 0.5 0.1 0.1", r"deep/z.txt: a label file without a picture"),
        ("train/images/a.bmp", "", r"images/a.png: of which of a.bmp and a.png are the boxes of a\?"),
        ("data.yaml", "names: [[a], b]\ntrain: train/images\nval: b", r"data.yaml:1: names is .*expected the classes"),
    ],
)  # fmt: skip
def test_broken_yolo_is_named_by_file_and_line(file, line, expected, yolo):
    (yolo / file).parent.mkdir(exist_ok=True)
    (yolo / file).write_text(line)
    if file == "list.txt":
        (yolo / "data.yaml").write_text("names: [a, b]\ntrain: list.txt\nval: valid/images\n")
    with pytest.raises((ValueError, FileNotFoundError), match=expected):
        read_split(yolo, "train")


def test_yolo_pictures_without_any_label_are_refused(yolo, caplog):
    (yolo / "train" / "labels" / "b.txt").unlink()
    assert len(read_split(yolo, "train").records[1].category_ids) == 0
    assert "1 of 3 pictures of train have no label file and count as empty" in caplog.text
    for path in (yolo / "train" / "labels").iterdir():
        path.unlink()
    with pytest.raises(ValueError, match="none of the 3 pictures of train has a label file"):
        read_split(yolo, "train")
    (yolo / "data.yaml").unlink()
    with pytest.raises(ValueError, match=r"it has YOLO labels .* but no data.yaml"):
        read_split(yolo, "train")


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        (lambda text: text[: text.index("</bndbox>")], r"a.xml:7: not valid XML .*is the file complete"),
        (lambda text: text.replace("<name>kite</name>", ""), r"a.xml:9: this object has no name"),
        (lambda text: text.replace("<xmin>6</xmin>", "<xmin>six</xmin>"), r"a.xml:9: this object has no bndbox"),
        (lambda text: re.sub("<([xy]m..)>[0-9]+", r"<\1>0.5", text), r"a.xml:5: the corners .* look like fractions"),
        (lambda text: "<html></html>", r"a.xml: its element is <html>, expected <annotation>"),
    ],
)
def test_broken_xml_is_named_by_file_and_line(edit, expected, tmp_path):
    exports.voc(tmp_path)
    file = tmp_path / "Annotations" / "a.xml"
    file.write_text(edit(file.read_text()))
    with pytest.raises(ValueError, match=expected):
        read_split(tmp_path, "train")


def test_voc_names_what_is_missing_and_reads_sizes_where_they_are_not_told(tmp_path):
    exports.voc(tmp_path)
    file = tmp_path / "Annotations" / "a.xml"
    file.write_text(file.read_text().replace("<width>40</width>", "<width>0</width>"))
    assert (read_split(tmp_path, "train").records[0].height, read_split(tmp_path, "train").records[0].width) == (30, 40)
    assert read_split(tmp_path, "train").place_of(0, 1) == f"{file}:9"
    (tmp_path / "JPEGImages" / "b.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"b.xml: an annotation without its picture, .*JPEGImages/b"):
        read_split(tmp_path, "train")
    (tmp_path / "Annotations" / "b.xml").unlink()
    with pytest.raises(FileNotFoundError, match=r"train.txt:2: no such file, .*b.xml"):
        read_split(tmp_path, "train")


def test_voc_as_other_programs_write_it(tmp_path):
    exports.voc_roboflow(tmp_path / "flat")  # whose valid alone does not show what corners mean
    valid = tmp_path / "flat" / "valid" / "c.xml"
    valid.write_text(re.sub("<xmax>51</xmax>", "<xmax>50</xmax>", valid.read_text()))
    assert read_split(tmp_path / "flat", "validation").records[0].boxes_xywh_px.tolist() == [[11, 0, 38, 13]]
    exports.voc(tmp_path / "voc")
    pictures, annotations = tmp_path / "voc" / "JPEGImages", tmp_path / "voc" / "Annotations"
    (pictures / "deep").mkdir()
    (annotations / "deep").mkdir()
    (pictures / "a.png").rename(pictures / "deep" / "a b.png")
    text = (annotations / "a.xml").read_text()
    (annotations / "deep" / "a b.XML").write_bytes(f'<?xml version="1.0" encoding="UTF-16"?>{text}'.encode("utf-16"))
    (annotations / "a.xml").unlink()
    (tmp_path / "voc/ImageSets/Main/train.txt").write_bytes(b"\xef\xbb\xbfdeep/a b\r\nb.png\r\nempty -1\r\n")
    source = read_split(tmp_path / "voc", "train")
    assert [record.file_name for record in source.records] == ["deep/a b.png", "b.png", "empty.png"]
    assert source.records[0].boxes_xywh_px.tolist() == [[0, 0, 10, 20], [5, 7, 35, 23]]


def test_years_of_voc_are_one_data_set(tmp_path):
    exports.voc_years(tmp_path)
    assert find_layout(tmp_path).describe() == f"{tmp_path} holds Pascal VOC's VOC2007, VOC2012: train, validation"
    source = read_split(tmp_path, "train")
    years = [record.file_name.partition("/")[0] for record in source.records]
    assert years == sorted(years)
    assert set(years) == {"VOC2007", "VOC2012"}
    assert [record.image_id for record in source.records] == list(range(1, len(source) + 1))
    with_boxes = [i for i, record in enumerate(source.records) if len(record.category_ids)]
    for i in with_boxes:
        year, _, name = source.records[i].file_name.split("/")
        assert source.place_of(i, 0).startswith(f"{tmp_path / year / 'Annotations' / name.removesuffix('.png')}.xml:")
    assert not list(look_through({"train": source}))
    (tmp_path / "VOC2012" / "ImageSets").rename(tmp_path / "devkit_doc" / "away")
    with pytest.raises(ValueError, match=r"VOC2012: it has no lists of its splits, ImageSets/Main/\*.txt, as another"):
        find_layout(tmp_path)
    (tmp_path / "VOC2007" / "ImageSets").rename(tmp_path / "devkit_doc" / "away too")
    assert list(find_layout(tmp_path).splits) == ["all"]


def test_coco_as_other_programs_write_it(tmp_path):
    exports.roboflow_coco(tmp_path)
    for split in ("train", "valid"):
        (tmp_path / split).rename(tmp_path / split.title())
    file = tmp_path / "Train" / "_annotations.coco.json"
    (tmp_path / "Train" / "deep").mkdir()
    (tmp_path / "Train" / "a.png").rename(tmp_path / "Train" / "deep" / "a.png")
    content = json.loads(file.read_text())
    content["images"][0]["file_name"] = "deep\\a.png"
    content["images"].append(content["images"][0] | {"id": 99})
    content["annotations"][0]["bbox"] = [0.1, 0.2, 0.3, 0.4]
    file.write_text(json.dumps(content))
    source = read_split(tmp_path, "train")
    assert source.load_image(0).shape == (30, 40, 3)
    assert [(what, place.rpartition("/")[2].partition(" (")[0]) for what, place in look_through({"test": source})] == [
        ("a box smaller than a pixel: fractions where pixels belong?", "a.png"),
        ("the same picture twice in test", "a.png"),
    ]


def test_coco_folders_with_unclear_files_are_refused(tmp_path):
    exports.coco(tmp_path)
    (tmp_path / "annotations" / "captions_train2017.json").write_text("{}")
    (tmp_path / "other.json").write_text("{}")
    assert list(find_layout(tmp_path).splits) == ["train", "validation"]
    (tmp_path / "annotations" / "instances_train_minus.json").write_text("{}")
    with pytest.raises(ValueError, match=r"which of .*instances_train2017.json, .*instances_train_minus.json"):
        find_layout(tmp_path)


def _one_json(folder, names):
    folder.mkdir(exist_ok=True)
    images = [{"id": i, "file_name": name, "height": 9, "width": 9} for i, name in enumerate(names)]
    content = {"images": images, "annotations": [], "categories": [{"id": 1, "name": "oak"}]}
    (folder / "labels.json").write_text(json.dumps(content))


def test_what_has_no_split_is_divided_by_a_seed_and_so_again(tmp_path):
    folder, file = tmp_path / "mine", tmp_path / "run" / "split.json"
    names = [f"{i}.rf.{k}.png" for i in range(10) for k in range(3)]  # three versions of each of ten
    _one_json(folder, names)
    assert find_layout(folder).describe() == (
        f"{folder} is a COCO folder, without a split; 20% of its pictures are held out for evaluation"
    )
    parts = {split: read_split(folder, split, 0, str(file)) for split in SPLITS}
    held_out = [record.file_name for record in parts["validation"].records]
    assert len(held_out) == 6
    assert {record.file_name for record in parts["train"].records} == set(names) - set(held_out)
    originals = [{name.partition(".")[0] for name in part} for part in (held_out, set(names) - set(held_out))]
    assert not originals[0] & originals[1]
    assert json.loads(file.read_text())["validation"] == sorted(held_out)
    others = [record.file_name for record in read_split(folder, "validation", seed=1).records]
    assert others != held_out
    again = read_split(folder, "validation", seed=1, split_file=str(file))  # the file counts
    assert [record.file_name for record in again.records] == held_out
    _one_json(folder, [*names, "new.png"])
    with pytest.raises(
        ValueError, match=r"split.json: 'new.png' and 0 more are in this file but not in .*, or the reverse"
    ):
        read_split(folder, "train", 0, str(file))
    _one_json(folder, ["one.png"])
    with pytest.raises(ValueError, match="1 pictures, too few to hold some out"):
        divide(find_layout(folder).splits["all"](), seed=0)


def test_what_is_wrong_is_found_with_its_place(yolo):
    train, valid = yolo / "train", yolo / "valid"
    (train / "labels" / "a.txt").write_text(
        "0 0.5 0.5 0.5 0.5\n0 0.5 0.5 0 0.1\n1 0.99 0.5 0.4 0.5\n0 0.5 0.5 0.5 0.5\n1 0.5 0.5 0.1 0.1\n"
    )
    (valid / "labels" / "c.txt").write_text("1 0.5 0.5 0.5 0.5\n")
    (train / "images" / "b.png").write_bytes((train / "images" / "b.png").read_bytes()[:-700])
    (valid / "images" / "d.png").write_bytes((train / "images" / "a.png").read_bytes())
    splits = {split: read_split(yolo, split) for split in SPLITS}
    found = [(what, re.sub(rf"{yolo}/| \(.*", "", place)) for what, place in look_through(splits)]
    assert found == [
        ("a damaged picture", "train/images/b.png: cannot read this picture"),
        ("an empty box", "train/labels/a.txt:2"),
        ("a box outside of its picture", "train/labels/a.txt:3"),
        ("a box that is there twice", "train/labels/a.txt:4, as train/labels/a.txt:1"),
        ("the same picture in train and validation", "train/images/a.png, valid/images/d.png"),
    ]
    assert leaks(splits) == (
        f"1 pictures are in both train and validation, such as {train}/images/a.png and {valid}/images/d.png"
    )
    (valid / "images" / "d.png").unlink()
    assert leaks({split: read_split(yolo, split) for split in SPLITS}) == ""
