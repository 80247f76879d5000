import re

import pytest

from cdetr_jax.cli import benchmark_input, main

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


def test_wrong_number_of_batches(capsys):
    with pytest.raises(SystemExit):
        main.run(["benchmark", "input", *SMALL, "--batches=0"])
    assert "--batches is 0, expected at least 1" in capsys.readouterr().err
