"""`cdetr evaluate`."""

import argparse

from cdetr_jax.checkpoints.workdir import load_config
from cdetr_jax.cli.settings import change_config, read_config, set_up_logging


def run(arguments: argparse.Namespace, fields: list[str]) -> None:
    """Prints the table."""
    if arguments.config:
        config = read_config(arguments.config, fields)
    else:
        config = change_config(load_config(arguments.workdir), fields)
    set_up_logging()
    from cdetr_jax.training.loop import evaluate

    print(evaluate(config, arguments.workdir, arguments.checkpoint).format_table())
