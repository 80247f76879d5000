"""Two virtual CPU devices for every test; shapes are checked, and arrays of another rank do not broadcast."""

import atexit
import importlib.metadata
import importlib.util
import os
import shutil
import tempfile

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=2"

if "PYTEST_XDIST_WORKER" in os.environ:  # several processes that each use all cores get in each other's way
    os.environ["XLA_FLAGS"] += " --xla_cpu_multi_thread_eigen=false"
    # Loops are compiled in a third less time by what XLA had before; later versions have no choice. The slow tests and
    # the demo run what users do.
    if importlib.metadata.version("jaxlib").startswith("0.10."):
        os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"
# What one test compiles, the others find, in all processes of this run and in the commands that they start.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="cdetr-tests-compiled-")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
# Compiling takes longer than running what is compiled: only LLVM's part is left out, XLA's passes are as always.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

import jax
import pytest
from absl import logging
from etils import epath
from etils.epath import backend, gpath
from fsspec.implementations.memory import MemoryFileSystem
from jaxtyping import install_import_hook

jax.config.update("jax_platforms", os.environ.get("TESTS_ON", "cpu"))  # "": on what there is
jax.config.update("jax_numpy_rank_promotion", "raise")
# Where one device's arrays are computed with. Elsewhere records also hold all devices' arrays, or shapes alone.
install_import_hook(
    [f"cdetr_jax.{name}" for name in ("boxes", "models", "matching", "losses", "evaluation")], "beartype.beartype"
)


LONGEST = ("test_parity.py", "test_loop.py", "test_cli.py", "test_weights.py", "test_step.py", "test_transformer.py")


def pytest_collection_modifyitems(items):
    """The longest files first, so that no process is left with one at the end."""
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


@pytest.fixture(autouse=True)
def _verbosity():
    """Every test logs what it would alone: a command that ran in this process before has asked for more."""
    logging.set_verbosity(logging.WARNING)


class _ObjectStore(MemoryFileSystem):
    """Objects by their gs:// names; as in a true store nothing can be appended to one."""

    protocol = ("gs", "gcs")
    cachable = False

    def __init__(self):
        super().__init__()
        self.store, self.pseudo_dirs = {}, [""]

    @classmethod
    def _strip_protocol(cls, path):
        return "/" + path.removeprefix("gs://").strip("/")

    def _open(self, path, mode="rb", **arguments):
        assert "a" not in mode, "an object store cannot append"
        return super()._open(path, mode, **arguments)


@pytest.fixture
def bucket(monkeypatch):
    """An empty gs:// bucket in memory, as an `epath.Path`."""
    store, find = _ObjectStore(), importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "gcsfs" or find(name))
    monkeypatch.setattr(gpath, "_is_tf_installed", lambda: False)
    # Local paths, which the backend has a file system for too, are not asked for.
    monkeypatch.setattr(type(backend.fsspec_backend), "_get_filesystem", lambda self, name: {"gcs": store}[name])
    return epath.Path("gs://bucket")
