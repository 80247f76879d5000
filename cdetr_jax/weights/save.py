"""Weights written in each format: the hub's folder, the authors' `.pth`, a workdir of ours."""

import os
from pathlib import Path

import ml_collections

from cdetr_jax.checkpoints import workdir as run_files
from cdetr_jax.checkpoints.io import Checkpoints
from cdetr_jax.weights import architecture, torch_files
from cdetr_jax.weights.load import Weights
from cdetr_jax.weights.torch_convert import HUB, HUB_WITHOUT_TIMM, OFFICIAL, to_torch


def save_hub(weights: Weights, folder: str | os.PathLike, without_timm: bool = False) -> None:
    """Writes a folder that transformers loads: `model.safetensors`, `config.json`, `preprocessor_config.json`.

    Args:
      without_timm: the backbone under the names of transformers' own ResNet, so that timm is not needed there.
    Raises: ValueError, if transformers has no such model; OSError.
    """
    layout = HUB_WITHOUT_TIMM if without_timm else HUB
    sides = weights.preprocessing
    config = architecture.hub_config(weights.model, weights.classes, layout)
    config["cdetr_jax"] = {"shapes_hw": sides.shapes_hw, "top_k": weights.top_k}
    preprocessor = architecture.hub_preprocessor(weights.model["decoder"], sides.short_side_px, sides.long_side_max_px)
    torch_files.write_hub_folder(folder, to_torch(weights.variables, layout), config, preprocessor)


def save_pth(weights: Weights, path: str | os.PathLike) -> None:
    """Writes the authors' `.pth` layout; model fields and classes lie beside the weights, under "cdetr_jax".

    Raises: ModuleNotFoundError, without PyTorch; OSError.
    """
    classes = run_files.classes_as_json(weights.classes)
    sides = weights.preprocessing
    extra = {
        "model": dict(weights.model),
        "classes": classes,
        "sides_px": [sides.short_side_px, sides.long_side_max_px],
        "shapes_hw": [list(shape) for shape in sides.shapes_hw],
        "top_k": weights.top_k,
    }
    torch_files.write_pickle(path, to_torch(weights.variables, OFFICIAL), {"cdetr_jax": extra})


def save_run(weights: Weights, workdir: str | os.PathLike) -> None:
    """Writes a workdir that predicts, evaluates and starts other runs; it has no optimiser state to go on from.

    Raises: FileExistsError, if there is a run already; OSError.
    """
    if (Path(workdir) / run_files.CONFIG).exists():
        raise FileExistsError(f"{workdir} holds a run already; name another folder")
    sides = weights.preprocessing
    config = {
        "model": dict(weights.model),
        "data": {
            "eval_short_side_px": sides.short_side_px,
            "long_side_max_px": sides.long_side_max_px,
            "eval_shapes": sides.shapes_hw,
        },
        "eval": {"top_k": weights.top_k},
    }
    checkpoints = Checkpoints(workdir)
    try:
        checkpoints.save(0, weights.variables, {"epoch": 0, "batch": 0})
    finally:
        checkpoints.close()
    run_files.save_classes(workdir, weights.classes)
    run_files.save_config(workdir, ml_collections.ConfigDict(config))
