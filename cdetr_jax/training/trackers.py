"""Where a run's numbers and pictures go besides its metrics file: a small adapter for each tracker.

A tracker elsewhere that fails ends no run: `metrics.jsonl` has every number, and it is the record of the run.
"""

import importlib.util
import io
import json
import os
import re
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from absl import logging
from PIL import Image

from cdetr_jax.files import as_csv, as_path, is_remote, write_json, write_text, writing
from cdetr_jax.training.tensorboard import TensorBoardFile
from cdetr_jax.visualization.curve import read_metrics

PROJECT = "cdetr_jax"  # of Weights & Biases, and the experiment of MLflow, where their variables do not name one
IDS = "trackers.json"  # what a run is called elsewhere, so that it goes on there too


class Tracker(Protocol):
    """What takes numbers and pictures of a run. A step may come again when a run goes on."""

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Takes scalars of one step, named as train/loss."""

    def write_picture(self, step: int, name: str, content: bytes, width: int, height: int) -> None:
        """Takes an RGB picture, the content of a PNG or JPEG file."""

    def hide_after(self, step: int) -> None:
        """What was written of later steps than this one will come again."""

    def close(self, end: str = "finished") -> None:
        """The run is finished, stopped, to go on later, or failed, by an error."""


class Csv:
    """`metrics.csv`: a row for each line of the metrics file, a column for each name."""

    def __init__(self, workdir: Path, facts: Mapping[str, Any]):
        del facts
        self._path, self._metrics = workdir / "metrics.csv", workdir / "metrics.jsonl"
        self._columns: list[str] = []
        self._write_anew()

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        row = {"step": step, **scalars}
        if not row.keys() <= set(self._columns):
            self._write_anew()  # the metrics file has this row already
            return
        with writing(self._path), self._path.open("a", encoding="utf-8") as file:
            file.write(self._text([row]))

    def write_picture(self, step: int, name: str, content: bytes, width: int, height: int) -> None:
        """Goes nowhere: the pictures are in the workdir."""

    def hide_after(self, step: int) -> None:
        self._write_anew()

    def close(self, end: str = "finished") -> None:
        """Nothing is open."""

    def _write_anew(self) -> None:
        rows = []
        for line in read_metrics(self._metrics) if self._metrics.exists() else ():
            step, epoch, kind = (line.pop(name) for name in ("step", "epoch", "kind"))
            rows.append({"step": step, "epoch": epoch, **{f"{kind}/{name}": value for name, value in line.items()}})
        self._columns = list(dict.fromkeys(name for row in rows for name in row))
        write_text(self._path, as_csv([self._columns]) + self._text(rows))

    def _text(self, rows: list[dict[str, Any]]) -> str:
        return as_csv([_plain(row.get(name)) for name in self._columns] for row in rows)


def _plain(value: Any) -> Any:
    return value if value is None or isinstance(value, int) else float(value)


class Wandb:
    """Weights & Biases: the project is $WANDB_PROJECT. It drops steps that come again."""

    def __init__(self, workdir: Path, facts: Mapping[str, Any]):
        import wandb

        self._wandb = wandb
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=_name(workdir),
            id=_id(workdir, "wandb", lambda: uuid.uuid4().hex[:8]),
            resume="allow",
            dir=None if is_remote(workdir) else str(workdir),
            config=dict(facts),
        )

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        self._run.log({name: float(value) for name, value in scalars.items()}, step=step)

    def write_picture(self, step: int, name: str, content: bytes, width: int, height: int) -> None:
        self._run.log({name: self._wandb.Image(Image.open(io.BytesIO(content)))}, step=step)

    def hide_after(self, step: int) -> None:
        """See the class."""

    def close(self, end: str = "finished") -> None:
        self._run.finish(exit_code=int(end == "failed"))


class Mlflow:
    """MLflow: where $MLFLOW_TRACKING_URI says, in the experiment $MLFLOW_EXPERIMENT_NAME."""

    def __init__(self, workdir: Path, facts: Mapping[str, Any]):
        # Training waits for it: its own 7 tries of 120 s each would hold up a run for many minutes.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        import mlflow
        from mlflow.entities import Metric, Param

        self._metric, self._client = Metric, mlflow.MlflowClient()

        def create() -> str:
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
            experiment = self._client.get_experiment_by_name(name)
            experiment_id = experiment.experiment_id if experiment else self._client.create_experiment(name)
            run_id = self._client.create_run(experiment_id, run_name=_name(workdir)).info.run_id
            params = [Param(name, str(value)[:500]) for name, value in facts.items()]
            for i in range(0, len(params), 100):  # as many as it takes at once
                self._client.log_batch(run_id, params=params[i : i + 100])
            return run_id

        self._run_id = _id(workdir, "mlflow", create)
        self._client.update_run(self._run_id, status="RUNNING")
        self._client.log_dict(self._run_id, dict(facts), "run.json")

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        now_ms = int(1000 * time.time())
        metrics = [self._metric(name, float(value), now_ms, step) for name, value in scalars.items()]
        self._client.log_batch(self._run_id, metrics=metrics)

    def write_picture(self, step: int, name: str, content: bytes, width: int, height: int) -> None:
        self._client.log_image(self._run_id, Image.open(io.BytesIO(content)), key=name, step=step)

    def hide_after(self, step: int) -> None:
        """It keeps both values of a step that comes again."""

    def close(self, end: str = "finished") -> None:
        status = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}[end]
        self._client.set_terminated(self._run_id, status)


class _Elsewhere:
    """A tracker that is left out after its first failure: one that is away would hold up every step, and the end."""

    def __init__(self, name: str, tracker: Tracker):
        self._name, self._tracker, self._has_failed = name, tracker, False

    def __getattr__(self, method: str) -> Any:
        def call(*arguments: Any) -> None:
            if self._has_failed:
                return
            try:
                getattr(self._tracker, method)(*arguments)
            except Exception as error:
                self._has_failed = True
                logging.warning(
                    "%s failed: %s: %s; the run goes on without it, and metrics.jsonl has what is missing there",
                    self._name, type(error).__name__, error,
                )  # fmt: skip

        return call


FILES = {"tensorboard": lambda workdir, facts: TensorBoardFile(workdir), "csv": Csv}
SERVICES = {"wandb": Wandb, "mlflow": Mlflow}
TRACKERS = (*FILES, *SERVICES)


def check_installed(log: str) -> None:
    """Raises ModuleNotFoundError, if a tracker's package is missing."""
    for name in log.split(","):
        if name in SERVICES and importlib.util.find_spec(name) is None:
            raise ModuleNotFoundError(f"--log={name} needs its package: pip install 'cdetr_jax[{name}]'")


def make_trackers(log: str, workdir: str | os.PathLike, facts: Mapping[str, Any]) -> dict[str, Tracker]:
    """The trackers that are named. Those that are files need a local workdir, and are left out without one.

    Args:
      log: as `config.train.log`.
      facts: what is to be kept with the run, by name: its config and environment.
    Raises: ValueError, if one cannot be reached or does not let us in; a run that goes on does so without it.
    """
    workdir = as_path(workdir)
    trackers: dict[str, Tracker] = {}
    for name in log.split(","):
        if name in SERVICES:
            try:
                trackers[name] = _Elsewhere(name, SERVICES[name](workdir, facts))
            except Exception as error:
                message = str(error) or type(error).__name__
                if (workdir / "metrics.jsonl").exists():  # such as after a preemption, with nobody there to mend it
                    logging.warning("--log=%s does not work: %s; the run goes on without it", name, message)
                    continue
                raise ValueError(f"--log={name} does not work: {message}; mend that, or train without it") from error
        elif name in FILES and is_remote(workdir):
            logging.info("no %s: its files need a local workdir", name)
        elif name in FILES:
            trackers[name] = FILES[name](workdir, facts)
    return trackers


def _name(workdir: Path) -> str:
    """The workdir's; of a comparison's runs, which are all called seed0, with the variant."""
    return f"{workdir.parent.name}/{workdir.name}" if re.fullmatch(r"seed\d+", workdir.name) else workdir.name


def _id(workdir: Path, name: str, create: Any) -> str:
    """What the run of a workdir is called elsewhere; made and kept the first time."""
    path = workdir / IDS
    ids = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if name not in ids:
        ids[name] = create()
        write_json(path, ids)
    return ids[name]
