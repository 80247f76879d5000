"""A new run's variables with loaded weights in them."""

import os
import re
from collections import Counter
from collections.abc import Collection
from typing import Any

from absl import logging
from flax import traverse_util

from cdetr_jax.checkpoints import mismatch
from cdetr_jax.classes import ClassTable
from cdetr_jax.files import write_json
from cdetr_jax.weights.load import FREE_FIELDS, Backbone, Weights, naming
from cdetr_jax.weights.torch_convert import BACKBONE, from_torch, is_ignored

HEAD = "params/class_embed/"


def start_from(
    initial: Weights | Backbone,
    variables: Any,
    classes: ClassTable,
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
        with naming(f"config.init={initial.source}"):
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
        problems = mismatch.compare(
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
        write_json(report_path, {"source": initial.source, **report})
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


def _head_differs(weights: Weights, new: dict[str, Any], classes: ClassTable) -> bool:
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
