"""`cdetr evaluate`."""

import argparse
import signal

from cdetr_jax.cli.processes import join_processes
from cdetr_jax.cli.settings import change_config, read_config, set_up_logging


def run(arguments: argparse.Namespace, fields: list[str]) -> None:
    """Prints the table.

    Raises: ValueError, if it is not known what to evaluate on.
    """
    set_up_logging()
    join_processes(arguments)  # so that the others hear of what goes wrong from here on
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # JAX's handler would wait for a step of training
    config = read_config(arguments.config, fields) if arguments.config else None
    from cdetr_jax.training.evaluate import evaluate
    from cdetr_jax.weights.load import load_weights

    weights = load_weights(arguments.weights, arguments.checkpoint, arguments.dc5)
    if config is None:
        if weights.config is None:
            raise ValueError(
                f"{arguments.weights} does not say on which pictures to evaluate it; name a recipe, such as "
                "--config=configs/conditional_detr_r50.py"
            )
        config = change_config(weights.config, fields)
    metrics = evaluate(config, weights)
    if metrics is not None:
        print(metrics.format_table())
