import contextlib
import re

import numpy as np
import pytest

from cdetr_jax.cli import benchmark_input, main
from cdetr_jax.data.pipeline import sizes_hw, train_batches
from cdetr_jax.data.plan import ROW, Augmentation, EpochPlan, train_plan
from cdetr_jax.data.reader import Reading
from cdetr_jax.data.synthetic import SyntheticShapes
from cdetr_jax.models.detector import MEAN_RGB, STD_RGB

SMALL = [
    "--config=configs/demo.py",
    "--config.data.synthetic.train_pictures=40",
    "--batches=2",
]


def _lines(capsys):
    """Name, number and unit of each line of figures."""
    found = re.findall(r"^ *(\S.*?) {2,}(\d\S*) (\S*)", capsys.readouterr().out, re.MULTILINE)
    return {name: (float(number), unit) for name, number, unit in found}


def test_figures_with_their_units(capsys, monkeypatch):
    monkeypatch.setattr(benchmark_input, "_time_step", lambda *_: 0.25)  # s; compiling one takes too long here
    main.run(["benchmark", "input", *SMALL, "--step"])
    lines = _lines(capsys)
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


def test_against_a_plain_loader(capsys, monkeypatch):
    def time_flow(_, count):
        return 0.1, benchmark_input._Flow(None, pictures=16 * count, wall_s=1.0, cpu_s=2.0)

    monkeypatch.setattr(benchmark_input, "_time_flow", time_flow)
    batches, rows = [], np.zeros((3, 4), ROW)
    rows["size_hw"] = 32
    plan = EpochPlan(rows, np.full((3, 2), 64))
    source = SyntheticShapes(seed=0, size=1, height=32, width=32, max_objects=1)
    found = benchmark_input._time_plain(batches, source, plan, 10)
    assert len(found) == 2
    for figures in found.values():  # 2 batches a turn: 32 pictures, in 1 s and in 2 s of one core
        assert figures.times == pytest.approx(32 / figures.speed)
        assert 0 < figures.times_per_core < figures.times  # a plain loader never takes two cores


def test_a_plain_loader_does_the_same_work():
    source = SyntheticShapes(seed=0, size=2, height=44, width=36, max_objects=3)
    settings = {"short_sides_px": (48,), "long_side_max_px": 64, "flip_probability": 1.0, "crop_probability": 1.0}
    augmentation = Augmentation(**settings, crop_short_sides_px=(40,), crop_sides_px=(24, 36))
    shapes = [(64, 64)]
    plan = train_plan(sizes_hw(source), augmentation, shapes, batch_size=2, seed=1, epoch=0)
    reading = Reading(0, 1, 0, "raise", 0.0)
    label_of = {category.id: k for k, category in enumerate(source.categories)}
    with contextlib.closing(train_batches(source, label_of, augmentation, shapes, reading, batch_size=2, seed=1)) as b:
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
    assert "--batches is 0, expected at least 1" in capsys.readouterr().err
