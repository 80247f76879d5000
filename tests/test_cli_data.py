"""`--data` and `cdetr data`: the config that a folder gets, and what is said of it."""

import json
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from absl import logging
from PIL import Image

from cdetr_jax import build
from cdetr_jax.checkpoints import workdir as run_files
from cdetr_jax.cli import data_flag
from cdetr_jax.cli.data_flag import choices, config_of, evaluation_of
from cdetr_jax.cli.main import run
from cdetr_jax.cli.settings import read_config
from cdetr_jax.config_check import check_config
from cdetr_jax.data.buckets import by_area
from cdetr_jax.data.folders import read_split
from cdetr_jax.records import Record
from cdetr_jax.training import loop
from cdetr_jax.training.start import check_data
from cdetr_jax.weights.load import Preprocessing, Weights

sys.path.append(str(Path(__file__).parent / "data"))
import exports


class Pictures:
    """A source of so many pictures, each with so many objects."""

    def __init__(self, count, size_hw=(480, 640), objects=3):
        boxes = np.tile([[1.0, 2.0, 30.0, 40.0]], (objects, 1))
        labels, crowds = np.ones(objects, np.int64), np.zeros(objects, bool)
        self.records = (Record(1, "a", *size_hw, boxes, labels, crowds, boxes[:, 0]),) * count

    def __len__(self):
        return len(self.records)


@pytest.fixture
def folder(tmp_path):
    exports.yolo(tmp_path / "mine")
    return tmp_path / "mine"


def chosen(source, recipe="coco_folder", devices=1, fixed=(), **fields):
    config = data_flag.changed(read_config(recipe, []), fields)
    found = {choice.field: choice.value for choice in choices(config, source, devices, fixed)}
    check_config(data_flag.changed(config, found))
    return found


@pytest.mark.parametrize(
    ("pictures", "recipe", "epochs", "drop"),
    [(100, "coco_folder", 200, 160), (1000, "coco_folder", 40, 32), (10**5, "coco_folder", 12, 10),
     (200, "coco_folder_small", 100, 80), (5000, "coco_folder_small", 50, 40)],
)  # fmt: skip
def test_fewer_pictures_are_seen_more_often(pictures, recipe, epochs, drop):
    found = chosen(Pictures(pictures), recipe)
    assert (found["train.num_epochs"], found["optimizer.drop_epoch"]) == (epochs, drop)
    assert found["eval.every_epochs"] == max(epochs // 10, 1)
    assert found.get("data.last_batch") == ("fill" if pictures < 80 else None)


def test_what_is_set_by_hand_decides_on_the_rest():
    assert (
        chosen(Pictures(1000), fixed=["train.num_epochs"], **{"train.num_epochs": 300})["optimizer.drop_epoch"] == 240
    )


def test_crowded_and_small_pictures_and_several_devices():
    found = chosen(Pictures(1000, (96, 120), objects=134), "coco_folder_small", devices=3)
    assert (found["model.num_queries"], found["eval.top_k"], found["train.batch_size"]) == (270, 270, 9)
    assert (found["data.eval_short_side_px"], found["data.long_side_max_px"]) == (96, 128)
    assert found["data.short_sides_px"] == (80, 88, 96)
    detector = chosen(Pictures(1000, (96, 120), objects=134))  # whose queries and sizes are those of its weights
    assert not {"model.num_queries", "data.eval_short_side_px"} & detector.keys()
    for recipe, init in (("coco_folder_small", ""), ("coco_folder", data_flag.STARTS[1][1])):
        tiny = chosen(Pictures(1000, (8, 9)), recipe, init=init)
        assert (tiny["data.eval_short_side_px"], len(tiny["data.crop_sides_px"])) == (32, 2)
    few = chosen(Pictures(1000, (96, 120), objects=3), "coco_folder_small")
    assert not {"model.num_queries", "eval.top_k", "train.batch_size"} & few.keys()


def test_training_starts_from_the_best_weights_that_there_are(monkeypatch, caplog):
    there = {init for _, init in data_flag.STARTS[:2]}

    def download(init):
        if init not in there:
            raise OSError("no network")

    monkeypatch.setattr(data_flag.torch_files, "download", download)
    assert data_flag.start(True) == ("coco_folder", "hf://microsoft/conditional-detr-resnet-50")
    there.discard("hf://microsoft/conditional-detr-resnet-50")
    assert data_flag.start(True) == ("coco_folder", "hf://timm/resnet50.tv_in1k")
    assert "cannot start from hf://microsoft/conditional-detr-resnet-50: no network" in caplog.text
    there.clear()
    assert data_flag.start(True) == data_flag.start(False) == ("coco_folder_small", "")


def test_train_with_one_flag(folder, monkeypatch):
    calls = []
    monkeypatch.chdir(folder.parent)
    monkeypatch.setattr(loop, "train_and_evaluate", lambda *arguments: calls.append(arguments))
    run(["train", "--data=mine", "--config.train.batch_size=2", "--config.optimizer.drop_epoch=7"])
    [(config, workdir)] = calls
    check_config(config)
    assert workdir == Path("runs/mine")
    assert (config.data.source, config.data.folder, config.init) == ("folder", "mine", "")
    assert (config.train.batch_size, config.optimizer.drop_epoch, config.train.num_epochs) == (2, 7, 300)
    # A run that was begun goes on with its own config.
    config.train.num_epochs = 30
    run_files.save_config(workdir, config)
    run(["train", "--data=mine", "--config.eval.batch_size=1"])
    assert (calls[1][0].train.num_epochs, calls[1][0].optimizer.drop_epoch, calls[1][0].eval.batch_size) == (30, 7, 1)
    exports.yolo(folder.parent / "other")
    with pytest.raises(
        ValueError, match="the run in runs/mine is trained on mine, not on other; use another --workdir"
    ):
        config_of(None, "other", [], workdir)
    assert config_of(None, str(folder), [], workdir).data.folder == str(folder)  # another way to the same
    # A recipe stays as it is.
    run(["train", "--data=mine", "--config=conditional_detr_r50:12", "--workdir=w"])
    assert (
        calls[2][0].to_dict()
        == data_flag.changed(
            read_config("conditional_detr_r50:12", []), {"data.source": "folder", "data.folder": "mine"}
        ).to_dict()
    )


def test_a_set_that_is_divided_is_so_in_the_workdir_and_a_test_split_stands_in(tmp_path):
    exports.voc_roboflow(tmp_path / "mine")
    config = config_of("demo", str(tmp_path / "mine"), [], tmp_path / "w")
    assert (config.data.split_file, config.data.eval_split) == ("", "validation")
    (tmp_path / "mine" / "valid").rename(tmp_path / "mine" / "test")
    assert config_of("demo", str(tmp_path / "mine"), []).data.eval_split == "test"
    (tmp_path / "mine" / "test").rename(tmp_path / "away")
    assert config_of("demo", str(tmp_path / "mine"), [], tmp_path / "w").data.split_file == str(
        tmp_path / "w/split.json"
    )


def test_weights_are_evaluated_on_a_folder(folder):
    weights = Weights("w", {}, (), {}, Preprocessing(96, 160, ((96, 160),)))
    config = evaluation_of(weights, str(folder), ["--config.eval.batch_size=3"])
    check_config(config)
    assert (config.data.eval_short_side_px, config.data.long_side_max_px, config.eval.batch_size) == (96, 160, 3)
    assert (config.data.folder, config.data.eval_split) == (str(folder), "validation")
    with pytest.raises(ValueError, match="w does not say on which pictures to evaluate it; name them, --data=FOLDER"):
        evaluation_of(weights, None, [])
    old = read_config("demo", ["--config.data.eval_split=mine", "--config.eval.top_k=7"]).to_dict()
    del old["data"]["folder"], old["data"]["split_file"]  # a run from before these fields
    run_config = run_files.with_all_fields(run_files.ml_collections.ConfigDict(old))
    check_config(run_config)
    assert (run_config.data.folder, run_config.data.eval_split, run_config.eval.top_k) == ("", "mine", 7)


def test_training_refuses_splits_that_share_pictures(folder, caplog):
    (folder / "valid/images/d.png").write_bytes((folder / "train/images/a.png").read_bytes())
    config = config_of("coco_folder", str(folder), [])
    sources = [read_split(folder, split) for split in ("train", "validation")]
    with pytest.raises(ValueError, match=r"1 pictures are in both train and validation, such as .*a.png and .*d.png"):
        check_data(config, *sources, classes=sources[0].categories)
    config.data.on_error = "skip"
    check_data(config, *sources, classes=sources[0].categories)
    assert "1 pictures are in both train and validation" in caplog.text


def test_a_look_at_a_sound_data_set(folder, tmp_path, capsys):
    run(["data", str(folder), f"--output={tmp_path / 'look'}"])
    said = capsys.readouterr().out
    assert said.startswith(f"{folder} is a YOLO data set (data.yaml): train, validation\n")
    assert "nothing wrong was found" in said
    found = json.loads((tmp_path / "look" / "data.json").read_text())
    assert found["findings"] == []
    assert found["splits"]["train"]["classes"] == {"kite": 2, "oak": 1}
    assert found["splits"]["train"]["pictures without objects"] == 1
    assert Image.open(tmp_path / "look" / "annotated.png").width > 100


def test_a_look_at_a_broken_data_set(folder, capsys):
    (folder / "valid/labels/c.txt").write_text("7 0.5 0.5 0.1 0.1\n")
    with pytest.raises(SystemExit) as stopped:
        run(["data", str(folder)])
    assert stopped.value.code == 1
    said = capsys.readouterr().out
    assert "1 x validation cannot be read: '7 0.5 0.5 0.1 0.1', expected a class of data.yaml, one of 0 to 1" in said
    assert f"{folder}/valid/labels/c.txt:1\n" in said
    assert "train" in said
    with pytest.raises(SystemExit) as stopped:
        run(["data", str(folder / "nothing")])
    assert stopped.value.code == 1
    assert "no such folder; expected a COCO folder" in capsys.readouterr().err


def test_devices_of_this_machine_are_counted(folder, monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 5)
    assert config_of(None, str(folder), []).train.batch_size == 10


def test_a_step_is_cut_so_that_it_fits_the_memory(folder, monkeypatch, caplog):
    logging.set_verbosity(logging.INFO)
    monkeypatch.setattr(data_flag, "_memory_of_a_device", lambda: 10 * 2**30)
    asked = []
    monkeypatch.setattr(data_flag, "parts_that_fit", lambda *given: asked.append(given) or (2, 5 * 2**30))
    fields = ["--config.train.batch_size=4", "--config.model.backbone_width=4"]
    assert config_of(None, str(folder), fields).train.accumulation_steps == 2
    ((_, _, pictures, shape_hw, targets, available, shapes),) = asked
    config = config_of(None, str(folder), [*fields, "--config.train.accumulation_steps=4"])
    settings = build.make_plan_settings(config, read_split(folder, "train"))
    assert (pictures, shape_hw) == (4 // jax.device_count(), tuple(by_area(settings.shapes)[-1].tolist()))
    assert (targets, shapes) == (max(settings.target_sizes), len(settings.shapes))
    assert available == 9 * 2**30
    assert (config.train.accumulation_steps, len(asked)) == (4, 1)
    assert "--config.train.accumulation_steps=2" in caplog.text
    assert "take 5.0 GiB, an estimate; it has 10.0 GiB, of which 10 % are kept free" in caplog.text
