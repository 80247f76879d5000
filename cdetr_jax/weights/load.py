"""Weights from anywhere (a run of ours, the authors' files, the hub) as one thing."""

import dataclasses
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from absl import logging
from flax import traverse_util

from cdetr_jax.checkpoints import mismatch
from cdetr_jax.checkpoints import workdir as run_files
from cdetr_jax.checkpoints.io import Checkpoints
from cdetr_jax.classes import ClassTable
from cdetr_jax.data.plan import evaluation_shapes
from cdetr_jax.models.detector import DetectionTransformer, model_of, published_fields
from cdetr_jax.weights import architecture, torch_files
from cdetr_jax.weights.torch_convert import BACKBONE, Layout, from_torch, layout_of

# Fields of config.model that the weights do not depend on: a config may set them as it likes.
FREE_FIELDS = ("dropout", "frozen_stages", "compute_dtype", "matmul_precision", "attention")


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """How a picture gets its size: short side and longest side, then padding to the smallest of the shapes."""

    short_side_px: int
    long_side_max_px: int
    shapes_hw: tuple[tuple[int, int], ...]

    @property
    def largest_hw(self) -> tuple[int, int]:
        """A padded shape that holds what any of the shapes does."""
        height, width = np.max(self.shapes_hw, axis=0).tolist()
        return height, width


@dataclasses.dataclass(frozen=True)
class Weights:
    """A trained detector's weights and all that is known of it.

    Attributes:
      source: what the user named.
      model: the fields of `config.model`; `num_classes` is the number of class logits.
      classes: what each of them stands for.
      variables: the model's collections, `params` and, with frozen batch norm, `constants`; NumPy arrays.
      preprocessing: of pictures.
      top_k: detections per picture.
      config: the whole config of a run of ours; None for weights from elsewhere.
    """

    source: str
    model: dict[str, Any]
    classes: ClassTable
    variables: dict[str, Any]
    preprocessing: Preprocessing
    top_k: int = 100
    config: ml_collections.ConfigDict | None = None

    def make_model(self) -> DetectionTransformer:
        """The linen module of these weights."""
        return model_of(self.model)


def load_weights(source: str | os.PathLike, checkpoint: str = "best", dc5: bool = False) -> Weights:
    """Loads a detector.

    Args:
      source: the workdir of a run, one of its checkpoints (`workdir/checkpoints/1000`), a `.pth` of the authors or of
        facebookresearch/detr, a folder or file in the hub's layout, or a hub name, `hf://owner/model`.
      checkpoint: of a workdir: `best` by AP, or `latest`.
      dc5: the model is a DC5 one; only for a file that does not say so itself.
    Raises: FileNotFoundError, OSError (no network), ModuleNotFoundError (PyTorch is needed), ValueError, if there are
      no such weights or they are damaged, of another architecture, or incomplete.
    """
    source = os.fspath(source)
    if checkpoint not in ("best", "latest"):
        raise ValueError(
            f"checkpoint is {checkpoint!r}, expected 'best' or 'latest'; one of another step is named by its folder, "
            "workdir/checkpoints/STEP"
        )
    loaded = _load(source, checkpoint, dc5)
    if isinstance(loaded, Backbone):
        raise ValueError(
            f"{source} is a backbone alone, which finds no objects; a training run can start from it: "
            f"--config.init={source}"
        )
    return loaded


@dataclasses.dataclass(frozen=True)
class Backbone:
    """A ResNet's weights under torchvision's names, to start a training run from."""

    source: str
    state_dict: dict[str, Any]


def load_initial(source: str) -> Weights | Backbone:
    """Loads what `config.init` names: as `load_weights`, or a ResNet of torchvision's or timm's.

    Raises: as `load_weights`.
    """
    try:
        return _load(source, checkpoint="best", dc5=False)
    except OSError as error:
        if not source.startswith(torch_files.HUB_PREFIX):
            raise
        raise OSError(
            f"config.init: {error}; or train from random weights: --config.init= --config.model.backbone_norm=group "
            "--config.model.frozen_stages=0"
        ) from error


def _load(source: str, checkpoint: str, dc5: bool) -> Weights | Backbone:
    run = _run_of(source)
    if run is not None:
        return _load_run(source, *run, checkpoint)
    file, layout = _open(source)
    if layout == BACKBONE:
        return Backbone(source, file.state_dict)
    return _load_published(source, file, layout, dc5)


def _open(source: str) -> tuple[torch_files.WeightsFile, Layout]:
    is_hub_name = source.startswith(torch_files.HUB_PREFIX)
    file = torch_files.read(torch_files.download(source) if is_hub_name else source)
    config_type = (file.config or {}).get("model_type")
    if config_type is not None and config_type not in (*architecture.MODEL_TYPES.values(), "timm_backbone"):
        expected = " or ".join(architecture.MODEL_TYPES.values())
        raise ValueError(f"{source}: its config.json says model_type {config_type!r}, expected {expected}")
    with naming(source):
        return file, layout_of(file.state_dict)


def _load_published(source: str, file: torch_files.WeightsFile, layout: Layout, dc5: bool) -> Weights:
    with naming(source):
        fields = architecture.model_fields(file, layout)
        fields["dc5"] = fields["dc5"] or dc5
        classes = architecture.classes_of(file, fields["num_classes"])
        variables = from_torch(file.state_dict, _template(fields), layout)
    short, long = architecture.sides_of(file)
    ours = architecture.added_by_us(file)
    shapes = tuple(tuple(shape) for shape in ours.get("shapes_hw", evaluation_shapes(short, long)))
    return Weights(source, fields, classes, variables, Preprocessing(short, long, shapes), ours.get("top_k", 100))


def _load_run(source: str, workdir: str, step: int | None, checkpoint: str) -> Weights:
    config = run_files.load_config(workdir)
    is_whole = "train" in config  # else it was converted from elsewhere
    classes = run_files.load_classes(workdir)
    # A run from before a field was there is one with its published value.
    fields = published_fields() | config.model.to_dict() | {"num_classes": len(classes)}
    if is_whole:
        config = run_files.with_all_fields(config)
    checkpoints = Checkpoints(workdir, read_only=True)
    try:
        steps = checkpoints.steps()
        if not steps:
            raise FileNotFoundError(f"{checkpoints.directory} holds no finished checkpoint")
        if step is None:
            first = checkpoints.best_step() if checkpoint == "best" else steps[-1]
            others = [other for other in reversed(steps) if other != first]
            step, variables = checkpoints.first_whole([first, *others], checkpoints.restore_weights)
        elif step in steps:
            with naming(f"{source}, one of {', '.join(map(str, steps))}"):
                variables = checkpoints.restore_weights(step)
        else:
            raise FileNotFoundError(f"{checkpoints.directory} has no checkpoint {step}, only {steps}")
    finally:
        checkpoints.close()
    given, expected = (
        {name: leaf.shape for name, leaf in traverse_util.flatten_dict(tree, sep="/").items()}
        for tree in (variables, _template(fields))
    )
    problems = mismatch.compare(given, expected)
    if problems:
        raise ValueError(f"checkpoint {step} of {workdir} does not fit its own config.json: {problems}")
    logging.info("Weights of step %d of %s", step, workdir)
    data = config.data
    sides = data.eval_short_side_px, data.long_side_max_px
    shapes = tuple(tuple(shape) for shape in data.eval_shapes or evaluation_shapes(*sides))
    preprocessing = Preprocessing(*sides, shapes)
    return Weights(source, fields, classes, variables, preprocessing, config.eval.top_k, config if is_whole else None)


def _run_of(source: str) -> tuple[str, int | None] | None:
    """The workdir and the step that a path names; None if it is no run of ours."""
    path = Path(source)
    if path.parent.name == "checkpoints" and path.name.isdigit():
        return str(path.parents[1]), int(path.name)
    if path.name == "checkpoints":
        path = path.parent
    is_run = (path / run_files.CLASSES).is_file() or (path / "checkpoints").is_dir()
    return (str(path), None) if is_run else None


def _template(fields: dict[str, Any]) -> Any:
    """The shapes of the model's variables."""
    images, sizes_hw = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.uint8), jax.ShapeDtypeStruct((1, 2), jnp.int32)
    return jax.eval_shape(model_of(fields).init, jax.eval_shape(lambda: jax.random.key(0)), images, sizes_hw)


@contextmanager
def naming(source: str) -> Iterator[None]:
    """Puts the weights' name before the message of a ValueError."""
    try:
        yield
    except ValueError as error:
        if source in str(error):
            raise
        raise ValueError(f"{source}: {error}") from error
