"""What every field of a config may hold, and which values of several fields go together."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import ml_collections

from cdetr_jax.data.plan import LAST_BATCH
from cdetr_jax.models.resnet import NORMS, STAGE_SIZES
from cdetr_jax.models.transformer import REFERENCE_POINTS, SPATIAL_QUERIES, TRANSFORMATIONS
from cdetr_jax.training.trackers import TRACKERS


class Rule(NamedTuple):
    """What a field may hold, in words for an error, and whether a value is that."""

    expected: str
    holds: Callable[[Any], bool]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _one_of(*choices: str) -> Rule:
    return Rule(f"one of {', '.join(choices)}", lambda value: isinstance(value, str) and value in choices)


def _whole(low: int, high: int = 10**9) -> Rule:
    return Rule(
        f"a whole number from {low} to {high}",
        lambda value: _is_number(value) and isinstance(value, int) and low <= value <= high,
    )


def _number(high: float = 1e6, but_not: tuple[float, ...] = ()) -> Rule:
    """From 0 on; also a NaN is refused, and what float32 could not hold."""
    words = "".join(f", not {value:g} itself" for value in but_not)
    return Rule(
        f"a number from 0 to {high:g}{words}",
        lambda value: _is_number(value) and 0 <= value <= high and value not in but_not,
    )


def _several(rule: Rule, what: str, of: tuple[int, ...] = ()) -> Rule:
    """A tuple; JSON makes lists of them. `of`: how many; else at least one."""

    def holds(value: Any) -> bool:
        is_sequence = isinstance(value, tuple | list) and (len(value) in of if of else len(value) > 0)
        return is_sequence and all(map(rule.holds, value))

    return Rule(f"{what}, each {rule.expected}", holds)


def _each_once(names: list[str], known: Iterable[str]) -> bool:
    return set(names) <= set(known) and len(names) == len(set(names))


_TEXT = Rule("a text", lambda value: isinstance(value, str))
_FLAG = Rule("True or False", lambda value: isinstance(value, bool))
_FRACTION = _number(1)
_SIDE_PX = _whole(1, 16384)
_SIDES_PX = _several(_SIDE_PX, "sides in pixels, as (480, 512) or (480,)")
_SIDES = _several(_number(0.7, but_not=(0,)), "(from, to)", of=(2,))
_SHAPE = _several(_SIDE_PX, "(H, W)", of=(2,))
_SHAPES = Rule(
    f"() or padded shapes in pixels, as ((480, 640), (640, 480)), each side {_SIDE_PX.expected}",
    lambda value: isinstance(value, tuple | list) and all(map(_SHAPE.holds, value)),
)

FIELDS = {
    "seed": _whole(0, 2**32 - 1),
    "init": _TEXT,
    "model.decoder": _one_of("conditional", "detr"),
    "model.backbone": _one_of(*STAGE_SIZES),
    "model.backbone_width": _whole(1, 4096),
    "model.backbone_norm": _one_of(*NORMS),
    "model.frozen_stages": _whole(0, 5),
    "model.dc5": _FLAG,
    "model.width": _whole(4, 65536),
    "model.num_heads": _whole(1, 65536),
    "model.ffn_width": _whole(1, 10**6),
    "model.encoder_layers": _whole(0, 1000),
    "model.decoder_layers": _whole(1, 1000),
    "model.num_queries": _whole(1, 10**6),
    "model.dropout": _number(1, but_not=(1,)),
    "model.num_classes": _whole(0, 10**6),
    "model.class_loss": _one_of("focal", "softmax"),
    "model.box_offset": _FLAG,
    "model.reference_point": _one_of(*REFERENCE_POINTS),
    "model.spatial_query": _one_of(*SPATIAL_QUERIES),
    "model.transformation": _one_of(*TRANSFORMATIONS),
    "model.temperature": _number(1e9, but_not=(0,)),
    "model.norm_between_layers": _FLAG,
    "model.local_gain": _number(),
    "model.attention": _one_of("einsum", "fused"),
    "model.matmul_precision": _one_of("default", "high", "highest"),
    "model.compute_dtype": _one_of("float32", "bfloat16"),
    "matcher.class_cost": _number(),
    "matcher.l1_cost": _number(),
    "matcher.giou_cost": _number(),
    "loss.class_weight": _number(),
    "loss.l1_weight": _number(),
    "loss.giou_weight": _number(),
    "loss.focal_alpha": _FRACTION,
    "loss.focal_gamma": _number(100),
    "loss.no_object_weight": _number(),
    "data.source": _one_of("folder", "coco_folder", "tfds", "coco_folder+tfds", "synthetic"),
    "data.folder": _TEXT,
    "data.split_file": _TEXT,
    "data.split_seed": _whole(0, 2**32 - 1),
    "data.train_images": _TEXT,
    "data.train_annotations": _TEXT,
    "data.eval_images": _TEXT,
    "data.eval_annotations": _TEXT,
    "data.tfds_name": _TEXT,
    "data.tfds_data_dir": _TEXT,
    "data.train_split": _TEXT,
    "data.eval_split": _TEXT,
    "data.class_ids": _one_of("category_id", "contiguous"),
    "data.on_error": _one_of("raise", "skip"),
    "data.max_bad_fraction": _FRACTION,
    "data.workers": _whole(0, 1024),
    "data.threads": _whole(0, 1024),
    "data.max_targets": _whole(0, 10**6),
    "data.train_shapes": _SHAPES,
    "data.eval_shapes": _SHAPES,
    "data.num_train_shapes": _whole(1, 1000),
    "data.num_eval_shapes": _whole(1, 1000),
    "data.last_batch": _one_of(*LAST_BATCH),
    "data.short_sides_px": _SIDES_PX,
    "data.long_side_max_px": _SIDE_PX,
    "data.flip_probability": _FRACTION,
    "data.crop_probability": _FRACTION,
    "data.crop_short_sides_px": _SIDES_PX,
    "data.crop_sides_px": Rule(
        f"(from, to) in pixels, from at most to, each {_SIDE_PX.expected}",
        lambda value: _SHAPE.holds(value) and value[0] <= value[1],
    ),
    "data.eval_short_side_px": _SIDE_PX,
    "data.synthetic.train_pictures": _whole(1, 10**7),
    "data.synthetic.eval_pictures": _whole(1, 10**7),
    "data.synthetic.height": _whole(32, 16384),
    "data.synthetic.width": _whole(32, 16384),
    "data.synthetic.max_objects": _whole(1, 1000),
    "data.synthetic.sides": Rule(
        "(from, to), from at most to, each a number from 0 to 0.7, not 0 itself",
        lambda value: _SIDES.holds(value) and value[0] <= value[1],
    ),
    "data.synthetic.hue_by_class": _FLAG,
    "optimizer.lr": _number(10),
    "optimizer.backbone_lr": _number(10),
    "optimizer.weight_decay": _number(10),
    "optimizer.clip_norm": _number(),
    "optimizer.warmup_steps": _whole(0),
    "optimizer.drop_epoch": _whole(0),
    "optimizer.drop_factor": _FRACTION,
    "optimizer.ema_decay": _number(1, but_not=(1,)),
    "train.batch_size": _whole(1, 10**6),
    "train.accumulation_steps": _whole(1, 10**6),
    "train.num_epochs": _whole(1),
    "train.max_steps": Rule("None or a whole number from 1", lambda value: value is None or _whole(1).holds(value)),
    "train.log": Rule(
        f"one or more of {', '.join(TRACKERS)}, each once, with commas between, or none",
        lambda value: isinstance(value, str) and _each_once(value.split(","), (*TRACKERS, "none")),
    ),
    "train.log_every_steps": _whole(1),
    "train.checkpoint_every_steps": _whole(1),
    "train.keep_checkpoints": _whole(1, 10**6),
    "eval.batch_size": _whole(1, 10**6),
    "eval.every_epochs": _whole(0),
    "eval.top_k": _whole(1, 10**6),
}


def flat_fields(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Every field's value, by its full name such as `optimizer.lr`."""
    flat = {}
    for name, value in config.items():
        flat |= flat_fields(value, f"{prefix}{name}.") if hasattr(value, "items") else {prefix + name: value}
    return flat


def check_value(field: str, value: Any) -> None:
    """Raises ValueError, naming the field, its value and what was expected."""
    if not FIELDS[field].holds(value):
        raise ValueError(f"config.{field} is {_short(value)}, expected {FIELDS[field].expected}")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:50]}...{text[-10:]}"


def check_config(config: ml_collections.ConfigDict) -> None:
    """Checks what can be checked without data and devices.

    Raises: ValueError, naming the field, what it holds and what was expected.
    """
    values = flat_fields(config)
    if missing := [field for field in FIELDS if field not in values]:
        raise ValueError(
            f"config.{missing[0]} is missing{f', and {len(missing) - 1} more' * (len(missing) > 1)}: begin the recipe "
            "with common.get_config() of configs/common.py, which has every field"
        )
    if unknown := [field for field in values if field not in FIELDS]:
        raise ValueError(f"config.{unknown[0]} is no field of a config; configs/common.py lists them")
    for field, value in values.items():
        check_value(field, value)
    model = config.model
    if model.width % model.num_heads or model.width % 4:
        raise ValueError(
            f"config.model.width is {model.width}; it must be a multiple of 4 (sine and cosine of x and y) and of "
            f"config.model.num_heads, {model.num_heads}"
        )
    if model.spatial_query == "t" and model.transformation not in ("scalar", "diagonal"):
        raise ValueError(
            f"config.model.spatial_query 't' is lambda_q alone, a vector, but config.model.transformation is "
            f"{model.transformation!r}; use 'scalar' or 'diagonal'"
        )
    if not any(config.matcher.values()):
        raise ValueError("all three costs of config.matcher are 0: any assignment would do; set at least one")
    if not any(config.loss[f"{term}_weight"] for term in ("class", "l1", "giou")):
        raise ValueError("all three weights of config.loss are 0: nothing would be learnt; set at least one")


def count_train_devices(
    batch_size: int,
    accumulation_steps: int,
    device_count: int,
    process_count: int = 1,
    name: str = "config.train.batch_size",
) -> int:
    """How many of a process's devices a training batch is spread over: all, or one for each picture if it has fewer.

    Args:
      device_count: of each process.
      name: of the field or option that the batch is from, for the error.
    Raises: ValueError, if the batch cannot be cut so; it says which can. Several processes use all of their devices.
    """
    all_devices = device_count * process_count
    micro_batch, rest = divmod(batch_size, accumulation_steps)
    if not rest and process_count == 1 and 0 < micro_batch < device_count:
        return micro_batch
    step = all_devices * accumulation_steps
    if batch_size % step:
        below, above = batch_size // step * step, math.ceil(batch_size / step) * step
        micro_batches = (
            "" if accumulation_steps == 1 else f" times config.train.accumulation_steps {accumulation_steps}"
        )
        raise ValueError(
            f"{name} {batch_size} is not divisible by {all_devices} devices{micro_batches}; use "
            + (f"{below} or {above}" if below else f"{above}")
        )
    return device_count
