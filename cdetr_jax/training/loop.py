"""A training run, read top to bottom."""

import contextlib
import functools
import io
import itertools
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np
from absl import logging

from cdetr_jax import build
from cdetr_jax.checkpoints import workdir as run_files
from cdetr_jax.checkpoints.io import Checkpoints
from cdetr_jax.classes import ClassTable, class_table
from cdetr_jax.config_check import check_config, count_train_devices, flat_fields
from cdetr_jax.data.buckets import by_area
from cdetr_jax.data.pipeline import Batches
from cdetr_jax.data.plan import EpochPlan, PlanSettings
from cdetr_jax.data.reader import usable_cores
from cdetr_jax.data.sources import Source
from cdetr_jax.device_memory import must_fit
from cdetr_jax.files import as_path, whole_file
from cdetr_jax.inference import Detector
from cdetr_jax.matching.assign import NonFiniteCostError
from cdetr_jax.models.resnet import frozen_modules
from cdetr_jax.training.ahead import Ahead, Programs
from cdetr_jax.training.evaluate import Results, detect_all, eval_programs, evaluation_sheet, shared_summary
from cdetr_jax.training.feed import Feed
from cdetr_jax.training.metrics import IntervalTimer, Progress, make_writer
from cdetr_jax.training.parallel import Trainer, step_programs, unreplicate
from cdetr_jax.training.processes import are_several, before_leaving, check_shared, on_all
from cdetr_jax.training.start import (
    check_data,
    check_same_command,
    check_same_data,
    check_same_run,
    check_same_state,
    describe_parameters,
    fingerprint,
    initial_state,
    record_start,
)
from cdetr_jax.training.step import StepMetrics, TrainState
from cdetr_jax.training.stopping import Stop, StoppedError, watch_signals
from cdetr_jax.training.trackers import check_installed
from cdetr_jax.visualization.curve import training_curve
from cdetr_jax.weights.load import Preprocessing, Weights

_LESS_MEMORY = (
    "use a smaller config.train.batch_size, or a larger config.train.accumulation_steps for the same batch in smaller "
    "parts, smaller config.data.train_shapes, or config.model.compute_dtype=bfloat16"
)


class NonFiniteLossError(FloatingPointError):
    """A loss term, or the gradient, is NaN or infinite."""


def train_and_evaluate(config: ml_collections.ConfigDict, workdir: str | os.PathLike) -> dict[str, float] | None:
    """Trains from the newest checkpoint in `workdir`, or from the start, to the end of the config's epochs.

    Killed at any moment and called again it goes on from the last checkpoint and ends with the weights that it would
    have had.
    Returns: the last evaluation's 12 COCO numbers; None if none was made.
    Raises: ValueError, if a field or the data are wrong, or the workdir holds another run or one that is going on;
      FileNotFoundError, if pictures are missing; ModuleNotFoundError, if a tracker's package is; NonFiniteLossError;
      OSError, if a checkpoint cannot be written; StoppedError, after Ctrl-C or SIGTERM, with all of it saved.
    """
    workdir = as_path(workdir)
    check_config(config)
    check_installed(config.train.log)
    check_same_command(config)
    devices = _train_devices(config)
    source = build.make_source(config, "train")
    eval_source = build.make_source(config, "eval") if config.eval.every_epochs > 0 else None
    classes = class_table(source.categories, config.data.class_ids, config.model.num_classes)
    check_same_run(config, classes, workdir)
    check_data(config, source, eval_source, classes)
    check_same_data(source, eval_source, classes)
    # The other processes of a run belong to the first, which alone writes.
    with run_files.locked(workdir) if jax.process_index() == 0 else contextlib.nullcontext():
        check_shared(workdir)
        return _train(config, workdir, devices, source, eval_source, classes)


def _train(
    config: ml_collections.ConfigDict,
    workdir: Path,
    devices: Sequence[jax.Device],
    source: Source,
    eval_source: Source | None,
    classes: ClassTable,
) -> dict[str, float] | None:
    is_first_process = jax.process_index() == 0
    plan_settings = build.make_plan_settings(config, source)
    device_count = len(devices) * jax.process_count()
    eval_plan = None if eval_source is None else build.make_eval_plan(config, eval_source, device_count)
    steps_per_epoch = plan_settings.steps_per_epoch
    schedules = build.make_schedules(config, steps_per_epoch)
    functions = build.make_step_functions(config, len(classes), schedules)
    trainer = Trainer(functions, devices)
    checkpoints = Checkpoints(workdir, keep=config.train.keep_checkpoints)
    before_leaving(checkpoints.finish)
    planned_from = {"steps_per_epoch": steps_per_epoch, "pictures": fingerprint(source)}
    state, start_step = initial_state(config, functions, checkpoints, planned_from, classes)
    check_same_state(state, start_step)
    accumulation_steps = config.train.accumulation_steps
    epoch, step_of_epoch = divmod(start_step, steps_per_epoch)
    start = (epoch, step_of_epoch * accumulation_steps)
    batches = build.make_train_batches(config, source, classes, plan_settings, start)

    total_steps = config.train.num_epochs * steps_per_epoch
    if config.train.max_steps is not None:
        total_steps = min(total_steps, config.train.max_steps)
    if is_first_process:
        run_files.save_config(workdir, config)
        run_files.save_classes(workdir, classes)
        if start_step == 0:
            frozen = frozen_modules(config.model.backbone, config.model.frozen_stages)
            logging.info("%s", describe_parameters(workdir, state.params, frozen))
        environment = record_start(workdir, start_step)
        facts = flat_fields({"config": config, "environment": environment})
    writer = make_writer(workdir, config.train.log, facts) if is_first_process else None
    if writer:
        writer.truncate_after(start_step, is_evaluated=checkpoints.score(start_step) is not None)
    logging.info(
        "%d pictures, %d steps an epoch, %d steps in all, on %d device(s) of %d process(es)",
        len(source), steps_per_epoch, total_steps, device_count, jax.process_count(),
    )  # fmt: skip
    progress = Progress(total_steps, steps_per_epoch, start_step) if is_first_process else None
    say = progress.say if progress else logging.info

    def is_due(step: int) -> bool:
        """Whether a step is one to evaluate after."""
        if eval_source is None or step == 0:
            return False
        epochs, rest = divmod(step, steps_per_epoch)
        return step == total_steps or (rest == 0 and epochs % config.eval.every_epochs == 0)

    def save(step: int) -> None:
        epoch, step_of_epoch = divmod(step, steps_per_epoch)
        saved = unreplicate(state)
        _check_finite_parameters(step, saved.params)
        checkpoints.save(step, saved, {"epoch": epoch, "batch": step_of_epoch, **planned_from})

    def evaluate_now(step: int, stop: Stop) -> dict[str, float] | None:
        """The AP of a saved step goes to the metrics, the pictures, its checkpoint and the log. None after a stop."""
        say("step %d: evaluating on %d pictures", step, len(eval_source))
        variables = state.eval_variables
        results = detect_all(config, trainer, variables, eval_source, eval_plan, classes, ahead, stop)
        if stop:
            return None
        summary = shared_summary(eval_source, results)
        if writer:
            writer.write_scalars(step, summary, epoch=step / steps_per_epoch, kind="eval")
            _draw(workdir, lambda: draw_sheet(step, results, variables))
        checkpoints.set_score(step, summary["AP"])  # last: without it a run that goes on evaluates this step again
        say("step %d: AP %.4f, AP50 %.4f", step, summary["AP"], summary["AP50"])
        return summary

    def draw_sheet(step: int, results: Results, variables: Any) -> None:
        """What the detector finds in a few pictures, and where it looks: eval.png, pictures/ and TensorBoard."""
        here = jax.tree.map(lambda x: x.addressable_data(0), variables)
        largest = tuple(eval_plan.shapes_hw.max(axis=0).tolist())  # holds all pictures: one program to compile
        preprocessing = Preprocessing(config.data.eval_short_side_px, config.data.long_side_max_px, (largest,))
        model = config.model.to_dict() | {"num_classes": len(classes)}
        detector = Detector(Weights(str(workdir), model, classes, here, preprocessing))
        look = functools.partial(detector.attention, objects=1)
        sheet = evaluation_sheet(eval_source, results, config.seed, look)
        with whole_file(workdir / "eval.png") as temporary:
            sheet.save(temporary, format="PNG")
        jpeg = io.BytesIO()  # a tenth of the size, as all of them are kept
        sheet.save(jpeg, format="JPEG", quality=85)
        with whole_file(workdir / "pictures" / f"eval_{step:08d}.jpg") as temporary:
            temporary.write_bytes(jpeg.getvalue())
        writer.write_picture(step, "eval/pictures", jpeg.getvalue(), *sheet.size)

    state = trainer.replicate(state)
    must_evaluate = is_due(start_step) and checkpoints.score(start_step) is None  # it was stopped before this was done
    programs = ()
    if start_step < total_steps:
        programs = _programs(trainer, state, plan_settings, batches, eval_plan)
    elif must_evaluate:
        programs = eval_programs(trainer, state.eval_variables, eval_plan)
    ahead = Ahead(programs, usable_cores(), say)
    feed = Feed(batches, trainer.put, accumulation_steps)
    timer = IntervalTimer()
    recent: list[tuple[int, StepMetrics]] = []
    summary = None
    step = start_step
    try:
        with watch_signals() as stop:
            if must_evaluate:
                summary = evaluate_now(start_step, stop)
            elif start_step >= total_steps:
                say("The run in %s is complete: %d steps of %d.", workdir, start_step, total_steps)
            for step in range(start_step + 1, total_steps + 1):
                with timer.part("data"):
                    micro_batches = next(feed)
                names = [name for each in micro_batches for name in step_programs(*each.shape, accumulation_steps > 1)]
                largest = max((each.images_shape for each in micro_batches), key=math.prod)
                with must_fit(*largest, _LESS_MEMORY):
                    with timer.pause(), progress.pause() if progress else contextlib.nullcontext():
                        is_compiled = ahead.wait(names, stop.wait)
                    if is_compiled:
                        try:
                            state, step_metrics = trainer.step(state, micro_batches)
                        except NonFiniteCostError as error:
                            raise _named(error, step, micro_batches, source) from None
                if not is_compiled:
                    step -= 1
                    if recent:
                        _check_finite(*recent[-1])
                    if step and step not in checkpoints.steps():
                        save(step)
                    break
                timer.add("match", trainer.matching_s)
                trainer.matching_s = 0.0
                if recent:
                    _check_finite(*recent[-1])  # one step behind, so that the device need not wait
                recent.append((step, step_metrics))
                checkpoints.check()

                end_of_epoch = step % steps_per_epoch == 0
                last = stop.ask() or step == total_steps
                metrics = None
                if step % config.train.log_every_steps == 0 or last or step == start_step + 1:
                    _check_finite(*recent[-1])
                    metrics = _mean_scalars(config, recent)
                    report = timer.report(len(recent) * config.train.batch_size)
                    if step > start_step + 1:  # in the first interval the devices waited for the first pictures
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
                    save(step)
                    if is_due(step) and not stop:
                        summary = evaluate_now(step, stop)
                if stop:
                    break
    finally:
        ahead.close()
        feed.close()
        if progress:
            progress.close()
        if writer:
            writer.close("failed" if sys.exception() else "stopped" if stop else "finished")
        if not (are_several() and sys.exception()):  # else it is finished before this process leaves
            checkpoints.close()
        if is_first_process and (workdir / "metrics.jsonl").exists():
            _draw(workdir)
    if batches.bad_files:
        logging.warning("%d damaged pictures were skipped: %s", len(batches.bad_files), sorted(batches.bad_files))
    on_all(True)  # the first process may still have been saving
    if stop:
        where = f"; step {step} of {total_steps} is saved in {workdir}" if step else " before the first step"
        raise StoppedError(f"stopped{where}")
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


def _programs(
    trainer: Trainer, state: TrainState, settings: PlanSettings, batches: Batches, eval_plan: EpochPlan | None
) -> Iterator[Programs]:
    """All that a run compiles, in the order in which the first epoch needs it, and what other epochs may need."""
    batch, accumulates = settings.micro_batch_size // trainer.device_count, settings.accumulation_steps > 1

    def of_shape(shape_hw: tuple[int, int]) -> Programs:
        names = (step_programs(*shape_hw, targets, accumulates) for targets in settings.target_sizes)
        programs = (
            trainer.train_programs(state, batch, shape_hw, targets, accumulates) for targets in settings.target_sizes
        )
        return Programs(tuple(itertools.chain.from_iterable(names)), itertools.chain.from_iterable(programs))

    first = list(dict.fromkeys(map(tuple, batches.plan.shapes_hw[batches.position[1] :].tolist())))
    yield from map(of_shape, first)
    if eval_plan is not None:
        yield from eval_programs(trainer, state.eval_variables, eval_plan)
    yield from map(of_shape, sorted(set(map(tuple, by_area(settings.shapes).tolist())) - set(first)))


def _named(error: NonFiniteCostError, step: int, micro_batches: Sequence[Any], source: Source) -> NonFiniteLossError:
    index = np.concatenate([placed.index.reshape(-1) for placed in micro_batches])
    picture = source.records[int(index[error.image])].file_name
    return NonFiniteLossError(
        f"step {step}: {error}, picture {picture}: the network's output is NaN or infinite; "
        "use a lower config.optimizer.lr, or look at the pictures of this batch"
    )


def _draw(workdir: Path, draw_sheet: Callable[[], None] = lambda: None) -> None:
    """Draws `curve.png` and, after an evaluation, a sheet. What goes wrong with a drawing ends no run."""
    try:
        training_curve(workdir / "metrics.jsonl", workdir / "curve.png")
        draw_sheet()
    except Exception as error:
        logging.warning("%s: could not draw how the run goes: %s: %s", workdir, type(error).__name__, error)


def _check_finite(step: int, metrics: StepMetrics) -> None:
    """Raises NonFiniteLossError that names the first term that is NaN or infinite. Fetches one flag if none is."""
    if jax.device_get(metrics.is_finite.addressable_data(0)):
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
