"""Conditional DETR in JAX and Flax."""

from typing import Any

__all__ = ["Detector", "Objects"]


def __getattr__(name: str) -> Any:
    """Imports JAX only when something is used, so that `cdetr --help` answers at once."""
    if name in __all__:
        from cdetr_jax import inference

        return getattr(inference, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
