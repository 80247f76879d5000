"""Evaluation of a detector: COCO AP, and a sheet of a few pictures with what was found in them."""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np
from absl import logging
from jax.experimental import multihost_utils
from PIL import Image

from cdetr_jax import build
from cdetr_jax.classes import ClassTable, classes_in_data
from cdetr_jax.config_check import check_config
from cdetr_jax.data.plan import EpochPlan
from cdetr_jax.data.reader import usable_cores
from cdetr_jax.data.sources import Source
from cdetr_jax.device_memory import must_fit
from cdetr_jax.evaluation.coco_eval import SUMMARY, CocoMetrics, Results, coco_average_precision
from cdetr_jax.training.ahead import Ahead, Programs
from cdetr_jax.training.feed import Feed
from cdetr_jax.training.parallel import Trainer, detect_programs
from cdetr_jax.training.start import check_same_command, check_same_data, check_same_state
from cdetr_jax.training.stopping import Stop
from cdetr_jax.visualization.attention import Attention, heat_over
from cdetr_jax.visualization.draw import contact_sheet, draw_annotated, tagged
from cdetr_jax.weights.load import FREE_FIELDS, Weights

SHEET_PICTURES, SHEET_THRESHOLD = 8, 0.3

LESS_MEMORY = (
    "use a smaller config.eval.batch_size, smaller config.data.eval_shapes, or config.model.compute_dtype=bfloat16"
)


class Evaluation(NamedTuple):
    """What was evaluated, what was found, and how good that is."""

    source: Source
    results: Results
    metrics: CocoMetrics


def evaluate(config: ml_collections.ConfigDict, weights: Weights) -> Evaluation | None:
    """COCO AP of a detector on the config's evaluation pictures.

    Args:
      config: its data and eval fields count, and those of the model that the weights leave open.
      weights: of `load_weights`. Their classes are found in the data by name, see `classes_in_data`.
    Returns: None on all processes but the first.
    Raises: ValueError, FileNotFoundError, if the weights or the data do not fit the config.
    """
    config = with_model_of(weights, config)
    check_config(config)
    check_same_command(config)
    source = build.make_source(config, "eval")
    logging.info("%d pictures", len(source))
    check_same_data(None, source, weights.classes)
    check_same_state(weights.variables)
    functions = build.make_step_functions(config, len(weights.classes), build.make_schedules(config, 1))
    trainer = Trainer(functions)
    variables = trainer.replicate(weights.variables)
    plan = build.make_eval_plan(config, source, jax.device_count())
    ahead = Ahead(eval_programs(trainer, variables, plan), usable_cores())
    try:
        results = detect_all(config, trainer, variables, source, plan, weights.classes, ahead, Stop())
    finally:
        ahead.close()
    if results is None:
        return None
    return Evaluation(source, results, coco_average_precision(source.records, source.categories, results))


def eval_programs(trainer: Trainer, variables: Any, plan: EpochPlan) -> Iterator[Programs]:
    """All that `detect_all` compiles, in the order in which it is needed."""
    batch, (max_targets,) = plan.rows.shape[1] // trainer.device_count, set(plan.max_targets.tolist())
    for shape_hw in dict.fromkeys(map(tuple, plan.shapes_hw.tolist())):
        program = trainer.detect_program(variables, batch, shape_hw, max_targets)
        yield Programs(detect_programs(*shape_hw), [program])


def detect_all(
    config: ml_collections.ConfigDict,
    trainer: Trainer,
    variables: Any,
    source: Source,
    plan: EpochPlan,
    classes: ClassTable,
    ahead: Ahead,
    stop: Stop,
) -> Results | None:
    """What is found in every picture of a source, in a plan's batches.

    Args:
      variables: replicated.
      ahead: compiles `eval_programs`.
      stop: asked before every batch; once it says so, nothing more is done.
    Returns: None after a stop, and on all processes but the first.
    """
    is_first_process = jax.process_index() == 0
    classes = classes_in_data(classes, source.categories)
    batches = build.make_eval_batches(config, source, plan)
    feed = Feed(batches, trainer.put)
    results = []
    try:
        for [placed] in feed:
            with must_fit(*placed.images_shape, LESS_MEMORY):
                if stop.ask() or not ahead.wait(detect_programs(*placed.shape[:2]), stop.wait):
                    return None
                detections = trainer.detect(variables, placed)
            index = placed.index.reshape(-1)
            if jax.process_count() > 1:
                detections, index = multihost_utils.process_allgather((detections, index), tiled=True)
            if not is_first_process:
                continue
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
    return results if is_first_process else None


def shared_summary(source: Source, results: Results | None) -> dict[str, float]:
    """The 12 COCO numbers, computed by the first process, for all of them: they decide which checkpoint is the best."""
    summary = dict.fromkeys(SUMMARY, 0.0)
    if results is not None:
        summary = coco_average_precision(source.records, source.categories, results).summary
    if jax.process_count() == 1:
        return summary
    as_bytes = np.array(list(summary.values()), np.float64).view(np.uint8)  # JAX would make float32 of them
    values = np.asarray(multihost_utils.broadcast_one_to_all(as_bytes)).view(np.float64)
    return dict(zip(SUMMARY, values.tolist(), strict=True))


def coco_results(image_id: int, detections: Any, classes: ClassTable) -> Results:
    """One picture's detections in COCO's results format; logits that stand for nothing are left out."""
    results = []
    for score, label, (left, top, right, bottom) in zip(
        detections.scores.tolist(), detections.labels.tolist(), detections.boxes_xyxy_px.tolist(), strict=True
    ):
        if classes[label] is not None:
            box = [left, top, right - left, bottom - top]
            results.append({"image_id": image_id, "category_id": classes[label].id, "bbox": box, "score": score})
    return results


def evaluation_sheet(
    source: Source, results: Results, seed: int, look: Callable[[np.ndarray], Attention]
) -> Image.Image:
    """The same few pictures of a source at every call, in columns, to flip through a run.

    Rows: as annotated; what was found; and where the decoder's last layer looks with the picture's best query, mean of
    the heads: the spatial part of its attention, and all of it. Red is 20 times the mean of a map, in all sheets.
    Args:
      look: `Detector.attention`, or alike.
    """
    chosen = np.random.default_rng(seed).permutation(len(source))[:SHEET_PICTURES].tolist()
    names = {category.id: category.name for category in source.categories}
    image_ids = {source.records[i].image_id for i in chosen}
    shown = [result for result in results if result["image_id"] in image_ids and result["score"] >= SHEET_THRESHOLD]
    shown.sort(key=lambda result: -result["score"])
    draw = functools.partial(draw_annotated, names=list(names.values()))
    rows = []
    for i in chosen:
        picture, record = source.load_image(i), source.records[i]
        labels = [names[category_id] for category_id in record.category_ids.tolist()]
        rows.append([draw(picture, record.boxes_xywh_px, labels)])
        found = [result for result in shown if result["image_id"] == record.image_id]
        boxes, scores = [result["bbox"] for result in found], [result["score"] for result in found]
        rows[-1].append(draw(picture, boxes, [names[result["category_id"]] for result in found], scores))
        attention = look(picture)
        for part in ("spatial", "combined"):
            panel = heat_over(attention, 0, getattr(attention, part)[-1, 0].mean(0), rows[-1][0].size, most=20)
            rows[-1].append(tagged(panel, f"{part}: {attention.names[0]} {attention.scores[0]:.2f}"))
    return contact_sheet([panel for row in zip(*rows, strict=True) for panel in row], len(chosen), cell_px=240)


def with_model_of(weights: Weights, config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """The config, unresolved references resolved, with the model that the weights are of."""
    config = config.copy_and_resolve_references()
    with config.unlocked():
        for name, value in weights.model.items():
            if name in FREE_FIELDS:
                continue
            if config.model[name] not in (value, 0):  # 0: to be counted
                logging.info("config.model.%s is %r: the weights' own value counts", name, value)
            config.model[name] = value
    return config
