"""What a run tells while it goes: a metrics file, trackers, and its progress."""

import contextlib
import functools
import json
import math
import os
import sys
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from time import monotonic
from typing import Any, Literal

from absl import logging
from tqdm import tqdm

from cdetr_jax.files import as_path, is_remote, write_text, writing
from cdetr_jax.training.trackers import Tracker, make_trackers
from cdetr_jax.visualization.curve import read_metrics

RATE_WINDOW_STEPS = 200  # the time left comes from the mean pace of so many steps


class MetricsFile:
    """A file of one JSON object a line, readable at any moment and after any kill; `read_metrics` reads it back.

    A number that is not finite becomes null, so that every line is valid JSON. Nothing is held open between writes.
    An object store cannot append: there every line writes the file anew, which is some megabytes at a run's end.
    """

    def __init__(self, path: str | os.PathLike):
        """Starts or continues the file; removes a last line that a killed process left half-written.

        Raises: ValueError, if another line of an existing file is not JSON.
        """
        self.path = as_path(path)
        if self.path.exists():
            self._replace(read_metrics(self.path))

    def write(self, step: int, epoch: float, kind: Literal["train", "eval"], scalars: Mapping[str, float]) -> None:
        """Appends one line. `scalars` may hold anything that float() takes, such as a zero-dimensional array."""
        row = {"step": int(step), "epoch": _finite(epoch), "kind": kind}
        row |= {name: _finite(value) for name, value in scalars.items()}
        if is_remote(self.path):
            self._replace([*(read_metrics(self.path) if self.path.exists() else []), row])
            return
        with writing(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(_line(row))

    def truncate_after(self, step: int, is_evaluated: bool = True) -> None:
        """Drops what a resumed run will write again, all of it or nothing.

        Args:
          step: the lines of later steps go.
          is_evaluated: False, if this step's evaluation is to be done again; then its line goes too.
        """
        if self.path.exists():
            last = {"train": step, "eval": step if is_evaluated else step - 1}
            self._replace([row for row in read_metrics(self.path) if row["step"] <= last[row["kind"]]])

    def _replace(self, rows: list[dict]) -> None:
        write_text(self.path, "".join(map(_line, rows)))


class MetricsWriter:
    """Writes scalars to the metrics file, and then to the trackers."""

    def __init__(self, file: MetricsFile, trackers: Sequence[Tracker] = ()):
        self._file, self._trackers = file, trackers

    def write_scalars(
        self, step: int, scalars: Mapping[str, float], *, epoch: float, kind: Literal["train", "eval"]
    ) -> None:
        """Writes scalars of one step; for trackers their names start with the kind, "train/loss"."""
        self._file.write(step, epoch, kind, scalars)
        for tracker in self._trackers:
            tracker.write(step, {**{f"{kind}/{name}": value for name, value in scalars.items()}, "epoch": epoch})

    def write_picture(self, step: int, name: str, content: bytes, width: int, height: int) -> None:
        """Hands the content of a PNG or JPEG file to the trackers."""
        for tracker in self._trackers:
            tracker.write_picture(step, name, content, width, height)

    def truncate_after(self, step: int, is_evaluated: bool = True) -> None:
        """At resume, as `MetricsFile.truncate_after`: trackers no longer show what comes after the restored step."""
        self._file.truncate_after(step, is_evaluated)
        for tracker in self._trackers:
            tracker.hide_after(step)

    def close(self, end: str = "finished") -> None:
        """Closes the trackers, see `Tracker.close`."""
        for tracker in self._trackers:
            tracker.close(end)


def make_writer(
    workdir: str | os.PathLike, log: str = "tensorboard", facts: Mapping[str, Any] | None = None
) -> MetricsWriter:
    """A writer to `workdir/metrics.jsonl` and to trackers, see `make_trackers`; for one process of a run."""
    workdir = as_path(workdir)
    if not is_remote(workdir):
        workdir.mkdir(parents=True, exist_ok=True)
    file = MetricsFile(workdir / "metrics.jsonl")
    trackers = make_trackers(log, workdir, facts or {})
    logging.info("Metrics go to %s%s", file.path, f", and to {', '.join(trackers)}" if trackers else "")
    return MetricsWriter(file, list(trackers.values()))


@contextlib.contextmanager
def _timed(add: Callable[[float], None]) -> Iterator[None]:
    """Hands over the seconds inside the `with` block."""
    start = monotonic()
    try:
        yield
    finally:
        add(monotonic() - start)


class IntervalTimer:
    """Seconds spent in named parts of the loop since the last report."""

    def __init__(self):
        self._seconds = defaultdict(float)
        self._start = monotonic()

    def part(self, name: str) -> AbstractContextManager[None]:
        """Counts the time inside the `with` block for this part."""
        return _timed(functools.partial(self.add, name))

    def add(self, name: str, seconds: float) -> None:
        """Counts time that was measured elsewhere for this part."""
        self._seconds[name] += seconds

    def pause(self) -> AbstractContextManager[None]:
        """The time inside the `with` block, such as that of an evaluation, is not part of the interval."""
        return _timed(self._leave_out)

    def _leave_out(self, seconds: float) -> None:
        self._start += seconds

    def report(self, images: int) -> dict[str, float]:
        """Ends the interval, in which so many images were trained on, and starts the next.

        Returns: "images_per_second", and "<name>_percent" of the interval's time for every part seen so far.
        """
        now = monotonic()
        elapsed = max(now - self._start, 1e-9)
        scalars = {"images_per_second": images / elapsed}
        scalars |= {f"{name}_percent": 100 * seconds / elapsed for name, seconds in self._seconds.items()}
        self._start = now
        self._seconds = defaultdict(float, dict.fromkeys(self._seconds, 0.0))
        return scalars


class Progress:
    """How far a run is: a bar on a terminal, log lines elsewhere."""

    def __init__(self, total_steps: int, steps_per_epoch: int, start_step: int = 0):
        """Shows nothing yet.

        Args:
          total_steps: steps of the whole run, those before a resume too.
          steps_per_epoch: steps of one epoch.
          start_step: steps that were done before.
        """
        self._total = total_steps
        self._steps_per_epoch = steps_per_epoch
        self._marks = deque(maxlen=RATE_WINDOW_STEPS + 1)  # (time, step)
        self._paused_s = 0.0
        self._text = ""
        self._bar = None
        if sys.stderr.isatty():
            self._bar = tqdm(
                total=total_steps,
                initial=start_step,
                dynamic_ncols=True,
                bar_format="{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}{postfix}",
            )

    def update(self, step: int, metrics: Mapping[str, float] | None = None) -> None:
        """Moves on; call it after every step.

        Args:
          step: steps done so far.
          metrics: what is known at a logging step, else None. Shown are "loss", "images_per_second", "data_percent"
            and "match_percent", those that it holds. Without a terminal only these calls write a line.
        """
        self._marks.append((monotonic() - self._paused_s, step))
        if metrics is not None:
            self._text = _shown(metrics)
        epoch = f"epoch {max(0, step - 1) // self._steps_per_epoch + 1}/{self._total_epochs()}"
        left = f"left {self._time_left()}"
        if self._bar is not None:
            self._bar.set_postfix_str(" ".join(filter(None, (epoch, self._text, left))), refresh=False)
            self._bar.update(step - self._bar.n)
        elif metrics is not None:
            logging.info("%s", " ".join(filter(None, (epoch, f"step {step}/{self._total}", self._text, left))))

    def pause(self) -> AbstractContextManager[None]:
        """The time inside the `with` block, such as that of compiling, is not part of any pace."""
        return _timed(self._leave_out)

    def _leave_out(self, seconds: float) -> None:
        self._paused_s += seconds

    def say(self, text: str, *values: object) -> None:
        """Logs a line, above the bar if there is one."""
        if self._bar is not None:
            self._bar.clear()
        logging.info(text, *values)
        if self._bar is not None:
            self._bar.refresh()

    def close(self) -> None:
        """Leaves the bar as it stands."""
        if self._bar is not None:
            self._bar.refresh()
            self._bar.close()

    def _total_epochs(self) -> int:
        return math.ceil(self._total / self._steps_per_epoch)

    def _time_left(self) -> str:
        """Hours, minutes and seconds at the pace of the last steps; a question mark before the second step."""
        (first_time, first_step), (last_time, last_step) = self._marks[0], self._marks[-1]
        if last_step == first_step:
            return "?"
        seconds = round((last_time - first_time) / (last_step - first_step) * (self._total - last_step))
        return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"


def _shown(metrics: Mapping[str, float]) -> str:
    """The metrics that a line of progress has room for."""
    formats = {
        "loss": "loss {:.4g}",
        "images_per_second": "{:.1f} img/s",
        "data_percent": "data {:.0f} %",
        "match_percent": "match {:.0f} %",
    }
    return " ".join(text.format(float(metrics[name])) for name, text in formats.items() if name in metrics)


def _finite(value: float) -> float | None:
    value = float(value)
    return value if math.isfinite(value) else None


def _line(row: dict) -> str:
    return json.dumps(row, allow_nan=False) + "\n"
