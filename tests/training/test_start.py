"""What is looked at before a run starts."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from cdetr_jax.classes import class_table
from cdetr_jax.data.coco import CocoFolder
from cdetr_jax.data.joined import JoinedSource
from cdetr_jax.data.sources import missing_files
from cdetr_jax.training import start
from configs import common


def folder(path, names=("bird", "cat"), pictures=("a.png", "b/c.png"), there=("a.png", "b/c.png"), size=(40, 30)):
    """A COCO folder; only some of its pictures are there."""
    for name in there:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size).save(path / name)
    content = {
        "images": [{"id": i, "file_name": n, "width": size[0], "height": size[1]} for i, n in enumerate(pictures)],
        "categories": [{"id": i + 1, "name": name} for i, name in enumerate(names)],
        "annotations": [{"id": 1, "image_id": 0, "category_id": 1, "bbox": [3, 5, 20, 20]}] if pictures else [],
    }
    path.mkdir(exist_ok=True)
    (path / "instances.json").write_text(json.dumps(content))
    return CocoFolder(path, path / "instances.json")


def check(source, eval_source, **data):
    config = common.get_config()
    config.data.update({"eval_short_side_px": 32, "long_side_max_px": 64, "class_ids": "contiguous"} | data)
    start.check_data(config, source, eval_source, class_table(source.categories, "contiguous", 0))


def test_whole_sets_pass(tmp_path):
    check(folder(tmp_path / "train"), folder(tmp_path / "eval", names=("cat", "dog")))
    check(folder(tmp_path / "train"), None)


@pytest.mark.parametrize("broken", ["train", "eval"])
def test_missing_pictures_are_named(broken, tmp_path, monkeypatch):
    there = {"train": ("a.png", "b/c.png"), "eval": ("a.png", "b/c.png")} | {broken: ("a.png",)}
    sources = [folder(tmp_path / name, there=there[name]) for name in ("train", "eval")]
    expected = (
        rf"1 of 2 pictures of the {broken}\w* set are missing: .*{broken}/b/c\.png; is config\.data\.{broken}_images"
    )
    with pytest.raises(FileNotFoundError, match=expected):
        check(*sources)
    warnings = []
    monkeypatch.setattr(start.logging, "warning", lambda text, *values: warnings.append(text % values))
    check(*sources, on_error="skip")
    assert len(warnings) == 1


def test_missing_files_of_joined_sources(tmp_path):
    parts = [(name, folder(tmp_path / name, there=("a.png",))) for name in ("one", "two")]
    assert missing_files(JoinedSource(parts)) == [str(tmp_path / name / "b" / "c.png") for name in ("one", "two")]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"names": ("car", "bus")}, "the detector knows none of the data set's classes"),
        ({"pictures": ()}, "the data hold no picture"),
        ({"there": (), "pictures": ("a.png",), "size": (90_000, 90_000)}, r"a\.png is annotated as 90000 x 90000"),
    ],
)
def test_mistakes_in_the_evaluation_set_show_at_the_start(changes, message, tmp_path):
    with pytest.raises(ValueError, match=f"^the evaluation set: .*{message}"):
        check(folder(tmp_path / "train"), folder(tmp_path / "eval", **changes), on_error="skip")


def test_the_parameters_are_counted_and_listed(tmp_path):
    params = {
        "backbone": {"conv1": {"kernel": np.zeros((300, 100))}, "layer1_0": {"kernel": np.zeros((10, 1000))}},
        "head": {"bias": np.zeros(20_000)},
    }
    line = start.describe_parameters(tmp_path, params, ("conv1",))
    assert line == f"0.06 M parameters, 0.03 M of them trained, listed in {tmp_path / 'parameters.txt'}"
    assert "backbone/layer1_0/kernel" in (tmp_path / "parameters.txt").read_text()


def test_what_is_kept_of_every_start(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["cdetr", "train", "--workdir=my run"])
    start.record_start(tmp_path, 0)
    found = start.record_start(tmp_path, 20)
    lines = [json.loads(line) for line in (tmp_path / "environment.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 20]
    assert lines[1] == found
    assert found["command"] == "cdetr train '--workdir=my run'"
    assert found["packages"]["jax"] == jax.__version__
    assert found["devices"].startswith(f"{jax.device_count()} x ")
    assert found["processor"]
    assert found["cores"] >= 1
    clone = Path(__file__).parents[2]
    if (clone / ".git").exists():
        head = subprocess.run(
            ["git", "-C", clone, "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        ).stdout
        assert found["git_commit"].removesuffix("+") == head.strip()
    monkeypatch.setenv("PATH", "")  # no git; and the package may have been installed from a folder
    assert start.record_start(tmp_path, 30)["git_commit"] == ""
