"""Which paths are taken, and files that are there whole or not at all, on a disk and in an object store."""

import contextlib
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import types

import pytest

from cdetr_jax.files import as_path, growing_list, is_remote, refuse_to_overwrite, whole_file


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


def test_a_full_disk_names_the_file(folder):
    """What is written to a file that is open already fails without a name."""
    with pytest.raises(OSError, match=r"No space left on device: '.*a.json'") as error, whole_file(folder / "a.json"):
        raise OSError(28, "No space left on device")
    assert error.value.__notes__ == ["free some space and run the same command again"]


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


def test_a_file_follows_the_umask(tmp_path):
    """Also one whose writer makes it private, as safetensors does."""
    (tmp_path / "plain").touch()
    with whole_file(tmp_path / "private") as temporary:
        os.close(os.open(temporary, os.O_CREAT, 0o600))
    assert (tmp_path / "private").stat().st_mode == (tmp_path / "plain").stat().st_mode != 0o100600


def test_a_list_is_whole_after_every_addition(tmp_path):
    path = tmp_path / "new" / "a.json"
    with growing_list(path) as add:
        assert json.loads(path.read_text()) == []
        add([])
        add([{"a": "ä"}, 2])
        assert json.loads(path.read_text(encoding="utf-8")) == [{"a": "ä"}, 2]
        add([3])
        assert json.loads(path.read_text(encoding="utf-8")) == [{"a": "ä"}, 2, 3]
    with growing_list(path):
        pass
    assert json.loads(path.read_text()) == []


def test_a_remote_list_arrives_whatever_happens(bucket):
    def fail(add):
        add([1])
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"), growing_list(bucket / "a.json") as add:
        fail(add)
    assert json.loads((bucket / "a.json").read_text()) == [1]


def test_a_full_disk_leaves_a_whole_list(tmp_path, monkeypatch):
    def full(self, data):
        if len(data) < 4:  # what stood there before has its place
            return raw.write(data)
        raw.write(data[:5])
        raise OSError(28, "No space left on device")

    raw = (tmp_path / "a.json").open("wb", buffering=0)
    disk = types.SimpleNamespace(seek=raw.seek, truncate=raw.truncate, write=lambda data: full(None, data))
    monkeypatch.setattr(type(tmp_path), "open", lambda *_, **__: contextlib.nullcontext(disk))
    with pytest.raises(OSError, match="No space left"), growing_list(tmp_path / "a.json") as add:
        add(["much"])
    monkeypatch.undo()
    raw.close()
    assert json.loads((tmp_path / "a.json").read_text()) == []


@pytest.mark.parametrize("target", ["w/model.safetensors", "w/../w/config.json", "link"])
def test_weights_are_not_written_over(target, tmp_path):
    (tmp_path / "w").mkdir()
    for name in ("model.safetensors", "config.json"):
        (tmp_path / "w" / name).touch()
    (tmp_path / "link").symlink_to(tmp_path / "w" / "model.safetensors")
    with pytest.raises(ValueError, match=r"^--output .* would be written over the weights .*w; name another one"):
        refuse_to_overwrite(tmp_path / "w", tmp_path / target, "--output")
    refuse_to_overwrite(tmp_path / "w", tmp_path / "w" / "detector.zip", "--output")
    refuse_to_overwrite("hf://owner/model", tmp_path / target, "--output")
