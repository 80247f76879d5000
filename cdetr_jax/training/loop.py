"""A training run and an evaluation, read top to bottom."""

import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np
from absl import logging
from clu import parameter_overview
from jax.experimental import multihost_utils

from cdetr_jax import build
from cdetr_jax.checkpoints import workdir as run_files
from cdetr_jax.checkpoints.io import Checkpoints
from cdetr_jax.classes import ClassTable, class_table, classes_in_data
from cdetr_jax.config_check import check_config, count_train_devices
from cdetr_jax.data.pipeline import sizes_hw
from cdetr_jax.data.plan import EpochPlan
from cdetr_jax.data.sources import Source
from cdetr_jax.evaluation.coco_eval import CocoMetrics, coco_average_precision
from cdetr_jax.matching.assign import NonFiniteCostError
from cdetr_jax.training.feed import Feed
from cdetr_jax.training.metrics import IntervalTimer, Progress, make_writer
from cdetr_jax.training.parallel import Trainer, unreplicate
from cdetr_jax.training.step import StepMetrics, TrainState, new_rng
from cdetr_jax.weights.load import FREE_FIELDS as FREE_MODEL_FIELDS
from cdetr_jax.weights.load import Backbone, Weights, load_initial
from cdetr_jax.weights.start import check_form, start_from

# Fields that may change between the start of a run and its resumption: they do not touch the weights.
FREE_GROUPS = ("eval",)
FREE_FIELDS = (
    "data.workers",
    "data.threads",
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
    "train.log_every_steps",
    "train.checkpoint_every_steps",
    "train.keep_checkpoints",
)
INIT_SHAPE = (64, 64)  # of a picture; the parameters do not depend on it


class NonFiniteLossError(FloatingPointError):
    """A loss term, or the gradient, is NaN or infinite."""


def train_and_evaluate(config: ml_collections.ConfigDict, workdir: str | os.PathLike) -> dict[str, float] | None:
    """Trains from the newest checkpoint in `workdir`, or from the start, to the end of the config's epochs.

    Killed at any moment and called again it goes on from the last checkpoint and ends with the weights that it would
    have had.
    Returns: the last evaluation's 12 COCO numbers; None if none was asked for.
    Raises: ValueError, if a field or the data are wrong, or the workdir holds another run; NonFiniteLossError;
      OSError, if a checkpoint cannot be written.
    """
    check_config(config)
    devices = _train_devices(config)
    source = build.make_source(config, "train")
    evaluates = config.eval.every_epochs > 0
    eval_source = build.make_source(config, "eval") if evaluates else None
    classes = class_table(source.categories, config.data.class_ids, config.model.num_classes)
    _check_same_run(config, workdir)

    plan_settings = build.make_plan_settings(config, source)
    device_count = len(devices) * jax.process_count()
    eval_plan = build.make_eval_plan(config, eval_source, device_count) if evaluates else None
    steps_per_epoch = plan_settings.steps_per_epoch
    schedules = build.make_schedules(config, steps_per_epoch)
    functions = build.make_step_functions(config, len(classes), schedules)
    trainer = Trainer(functions, devices)
    checkpoints = Checkpoints(workdir, keep=config.train.keep_checkpoints)
    planned_from = {"steps_per_epoch": steps_per_epoch, "pictures": _fingerprint(source)}
    state, start_step = _initial_state(config, functions, checkpoints, planned_from, classes)
    accumulation_steps = config.train.accumulation_steps
    epoch, step_of_epoch = divmod(start_step, steps_per_epoch)
    start = (epoch, step_of_epoch * accumulation_steps)
    batches = build.make_train_batches(config, source, classes, plan_settings, start)

    total_steps = config.train.num_epochs * steps_per_epoch
    if config.train.max_steps is not None:
        total_steps = min(total_steps, config.train.max_steps)
    is_first_process = jax.process_index() == 0
    if is_first_process:
        run_files.save_config(workdir, config)
        run_files.save_classes(workdir, classes)
        if start_step == 0:
            logging.info(
                "Parameters:\n%s", parameter_overview.get_parameter_overview(state.params, include_stats=False)
            )
    writer = make_writer(workdir) if is_first_process else None
    if writer:
        writer.truncate_after(start_step)
    if start_step >= total_steps:
        logging.info("The run in %s is complete: %d steps of %d.", workdir, start_step, total_steps)
    progress = Progress(total_steps, steps_per_epoch, start_step) if is_first_process else None
    logging.info(
        "%d pictures, %d steps an epoch, %d steps in all, on %d device(s) of %d process(es)",
        len(source), steps_per_epoch, total_steps, device_count, jax.process_count(),
    )  # fmt: skip

    state = trainer.replicate(state)
    feed = Feed(batches, trainer.put, accumulation_steps)
    timer = IntervalTimer()
    recent: list[tuple[int, StepMetrics]] = []
    summary = None
    try:
        for step in range(start_step + 1, total_steps + 1):
            with timer.part("data"):
                micro_batches = next(feed)
            try:
                state, step_metrics = trainer.step(state, micro_batches)
            except NonFiniteCostError as error:
                index = np.concatenate([placed.index.reshape(-1) for placed in micro_batches])
                picture = source.records[int(index[error.image])].file_name
                raise NonFiniteLossError(
                    f"step {step}: {error}, picture {picture}: the network's output is NaN or infinite; "
                    "use a lower config.optimizer.lr, or look at the pictures of this batch"
                ) from None
            timer.add("match", trainer.matching_s)
            trainer.matching_s = 0.0
            if recent:
                _check_finite(*recent[-1])  # one step behind, so that the device need not wait
            recent.append((step, step_metrics))

            end_of_epoch = step % steps_per_epoch == 0
            last = step == total_steps
            metrics = None
            if step % config.train.log_every_steps == 0 or last or step == start_step + 1:
                _check_finite(*recent[-1])
                metrics = _mean_scalars(config, recent)
                report = timer.report(len(recent) * config.train.batch_size)
                if step > start_step + 1:  # the first interval is compilation
                    metrics |= report
                metrics |= {name: float(schedule(step - 1)) for name, schedule in schedules._asdict().items()}
                recent = []
                if writer:
                    writer.write_scalars(step, metrics, epoch=step / steps_per_epoch, kind="train")
            if progress:
                progress.update(step, metrics)

            if not (end_of_epoch or last or step % config.train.checkpoint_every_steps == 0):
                continue
            if recent:
                _check_finite(*recent[-1])
            with timer.pause():
                scores = None
                if evaluates and (last or (end_of_epoch and (step // steps_per_epoch) % config.eval.every_epochs == 0)):
                    variables = state.eval_variables
                    summary = _evaluate(config, trainer, variables, eval_source, eval_plan, classes).summary
                    if writer:
                        writer.write_scalars(step, summary, epoch=step / steps_per_epoch, kind="eval")
                    logging.info("step %d: AP %.4f, AP50 %.4f", step, summary["AP"], summary["AP50"])
                    scores = {"AP": summary["AP"]}
                epoch, step_of_epoch = divmod(step, steps_per_epoch)
                position = {"epoch": epoch, "batch": step_of_epoch, **planned_from}
                saved = unreplicate(state)
                _check_finite_parameters(step, saved.params)
                checkpoints.save(step, saved, position, scores)
    finally:
        feed.close()
        if progress:
            progress.close()
        if writer:
            writer.close()
        checkpoints.close()
    if batches.bad_files:
        logging.warning("%d damaged pictures were skipped: %s", len(batches.bad_files), sorted(batches.bad_files))
    return summary


def _train_devices(config: ml_collections.ConfigDict) -> tuple[jax.Device, ...]:
    """The local devices that a batch is spread over, see `count_train_devices`. Raises: ValueError."""
    devices, batch_size = jax.local_devices(), config.train.batch_size
    count = count_train_devices(batch_size, config.train.accumulation_steps, len(devices), jax.process_count())
    if count < len(devices):
        logging.warning(
            "config.train.batch_size %d uses %d of %d devices, a picture each; use a multiple of %d for all",
            batch_size, count, len(devices), len(devices) * config.train.accumulation_steps,
        )  # fmt: skip
    return tuple(devices[:count])


def evaluate(config: ml_collections.ConfigDict, weights: Weights) -> CocoMetrics:
    """COCO AP of a detector on the config's evaluation pictures.

    Args:
      config: its data and eval fields count, and those of the model that the weights leave open.
      weights: of `load_weights`. Their classes are found in the data by name, see `classes_in_data`.
    Raises: ValueError, FileNotFoundError, if the weights or the data do not fit the config.
    """
    config = _with_model_of(weights, config)
    check_config(config)
    source = build.make_source(config, "eval")
    logging.info("%d pictures", len(source))
    trainer = Trainer(_functions(config, len(weights.classes)))
    variables = trainer.replicate(weights.variables)
    plan = build.make_eval_plan(config, source, jax.device_count())
    return _evaluate(config, trainer, variables, source, plan, weights.classes)


def _with_model_of(weights: Weights, config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    config = config.copy_and_resolve_references()
    with config.unlocked():
        for name, value in weights.model.items():
            if name in FREE_MODEL_FIELDS:
                continue
            if config.model[name] not in (value, 0):  # 0: to be counted
                logging.info("config.model.%s is %r: the weights' own value counts", name, value)
            config.model[name] = value
    return config


def _functions(config: ml_collections.ConfigDict, num_classes: int) -> Any:
    return build.make_step_functions(config, num_classes, build.make_schedules(config, 1))


def _template(config: ml_collections.ConfigDict, functions: Any) -> TrainState:
    return jax.eval_shape(lambda: functions.init(new_rng(config.seed), INIT_SHAPE))


def _initial_state(
    config: ml_collections.ConfigDict,
    functions: Any,
    checkpoints: Checkpoints,
    planned_from: dict[str, Any],
    classes: ClassTable,
) -> tuple[TrainState, int]:
    """The newest checkpoint's state and step, or a new state and 0."""
    step = checkpoints.latest_step()
    if step is None:
        initial = load_initial(config.init) if config.init else None
        if isinstance(initial, Weights):
            check_form(initial, config.model.to_dict())
        state = functions.init(new_rng(config.seed), INIT_SHAPE)
        if initial is not None:
            state = _start_from(initial, state, classes, checkpoints.directory.parent)
        return state, 0
    state, position = checkpoints.restore(step, _template(config, functions))
    if position["steps_per_epoch"] != planned_from["steps_per_epoch"]:
        raise ValueError(
            f"the run in {checkpoints.directory.parent} has {position['steps_per_epoch']} steps an epoch, but the "
            f"training data and config.train.batch_size now give {planned_from['steps_per_epoch']}; use the same data, "
            "or another workdir"
        )
    if (planned_from | position)["pictures"] != planned_from["pictures"]:
        logging.warning("The training pictures have other sizes than before: from here on the epochs' plans are others")
    logging.info("Going on from step %d, in %s", step, checkpoints.directory)
    return state, step


def _fingerprint(source: Source) -> str:
    """Of all that a plan depends on in the data: with another one, (epoch, batch) means other pictures."""
    return f"{zlib.crc32(sizes_hw(source).tobytes()):08x}"


def _start_from(initial: Weights | Backbone, state: TrainState, classes: ClassTable, workdir: Path) -> TrainState:
    """A new run's state with loaded weights; `workdir/init.json` tells of every array where it is from."""
    report_path = workdir / "init.json" if jax.process_index() == 0 else None
    variables = start_from(initial, {"params": state.params, "constants": state.constants}, classes, report_path)
    ema_params = None if state.ema_params is None else variables["params"]
    return state.replace(params=variables["params"], constants=variables.get("constants", {}), ema_params=ema_params)


def _check_same_run(config: ml_collections.ConfigDict, workdir: str | os.PathLike) -> None:
    """Raises ValueError if the workdir's run has other values in a field that its weights depend on."""
    try:
        before = run_files.load_config(workdir).to_dict()
    except FileNotFoundError:
        return
    changes = []
    flat_before, flat_now = _flatten(before), _flatten(config.to_dict())
    for field in sorted(flat_before):  # a field that came later has, as its default, what was done before
        free = field in FREE_FIELDS or field.split(".")[0] in FREE_GROUPS
        if not free and _plain(flat_before[field]) != _plain(flat_now.get(field)):
            changes.append(f"config.{field} was {flat_before[field]!r}, is {flat_now.get(field)!r}")
    if changes:
        raise ValueError(
            f"{workdir} holds another run: {'; '.join(changes)}. Use another --workdir, or undo the changes"
        )


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for name, value in tree.items():
        flat |= _flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def _plain(value: Any) -> Any:
    """Tuples as the lists that JSON makes of them."""
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _check_finite(step: int, metrics: StepMetrics) -> None:
    """Raises NonFiniteLossError that names the first term that is NaN or infinite. Fetches one flag if none is."""
    if jax.device_get(metrics.is_finite.addressable_data(0)).all():
        return
    losses = unreplicate(metrics.losses)
    terms = {"class": losses.class_loss, "L1": losses.l1_loss, "GIoU": losses.giou_loss, "total": losses.total}
    for name, values in terms.items():
        if not np.isfinite(values).all():
            raise NonFiniteLossError(f"step {step}: the {name} loss is not finite; use a lower config.optimizer.lr")
    raise NonFiniteLossError(f"step {step}: the gradient is not finite; use a lower config.optimizer.lr")


def _check_finite_parameters(step: int, params: Any) -> None:
    """Raises NonFiniteLossError: the last update may have overflowed although its loss and gradient did not."""
    if not all(np.isfinite(np.asarray(leaf)).all() for leaf in jax.tree.leaves(params)):
        raise NonFiniteLossError(f"step {step}: a parameter is not finite; use a lower config.optimizer.lr")


def _mean_scalars(config: ml_collections.ConfigDict, recent: Sequence[tuple[int, StepMetrics]]) -> dict[str, float]:
    """Names and means over the steps of an interval; the loss terms are weighted, so that they add up to `loss`."""
    fetched = [unreplicate(metrics) for _, metrics in recent]
    mean = jax.tree.map(lambda *values: np.mean(values, axis=0), *fetched)
    losses, weights = mean.losses, config.loss
    scalars = {
        "loss": losses.total,
        "grad_norm": mean.grad_norm,
        "class_error": losses.class_error,
        "cardinality_error": losses.cardinality_error[-1],
    }
    terms = {
        "class": weights.class_weight * losses.class_loss,
        "l1": weights.l1_weight * losses.l1_loss,
        "giou": weights.giou_weight * losses.giou_loss,
    }
    for name, values in terms.items():
        scalars[f"loss_{name}"] = values.sum()
        scalars |= {f"loss_{name}_layer{i}": value for i, value in enumerate(values)}
    return {name: float(value) for name, value in scalars.items()}


def _evaluate(
    config: ml_collections.ConfigDict,
    trainer: Trainer,
    variables: Any,
    source: Source,
    plan: EpochPlan,
    classes: ClassTable,
) -> CocoMetrics:
    """Runs every picture of the source, in a plan's batches, and scores the detections. `variables` are replicated."""
    classes = classes_in_data(classes, source.categories)
    batches = build.make_eval_batches(config, source, plan)
    feed = Feed(batches, trainer.put)
    results = []
    try:
        for [placed] in feed:
            index = placed.index.reshape(-1)
            detections = trainer.detect(variables, placed)
            if jax.process_count() > 1:
                detections, index = multihost_utils.process_allgather((detections, index), tiled=True)
            for row, i in enumerate(index):
                if i >= 0:
                    found = jax.tree.map(lambda x, row=row: x[row], detections)
                    results += coco_results(source.records[i].image_id, found, classes)
    finally:
        feed.close()
    if batches.bad_files:
        logging.warning(
            "%d damaged pictures count as if nothing had been found in them: %s",
            len(batches.bad_files), sorted(batches.bad_files),
        )  # fmt: skip
    return coco_average_precision(source.records, source.categories, results)


def coco_results(image_id: int, detections: Any, classes: ClassTable) -> list[dict[str, Any]]:
    """One picture's detections in COCO's results format; logits that stand for nothing are left out."""
    results = []
    for score, label, (left, top, right, bottom) in zip(
        detections.scores.tolist(), detections.labels.tolist(), detections.boxes_xyxy_px.tolist(), strict=True
    ):
        if classes[label] is not None:
            box = [left, top, right - left, bottom - top]
            results.append({"image_id": image_id, "category_id": classes[label].id, "bbox": box, "score": score})
    return results
