"""TFDS sets as a source. The numbers are tested everywhere; the sets themselves where TFDS is installed."""

import functools
import io
import json
import os
import pickle
import shutil
import sys
import zipfile

import numpy as np
import pytest
from coco_archives import CMYK, FILE_NAMES, GRAY, WITHOUT_BOXES, detections, write_archives
from PIL import Image

from cdetr_jax import build
from cdetr_jax.checkpoints.workdir import save_config
from cdetr_jax.cli.data_flag import config_of, evaluation_of
from cdetr_jax.data import cache, tfds_source
from cdetr_jax.data.coco import CocoFolder
from cdetr_jax.data.coco_categories import COCO_CATEGORIES
from cdetr_jax.data.sources import BadPictureError
from cdetr_jax.data.tfds_source import TfdsSource, category_ids_of, find_prepared, object_areas, pixel_boxes
from cdetr_jax.evaluation.coco_eval import SUMMARY, coco_average_precision
from cdetr_jax.structs import Category
from cdetr_jax.weights.load import Preprocessing, Weights
from configs import common, demo

# ------------------------------------------------------------------------------------------------------ numbers


def as_tfds(boxes_xywh, heights, widths):
    """Fractions as TFDS's coco builder computes and stores them."""
    x, y, w, h = boxes_xywh.T
    return np.stack([y / heights, x / widths, (y + h) / heights, (x + w) / widths], -1).astype(np.float32)


def test_boxes_with_two_decimals_come_back_exactly():
    rng = np.random.default_rng(0)
    heights, widths = rng.integers(20, 3000, (2, 200_000))
    corner = rng.uniform(0, np.stack([widths, heights], -1))
    size = rng.uniform(0, np.stack([widths, heights], -1) - corner)
    # Decimal numbers as JSON reads them, which are not all equal to k / 100 computed otherwise.
    boxes = np.array([[float(f"{v:.2f}") for v in box] for box in np.concatenate([corner, size], -1).tolist()])
    np.testing.assert_array_equal(pixel_boxes(as_tfds(boxes, heights, widths), heights, widths), boxes)


def test_other_boxes_come_back_to_float32():
    rng = np.random.default_rng(0)
    heights, widths = np.full((2, 5000), 640)
    boxes = rng.uniform(0, 320, (5000, 4))
    found = pixel_boxes(as_tfds(boxes, heights, widths), heights, widths)
    assert np.abs(found - boxes).max() < 640 * 2.0**-23
    rounded = np.isclose(found[:, 0] * 100 % 1, 0, atol=1e-6) | np.isclose(found[:, 0] * 100 % 1, 1, atol=1e-6)
    assert rounded.mean() < 0.02  # those that happen to lie on a hundredth


def test_no_boxes():
    assert pixel_boxes(np.zeros((0, 4), np.float32), np.zeros(0), np.zeros(0)).shape == (0, 4)


def test_areas_cut_to_whole_numbers():
    boxes = np.array([[0, 0, 32, 32], [0, 0, 32.01, 32], [0, 0, 80, 80], [5, 5, 50, 50]])
    cut = np.array([1024.0, 1024.0, 1024.0, 9216.0])
    sizes = np.full((2, 4), 640)
    np.testing.assert_allclose(object_areas(cut, boxes, *sizes, False), [1024, 32.01 * 32, 1024.5, 9216.5], rtol=1e-15)
    np.testing.assert_array_equal(object_areas(cut, boxes, *sizes, True), cut)


@pytest.mark.parametrize(("w", "h"), [(32, 32), (96, 96), (1024, 9), (36.864, 250)])
def test_areas_that_are_whole_stay_whole(w, h):
    """Where the box does not come back exactly."""
    rng = np.random.default_rng(0)
    heights, widths = rng.integers(1100, 3000, (2, 50_000))
    corner = rng.uniform(0, np.stack([widths - w, heights - h], -1))
    boxes = pixel_boxes(
        as_tfds(np.concatenate([corner, np.full((50_000, 2), [w, h])], -1), heights, widths), heights, widths
    )
    assert (boxes[:, 2] * boxes[:, 3] != round(w * h)).mean() > 0.5
    areas = object_areas(np.full(50_000, float(round(w * h))), boxes, heights, widths, False)
    np.testing.assert_array_equal(areas, round(w * h))


def test_areas_next_to_a_whole_number_are_kept_where_the_box_is_exact():
    boxes = np.array([[0, 0, 3000, 0.01], [7, 5, 29.03, 317.47]])
    areas = object_areas(np.floor(boxes[:, 2] * boxes[:, 3]), boxes, np.full(2, 3000), np.full(2, 3000), False)
    np.testing.assert_array_equal(areas, boxes[:, 2] * boxes[:, 3])


def test_ids_by_name():
    names = [category.name for category in COCO_CATEGORIES]
    assert category_ids_of(names) == [category.id for category in COCO_CATEGORIES]
    assert category_ids_of(["toothbrush", "person"]) == [90, 1]
    assert category_ids_of(["person", "aeroplane"]) == [0, 1]


def test_without_tfds(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    monkeypatch.setitem(sys.modules, "array_record", None)
    with pytest.raises(ModuleNotFoundError, match=r"not installed .*pip install cdetr_jax\[tfds\]$"):
        TfdsSource("coco/2017", "anywhere", "train")


@pytest.mark.parametrize(("name", "place"), [("coco/2017", "coco/2017/*"), ("coco/2017:1.0.0", "coco/2017/1.0.0")])
def test_not_prepared(tmp_path, name, place):
    (tmp_path / "coco" / "2017" / "incomplete.ABC_1.1.0").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="is not prepared") as error:
        find_prepared(name, tmp_path)
    assert f"no {tmp_path}/{place} with a prepared set" in str(error.value)
    assert f"`cdetr prepare --dataset={name} --data_dir={tmp_path}`" in str(error.value)


def test_the_newest_version_counts(tmp_path):
    for version in ("1.9.0", "1.10.0", "2.0.0"):
        (tmp_path / "my_set" / version).mkdir(parents=True)
    for version in ("1.9.0", "1.10.0"):
        (tmp_path / "my_set" / version / "features.json").touch()
    assert find_prepared("my_set", tmp_path).name == "1.10.0"
    assert find_prepared("my_set:1.9.0", tmp_path).name == "1.9.0"


def test_a_config_can_be_left_out_where_only_one_is_there(tmp_path):
    def prepared(folder):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "features.json").touch()

    prepared("voc/2012/5.0.0")
    (tmp_path / "voc" / "2007" / "incomplete.ABC_5.0.0").mkdir(parents=True)
    (tmp_path / "voc" / "a_file").touch()
    assert find_prepared("voc", tmp_path) == find_prepared("voc/2012:5.0.0", tmp_path)
    assert find_prepared("voc:5.0.0", tmp_path).parent.name == "2012"
    with pytest.raises(FileNotFoundError, match=r"voc:4\.0\.0 is not prepared"):
        find_prepared("voc:4.0.0", tmp_path)
    prepared("voc/2007/5.0.0")
    with pytest.raises(ValueError, match=r"voc names no config, .* say which, one of voc/2007, voc/2012$"):
        find_prepared("voc", tmp_path)


def test_a_name_that_is_none(tmp_path):
    with pytest.raises(ValueError, match=r"config\.data\.tfds_name is '\.\./x', expected a name such as coco/2017"):
        find_prepared("../x", tmp_path)


# ------------------------------------------------------------------------- coco/2017, by TFDS's own builder


def import_or_skip(*others):
    """TFDS; skips the test where it is missing, or one of the others that it imports late."""
    for name in ("array_record", *others):
        pytest.importorskip(name)
    return pytest.importorskip("tensorflow_datasets")


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    """TFDS's coco/2017, prepared from small archives. Returns: its data_dir, and the folder of what they hold."""
    import_or_skip("tensorflow", "importlib_resources")
    from cdetr_jax.data.tfds_prepare import prepare

    folder = tmp_path_factory.mktemp("coco")
    unpacked = write_archives(folder / "archives")
    done = prepare("coco/2017", folder / "tfds", folder / "archives", check_archives=False)
    assert not done.was_there
    assert done.pictures == {"train": 6, "validation": 9, "test": 1}
    return folder / "tfds", unpacked


def as_folder(unpacked, split):
    file = unpacked / "annotations" / f"instances_{split}.json"
    return CocoFolder(unpacked / split, file), json.loads(file.read_text())


@pytest.mark.parametrize(("split", "coco_split"), [("train", "train2017"), ("validation", "val2017")])
def test_same_as_the_coco_folder(coco, split, coco_split):
    data_dir, unpacked = coco
    source, (folder, _) = TfdsSource("coco/2017", data_dir, split), as_folder(unpacked, coco_split)
    assert source.categories == folder.categories
    for i, (found, expected) in enumerate(zip(source.records, folder.records, strict=True)):
        for field in ("image_id", "file_name", "height", "width"):
            assert getattr(found, field) == getattr(expected, field)
            assert type(getattr(found, field)) is type(getattr(expected, field))
        for field in ("boxes_xywh_px", "category_ids", "is_crowd"):
            assert getattr(found, field).dtype == getattr(expected, field).dtype
        np.testing.assert_array_equal(found.category_ids, expected.category_ids)
        np.testing.assert_array_equal(found.is_crowd, expected.is_crowd)
        boxes = expected.boxes_xywh_px
        has_decimals = (np.round(boxes, 2) == boxes).all(-1)
        np.testing.assert_array_equal(found.boxes_xywh_px[has_decimals], boxes[has_decimals])
        np.testing.assert_allclose(found.boxes_xywh_px, boxes, rtol=0, atol=640 * 2.0**-23)
        is_filled = boxes[:, 2] * boxes[:, 3] == expected.areas
        np.testing.assert_array_equal(found.areas[is_filled], expected.areas[is_filled])
        np.testing.assert_allclose(found.areas, expected.areas, rtol=0, atol=0.5)
        np.testing.assert_array_equal(source.load_image(i), folder.load_image(i))


def test_the_special_pictures_are_there(coco):
    _, unpacked = coco
    source, (_, instances) = TfdsSource("coco/2017", coco[0], "validation"), as_folder(unpacked, "val2017")
    at = {record.image_id: i for i, record in enumerate(source.records)}
    image_ids = [image["id"] for image in instances["images"]]
    assert source.records[at[image_ids[WITHOUT_BOXES]]].boxes_xywh_px.shape == (0, 4)
    gray = source.load_image(at[image_ids[GRAY]])
    assert (gray == gray[..., :1]).all()
    with Image.open(unpacked / "val2017" / source.records[at[image_ids[CMYK]]].file_name) as image:
        assert image.mode == "CMYK"
    assert sum(record.is_crowd.sum() for record in source.records) > 5
    areas = np.concatenate([record.areas for record in source.records])
    assert (areas == 1024).sum() > 20
    assert (areas == 9216).sum() > 10


def test_ap_equals_the_coco_folders_and_pycocotools(coco, capsys):
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    source, (folder, instances) = TfdsSource("coco/2017", coco[0], "validation"), as_folder(coco[1], "val2017")
    results = detections(instances)
    found = coco_average_precision(source.records, source.categories, results)
    expected = coco_average_precision(folder.records, folder.categories, results)
    for name in SUMMARY:
        assert found.summary[name] == pytest.approx(expected.summary[name], abs=1e-9)
    assert found.boxes_per_class == expected.boxes_per_class
    assert found.per_class == pytest.approx(expected.per_class, abs=1e-9)

    judge = COCO(coco[1] / "annotations" / "instances_val2017.json")
    evaluation = COCOeval(judge, judge.loadRes(results), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    capsys.readouterr()
    assert list(found.summary.values()) == pytest.approx(evaluation.stats.tolist(), abs=1e-9)
    assert 0.05 < found.summary["APS"] < 0.9  # it means something


def test_nothing_imports_tensorflow(coco):
    """In a process of its own: preparing has imported it here."""
    import subprocess

    code = (
        "import sys\nfrom cdetr_jax.data.tfds_source import TfdsSource\n"
        f"TfdsSource('coco/2017', {str(coco[0])!r}, 'train').load_image(0)\n"
        "print('tensorflow' in sys.modules, 'tensorflow_datasets' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["False", "True"]


def test_splits_of_tfds(coco):
    ids = [record.image_id for record in TfdsSource("coco/2017", coco[0], "train").records]
    assert sorted(ids) == ids
    assert len(TfdsSource("coco/2017", coco[0], "validation[:3]")) == 3
    assert [r.image_id for r in TfdsSource("coco/2017:1.1.0", coco[0], "train+test").records] == list(range(1, 8))
    with pytest.raises(ValueError, match=r"'valid', it has train with 6 pictures, validation with 9 pictures, test"):
        TfdsSource("coco/2017", coco[0], "valid")


def test_the_table_is_kept_and_made_anew_when_the_records_change(coco, tmp_path, monkeypatch):
    shutil.copytree(coco[0] / "coco", tmp_path / "coco")
    made = []
    read = TfdsSource._read
    monkeypatch.setattr(TfdsSource, "_read", lambda self: (made.append(1), read(self))[1])
    first = TfdsSource("coco/2017", tmp_path, "train")  # the table was made by `prepare` and copied with the set
    assert made == []
    for file in find_prepared("coco/2017", tmp_path).glob("coco-train*"):
        os.utime(file, (1, 1))
    for _ in range(2):
        again = TfdsSource("coco/2017", tmp_path, "train")
    assert len(made) == 1
    assert again.records[0].file_name == first.records[0].file_name
    np.testing.assert_array_equal(again.records[5].boxes_xywh_px, first.records[5].boxes_xywh_px)
    labels = find_prepared("coco/2017", tmp_path) / "objects-label.labels.txt"
    labels.write_text(labels.read_text().replace("person", "human"))
    renamed = TfdsSource("coco/2017", tmp_path, "train")
    assert len(made) == 2
    assert renamed.categories[0] == Category(0, "human")  # no longer COCO's names: TFDS's own numbers


def test_damaged_records_are_named(coco, tmp_path):
    shutil.copytree(coco[0] / "coco", tmp_path / "coco")
    (file,) = find_prepared("coco/2017", tmp_path).glob("coco-train*")
    state, content = os.stat(file), bytearray(file.read_bytes())
    place = content.index(b"\xff\xd8\xff") + 200  # inside of the first JPEG
    content[place] ^= 1
    file.write_bytes(content)
    os.utime(file, (state.st_atime, state.st_mtime))  # so that the cached table still holds
    source = TfdsSource("coco/2017", tmp_path, "train")
    bad = []
    for i, record in enumerate(source.records):
        try:
            source.load_image(i)
        except BadPictureError as error:
            bad.append(record.file_name)
            assert f"coco/2017 train: {record.file_name}: cannot read" in str(error)  # noqa: PT017
    assert len(bad) == 1
    os.utime(file, (1, 1))
    with pytest.raises(
        ValueError, match=rf"records 0 to 5 are damaged .* delete {file.parent} and prepare the set again"
    ):
        TfdsSource("coco/2017", tmp_path, "train")


def test_other_processes_can_read_it(coco):
    source = TfdsSource("coco/2017", coco[0], "train")
    source.load_image(0)  # the files are open
    copy = pickle.loads(pickle.dumps(source))
    np.testing.assert_array_equal(copy.load_image(4), source.load_image(4))
    assert copy.records[4].file_name == source.records[4].file_name


def test_many_threads_can_read_it(coco):
    source = TfdsSource("coco/2017", coco[0], "train")
    expected = [source.load_image(i) for i in range(6)]
    source = TfdsSource("coco/2017", coco[0], "train")
    found = cache.in_parallel(source.load_image, [i % 6 for i in range(300)], "pictures")
    assert all(np.array_equal(pixels, expected[k % 6]) for k, pixels in enumerate(found))


def test_a_read_only_set(coco, tmp_path, monkeypatch):
    shutil.copytree(coco[0] / "coco", tmp_path / "coco")
    save = cache._save
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))

    def refuse(file, *rest):
        if "home" not in file.parts:
            raise OSError(30, "Read-only file system")
        save(file, *rest)

    monkeypatch.setattr(cache, "_save", refuse)
    TfdsSource("coco/2017", tmp_path, "train")
    monkeypatch.setattr(TfdsSource, "_read", None)
    assert len(TfdsSource("coco/2017", tmp_path, "train")) == 6


def test_through_the_config(coco):
    config = common.get_config()
    config.data.update({"source": "tfds", "tfds_data_dir": str(coco[0])})
    assert len(build.make_source(config, "train")) == 6
    assert len(build.make_source(config, "eval")) == 9
    config.data.update({"tfds_name": "coco/2017,coco/2017", "train_split": "train,validation", "eval_split": "test,"})
    assert len(build.make_source(config, "train")) == 15
    assert len(build.make_source(config, "eval")) == 1
    config.data.update(
        {
            "source": "coco_folder+tfds",
            "tfds_name": "coco/2017",
            "train_split": "train",
            "eval_split": "",
            "train_images": str(coco[1] / "val2017"),
            "train_annotations": str(coco[1] / "annotations" / "instances_val2017.json"),
            "eval_images": str(coco[1] / "val2017"),
            "eval_annotations": str(coco[1] / "annotations" / "instances_val2017.json"),
        }
    )
    joined = build.make_source(config, "train")
    assert len(joined) == 15
    assert joined.categories == COCO_CATEGORIES
    assert isinstance(build.make_source(config, "eval"), CocoFolder)


def test_train_and_evaluate(coco, tmp_path):
    """One epoch of three steps on the prepared records, evaluated on all of its validation pictures."""
    from cdetr_jax.models import resnet
    from cdetr_jax.training.loop import train_and_evaluate

    config = demo.get_config()
    config.model.update({"backbone_width": 8, "width": 16, "num_heads": 2, "ffn_width": 16, "num_queries": 7})
    config.data.update({"source": "tfds", "tfds_data_dir": str(coco[0]), "max_targets": 0})
    config.train.update({"batch_size": 2, "num_epochs": 1, "log_every_steps": 1})
    config.eval.update({"batch_size": 2, "every_epochs": 1})
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(resnet.STAGE_SIZES, "resnet18", (1, 1, 1, 1))
        summary = train_and_evaluate(config, tmp_path / "run")
    assert summary.keys() == SUMMARY.keys()
    assert 0 <= summary["AP"] <= 1
    classes = json.loads((tmp_path / "run" / "classes.json").read_text())
    assert {entry["id"]: entry["name"] for entry in classes if entry} == {c.id: c.name for c in COCO_CATEGORIES}


# ----------------------------------------------------------------------------------------------- other sets


PIXELS = np.random.default_rng(0).integers(0, 256, (30, 50, 3), np.uint8)


def png(keep=None):
    """Bytes of a PNG, perhaps only the first of them."""
    stream = io.BytesIO()
    Image.fromarray(PIXELS).save(stream, "PNG")
    return io.BytesIO(stream.getvalue()[:keep])


@pytest.fixture(scope="module")
def trees(tmp_path_factory):
    """A set as VOC is one, without ids, areas and crowds, and one of its pictures is cut off. Returns: its data_dir."""
    data_dir = tmp_path_factory.mktemp("trees")
    trees_builder()(data_dir=str(data_dir), file_format="array_record").download_and_prepare()
    return data_dir


@functools.cache
def trees_builder():
    tfds = import_or_skip()

    class Trees(tfds.core.GeneratorBasedBuilder):
        """Two pictures of trees."""

        VERSION = tfds.core.Version("3.0.0")

        def _info(self):
            return tfds.core.DatasetInfo(
                builder=self,
                features=tfds.features.FeaturesDict(
                    {
                        "image": tfds.features.Image(),
                        "image/filename": tfds.features.Text(),
                        "objects": tfds.features.Sequence(
                            {
                                "bbox": tfds.features.BBoxFeature(),
                                "label": tfds.features.ClassLabel(names=["oak", "elm"]),
                                "is_difficult": np.bool_,
                            }
                        ),
                    }
                ),
            )

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            box = {"label": "elm", "bbox": tfds.features.BBox(2 / 30, 3 / 50, 12 / 30, 50 / 50), "is_difficult": True}
            for name, objects, keep in (("ä.png", [box, box], None), ("cut.png", [], 900)):
                yield name, {"image": png(keep), "image/filename": name, "objects": objects}

    return Trees


def test_a_set_like_voc(trees):
    source = TfdsSource("trees", trees, "train")
    assert source.categories == (Category(0, "oak"), Category(1, "elm"))
    assert sorted(record.image_id for record in source.records) == [1, 2]
    (i,) = [i for i, record in enumerate(source.records) if record.file_name == "ä.png"]
    record = source.records[i]
    assert (record.height, record.width) == (30, 50)
    np.testing.assert_array_equal(record.boxes_xywh_px, [[3, 2, 47, 10]] * 2)
    np.testing.assert_array_equal(record.areas, [470, 470])
    assert record.category_ids.tolist() == [1, 1]
    assert not record.is_crowd.any()
    np.testing.assert_array_equal(source.load_image(i), PIXELS)


def test_a_set_named_on_the_command_line(trees, tmp_path):
    """`--data=tfds:NAME`: the only split is divided; another command finds the set where the run found it."""
    config = config_of("demo", "tfds:trees", [f"--config.data.tfds_data_dir={trees}"])
    data = config.data
    assert (data.source, data.tfds_name) == ("tfds", "trees")
    assert (data.train_split, data.eval_split) == ("train[:80%]", "train[80%:]")
    assert len(build.make_source(config, "train")) == 2
    with pytest.raises(ValueError, match=r"no picture in a split 'train\[80%:\]', it has train with 2 pictures"):
        build.make_source(config, "eval")
    weights = Weights("w", {}, (), {}, Preprocessing(96, 160, ((96, 160),)), config=config)
    assert evaluation_of(weights, "tfds:trees", []).data.tfds_data_dir == str(trees)
    save_config(tmp_path, config)
    assert config_of(None, "tfds:trees", [], tmp_path).data.tfds_data_dir == str(trees)
    with pytest.raises(FileNotFoundError, match="trees is not prepared in elsewhere"):
        evaluation_of(weights, "tfds:trees", ["--config.data.tfds_data_dir=elsewhere"])


def test_a_damaged_picture_is_named(trees):
    source = TfdsSource("trees", trees, "train")
    (i,) = [i for i, record in enumerate(source.records) if record.file_name == "cut.png"]
    with pytest.raises(BadPictureError, match=r"trees train: cut\.png: cannot read "):
        source.load_image(i)


def test_records_that_cannot_be_read_at_random(tmp_path):
    import_or_skip("tensorflow")
    trees_builder()(data_dir=str(tmp_path), file_format="tfrecord").download_and_prepare()
    with pytest.raises(ValueError, match=r"trees/3\.0\.0 holds tfrecord files.*`cdetr prepare`"):
        TfdsSource("trees", tmp_path, "train")


def test_a_set_without_boxes():
    tfds = import_or_skip()
    features = {"image": tfds.features.Image(), "label": tfds.features.ClassLabel(num_classes=2)}
    with pytest.raises(ValueError, match=r"mnist cannot be trained on: .* it has image, label$"):
        tfds_source.check_features("mnist", tfds.features.FeaturesDict(features))
    boxes = {"bbox": tfds.features.BBoxFeature(bbox_format="XYWH"), "label": features["label"]}
    features = tfds.features.FeaturesDict({"image": features["image"], "objects": tfds.features.Sequence(boxes)})
    with pytest.raises(ValueError, match="boxes of form XYWH"):
        tfds_source.check_features("other", features)


def test_archives_are_complete(tmp_path):
    """The archives that the tests make hold what COCO's hold, under COCO's names."""
    write_archives(tmp_path)
    assert {path.name for path in tmp_path.glob("*.zip")} == set(FILE_NAMES)
    with zipfile.ZipFile(tmp_path / "val2017.zip") as archive:
        assert all(name.startswith("val2017/0000000") for name in archive.namelist())
