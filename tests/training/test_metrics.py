"""The metrics file through kills and resumes, the writer with and without TensorBoard, and progress."""

import importlib.util
import io
import json
import math
import subprocess
import sys
import types

import jax.numpy as jnp
import numpy as np
import pytest

from cdetr_jax.training import metrics
from cdetr_jax.training.metrics import IntervalTimer, MetricsFile, Progress, make_writer
from cdetr_jax.visualization.curve import read_metrics


class Clock:
    """Stands still until told."""

    now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(metrics, "monotonic", clock)
    return clock


@pytest.fixture
def without_tensorboard(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "tensorboard" else find(name))


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_lines_come_back_as_they_were_written(tmp_path):
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.write(np.int64(50), 0.1, "train", {"loss": jnp.float32(12.5), "lr": 1e-4})
    file.write(500, 1.0, "eval", {"AP": np.float64(0.25)})
    assert read_metrics(file.path) == [
        {"step": 50, "epoch": 0.1, "kind": "train", "loss": 12.5, "lr": 1e-4},
        {"step": 500, "epoch": 1.0, "kind": "eval", "AP": 0.25},
    ]


def test_every_line_is_valid_json_even_when_the_loss_is_not_finite(tmp_path):
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.write(1, 0.5, "train", {"loss": math.nan, "grad_norm": math.inf, "lr": 0.5})

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    (line,) = file.path.read_text().splitlines()
    row = json.loads(line, parse_constant=refuse)
    assert row == {"step": 1, "epoch": 0.5, "kind": "train", "loss": None, "grad_norm": None, "lr": 0.5}


@pytest.mark.parametrize("tail", [b'{"step": 3, "epo', b'{"step": 3, "epoch": 3, "kind": "train"}'])
def test_a_run_killed_while_writing_continues_on_a_fresh_line(tmp_path, tail):
    path = tmp_path / "metrics.jsonl"
    MetricsFile(path).write(2, 2.0, "train", {})
    path.write_bytes(path.read_bytes() + tail)
    MetricsFile(path).write(4, 4.0, "train", {})
    # A tail that lacks only its line end is a whole line.
    assert [row["step"] for row in read_metrics(path)] == ([2, 3, 4] if tail.endswith(b"}") else [2, 4])
    assert path.read_bytes().endswith(b"}\n")


def test_resume_drops_the_lines_after_the_restored_step(tmp_path):
    file = MetricsFile(tmp_path / "metrics.jsonl")
    for step in (1, 2, 3, 5, 8):
        file.write(step, step / 7, "train", {"loss": step / 3})
    before = file.path.read_text().splitlines(keepends=True)
    file.truncate_after(3)
    assert file.path.read_text() == "".join(before[:3])
    file.write(4, 4 / 7, "train", {})
    file.truncate_after(0)
    assert file.path.read_text() == ""
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_truncation_that_fails_leaves_the_file_whole(tmp_path, monkeypatch):
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.write(1, 0.5, "train", {})
    file.write(2, 1.0, "train", {})
    before = file.path.read_bytes()

    def fail(*_):
        raise OSError("disk is gone")

    monkeypatch.setattr(metrics.os, "replace", fail)
    with pytest.raises(OSError, match="disk is gone"):
        file.truncate_after(1)
    assert file.path.read_bytes() == before


def test_truncating_before_the_first_line_makes_no_file(tmp_path):
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.truncate_after(0)
    assert not file.path.exists()


def test_writer_without_tensorboard_says_so_and_writes_the_file(tmp_path, caplog, without_tensorboard):
    caplog.set_level("INFO", logger="absl")
    writer = make_writer(tmp_path / "new" / "run")
    writer.write_scalars(7, {"loss": 3.0}, epoch=0.5, kind="train")
    writer.write_scalars(9, {"loss": 2.0}, epoch=0.6, kind="train")
    writer.truncate_after(8)
    writer.close()
    assert read_metrics(tmp_path / "new" / "run" / "metrics.jsonl") == [
        {"step": 7, "epoch": 0.5, "kind": "train", "loss": 3.0}
    ]
    assert "metrics.jsonl" in caplog.text
    assert "not to TensorBoard" in caplog.text
    assert "no tensorboard" in caplog.text


def test_writer_hands_scalars_to_clu_under_their_kind(tmp_path, monkeypatch):
    calls = []

    class SummaryWriter:
        def __init__(self, logdir):
            calls.append(logdir)

        def write_scalars(self, step, scalars):
            calls.append((step, scalars))

        def flush(self):
            calls.append("flush")

        def close(self):
            calls.append("close")

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    module = types.SimpleNamespace(SummaryWriter=SummaryWriter)
    monkeypatch.setitem(sys.modules, "clu", types.SimpleNamespace(metric_writers=module))
    writer = make_writer(tmp_path)
    writer.write_scalars(7, {"AP": jnp.float32(0.25)}, epoch=0.5, kind="eval")
    writer.close()
    assert calls == [str(tmp_path), (7, {"eval/AP": 0.25, "epoch": 0.5}), "flush", "close"]
    assert read_metrics(tmp_path / "metrics.jsonl")[0]["AP"] == 0.25


@pytest.mark.filterwarnings("ignore")  # TensorFlow's own, on import
def test_tensorboard_reads_what_was_written(tmp_path):
    pytest.importorskip("tensorflow")
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.util.tensor_util import make_ndarray

    writer = make_writer(tmp_path)
    writer.write_scalars(7, {"loss": 3.0}, epoch=0.5, kind="train")
    writer.write_scalars(9, {"loss": 2.5}, epoch=0.6, kind="train")
    writer.close()
    events = EventAccumulator(str(tmp_path)).Reload().Tensors("train/loss")
    assert [(event.step, float(make_ndarray(event.tensor_proto))) for event in events] == [(7, 3.0), (9, 2.5)]


def test_importing_loads_neither_tensorflow_nor_a_plotting_library():
    code = (
        "import sys, cdetr_jax.training.metrics, cdetr_jax.visualization.draw\n"
        "print({'tensorflow', 'tensorboard', 'clu', 'matplotlib', 'jax'} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"


def test_timer_gives_shares_of_the_interval_and_starts_again(clock):
    timer = IntervalTimer()
    for _ in range(2):
        with timer.part("data"):
            clock.now += 1.0
        with timer.part("match"):
            clock.now += 0.5
        clock.now += 3.5
    assert timer.report(40) == {"images_per_second": 4.0, "data_percent": 20.0, "match_percent": 10.0}
    clock.now += 4.0
    assert timer.report(2) == {"images_per_second": 0.5, "data_percent": 0.0, "match_percent": 0.0}


def test_a_pause_is_not_part_of_the_interval(clock):
    timer = IntervalTimer()
    with timer.part("data"):
        clock.now += 1.0
    with timer.pause():
        clock.now += 100.0
    clock.now += 3.0
    assert timer.report(8) == {"images_per_second": 2.0, "data_percent": 25.0}


def test_without_a_terminal_a_line_is_logged_at_logging_steps_only(clock, caplog):
    caplog.set_level("INFO", logger="absl")
    progress = Progress(total_steps=300, steps_per_epoch=100, start_step=200)
    progress.update(201, {"loss": 50.0})
    clock.now += 2
    progress.update(202)
    clock.now += 2
    shown = {"loss": 12.3444, "images_per_second": 31.24, "data_percent": 3.2, "match_percent": 0.9, "lr": 1.0}
    progress.update(203, shown)
    progress.close()
    assert [record.getMessage() for record in caplog.records] == [
        "epoch 3/3 step 201/300 loss 50 left ?",
        "epoch 3/3 step 203/300 loss 12.34 31.2 img/s data 3 % match 1 % left 0:03:14",  # 97 steps of 2 s
    ]


def test_time_left_forgets_compiling_and_follows_the_pace(clock, caplog, monkeypatch):
    caplog.set_level("INFO", logger="absl")
    monkeypatch.setattr(metrics, "RATE_WINDOW_STEPS", 3)
    progress = Progress(total_steps=5000, steps_per_epoch=100)
    clock.now += 1000.0  # compiling, in the first step
    for step in range(1, 16):
        progress.update(step, {})
        clock.now += 1.0 if step < 12 else 10.0
    left = [record.getMessage().split("left ")[1] for record in caplog.records]
    assert left[0] == "?"
    assert left[1] == "1:23:18"  # 4998 steps of 1 s
    assert left[11] == "1:23:08"
    assert left[14] == "13:50:50"  # 4985 steps of 10 s: the last 3 steps decide


def test_last_step_of_an_epoch_belongs_to_it(clock, caplog):
    caplog.set_level("INFO", logger="absl")
    progress = Progress(total_steps=250, steps_per_epoch=100)
    for step in (100, 101, 250):
        progress.update(step, {})
    assert [record.getMessage().split(" step")[0] for record in caplog.records] == [
        "epoch 1/3",
        "epoch 2/3",
        "epoch 3/3",
    ]


def test_on_a_terminal_a_bar_shows_the_whole_run(clock, caplog, monkeypatch):
    caplog.set_level("INFO", logger="absl")
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    progress = Progress(total_steps=200, steps_per_epoch=100, start_step=148)
    progress.update(149, {"loss": 12.5, "images_per_second": 31.2})
    clock.now += 2
    progress.update(150)
    progress.close()
    last = terminal.getvalue().split("\r")[-1]
    assert last.startswith(" 75%|")
    assert "150/200, epoch 2/2 loss 12.5 31.2 img/s left 0:01:40" in last
    assert not caplog.records
