"""AdamW with two learning rates, clipping and frozen modules, as one optax transform."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import optax
from flax import traverse_util
from jaxtyping import Array, Float

FROZEN, BACKBONE, REST = "frozen", "backbone", "rest"


def parameter_groups(params: Mapping[str, Any], frozen_modules: tuple[str, ...]) -> Any:
    """Labels each parameter: `frozen` (the named backbone modules), `backbone` or `rest`."""

    def group(path: tuple[str, ...]) -> str:
        if path[0] != "backbone":
            return REST
        return FROZEN if path[1] in frozen_modules else BACKBONE

    flat = traverse_util.flatten_dict(params)
    return traverse_util.unflatten_dict({path: group(path) for path in flat})


def step_schedule(lr: float, *, warmup_steps: int, drop_step: int, drop_factor: float) -> optax.Schedule:
    """`lr`, times `drop_factor` from `drop_step` on; before that a linear rise over the first `warmup_steps`."""

    def schedule(step: Float[Array, ""]) -> Float[Array, ""]:
        rise = jnp.minimum((step + 1.0) / max(warmup_steps, 1), 1.0)
        return lr * rise * jnp.where(step >= drop_step, drop_factor, 1.0)

    return schedule


def make_optimizer(
    *,
    lr: optax.Schedule,
    backbone_lr: optax.Schedule,
    weight_decay: float,
    clip_norm: float,
    frozen_modules: tuple[str, ...],
) -> optax.GradientTransformation:
    """The published optimiser: clip the global norm, then AdamW on every trained parameter.

    Weight decay reaches biases and norms too, as published. Frozen parameters have no gradient (the backbone stops
    it), so that they do not count in the norm, and neither moments nor decay.
    Args:
      lr, backbone_lr: schedules over optimiser steps.
      weight_decay: decoupled, times the learning rate.
      clip_norm: largest global gradient norm; 0: no clipping.
      frozen_modules: names of backbone modules.
    """
    groups = {
        FROZEN: optax.set_to_zero(),
        BACKBONE: optax.adamw(backbone_lr, weight_decay=weight_decay),
        REST: optax.adamw(lr, weight_decay=weight_decay),
    }
    clip = optax.clip_by_global_norm(clip_norm) if clip_norm > 0 else optax.identity()
    return optax.chain(clip, optax.multi_transform(groups, lambda params: parameter_groups(params, frozen_modules)))
