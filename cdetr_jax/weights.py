"""Weights from anywhere (a run of ours, the authors' files, the hub) as one thing, and back into each format."""

import dataclasses
import os
import re
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from absl import logging
from flax import traverse_util

from cdetr_jax import build
from cdetr_jax.checkpoints import architecture, misfit, torch_files
from cdetr_jax.checkpoints import workdir as run_files
from cdetr_jax.checkpoints.io import Checkpoints
from cdetr_jax.checkpoints.torch_convert import (
    BACKBONE,
    HUB,
    HUB_WITHOUT_TIMM,
    OFFICIAL,
    Layout,
    from_torch,
    is_ignored,
    layout_of,
    to_torch,
)
from cdetr_jax.data.plan import evaluation_shapes
from cdetr_jax.models.detector import DetectionTransformer

# Fields of config.model that the weights do not depend on: a config may set them as it likes.
FREE_FIELDS = ("dropout", "frozen_stages", "compute_dtype", "matmul_precision")
HEAD = "params/class_embed/"


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """How a picture gets its size: short side and longest side, then padding to the smallest of the shapes."""

    short_side_px: int
    long_side_max_px: int
    shapes_hw: tuple[tuple[int, int], ...]


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
    classes: build.ClassTable
    variables: dict[str, Any]
    preprocessing: Preprocessing
    top_k: int = 100
    config: ml_collections.ConfigDict | None = None

    def make_model(self) -> DetectionTransformer:
        """The linen module of these weights."""
        return build.model_of(self.model)


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


def start_from(
    initial: Weights | Backbone,
    variables: Any,
    classes: build.ClassTable,
    report_path: str | os.PathLike | None = None,
) -> Any:
    """A new run's variables with loaded weights in them.

    A class head of another size, or for other classes, stays new; of a ResNet only the backbone is loaded. Everything
    else must fit. What was loaded, made new and left over is logged, and listed name by name in `report_path`.
    Args:
      initial: of `load_initial`.
      variables: `{"params", "constants"}` of the new run.
      classes: of the new run.
    Raises: ValueError, with the missing, unused and mis-shaped names.
    """
    new = traverse_util.flatten_dict(variables, sep="/")
    if isinstance(initial, Backbone):
        template = {name: {"backbone": tree["backbone"]} for name, tree in variables.items() if "backbone" in tree}
        with _naming(f"config.init={initial.source}"):
            old = traverse_util.flatten_dict(from_torch(initial.state_dict, template, BACKBONE), sep="/")
        made_new = sorted(new.keys() - old.keys())
        left_over = sorted(name for name in initial.state_dict if is_ignored(name, BACKBONE))
    else:
        old = traverse_util.flatten_dict(initial.variables, sep="/")
        head = {name for name in old.keys() | new.keys() if name.startswith(HEAD)}
        head_is_new = _head_differs(initial, new, classes)
        made_new = sorted(head & new.keys()) if head_is_new else []
        left_over = sorted(head & old.keys()) if head_is_new else []
        old = {name: leaf for name, leaf in old.items() if name not in left_over}
        problems = misfit.compare(
            {name: leaf.shape for name, leaf in old.items()},
            {name: leaf.shape for name, leaf in new.items() if name not in made_new},
        )
        if problems:
            raise ValueError(
                f"config.init={initial.source} does not fit config.model: {problems}; its own model is "
                f"{', '.join(f'{name}={value}' for name, value in initial.model.items() if name not in FREE_FIELDS)}"
            )
    report = {"loaded": sorted(old), "made_new": made_new, "left_over": left_over}
    for what, names in report.items():
        logging.info("config.init=%s, %s: %s", initial.source, what.replace("_", " "), _by_module(names))
    if report_path is not None:
        run_files.write_json(report_path, {"source": initial.source, **report})
    return traverse_util.unflatten_dict({name: old.get(name, leaf) for name, leaf in new.items()}, sep="/")


def check_form(initial: Weights, model: dict[str, Any]) -> None:
    """Refuses weights whose arrays fit a model that computes something else with them.

    Args:
      initial: of `load_initial`.
      model: the fields of `config.model` of the new run.
    Raises: ValueError, with the fields that differ.
    """
    free = (*FREE_FIELDS, "num_classes", "local_gain", "dc5")  # a DC5 model may start from one without
    differing = [
        f"config.model.{name} is {model[name]!r}, expected {value!r}"
        for name, value in initial.model.items()
        if name not in free and model[name] != value
    ]
    if differing:
        raise ValueError(f"config.init={initial.source} is of another model: {'; '.join(differing)}")


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
    with _naming(source):
        return file, layout_of(file.state_dict)


def _load_published(source: str, file: torch_files.WeightsFile, layout: Layout, dc5: bool) -> Weights:
    with _naming(source):
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
    classes = run_files.load_classes(workdir)
    # A run from before a field was there is one with its published value.
    fields = architecture.published_fields() | config.model.to_dict() | {"num_classes": len(classes)}
    checkpoints = Checkpoints(workdir, read_only=True)
    try:
        if step is None:
            step = checkpoints.best_step() if checkpoint == "best" else checkpoints.latest_step()
        if step is None:
            raise FileNotFoundError(f"{checkpoints.directory} holds no finished checkpoint")
        if step not in checkpoints.steps():
            raise FileNotFoundError(f"{checkpoints.directory} has no checkpoint {step}, only {checkpoints.steps()}")
        variables = checkpoints.restore_weights(step)
    finally:
        checkpoints.close()
    given, expected = (
        {name: leaf.shape for name, leaf in traverse_util.flatten_dict(tree, sep="/").items()}
        for tree in (variables, _template(fields))
    )
    problems = misfit.compare(given, expected)
    if problems:
        raise ValueError(f"checkpoint {step} of {workdir} does not fit its own config.json: {problems}")
    logging.info("Weights of step %d of %s", step, workdir)
    data = config.data
    sides = data.eval_short_side_px, data.long_side_max_px
    shapes = tuple(tuple(shape) for shape in data.eval_shapes or evaluation_shapes(*sides))
    preprocessing = Preprocessing(*sides, shapes)
    is_whole = "train" in config  # else it was converted from elsewhere
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
    model = build.model_of(fields)
    images, sizes = jnp.zeros((1, 64, 64, 3), jnp.uint8), jnp.full((1, 2), 64)
    return jax.eval_shape(lambda: model.init(jax.random.key(0), images, sizes))


def _head_differs(weights: Weights, new: dict[str, Any], classes: build.ClassTable) -> bool:
    """Whether the class head has another size, or a logit would change its meaning."""
    old = traverse_util.flatten_dict(weights.variables, sep="/")
    if any(name in new and new[name].shape != old[name].shape for name in old if name.startswith(HEAD)):
        return True
    if len(weights.classes) != len(classes):  # one of the two has a logit for "no object"
        return True
    return any(
        before and now and before.name != now.name and not before.is_unnamed and not now.is_unnamed
        for before, now in zip(weights.classes, classes, strict=True)
    )


def _by_module(names: Collection[str]) -> str:
    """The names, those of a module with many of them as one entry with their number."""
    counts = Counter(_module(name) for name in names)
    entries = [f"{module} ({count} arrays)" for module, count in counts.items() if count > 2]
    entries += [name for name in names if counts[_module(name)] <= 2]
    return ", ".join(entries) or "nothing"


def _module(name: str) -> str:
    return re.sub(r"^(params|constants)/", "", name).split("/")[0]


@contextmanager
def _naming(source: str) -> Iterator[None]:
    """Puts the weights' name before the message of a ValueError."""
    try:
        yield
    except ValueError as error:
        if source in str(error):
            raise
        raise ValueError(f"{source}: {error}") from error
