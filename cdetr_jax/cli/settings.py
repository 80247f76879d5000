"""What the commands share: reading the config, and how the log looks."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_collections
from absl import flags
from absl import logging as absl_logging
from ml_collections import config_flags


def read_config(path: str, fields: list[str]) -> ml_collections.ConfigDict:
    """A recipe with the command line's changes.

    Args:
      path: of a Python file with `get_config()`.
      fields: such as `--config.optimizer.lr=2e-4`.
    Raises: ValueError, if there is no such field (with the name that was perhaps meant) or the value has a wrong type.
    """
    file = Path(path.split(".py:")[0] + ".py" if ".py:" in path else path)
    if not file.is_file():
        raise FileNotFoundError(f"there is no config {path}; the recipes are in the repository's folder configs/")
    # A recipe may import its neighbours as `configs.common`, one elsewhere those of the repository that we are in.
    sys.path[:0] = [str(file.resolve().parents[1]), os.getcwd()]
    values = flags.FlagValues()
    argv = ["cdetr", f"--config={path}", *fields]
    return _parse(values, argv, lambda: config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv))


def change_config(config: ml_collections.ConfigDict, fields: list[str]) -> ml_collections.ConfigDict:
    """A run's own config with the command line's changes; as `read_config`."""
    values = flags.FlagValues()
    argv = ["cdetr", *fields]
    return _parse(
        values, argv, lambda: config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=argv)
    )


def _parse(values: flags.FlagValues, argv: list[str], define: Callable[[], Any]) -> ml_collections.ConfigDict:
    try:
        define()  # which already looks up the fields of a config that is there
        values(argv)
        return values["config"].value
    except (AttributeError, KeyError) as error:  # such as: 'lrr'\nDid you mean "lr" instead of "lrr"?
        message = error.args[0]
        if isinstance(message, KeyError):  # an AttributeError holds the KeyError, whose own text is quoted
            message = message.args[0]
        raise ValueError(f"there is no such config field: {' '.join(str(message).split())}") from error
    except (TypeError, flags.Error) as error:
        raise ValueError(str(error)) from error


def set_up_logging() -> None:
    """Our lines on standard error with the time only; a library's only where they warn.

    Of Orbax only errors: it warns at every checkpoint without an AP, and at every folder opened for reading.
    """
    flags.FLAGS.mark_as_parsed()  # or absl says at the first line that they are not
    absl_logging.use_absl_handler()
    absl_logging.set_verbosity(absl_logging.INFO)
    handler = absl_logging.get_absl_handler()
    ours = str(Path(__file__).parents[1])

    def is_shown(record: absl_logging.logging.LogRecord) -> bool:
        level = absl_logging.logging.ERROR if "orbax" in record.pathname else absl_logging.logging.WARNING
        return record.pathname.startswith(ours) or record.levelno >= level

    handler.addFilter(is_shown)
    handler.setFormatter(_Plain())


class _Plain(absl_logging.PythonFormatter):
    def format(self, record):
        level = "" if record.levelno <= 20 else f"{record.levelname.lower()}: "
        clock = absl_logging.time.strftime("%H:%M:%S", absl_logging.time.localtime(record.created))
        return f"{clock} {level}{record.getMessage()}"
