"""The metrics file through kills and resumes, TensorBoard's files, a bucket, and progress."""

import io
import json
import math
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
from tensorboard.compat.proto.event_pb2 import Event, SessionLog

from cdetr_jax import files
from cdetr_jax.training import metrics
from cdetr_jax.training.metrics import IntervalTimer, MetricsFile, Progress, make_writer
from cdetr_jax.training.tensorboard import TensorBoardFile
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


def events_of(folder):
    """What TensorBoard reads in the files of a folder, oldest first, as the files hold it."""
    files = sorted(folder.glob("events.out.tfevents.*"))
    return [Event.FromString(record) for file in files for record in RawEventFileLoader(str(file)).Load()]


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

    monkeypatch.setattr(files.os, "replace", fail)
    with pytest.raises(OSError, match="disk is gone"):
        file.truncate_after(1)
    assert file.path.read_bytes() == before


def test_truncating_before_the_first_line_makes_no_file(tmp_path):
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.truncate_after(0)
    assert not file.path.exists()


def test_scalars_go_to_both_files_and_the_log_says_where(tmp_path, caplog):
    caplog.set_level("INFO", logger="absl")
    folder = tmp_path / "new" / "run"
    writer = make_writer(folder)
    writer.truncate_after(6)
    writer.write_scalars(np.int64(7), {"loss": jnp.float32(3.0)}, epoch=0.5, kind="train")
    writer.write_scalars(9, {"AP": 0.25, "AP50": math.nan}, epoch=0.75, kind="eval")
    version, start, train, evaluation = events_of(folder)  # though the writer is still open
    writer.close()
    assert version.file_version == "brain.Event:2"
    assert (start.step, start.session_log.status) == (7, SessionLog.START)
    assert (train.step, {value.tag: value.simple_value for value in train.summary.value}) == (
        7,
        {"train/loss": 3.0, "epoch": 0.5},
    )
    values = {value.tag: value.simple_value for value in evaluation.summary.value}
    assert (evaluation.step, values.pop("eval/AP"), values.pop("epoch")) == (9, 0.25, 0.75)
    assert math.isnan(values.pop("eval/AP50"))
    assert values == {}
    assert [(row["step"], row["kind"]) for row in read_metrics(folder / "metrics.jsonl")] == [(7, "train"), (9, "eval")]
    assert f"Metrics go to {folder / 'metrics.jsonl'}, and to tensorboard" in caplog.text


def test_tensorboard_shows_pictures(tmp_path):
    jpeg = io.BytesIO()
    Image.new("RGB", (30, 20), "red").save(jpeg, format="JPEG")
    writer = make_writer(tmp_path)
    writer.write_picture(7, "eval/pictures", jpeg.getvalue(), 30, 20)
    writer.close()
    read = EventAccumulator(str(tmp_path)).Reload()
    [event] = read.Images("eval/pictures")
    assert (event.step, event.width, event.height) == (7, 30, 20)
    assert event.encoded_image_string == jpeg.getvalue()


def test_a_disk_that_is_full_for_the_metrics_is_named(tmp_path):
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.path.symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"No space left on device: '.*metrics.jsonl'"):
        file.write(7, 0.5, "train", {"loss": 3.0})


def test_a_disk_that_is_full_for_tensorboard_raises(tmp_path):
    (tmp_path / "full").symlink_to("/dev/full")
    file = TensorBoardFile(tmp_path)
    file.close()
    file._file = (tmp_path / "full").open("wb", buffering=0)
    with pytest.raises(OSError, match=r"No space left on device: .*full'"):
        file.write(7, {"loss": 3.0})
    file.close()


def test_tensorboard_forgets_what_a_resume_dropped(tmp_path):
    for resumed_at, steps in ((0, (7, 300)), (8, (10, 70_000))):
        writer = make_writer(tmp_path)
        writer.truncate_after(resumed_at)
        for step in steps:
            writer.write_scalars(step, {"loss": step / 2, "Käfer " + 200 * "x": -1e-3}, epoch=0.5, kind="train")
        writer.close()
    assert len(list(tmp_path.glob("events*"))) == 2
    read = EventAccumulator(str(tmp_path)).Reload()
    assert [(event.step, event.value) for event in read.Scalars("train/loss")] == [(7, 3.5), (10, 5.0), (70_000, 35e3)]
    assert [event.value for event in read.Scalars("train/Käfer " + 200 * "x")] == 3 * [float(np.float32(-1e-3))]


def test_tensorboard_skips_a_record_whose_checksum_is_wrong(tmp_path):
    """So the checksums are looked at, and those of the other tests are right."""
    file = TensorBoardFile(tmp_path)
    file.write(7, {"loss": 3.0})
    file.close()
    (path,) = tmp_path.iterdir()
    content = bytearray(path.read_bytes())
    content[-6] ^= 1
    path.write_bytes(content)
    assert [event.file_version for event in events_of(tmp_path)] == ["brain.Event:2"]


def test_in_a_bucket_lines_are_written_and_dropped_and_tensorboard_is_not_written(bucket, caplog):
    caplog.set_level("INFO", logger="absl")
    for _ in range(2):  # the second continues the file of the first
        writer = make_writer("gs://bucket/run")
        for step in (7, 9):
            writer.write_scalars(step, {"loss": 3.0}, epoch=0.5, kind="train")
        writer.close()
    assert [row["step"] for row in read_metrics("gs://bucket/run/metrics.jsonl")] == [7, 9, 7, 9]
    writer.truncate_after(8)
    writer.write_scalars(10, {"loss": 2.0}, epoch=0.6, kind="train")
    assert read_metrics(bucket / "run" / "metrics.jsonl")[-1]["loss"] == 2.0
    assert [row["step"] for row in read_metrics(bucket / "run" / "metrics.jsonl")] == [7, 7, 10]
    assert [path.name for path in (bucket / "run").iterdir()] == ["metrics.jsonl"]
    assert "no tensorboard: its files need a local workdir" in caplog.text


def test_writing_metrics_imports_no_tensorflow(tmp_path):
    """A package of that name that fails stands for the true one, which may not be installed."""
    for name in ("tensorflow", "tensorboard", "torch"):
        (tmp_path / f"{name}.py").write_text("raise RuntimeError('imported')")
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from cdetr_jax.training.metrics import make_writer\n"
        "writer = make_writer(sys.argv[1] + '/run')\n"
        "writer.write_scalars(7, {'loss': 3.0}, epoch=0.5, kind='train')\n"
        "writer.close()\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    assert len(events_of(tmp_path / "run")) == 2


def test_importing_loads_neither_tensorflow_nor_a_plotting_library():
    code = (
        "import sys, cdetr_jax.training.metrics, cdetr_jax.visualization.draw\n"
        "print({'tensorflow', 'tensorboard', 'clu', 'matplotlib', 'jax', 'etils'} & set(sys.modules))"
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
        with progress.pause():
            clock.now += 1000.0 * (step == 7)  # and later on
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
