"""Which paths are taken, and files that are there whole or not at all, on a disk and in an object store."""

import importlib.util
import os
import pathlib
import subprocess
import sys

import pytest

from cdetr_jax.files import as_path, is_remote, whole_file


@pytest.mark.parametrize("path", ["runs/r50", "/tmp/run", "./gs:/run", "a:b", "C:/run", pathlib.Path("runs")])
def test_local_paths_are_pathlibs(path):
    assert as_path(path) == pathlib.Path(path)
    assert not is_remote(path)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("s3://bucket/run", r"^s3://bucket/run: cannot write to s3://; use a local path or gs://bucket/folder$"),
        ("foo://run", "^foo://run: cannot write to foo://"),
        ("hf://owner/model", "cannot write to hf://"),
        ("memory://run", "cannot write to memory://"),
        ("gs://bucket/run", r"^gs://bucket/run: gs:// needs the package gcsfs; pip install 'cdetr_jax\[gcs\]', or"),
        (pathlib.Path("gs://bucket/run"), "^gs:/bucket/run is a remote path that lost a slash"),
    ],
)
def test_what_cannot_be_written_to_is_refused_and_leaves_nothing(path, message, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "gcsfs" else find(name))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        as_path(path)
    with pytest.raises(ValueError, match=message), whole_file(path):
        pytest.fail("the block ran")
    assert os.listdir() == []


def test_names_in_a_bucket(bucket):
    path = as_path("gs://bucket/run/")
    assert str(path / "config.json") == "gs://bucket/run/config.json"
    assert as_path(path) == path == bucket / "run"
    assert is_remote(path)


def test_a_bucket_does_without_tensorflow(tmp_path):
    """Packages of these names stand for the true ones, which may not be installed."""
    (tmp_path / "gcsfs.py").write_text("raise ImportError('stands for the true one')")
    (tmp_path / "tensorflow.py").write_text("raise RuntimeError('imported')")
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from cdetr_jax.files import as_path\n"
        "try: as_path('gs://bucket/run').exists()\n"
        "except ImportError as error: print(error.__cause__)\n"
    )
    found = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True)
    assert found.stdout == "stands for the true one\n"


def test_importing_loads_no_epath():
    code = (
        "import sys, cdetr_jax.files as files; files.as_path('run')\n"
        "print({'etils', 'jax', 'numpy'} & set(sys.modules))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "set()\n"


@pytest.fixture(params=["disk", "bucket"])
def folder(request, tmp_path):
    """A folder that is not there yet."""
    return tmp_path / "new" / "run" if request.param == "disk" else request.getfixturevalue("bucket") / "run"


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_appears_when_the_block_ends(folder):
    with whole_file(folder / "a.json") as temporary:
        temporary.write_text("new", encoding="utf-8")
        assert not (folder / "a.json").exists()
    assert (folder / "a.json").read_text() == "new"
    with whole_file(str(folder / "a.json")) as temporary:
        temporary.write_bytes(b"newer")
        assert (folder / "a.json").read_text() == "new"
    assert (folder / "a.json").read_text() == "newer"
    assert names(folder) == ["a.json"]


def test_a_block_that_fails_leaves_what_was_there(folder):
    with whole_file(folder / "a.json") as temporary:
        temporary.write_text("old")
    seen = []

    def fail(temporary):
        seen.append(temporary)
        temporary.write_text("ne")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"), whole_file(folder / "a.json") as temporary:
        fail(temporary)
    assert (folder / "a.json").read_text() == "old"
    assert names(folder) == ["a.json"]
    assert not seen[0].exists()


def test_two_writers_do_not_meet(folder):
    with whole_file(folder / "a.json") as first, whole_file(folder / "a.json") as second:
        first.write_text("first")
        second.write_text("second")
    assert (folder / "a.json").read_text() == "first"  # its block ends last
    assert names(folder) == ["a.json"]


def test_a_temporary_name_that_is_gone_already_hides_no_error(tmp_path):
    def fail():
        (tmp_path / "run").rmdir()
        (tmp_path / "run").write_text("a file, so that unlinking inside of it fails")
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"), whole_file(tmp_path / "run" / "a.json"):
        fail()
