"""Two virtual CPU devices for every test; shapes are checked, and arrays of another rank do not broadcast."""

import os

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=2"

import jax
import pytest
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
