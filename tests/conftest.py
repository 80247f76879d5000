"""Two virtual CPU devices for every test; shapes are checked, and arrays of another rank do not broadcast."""

import importlib.util
import os

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=2"

import jax
import pytest
from etils import epath
from etils.epath import backend, gpath
from fsspec.implementations.memory import MemoryFileSystem
from jax.experimental.compilation_cache import compilation_cache
from jaxtyping import install_import_hook

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_numpy_rank_promotion", "raise")
# Where one device's arrays are computed with. Elsewhere records also hold all devices' arrays, or shapes alone.
install_import_hook(
    [f"cdetr_jax.{name}" for name in ("boxes", "models", "matching", "losses", "evaluation")], "beartype.beartype"
)


@pytest.fixture(scope="module")
def kept_compilations(tmp_path_factory):
    """What one test of the module compiles, the next finds. Returns: the settings of JAX that do this."""
    settings = {
        "jax_compilation_cache_dir": str(tmp_path_factory.getbasetemp() / "compiled"),
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield settings
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


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
