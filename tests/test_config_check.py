"""What is refused before anything runs: every field of a config and every option, with values of every wrong kind."""

import argparse
import importlib
import math
import pathlib
import re

import pytest

from cdetr_jax.cli import main
from cdetr_jax.cli.settings import change_config
from cdetr_jax.config_check import FIELDS, check_config, check_value, count_train_devices, flat_fields
from configs import common

RECIPES = sorted(path.stem for path in pathlib.Path(common.__file__).parent.glob("*.py") if path.stem != "__init__")
FREE_TEXTS = tuple(field for field, rule in FIELDS.items() if rule.expected == "a text")

# ------------------------------------------------------------------------------------------------ one field at a time

BAD_VALUES = (None, "", "abc", -1, -0.5, 0, math.nan, math.inf, 10**400, 1e300, (), (-1,), (0, 0), ("a", "b"), {}, b"x")
# Which of these a field may hold, and why.
MAY_HOLD = {
    (0,): [
        "seed",
        "data.split_seed",
        "optimizer.warmup_steps",
        "optimizer.drop_epoch",
        "model.frozen_stages",
        "model.encoder_layers",
        "model.num_classes",
        "model.dropout",
        "model.local_gain",
        "data.max_bad_fraction",
        "data.workers",
        "data.threads",
        "data.max_targets",
        "data.flip_probability",
        "data.crop_probability",
        "optimizer.lr",
        "optimizer.backbone_lr",
        "optimizer.weight_decay",
        "optimizer.clip_norm",
        "optimizer.drop_factor",
        "optimizer.ema_decay",
        "eval.every_epochs",
        "matcher.class_cost",
        "matcher.l1_cost",
        "matcher.giou_cost",
        "loss.class_weight",
        "loss.l1_weight",
        "loss.giou_weight",
        "loss.focal_alpha",
        "loss.focal_gamma",
        "loss.no_object_weight",
    ],  # none of it, or from the start on
    (None,): ["train.max_steps"],  # no limit
    ((),): ["data.train_shapes", "data.eval_shapes"],  # chosen from the data
    ("", "abc"): FREE_TEXTS,  # names, which the files will tell
}


def may_hold(field, value):
    return any(
        field in fields and any(type(value) is type(held) and value == held for held in values)
        for values, fields in MAY_HOLD.items()
    )


@pytest.mark.parametrize("field", list(FIELDS))
def test_a_bad_value_is_refused_in_one_line(field):
    for value in BAD_VALUES:
        if may_hold(field, value):
            check_value(field, value)
            continue
        with pytest.raises(ValueError, match=rf"^config\.{field} is .*, expected ") as error:
            check_value(field, value)
        assert "\n" not in str(error.value)
        assert len(str(error.value)) < 300
        assert repr(value)[:20] in str(error.value)


# Texts of the command line, and which fields may have them.
BAD_TEXTS = (
    "",
    "abc",
    "-1",
    "0",
    "nan",
    "inf",
    "1e300",
    "9" * 40,
    "9" * 5000,
    "()",
    "(-1,)",
    "None",
    "[",
    "{[]: 1}",
    "(" * 300,
)
MAY_BE_SET_TO = {
    "0": MAY_HOLD[(0,)]
    + ["model.dc5", "model.box_offset", "model.norm_between_layers", "data.synthetic.hue_by_class"],  # of a flag: False
    "None": MAY_HOLD[(None,)],
    "()": MAY_HOLD[((),)],
}


@pytest.mark.parametrize("field", list(FIELDS))
def test_a_bad_text_is_refused_in_one_line(field):
    for text in BAD_TEXTS:
        if field in FREE_TEXTS or field in MAY_BE_SET_TO.get(text, ()):
            change_config(common.get_config(), [f"--config.{field}={text}"])
            continue
        with pytest.raises(ValueError, match=rf"^config\.{field} is .*, expected ") as error:
            change_config(common.get_config(), [f"--config.{field}={text}"])
        assert "\n" not in str(error.value)
        assert len(str(error.value)) < 300


def test_the_table_has_every_field():
    assert set(flat_fields(common.get_config())) == set(FIELDS)


@pytest.mark.parametrize(("text", "field", "value"), [
    ("2e-4", "optimizer.lr", 2e-4),
    ("1", "optimizer.lr", 1.0),
    ("true", "model.dc5", True),
    ("False", "model.box_offset", False),
    ("64", "data.short_sides_px", (64,)),
    ("[64, 96]", "data.short_sides_px", (64, 96)),
    ("((64, 96),)", "data.eval_shapes", ((64, 96),)),
    ("7", "train.max_steps", 7),
    ("a=b,c", "init", "a=b,c"),
])  # fmt: skip
def test_a_text_becomes_a_value(text, field, value):
    found = flat_fields(change_config(common.get_config(), ["--config.seed=1", f"--config.{field}={text}"]))[field]
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(("field", "message"), [
    ("optimizer.learning_rate=3", "there is no config.optimizer.learning_rate; did you mean --config.optimizer.lr?"),
    ("train.learning_rate=3", "did you mean --config.optimizer.lr?"),
    ("train.lr=3", "there is no config.train.lr; did you mean --config.optimizer.lr?"),
    ("optim.lr=3", "did you mean --config.optimizer.lr?"),
    ("optimiser.lr=3", "did you mean --config.optimizer.lr?"),
    ("batch_size=3", "did you mean --config.eval.batch_size or --config.train.batch_size?"),
    ("trian.batchsize=3", "did you mean --config.train.batch_size?"),
    ("train=3", "config.train is a group of fields; set one of them"),
    ("foo.bar=3", "there is no config.foo.bar; `cdetr configs NAME` lists the fields"),
    ("=3", "there is no config.; `cdetr configs"),
    ("train.batch_size", "config.train.batch_size is '', expected a whole number"),
])  # fmt: skip
def test_a_field_that_there_is_not(field, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        change_config(common.get_config(), [f"--config.{field}"])


# --------------------------------------------------------------------------------------- fields that go together


def changed(**fields):
    """The published config with some fields changed; a double underscore stands for the dot."""
    config = common.get_config()
    config.update_from_flattened_dict({name.replace("__", "."): value for name, value in fields.items()})
    return config


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_passes(recipe):
    check_config(importlib.import_module(f"configs.{recipe}").get_config())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model__width": 254, "model__num_heads": 2}, "config.model.width is 254; it must be a multiple of 4"),
        ({"model__width": 256, "model__num_heads": 7}, "and of config.model.num_heads, 7"),
        ({"model__spatial_query": "t", "model__transformation": "full"}, "config.model.transformation is 'full'; use"),
        ({"matcher__class_cost": 0.0, "matcher__l1_cost": 0.0, "matcher__giou_cost": 0.0}, "costs of config.matcher"),
        ({"loss__class_weight": 0.0, "loss__l1_weight": 0.0, "loss__giou_weight": 0.0}, "all three weights of config"),
        ({"optimizer__lr": -1.0}, "config.optimizer.lr is -1.0, expected a number from 0 to 10"),
    ],
)
def test_values_that_do_not_go_together(fields, message):
    with pytest.raises(ValueError, match=message):
        check_config(changed(**fields))


def test_a_recipe_of_its_own_must_have_every_field():
    config = common.get_config().unlock()
    del config.matcher
    with pytest.raises(ValueError, match=r"^config.matcher.class_cost is missing, and 2 more: begin the recipe"):
        check_config(config)
    config = common.get_config().unlock()
    config.train.batchsize = 4
    with pytest.raises(ValueError, match=r"config.train.batchsize is no field of a config; configs/common.py lists"):
        check_config(config)


@pytest.mark.parametrize(
    ("batch", "micro_batches", "devices", "processes", "expected"),
    [
        (16, 1, 1, 1, 1),
        (16, 1, 8, 1, 8),
        (16, 1, 4, 2, 4),
        (4, 1, 8, 1, 4),  # a picture on each
        (1, 1, 8, 1, 1),
        (16, 4, 8, 1, 4),
        (30, 1, 8, 1, "train.batch_size 30 is not divisible by 8 devices; use 24 or 32"),
        (4, 1, 4, 2, "train.batch_size 4 is not divisible by 8 devices; use 8"),
        (16, 3, 1, 1, "16 is not divisible by 1 devices times config.train.accumulation_steps 3; use 15 or 18"),
        (20, 3, 4, 1, "20 is not divisible by 4 devices times config.train.accumulation_steps 3; use 12 or 24"),
    ],
)
def test_the_devices_of_a_batch(batch, micro_batches, devices, processes, expected):
    if isinstance(expected, int):
        assert count_train_devices(batch, micro_batches, devices, processes) == expected
        return
    with pytest.raises(ValueError, match=expected):
        count_train_devices(batch, micro_batches, devices, processes)


# ------------------------------------------------------------------------------------------------------- options

# Of which options any text is right that is not empty: names, which the files will tell.
NAMES = [
    "--config",
    "--data",
    "folder",
    "--workdir",
    "--weights",
    "source",
    "destination",
    "--output",
    "--dataset",
    "--data_dir",
    "--archives",
    "--topology",
    "--trace",
    "--report",
    "--classes",
    "--only",
    "recipe",
    "pictures",
    "runs",
]
MAY_BE = {
    name: ["0"] for name in ("--from-eval", "--process-id", "--threshold", "--seeds", "--ap", "--head", "--query")
}
MAY_BE["--layer"] = ["0", "-1"]
COMMANDS = next(action.choices for action in main.parser()._actions if action.choices)
OPTIONS = [
    (command, action.option_strings[0] if action.option_strings else action.dest)
    for command, parser in COMMANDS.items()
    for action in parser._actions
    if action.nargs != 0
]


@pytest.mark.parametrize(("command", "option"), OPTIONS)
def test_a_bad_option_is_refused(command, option):
    parser = COMMANDS[command]
    action = next(a for a in parser._actions if option in (*a.option_strings, a.dest))
    for text in BAD_TEXTS:
        if text in MAY_BE.get(option, ()) or (option in NAMES and text):
            parser._get_values(action, [text])
            continue
        with pytest.raises(argparse.ArgumentError, match=r"(?s)argument .*(expected|choose from)") as error:
            parser._get_values(action, [text])
        assert "\n" not in str(error.value)
        assert option in str(error.value) or (action.metavar or "{}") in str(error.value) or action.choices
