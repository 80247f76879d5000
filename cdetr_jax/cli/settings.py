"""What the commands share: reading the config, and how the log looks."""

import ast
import contextlib
import difflib
import importlib
import importlib.util
import inspect
import os
import re
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import ml_collections
from absl import flags
from absl import logging as absl_logging

RECIPES = Path(__file__).parents[1] / "configs"  # in the repository a link to its folder configs


def read_config(path: str, fields: list[str]) -> ml_collections.ConfigDict:
    """A recipe with the command line's changes.

    Args:
      path: of a Python file with `get_config()`, or the name of one of ours, such as `detr_r50`; what comes after a
        colon is handed to it, as in `detr_r50:75` or `my/recipe.py:75`.
      fields: such as `--config.optimizer.lr=2e-4`.
    Raises: ValueError, FileNotFoundError, if the recipe cannot be read; see also `change_config`.
    """
    return read_recipe(path, fields)[0]


def read_recipe(path: str, fields: list[str]) -> tuple[ml_collections.ConfigDict, ModuleType]:
    """As `read_config`, and the recipe itself, which may say more: `configs/compare_demo.py` has variants."""
    name, colon, argument = path.rpartition(":") if re.search(r"(\.py|^\w+):[^/]*$", path) else (path, "", "")
    is_ours = re.fullmatch(r"\w+", name) is not None
    file = RECIPES / f"{name}.py" if is_ours else Path(name)
    if not file.is_file():
        similar = difflib.get_close_matches(file.stem, recipe_names(), n=1)
        meant = f"; did you mean --config={similar[0]}?" if similar else ""
        raise FileNotFoundError(f"there is no config {path}{meant}; `cdetr configs` lists the recipes")
    # A recipe imports its neighbours as `configs.common`, one elsewhere those of the folder that we are in, or ours.
    if not is_ours:
        sys.path[:0] = [str(file.resolve().parents[1]), os.getcwd()]
    if is_ours or not _is_there("configs.common"):
        sys.modules["configs"] = importlib.import_module("cdetr_jax.configs")
    try:
        config, recipe = _load(file.resolve(), [argument] if colon else [])
    except Exception as error:  # a recipe may do anything
        raise ValueError(f"{path} cannot be read: {_what_happened(error, file.resolve())}") from error
    return change_config(config, fields), recipe


def recipe_names() -> list[str]:
    """What can be given to `read_config` instead of a path."""
    return sorted(file.stem for file in RECIPES.glob("*.py") if file.stem not in ("__init__", "common"))


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def _load(file: Path, arguments: list[str]) -> tuple[ml_collections.ConfigDict, ModuleType]:
    if file.suffix != ".py":
        raise ValueError("it is not a Python file with a function get_config, such as configs/demo.py")
    spec = importlib.util.spec_from_file_location("cdetr_recipe", file)
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    get_config = getattr(recipe, "get_config", None)
    if not callable(get_config):
        raise ValueError("it has no function get_config; configs/demo.py shows how one looks")
    try:
        inspect.signature(get_config).bind(*arguments)
    except TypeError:
        what = "takes nothing after a colon" if arguments else f"needs an argument: --config={file.name}:ARGUMENT"
        raise ValueError(f"its get_config {what}") from None
    config = get_config(*arguments)
    if not isinstance(config, ml_collections.ConfigDict):
        raise ValueError(f"its get_config returned {type(config).__name__}, expected a ConfigDict")
    return config, recipe


def _what_happened(error: Exception, file: Path) -> str:
    """One line: a ValueError's own words, another error's with its type and the line of the recipe."""
    message = " ".join(str(error).split())
    if isinstance(error, ValueError):
        return message
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)]
    return f"{type(error).__name__}: {message}" + (f", in line {lines[-1]}" if lines else "")


def change_config(config: ml_collections.ConfigDict, fields: list[str]) -> ml_collections.ConfigDict:
    """A config with the command line's changes; of a field that is given twice the last counts.

    Raises: ValueError, if there is no such field (with the name that was perhaps meant) or it cannot have that value.
    """
    from cdetr_jax.config_check import FIELDS, check_value, flat_fields  # imports JAX

    before = flat_fields(config)
    for word in fields:
        field, equals, text = word.removeprefix("--config.").partition("=")
        if field not in before:
            group = [name for name in before if name.startswith(f"{field}.")]
            raise ValueError(
                f"config.{field} is a group of fields; set one of them, such as --config.{group[0]}=..."
                if group
                else f"there is no config.{field}; {_suggestion(field, list(before))}"
            )
        value = True if not equals and isinstance(before[field], bool) else _value(text, before[field])
        if field in FIELDS:  # else it is a recipe's own, which `check_config` refuses
            check_value(field, value)
        try:
            config.update_from_flattened_dict({field: value})
        except TypeError as error:  # the recipe wrote, say, a whole number where fractions may be
            raise ValueError(f"config.{field} cannot be {value!r} instead of {before[field]!r}: {error}") from None
    return config


def _suggestion(field: str, known: list[str]) -> str:
    """The fields that were perhaps meant: of the same name in another group, or of a similar one."""
    last = field.rpartition(".")[2]
    names = {last, "".join(word[:1] for word in last.split("_"))}  # learning_rate: lr
    found = [name for name in known if name.rpartition(".")[2] in names] or difflib.get_close_matches(field, known, n=1)
    if not found:  # the group is wrong as well
        names = difflib.get_close_matches(last, [name.rpartition(".")[2] for name in known], n=1)
        found = [name for name in known if name.rpartition(".")[2] in names]
    meant = " or ".join(f"--config.{name}" for name in found)
    return f"did you mean {meant}?" if found else "`cdetr configs NAME` lists the fields"


def _value(text: str, before: Any) -> Any:
    """What a text stands for in a field that held `before`; the text itself if it cannot be read so."""
    if isinstance(before, str):
        return text
    if isinstance(before, bool):
        return {"true": True, "1": True, "false": False, "0": False}.get(text.lower(), text)
    try:
        value = float(text) if isinstance(before, float) else ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text
    if not isinstance(before, tuple | list):
        return value
    return type(before)(value if isinstance(value, tuple | list) else (value,))


def set_up_logging() -> None:
    """Our lines on standard error with the time only; a library's only where they warn.

    Of Orbax nothing: it warns at every folder opened for reading, and its errors are raised as well.
    """
    flags.FLAGS.mark_as_parsed()  # or absl says at the first line that they are not
    absl_logging.use_absl_handler()
    absl_logging.set_verbosity(absl_logging.INFO)
    handler = absl_logging.get_absl_handler()
    ours = str(Path(__file__).parents[1])

    def is_shown(record: absl_logging.logging.LogRecord) -> bool:
        is_warning = record.levelno >= absl_logging.logging.WARNING and "orbax" not in record.pathname
        return record.pathname.startswith(ours) or is_warning

    handler.addFilter(is_shown)
    handler.setFormatter(_Plain())
    sys.unraisablehook = _show_unraisable


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Leaves all but errors out of the log, as long as it lasts."""
    before = absl_logging.get_verbosity()
    absl_logging.set_verbosity(absl_logging.ERROR)
    try:
        yield
    finally:
        absl_logging.set_verbosity(before)


def _show_unraisable(unraisable: Any) -> None:
    """After one failed read or write of a checkpoint, TensorStore's threads complain about each of the others."""
    if str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)


class _Plain(absl_logging.PythonFormatter):
    def format(self, record):
        level = "" if record.levelno <= 20 else f"{record.levelname.lower()}: "
        clock = absl_logging.time.strftime("%H:%M:%S", absl_logging.time.localtime(record.created))
        return f"{clock} {level}{record.getMessage()}"
