"""The training curve, from metrics files whole, young and empty."""

import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from cdetr_jax.cli import main
from cdetr_jax.visualization.curve import Series, draw_panels, read_metrics, training_curve

TRAIN = [{"step": 10 * i, "epoch": i / 10, "kind": "train", "loss": 20.0 - i} for i in range(1, 16)]
EVAL = [{"step": 100, "epoch": 1.0, "kind": "eval", "AP": 0.25, "AP50": 0.5, "AP75": -1.0}]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def count_colour(path, colour):
    """Pixels of about one colour."""
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
    return int((np.abs(pixels - colour).max(axis=-1) < 12).sum())


BLUE, ORANGE, GREEN = (31, 119, 180), (255, 127, 14), (44, 160, 44)  # matplotlib's first three line colours


def test_loss_and_ap_get_a_panel_each(tmp_path):
    path = write(tmp_path / "metrics.jsonl", TRAIN + EVAL)
    training_curve(path, tmp_path / "both.png")
    training_curve(write(path, TRAIN), tmp_path / "loss.png")
    training_curve(write(path, EVAL), tmp_path / "ap.png")
    for name, size in {"both": (960, 816), "loss": (960, 408), "ap": (960, 408)}.items():
        with Image.open(tmp_path / f"{name}.png") as image:
            assert image.size == size
    assert count_colour(tmp_path / "both.png", ORANGE) > 20
    assert count_colour(tmp_path / "both.png", GREEN) == 0  # AP75 is -1: there was nothing to find
    assert count_colour(tmp_path / "loss.png", BLUE) > 500
    assert count_colour(tmp_path / "loss.png", ORANGE) == 0


def test_several_runs_get_a_line_each(tmp_path, capsys):
    for name in ("a/one", "a/two"):
        (tmp_path / name).mkdir(parents=True)
        write(tmp_path / name / "metrics.jsonl", TRAIN + EVAL)
    main.run(["curve", f"{tmp_path}/a/one", f"{tmp_path}/a/two/", f"--output={tmp_path}/c.png"])
    assert f"{tmp_path}/c.png" in capsys.readouterr().out
    with Image.open(tmp_path / "c.png") as image:
        assert image.size == (960, 816)
    assert count_colour(tmp_path / "c.png", ORANGE) > 500, "the second run's loss"
    with pytest.raises(SystemExit, match="1"):
        main.run(["curve", f"{tmp_path}/a/one", f"{tmp_path}/b", f"--output={tmp_path}/d.png"])
    assert "b/metrics.jsonl is missing" in capsys.readouterr().err


def test_repetitions_are_a_mean_line_and_a_band(tmp_path):
    epochs = [1.0, 2.0]
    lines = {"a": [Series(epochs, [0.1, 0.1]), Series([*epochs, 3.0], [0.9, 0.9, 0.9]), Series([], [])]}
    assert draw_panels({"AP": lines}, tmp_path / "band.png")
    assert draw_panels({"AP": {"a": [Series(epochs, [0.5, 0.5])]}}, tmp_path / "line.png")
    band = tuple(round(255 - 0.15 * (255 - part)) for part in BLUE)
    assert count_colour(tmp_path / "band.png", band) > 10000
    assert count_colour(tmp_path / "line.png", band) < 1000
    assert not draw_panels({"AP": {"a": [Series([1.0], [float("nan")])]}}, tmp_path / "nothing.png")
    assert not (tmp_path / "nothing.png").exists()


def test_one_point_is_visible(tmp_path):
    training_curve(write(tmp_path / "metrics.jsonl", TRAIN[:1]), tmp_path / "curve.png")
    assert 10 < count_colour(tmp_path / "curve.png", BLUE) < 200


def test_losses_that_were_not_finite_leave_a_gap(tmp_path):
    rows = TRAIN[:6] + [{**row, "loss": None} for row in TRAIN[6:9]] + TRAIN[9:]
    training_curve(write(tmp_path / "metrics.jsonl", TRAIN), tmp_path / "whole.png")
    training_curve(write(tmp_path / "metrics.jsonl", rows), tmp_path / "gap.png")
    assert count_colour(tmp_path / "gap.png", BLUE) < 0.9 * count_colour(tmp_path / "whole.png", BLUE)


@pytest.mark.parametrize("rows", [[], [{"step": 1, "epoch": 0.1, "kind": "train", "loss": None}]])
def test_a_file_without_numbers_is_refused(tmp_path, rows):
    with pytest.raises(ValueError, match=r"metrics\.jsonl holds no loss and no AP yet"):
        training_curve(write(tmp_path / "metrics.jsonl", rows), tmp_path / "curve.png")
    assert not (tmp_path / "curve.png").exists()


def test_pyplot_and_its_global_state_stay_out(tmp_path):
    path = write(tmp_path / "metrics.jsonl", TRAIN)
    code = (
        "import sys; from cdetr_jax.visualization.curve import training_curve\n"
        "assert 'matplotlib' not in sys.modules\n"
        "training_curve(sys.argv[1], sys.argv[2])\n"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, path, tmp_path / "curve.png"], check=True)
    assert (tmp_path / "curve.png").exists()


@pytest.mark.parametrize("tail", [b'{"step": 20, "ep', b"\0\0\0\0", b'{"step": 20, "epoch": 2.0, "kind": "train"'])
def test_a_half_written_last_line_is_skipped(tmp_path, tail):
    path = write(tmp_path / "metrics.jsonl", TRAIN[:2])
    path.write_bytes(path.read_bytes() + tail)
    assert read_metrics(path) == TRAIN[:2]


def test_a_broken_line_in_the_middle_is_an_error(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step"\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2, is not JSON"):
        read_metrics(path)


def test_a_bucket_holds_metrics_and_picture(bucket):
    write(bucket / "metrics.jsonl", TRAIN + EVAL)
    training_curve("gs://bucket/metrics.jsonl", "gs://bucket/curve.png")
    assert (bucket / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_a_picture_that_cannot_be_drawn_leaves_the_old_one(tmp_path, monkeypatch):
    metrics, picture = write(tmp_path / "metrics.jsonl", TRAIN), tmp_path / "curve.png"
    picture.write_bytes(b"old")

    def fail(self, path, **_):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", fail)
    with pytest.raises(OSError, match="disk full"):
        training_curve(metrics, picture)
    assert picture.read_bytes() == b"old"
    assert len(list(tmp_path.iterdir())) == 2
