"""How much of the attention lies where at the objects: the claim of the paper's figures 1 and 4 as numbers."""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from absl import logging

from cdetr_jax import boxes, build
from cdetr_jax.config_check import check_config
from cdetr_jax.device_memory import must_fit
from cdetr_jax.evaluation.attention_maps import PARTS, REGIONS, attending, attention_maps, centre_of_mass, region_shares
from cdetr_jax.evaluation.postprocess import class_probs
from cdetr_jax.structs import Batch
from cdetr_jax.training.evaluate import LESS_MEMORY, with_model_of
from cdetr_jax.weights.load import Weights

MIN_IOU = 0.5


@dataclasses.dataclass(frozen=True)
class AttentionMeasure:
    """Where the decoder's cross-attention lies at the objects that are detected, mean over these.

    Attributes:
      objects: how many were measured: those that are detected.
      annotated: how many there are.
      uniform: of a map that is alike everywhere, the share in each of `REGIONS`, and in the whole "box".
      rows: of each part, layer and head the same shares; the `region` in which its attention is densest, against a
        uniform map, for most of the objects, and for which fraction of them that is (`consistency`; a head that does
        not care has a fifth); and the fraction of them for which the map's centre of mass is in the box or within a
        quarter of its sides around it (`centred`).
    """

    objects: int
    annotated: int
    uniform: dict[str, float]
    rows: list[dict[str, Any]]

    def format_table(self, part: str = "spatial") -> str:
        """A part's rows, in percent."""
        names = [*REGIONS, "box"]
        lines = [
            f"{part} attention at {self.objects} of {self.annotated} objects: percent of a map near the box's sides, "
            "in its middle, and in all of it",
            f"{'layer':>5} {'head':>4}" + "".join(f"{name:>8}" for name in names) + "   densest    of objects  centred",
            f"{'uniform':>10}" + "".join(f"{100 * self.uniform[name]:8.1f}" for name in names),
        ]
        lines += [
            f"{row['layer']:5} {row['head']:4}"
            + "".join(f"{100 * row[name]:8.1f}" for name in names)
            + f"   {row['region']:<8}{100 * row['consistency']:12.0f} %{100 * row['centred']:7.0f} %"
            for row in self.rows
            if row["part"] == part
        ]
        return "\n".join(lines)


def measure_attention(config: ml_collections.ConfigDict, weights: Weights, threshold: float = 0.5) -> AttentionMeasure:
    """Measures a detector on the config's evaluation pictures, on one device.

    An object's query is the one with the best score among those with at least the threshold's and an IoU of 0.5, of
    whatever class.
    Raises: as `evaluate`; ValueError, if no object is detected.
    """
    config = with_model_of(weights, config)
    check_config(config)
    source = build.make_source(config, "eval")
    plan = build.make_eval_plan(config, source)
    model = build.make_model(config, len(weights.classes))
    variables = jax.device_put(weights.variables)
    found, annotated = [], 0
    batches = build.make_eval_batches(config, source, plan)
    try:
        for number, batch in enumerate(batches, start=1):
            with must_fit(*batch.images.shape[:3], LESS_MEMORY):
                is_found, *values = jax.device_get(_measure(model, variables, batch, threshold, MIN_IOU))
            annotated += int(batch.targets.valid.sum())
            found.append([value[is_found] for value in values])
            if number % 50 == 0:
                logging.info("%d of %d batches", number, len(plan))
    finally:
        batches.close()
    shares, uniform, centred = (np.concatenate(each) for each in zip(*found, strict=True))
    if not len(shares):
        raise ValueError(
            f"none of the {annotated} objects is detected with a score of {threshold:g} and an IoU of {MIN_IOU}, so "
            "there is nothing to measure; use a lower threshold, or a detector that is trained further"
        )
    names = [*REGIONS, "box"]
    density = shares[..., :-1] / np.maximum(uniform, 1e-9)[:, None, None, None, :-1]
    densest = density.argmax(-1)
    rows = []
    for p, layer, head in np.ndindex(*shares.shape[1:4]):
        counts = np.bincount(densest[:, p, layer, head], minlength=len(REGIONS))
        mean = shares[:, p, layer, head].mean(0).tolist()
        rows.append(
            {"part": PARTS[p], "layer": layer, "head": head}
            | dict(zip(names, mean, strict=True))
            | {
                "region": REGIONS[counts.argmax()],
                "consistency": float(counts.max() / len(shares)),
                "centred": float(centred[:, p, layer, head].mean()),
            }
        )
    return AttentionMeasure(len(shares), annotated, dict(zip(names, uniform.mean(0).tolist(), strict=True)), rows)


@functools.partial(jax.jit, static_argnames="model")
def _measure(
    model: nn.Module, variables: Any, batch: Batch, threshold: float, min_iou: float
) -> tuple[Any, Any, Any, Any]:
    """Of each target: whether it is found [B T], shares [B T P L N R], those of a uniform map [B T R], and whether the
    centre of mass is at the box [B T P L N].
    """
    stages, attends = attending(model, variables, batch.images, batch.sizes_hw)
    cells = jnp.array(stages.is_pad.shape[1:]) / jnp.array(batch.images.shape[1:3])

    def of_picture(arguments: tuple[Any, ...]) -> tuple[Any, Any, Any, Any]:
        picture, logits, predicted, size_hw, targets = arguments
        scores, of_targets = class_probs(logits, model.class_loss).max(-1), boxes.cxcywh_to_xyxy(targets.boxes_cxcywh)
        iou, _ = boxes.iou_and_union(boxes.cxcywh_to_xyxy(predicted)[None], of_targets[:, None])
        candidates = (iou >= min_iou) & (scores >= threshold)[None]
        queries = jnp.where(candidates, scores[None], -1).argmax(-1)
        maps = attention_maps(model, jax.tree.map(lambda x: x[None], picture), queries[None])[0]
        maps = jnp.moveaxis(maps, 2, 0)  # [T P L N h w]
        size_in_cells = size_hw * cells
        in_cells = (of_targets * jnp.tile(size_in_cells[::-1], 2)[None])[:, None, None, None]
        uniform = jnp.where(picture.is_pad, 0, 1 / (~picture.is_pad).sum())
        x, y = jnp.moveaxis(centre_of_mass(maps), -1, 0)
        x0, y0, x1, y1 = jnp.moveaxis(in_cells, -1, 0)
        dx, dy = (x1 - x0) / 4, (y1 - y0) / 4
        centred = (x >= x0 - dx) & (x <= x1 + dx) & (y >= y0 - dy) & (y <= y1 + dy)
        of_uniform = region_shares(
            jnp.broadcast_to(uniform, (len(queries), *uniform.shape)), in_cells[:, 0, 0, 0], size_in_cells
        )
        return candidates.any(-1) & targets.valid, region_shares(maps, in_cells, size_in_cells), of_uniform, centred

    last = stages.predictions.logits[-1], stages.predictions.boxes_cxcywh[-1]
    return jax.lax.map(of_picture, (attends["decoder"], *last, batch.sizes_hw, batch.targets))
