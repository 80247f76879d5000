"""Trackers: the table of all metrics, and services, where their packages are installed."""

import csv
import io
import json
import re
import sys

import pytest
from PIL import Image

from cdetr_jax.cli import main, train
from cdetr_jax.config_check import check_value
from cdetr_jax.training import trackers
from cdetr_jax.training.metrics import make_writer
from cdetr_jax.training.trackers import check_installed

FACTS = {"config.optimizer.lr": 1e-4, "config.init": 600 * "x", "environment.git_commit": "abc"}


def write_run(workdir, log, resumed_at=0, steps=(1, 2), end="finished"):
    writer = make_writer(workdir, log, FACTS)
    writer.truncate_after(resumed_at, is_evaluated=False)
    for step in steps:
        writer.write_scalars(
            step, {"loss": step / 2} | ({"pace": 8.0} if step > 1 else {}), epoch=step / 4, kind="train"
        )
    writer.write_scalars(steps[-1], {"AP": 0.25}, epoch=steps[-1] / 4, kind="eval")
    jpeg = io.BytesIO()
    Image.new("RGB", (30, 20), "red").save(jpeg, format="JPEG")
    writer.write_picture(steps[-1], "eval/pictures", jpeg.getvalue(), 30, 20)
    writer.close(end)


def rows(workdir):
    with (workdir / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_table_of_all_metrics(tmp_path):
    write_run(tmp_path, "csv")
    assert rows(tmp_path) == [
        {"step": "1", "epoch": "0.25", "train/loss": "0.5", "train/pace": "", "eval/AP": ""},
        {"step": "2", "epoch": "0.5", "train/loss": "1.0", "train/pace": "8.0", "eval/AP": ""},
        {"step": "2", "epoch": "0.5", "train/loss": "", "train/pace": "", "eval/AP": "0.25"},
    ]
    assert not list(tmp_path.glob("events*"))


def test_a_table_that_goes_on(tmp_path):
    """Begun later than the run, it has all of it; steps that come again are there once."""
    write_run(tmp_path, "none", steps=(1, 2, 3))
    write_run(tmp_path, "csv,tensorboard", resumed_at=2, steps=(3, 4))
    assert [(row["step"], row["eval/AP"]) for row in rows(tmp_path)] == [
        ("1", ""), ("2", ""), ("3", ""), ("4", ""), ("4", "0.25"),
    ]  # fmt: skip
    assert len(list(tmp_path.glob("events*"))) == 1


def test_a_full_disk_names_the_table(tmp_path):
    writer = make_writer(tmp_path, "csv")
    writer.write_scalars(1, {"loss": 1.0}, epoch=0.5, kind="train")
    (tmp_path / "metrics.csv").unlink()
    (tmp_path / "metrics.csv").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"No space left on device: '.*metrics.csv'"):
        writer.write_scalars(2, {"loss": 1.0}, epoch=0.5, kind="train")


def test_a_service_that_fails_ends_no_run_and_is_left_out(tmp_path, monkeypatch, caplog):
    asked = []

    class Away:
        def __init__(self, workdir, facts):
            pass

        def write(self, step, scalars):
            asked.append(step)
            raise ConnectionError("nobody there")

        write_picture = hide_after = close = lambda self, *arguments: None

    monkeypatch.setitem(trackers.SERVICES, "wandb", Away)
    write_run(tmp_path, "wandb,csv")
    assert len(rows(tmp_path)) == 3
    assert asked == [1]
    assert caplog.text.count("wandb failed: ConnectionError: nobody there; the run goes on") == 1


def test_a_service_that_lets_nobody_in_or_is_missing(tmp_path, monkeypatch, caplog):
    def refuse(workdir, facts):
        raise RuntimeError("No API key configured")

    monkeypatch.setitem(trackers.SERVICES, "mlflow", refuse)
    with pytest.raises(ValueError, match="--log=mlflow does not work: No API key configured; mend that, or train"):
        make_writer(tmp_path, "mlflow")
    write_run(tmp_path, "none")
    write_run(tmp_path, "mlflow", resumed_at=2, steps=(3,))
    assert "--log=mlflow does not work: No API key configured; the run goes on without it" in caplog.text
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ModuleNotFoundError, match=r"--log=wandb needs its package: pip install 'cdetr_jax\[wandb\]'"):
        check_installed("csv,wandb")


def test_the_option_is_a_field(monkeypatch):
    seen = []
    monkeypatch.setattr(train, "run", lambda arguments, fields: seen.append(fields))
    main.run(["train", "--config=demo", "--workdir=w", "--config.seed=1", "--log=csv,tensorboard"])
    assert seen == [["--config.seed=1", "--config.train.log=csv,tensorboard"]]
    for log in ("none", "csv", "csv,mlflow"):
        check_value("train.log", log)
    for log in ("tensorbord", "csv,csv"):
        with pytest.raises(ValueError, match=rf"config.train.log is '{log}', expected one or more of tensorboard, csv"):
            check_value("train.log", log)


def test_mlflow(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.chdir(tmp_path)
    workdir, client = tmp_path / "detr" / "seed0", mlflow.MlflowClient()

    def the_run():
        (run,) = client.search_runs([client.get_experiment_by_name("cdetr_jax").experiment_id])
        return run

    write_run(workdir, "mlflow", end="stopped")
    assert the_run().info.status == "KILLED"
    write_run(workdir, "mlflow", resumed_at=1, steps=(2, 3))
    run = the_run()
    assert (run.info.run_name, run.info.status) == ("detr/seed0", "FINISHED")
    assert run.data.params["config.optimizer.lr"] == "0.0001"
    assert len(run.data.params["config.init"]) == 500
    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert {(metric.step, metric.value) for metric in history} == {(1, 0.5), (2, 1.0), (3, 1.5)}
    assert run.data.metrics["eval/AP"] == 0.25
    assert {file.path for file in client.list_artifacts(run.info.run_id)} == {"images", "run.json"}


def test_wandb(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    write_run(tmp_path / "run", "wandb")
    write_run(tmp_path / "run", "wandb", resumed_at=1, steps=(2, 3))
    run_id = json.loads((tmp_path / "run/trackers.json").read_text())["wandb"]
    folders = list((tmp_path / "run/wandb").glob("offline-run-*"))  # of two within a second the other's ends in -1
    assert {re.sub(r"^offline-run-\d+_\d+-(\w+)(-\d)?$", r"\1", folder.name) for folder in folders} == {run_id}
    assert all((folder / f"run-{run_id}.wandb").stat().st_size for folder in folders)
    assert list((tmp_path / "run/wandb").glob("offline-run-*/files/media/images/eval/pictures*"))
