"""The start of a run: whether it is the workdir's run, whether its data are there, and its first state."""

import contextlib
import datetime
import itertools
import json
import os
import platform
import shlex
import subprocess
import sys
import zlib
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import ml_collections
from absl import logging
from clu import parameter_overview

from cdetr_jax.checkpoints import workdir as run_files
from cdetr_jax.checkpoints.io import Checkpoints, checksums
from cdetr_jax.classes import ClassTable, classes_in_data
from cdetr_jax.config_check import flat_fields
from cdetr_jax.data.findings import leaks
from cdetr_jax.data.pipeline import sizes_hw
from cdetr_jax.data.reader import usable_cores
from cdetr_jax.data.sources import Source, missing_files
from cdetr_jax.files import as_path, write_text
from cdetr_jax.records import Category
from cdetr_jax.training.optimizer import FROZEN, parameter_groups
from cdetr_jax.training.processes import agree, code_version
from cdetr_jax.training.step import TrainState, new_rng
from cdetr_jax.weights.load import Backbone, Weights, load_initial
from cdetr_jax.weights.start import check_form, start_from

# Fields that may change between the start of a run and its resumption: they do not touch the weights.
FREE_GROUPS = ("eval",)
FREE_FIELDS = (
    "model.attention",
    "data.workers",
    "data.threads",
    "data.folder",
    "data.split_file",
    "data.eval_images",
    "data.eval_annotations",
    "data.train_images",
    "data.train_annotations",
    "data.tfds_data_dir",
    "data.tfds_name",
    "data.train_split",
    "data.eval_split",
    "data.eval_shapes",
    "data.num_eval_shapes",
    "data.on_error",
    "data.max_bad_fraction",
    "train.num_epochs",
    "train.max_steps",
    "train.log",
    "train.log_every_steps",
    "train.checkpoint_every_steps",
    "train.keep_checkpoints",
)
SHOWN_CLASSES = 8
ENVIRONMENT = "environment.jsonl"  # in the workdir
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "scipy", "pillow")
INIT_SHAPE = (64, 64)  # of a picture; the parameters do not depend on it


def template(config: ml_collections.ConfigDict, functions: Any) -> TrainState:
    return jax.eval_shape(lambda: functions.init(new_rng(config.seed), INIT_SHAPE))


def initial_state(
    config: ml_collections.ConfigDict,
    functions: Any,
    checkpoints: Checkpoints,
    planned_from: dict[str, Any],
    classes: ClassTable,
) -> tuple[TrainState, int]:
    """The newest undamaged checkpoint's state and step, or a new state and 0.

    Raises: ValueError, if it does not fit the config or the data; DamagedCheckpointError, if all are damaged.
    """
    steps = checkpoints.steps()[::-1]
    if not steps:
        initial = load_initial(config.init) if config.init else None
        if isinstance(initial, Weights):
            check_form(initial, config.model.to_dict())
        state = functions.init(new_rng(config.seed), INIT_SHAPE)
        if initial is not None:
            state = _start_from(initial, state, classes, checkpoints.directory.parent)
        return state, 0
    shapes = template(config, functions)
    step, (state, position) = checkpoints.first_whole(steps, lambda step: checkpoints.restore(step, shapes))
    if position["steps_per_epoch"] != planned_from["steps_per_epoch"]:
        raise ValueError(
            f"the run in {checkpoints.directory.parent} has {position['steps_per_epoch']} steps an epoch, but the "
            f"training data and config.train.batch_size now give {planned_from['steps_per_epoch']}; use the same data, "
            "or another workdir"
        )
    if (planned_from | position)["pictures"] != planned_from["pictures"]:
        logging.warning("The training pictures have other sizes than before: from here on the epochs' plans are others")
    for damaged in steps[: steps.index(step)]:
        checkpoints.set_aside(damaged)
    logging.info("Going on from step %d, in %s", step, checkpoints.directory)
    return state, step


def check_data(
    config: ml_collections.ConfigDict, source: Source, eval_source: Source | None, classes: ClassTable
) -> None:
    """Looks through both data sets before anything is trained: an evaluation may be hours away.

    Raises: ValueError, if the evaluation set has no picture, one of a size that cannot be, or no class of the training
      set, or the two sets of a folder share pictures; FileNotFoundError, if pictures are missing. Of shared and missing
      ones it only warns where damaged ones are to be skipped.
    """
    fields = ("folder", "folder") if config.data.source == "folder" else ("train_images", "eval_images")
    sets = zip(("training", "evaluation"), fields, (source, eval_source), strict=True)
    for what, field, each in sets:
        missing = missing_files(each) if each is not None else []
        if missing:
            message = (
                f"{len(missing)} of {len(each)} pictures of the {what} set are missing: {', '.join(missing[:3])}"
                f"{', ...' if len(missing) > 3 else ''}; is config.data.{field} the "
                "right folder?"
            )
            if config.data.on_error == "raise":
                raise FileNotFoundError(message)
            logging.warning("%s", message)
    if eval_source is not None and config.data.source == "folder":
        shared = leaks({config.data.train_split: source, config.data.eval_split: eval_source})
        if shared and config.data.on_error == "raise":
            raise ValueError(
                f"{shared}: the AP would be that of pictures that were trained on; take them out of one, or train all "
                "the same with --config.data.on_error=skip"
            )
        if shared:
            logging.warning("%s: the AP says little", shared)
    if eval_source is not None:
        try:
            sizes_hw(eval_source)
            classes_in_data(classes, eval_source.categories)
        except ValueError as error:
            raise ValueError(f"the evaluation set: {error}") from error


def check_same_command(config: ml_collections.ConfigDict) -> None:
    """Raises ValueError on all processes, if they have not the same config, code and number of devices."""
    fields = {f"config.{name}": value for name, value in flat_fields(config).items()}
    agree({**fields, **code_version(), "the number of devices": jax.local_device_count()})


def check_same_data(source: Source | None, eval_source: Source | None, classes: ClassTable) -> None:
    """Raises ValueError on all processes, if they have not the same pictures and classes."""
    facts = {}
    for what, each in (("training", source), ("evaluation", eval_source)):
        if each is not None:
            facts[f"the {what} set"] = f"{len(each)} pictures (fingerprint {fingerprint(each)})"
    agree(facts | {f"class logit {logit}": _named(category) for logit, category in enumerate(classes)})


def check_same_state(state: Any, step: int = 0) -> None:
    """Raises ValueError on all processes, if they do not start from the same step with the same arrays."""
    sums = {f"the checksum of {name}": f"{checksum:08x}" for name, checksum in checksums(state).items()}
    agree({"the step to start from": step, **sums})


def fingerprint(source: Source) -> str:
    """Of all that a plan depends on in the data: with another one, (epoch, batch) means other pictures."""
    return f"{zlib.crc32(sizes_hw(source).tobytes()):08x}"


def _start_from(initial: Weights | Backbone, state: TrainState, classes: ClassTable, workdir: Path) -> TrainState:
    """A new run's state with loaded weights; `workdir/init.json` tells of every array where it is from."""
    report_path = workdir / "init.json" if jax.process_index() == 0 else None
    variables = start_from(initial, {"params": state.params, "constants": state.constants}, classes, report_path)
    ema_params = None if state.ema_params is None else variables["params"]
    return state.replace(params=variables["params"], constants=variables.get("constants", {}), ema_params=ema_params)


def check_same_run(config: ml_collections.ConfigDict, classes: ClassTable, workdir: str | os.PathLike) -> None:
    """Raises ValueError if the workdir's run has other classes, or other values in a field that its weights need."""
    changes = []
    with contextlib.suppress(FileNotFoundError):
        flat_before, flat_now = flat_fields(run_files.load_config(workdir)), flat_fields(config)
        for field in sorted(flat_before):  # a field that came later has, as its default, what was done before
            free = field in FREE_FIELDS or field.split(".")[0] in FREE_GROUPS
            if not free and _plain(flat_before[field]) != _plain(flat_now.get(field)):
                changes.append(f"config.{field} was {flat_before[field]!r}, is {flat_now.get(field)!r}")
    with contextlib.suppress(FileNotFoundError):
        logits = list(itertools.zip_longest(run_files.load_classes(workdir), classes))
        differing = [logit for logit, (before, now) in enumerate(logits) if before != now]
        changes += [
            f"class logit {logit} was {_named(logits[logit][0])}, is {_named(logits[logit][1])}"
            for logit in differing[:SHOWN_CLASSES]
        ]
        if len(differing) > SHOWN_CLASSES:
            changes.append(f"so are {len(differing) - SHOWN_CLASSES} more class logits")
    if changes:
        raise ValueError(
            f"{workdir} holds another run: {'; '.join(changes)}. Use another --workdir, or undo the changes"
        )


def _named(category: Category | None) -> str:
    return "nothing" if category is None else f"{category.name!r} (id {category.id})"


def _plain(value: Any) -> Any:
    """Tuples as the lists that JSON makes of them."""
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def record_start(workdir: str | os.PathLike, step: int) -> dict[str, Any]:
    """Adds a line to `workdir/environment.jsonl`: when, where, with what and from which step a run starts.

    Returns: the same. Only what can be found out is in it.
    """
    path = as_path(workdir) / ENVIRONMENT
    environment = {
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "step": step,
        "command": shlex.join(sys.argv),
        **code_version(),
        "git_commit": git_commit(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "system": platform.platform(),
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "processor": _processor(),
        "cores": usable_cores(),
        "processes": jax.process_count(),
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", ""),
    }
    before = path.read_text(encoding="utf-8") if path.exists() else ""
    write_text(path, before + json.dumps(environment) + "\n")
    return environment


def _version(package: str) -> str:
    with contextlib.suppress(metadata.PackageNotFoundError):  # such as pillow, where pillow-simd takes its place
        return metadata.version(package)
    return ""


def _processor() -> str:
    """The name of the CPU, or of its kind."""
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n")
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return platform.processor() or platform.machine()


def git_commit() -> str:
    """Of this code, with a + if its files were changed since; empty, where it is in no clone and from none."""
    package = Path(__file__).parents[1]
    git = ["git", "-C", str(package)]
    try:
        # The package may be installed inside of another clone, which does not track it.
        subprocess.run([*git, "ls-files", "--error-unmatch", "__init__.py"], check=True, capture_output=True)
        commit = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
        changes = subprocess.run([*git, "status", "--porcelain", "."], check=True, capture_output=True).stdout
        return commit + "+" * bool(changes.strip())
    except (OSError, subprocess.CalledProcessError):
        pass
    with contextlib.suppress(metadata.PackageNotFoundError, ValueError):  # pip install git+https://...
        origin = json.loads(metadata.distribution("cdetr_jax").read_text("direct_url.json") or "{}")
        return origin.get("vcs_info", {}).get("commit_id", "")
    return ""


def describe_parameters(workdir: str | os.PathLike, params: Any, frozen_modules: tuple[str, ...]) -> str:
    """Writes the table of all parameters to `workdir/parameters.txt`. Returns: how many there are, in a line."""
    path = as_path(workdir) / "parameters.txt"
    write_text(path, parameter_overview.get_parameter_overview(params, include_stats=False) + "\n")
    groups = jax.tree.leaves(parameter_groups(params, frozen_modules))
    sizes = [leaf.size for leaf in jax.tree.leaves(params)]
    frozen = sum(size for size, group in zip(sizes, groups, strict=True) if group == FROZEN)
    total = sum(sizes)
    return f"{total / 1e6:.2f} M parameters, {(total - frozen) / 1e6:.2f} M of them trained, listed in {path}"
