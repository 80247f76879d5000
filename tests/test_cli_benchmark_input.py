import contextlib
import functools
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cdetr_jax.cli import benchmark_input, main
from cdetr_jax.data.pipeline import sizes_hw, train_batches
from cdetr_jax.data.plan import Augmentation, PlanSettings, train_plan
from cdetr_jax.data.reader import ReadSettings
from cdetr_jax.data.synthetic import SyntheticShapes
from cdetr_jax.models.detector import MEAN_RGB, STD_RGB

SMALL = [
    "--config=configs/demo.py",
    "--config.data.synthetic.train_pictures=40",
    "--batches=2",
]
LABEL_OF = {category.id: k for k, category in enumerate(SyntheticShapes.categories)}
READING = ReadSettings(workers=0, threads=1, on_error="raise", max_bad_fraction=0.0)


def _coco_folder(folder):
    """Draws 12 pictures, every fourth of them square. Returns: arguments that read them in batches of 2."""
    (folder / "pictures").mkdir()
    images, rng = [], np.random.default_rng(0)
    for k in range(12):
        height, width = (64, 64) if k % 4 == 0 else (32, 64)
        pixels = rng.integers(0, 256, (height, width, 3), np.uint8)
        Image.fromarray(pixels).save(folder / "pictures" / f"{k}.png")
        images.append({"id": k, "file_name": f"{k}.png", "height": height, "width": width})
    objects = [{"id": k, "image_id": k, "category_id": 1, "bbox": [4, 4, 20, 20]} for k in range(12)]
    content = {"images": images, "annotations": objects, "categories": [{"id": 1, "name": "disc"}]}
    (folder / "train.json").write_text(json.dumps(content))
    settings = {
        "source": "coco_folder",
        "train_images": folder / "pictures",
        "train_annotations": folder / "train.json",
        "train_shapes": ((32, 64), (64, 64)),
        "short_sides_px": (32, 64),
        "long_side_max_px": 64,
    }
    fields = [f"--config.data.{name}={value}" for name, value in settings.items()]
    return ["--config=configs/demo.py", *fields, "--config.train.batch_size=2", "--batches=2"]


def _lines(out):
    """Name, number and unit of each line of figures."""
    found = re.findall(r"^ *(\S.*?) {2,}(\d\S*) (\S*)", out, re.MULTILINE)
    return {name: (float(number), unit) for name, number, unit in found}


def test_figures_with_their_units(capsys, monkeypatch):
    monkeypatch.setattr(benchmark_input, "_time_step", lambda *_: 0.25)  # s; compiling one takes too long here
    main.run(["benchmark", "input", *SMALL, "--step"])
    lines = _lines(capsys.readouterr().out)
    units = {name: unit for name, (_, unit) in lines.items()}
    assert units["input"] == units["input, per core"] == units["train step eats"] == "images/s"
    assert lines["real pixels"] == (100.0, "%")  # every picture fills the one shape
    assert lines["padded shapes"][0] == 1
    stages = ["read and decode", "flip, crop, resize", "pad", "transfer to cpu"]
    assert [units[stage] for stage in stages] == ["ms"] * 4
    assert sum(lines[stage][0] for stage in stages) > 0
    assert lines["train step eats"][0] == 16 / 0.25
    assert lines["input / step"][0] == pytest.approx(lines["input"][0] / 64, rel=0.05, abs=0.06)


def test_processes(capsys):
    main.run(["benchmark", "input", *SMALL, "--config.data.workers=1", "--config.data.threads=1"])
    out = capsys.readouterr().out
    assert "read by 1 process x 1 thread on" in out
    assert "train step" not in out


def test_parts_of_a_step(capsys):
    main.run(["benchmark", "input", *SMALL])
    assert "batches of 16\n" in capsys.readouterr().out
    main.run(["benchmark", "input", *SMALL, "--config.train.accumulation_steps=2"])
    out = capsys.readouterr().out
    assert "micro-batches of 8, 2 a step\n" in out
    assert re.search("^plan of an epoch .* 4 micro-batches$", out, re.MULTILINE)


def test_one_folder_and_several(tmp_path, capsys):
    one = _coco_folder(tmp_path)
    several = [re.sub("(train_images|train_annotations)=(.*)", r"\1=\2,\2", argument) for argument in one]
    main.run(["benchmark", "input", *one])
    assert {"read", "decode"} < set(_lines(capsys.readouterr().out))
    main.run(["benchmark", "input", *several])
    out = capsys.readouterr().out
    assert "24 pictures" in out
    assert "read and decode" in _lines(out)


@pytest.mark.parametrize(
    "damage", [lambda file: file.write_bytes(b"no picture"), Path.unlink], ids=["damaged", "missing"]
)
def test_damaged_pictures_are_left_out(tmp_path, capsys, damage):
    arguments = ["benchmark", "input", *_coco_folder(tmp_path), "--plain", "--config.data.max_bad_fraction=0.5"]
    damage(tmp_path / "pictures" / "5.png")
    main.run([*arguments, "--config.data.on_error=skip"])
    out = capsys.readouterr().out
    timed = int(re.search(r"means of (\d+)", out)[1])
    assert 50 < timed < 64  # one picture in 12 is missing
    assert "as uint8, as ours" in out
    with pytest.raises(SystemExit):
        main.run(arguments)
    assert "5.png" in capsys.readouterr().err


def test_the_step_is_timed_at_the_mean_area_whatever_comes_last(tmp_path, capsys, monkeypatch):
    timed = []
    monkeypatch.setattr(benchmark_input, "_time_step", lambda *args: timed.append(args[2].images.shape[1:3]) or 0.25)
    arguments = _coco_folder(tmp_path)
    for batches in (4, 5, 6, 7, 8, 9):
        main.run(["benchmark", "input", *arguments, f"--batches={batches}", "--step"])
        assert "at 32 x 64, the timed shape nearest to the mean area" in capsys.readouterr().out
    assert set(timed) == {(32, 64)}  # two pictures in three are of this shape


class _Noting:
    """A source that notes which pictures are read."""

    def __init__(self, source):
        self.records, self.categories, self._source = source.records, source.categories, source
        self.read = []

    def __len__(self):
        return len(self.records)

    def load_image(self, i):
        self.read.append(i)
        return self._source.load_image(i)


AUGMENTATION = {
    "flip_probability": 0.5,
    "crop_probability": 0.0,
    "crop_short_sides_px": (40,),
    "crop_sides_px": (24, 36),
}


@contextlib.contextmanager
def _three_batches_an_epoch():
    """Source, batches of 2, and the plan of each epoch."""
    source = _Noting(SyntheticShapes(seed=0, size=7, height=32, width=32, max_objects=1))
    augmentation = Augmentation(short_sides_px=(32,), long_side_max_px=32, **AUGMENTATION)
    settings = PlanSettings(sizes_hw(source), np.ones(7), augmentation, [(32, 32)], batch_size=2, seed=0)
    with contextlib.closing(train_batches(source, LABEL_OF, settings, READING)) as batches:
        yield source, batches, functools.partial(train_plan, settings)


def test_against_a_plain_loader(monkeypatch):
    def time_flow(_, count):
        return 0.1, benchmark_input._Flow(4, None, pictures=16 * count, wall_s=1.0, cpu_s=2.0)

    monkeypatch.setattr(benchmark_input, "_time_flow", time_flow)
    with _three_batches_an_epoch() as (source, batches, plan_of):
        found = benchmark_input._time_plain(batches, source, plan_of, 10)
    assert len(found) == 2
    for figures in found.values():  # 2 batches a turn: 32 pictures, in 1 s and in 2 s of one core
        assert figures.times == pytest.approx(32 / figures.speed)
        assert 0 < figures.times_per_core < figures.times  # a plain loader never takes two cores


def test_a_plain_loader_reads_the_same_pictures():
    with _three_batches_an_epoch() as (source, batches, plan_of):
        benchmark_input._time_plain(batches, source, plan_of, 10)
    turns = 5  # of 2 batches, by each of 3 ways, after 1 batch that is not timed
    ahead = len(source.read) - turns * (3 * 4 + 2)
    assert ahead > 0
    for turn in np.array(source.read[ahead:]).reshape(turns, 3 * 4 + 2):
        ours, *plain = turn[2:].reshape(3, 4)
        np.testing.assert_array_equal(plain, [ours, ours])


def test_a_plain_loader_does_the_same_work():
    source = SyntheticShapes(seed=0, size=2, height=44, width=36, max_objects=3)
    always = {"flip_probability": 1.0, "crop_probability": 1.0}
    augmentation = Augmentation(short_sides_px=(48,), long_side_max_px=64, **AUGMENTATION | always)
    settings = PlanSettings(sizes_hw(source), np.array([3, 3]), augmentation, [(64, 64)], batch_size=2, seed=1)
    plan = train_plan(settings, 0)
    with contextlib.closing(train_batches(source, LABEL_OF, settings, READING)) as b:
        ours = next(b).images
    plain = benchmark_input._load_plainly(source, plan.rows[0], plan.shapes_hw[0], False)
    np.testing.assert_array_equal(plain, ours)
    normalised = benchmark_input._load_plainly(source, plan.rows[0], plan.shapes_hw[0], True)
    for k, (height, width) in enumerate(plan.rows[0]["size_hw"]):
        expected = (ours[k, :height, :width] / 255 - MEAN_RGB) / STD_RGB
        np.testing.assert_allclose(normalised[k, :height, :width], expected, atol=1e-6)  # a few float32 roundings
        assert not normalised[k, height:].any()
        assert not normalised[k, :, width:].any()


def test_wrong_number_of_batches(capsys):
    with pytest.raises(SystemExit):
        main.run(["benchmark", "input", *SMALL, "--batches=0"])
    assert "argument --batches: '0', expected a whole number from 1" in capsys.readouterr().err
