"""A run's files in a bucket, and workdirs that are refused."""

import os
import socket
import subprocess
import sys

import ml_collections
import pytest

from cdetr_jax.checkpoints import io
from cdetr_jax.checkpoints.io import Checkpoints
from cdetr_jax.checkpoints.workdir import load_classes, load_config, locked, save_classes, save_config
from cdetr_jax.structs import Category

CLASSES = (Category(1, "bird"), None, Category(7, "Käfer"))


def test_config_and_classes_come_back_from_a_bucket(bucket):
    save_config("gs://bucket/run", ml_collections.ConfigDict({"seed": 3, "data": {"source": "synthetic"}}))
    save_classes("gs://bucket/run", CLASSES)
    assert sorted(path.name for path in (bucket / "run").iterdir()) == ["classes.json", "config.json"]
    assert load_config(bucket / "run").data.source == "synthetic"
    assert load_classes("gs://bucket/run/") == CLASSES


def test_a_bucket_without_a_run_is_named_in_full(bucket):
    with pytest.raises(FileNotFoundError, match=r"^gs://bucket/run/config.json is missing: gs://bucket/run is not the"):
        load_config("gs://bucket/run")
    with pytest.raises(FileNotFoundError, match=r"^gs://bucket/run holds no checkpoints"):
        Checkpoints("gs://bucket/run", read_only=True)


def test_orbax_is_given_the_bucket(bucket, monkeypatch):
    """Orbax's own traffic with a bucket needs a true one."""
    given = []

    class Manager:
        def __init__(self, directory, **_):
            given.append(directory)

        def all_steps(self):
            return []

    monkeypatch.setattr(io, "_Manager", Manager)
    assert Checkpoints("gs://bucket/run").directory == bucket / "run" / "checkpoints"
    assert list(map(str, given)) == ["gs://bucket/run/checkpoints"]


@pytest.mark.parametrize("function", [load_config, load_classes, Checkpoints])
def test_a_workdir_that_cannot_be_written_to_is_refused(function, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"^foo://bucket/run: cannot write to foo://"):
        function("foo://bucket/run")
    assert list(tmp_path.iterdir()) == []


def test_a_workdir_holds_one_run_at_a_time(tmp_path):
    with locked(tmp_path / "w"):
        expected = (
            rf"another run trains in .*w: process {os.getpid()} on {socket.gethostname()}, since \d{{4}}-\d\d-\d\d"
        )
        with pytest.raises(ValueError, match=expected), locked(tmp_path / "w"):
            pass
    with locked(tmp_path / "w"):  # what is left of the first is no lock
        pass


def test_a_killed_process_leaves_no_lock(tmp_path):
    code = (
        "import fcntl, os, signal, sys; file = open(sys.argv[1], 'a+'); fcntl.flock(file, fcntl.LOCK_EX); "
        "file.write('process 1'); file.flush(); os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-S", "-c", code, str(tmp_path / ".lock")], check=False)
    with locked(tmp_path):
        assert (tmp_path / ".lock").read_text().startswith(f"process {os.getpid()} on ")


def test_a_bucket_is_not_locked(bucket):
    with locked("gs://bucket/run"), locked("gs://bucket/run"):
        assert not (bucket / "run").exists()
