"""`cdetr evaluate`."""

import argparse
import shlex
import signal
import sys
from pathlib import Path

from cdetr_jax.cli.processes import join_processes
from cdetr_jax.cli.settings import change_config, read_config, set_up_logging
from cdetr_jax.files import check_writable_folder


def run(arguments: argparse.Namespace, fields: list[str]) -> None:
    """Prints the table, and writes the report that was asked for.

    Raises: ValueError, if it is not known what to evaluate on; OSError, if the report cannot be written.
    """
    set_up_logging()
    join_processes(arguments)  # so that the others hear of what goes wrong from here on
    if arguments.report:
        check_writable_folder(Path(arguments.report))
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # JAX's handler would wait for a step of training
    config = read_config(arguments.config, fields) if arguments.config else None
    from cdetr_jax.training.evaluate import evaluate
    from cdetr_jax.weights.load import load_weights

    weights = load_weights(arguments.weights, arguments.checkpoint, arguments.dc5)
    if config is None:
        if weights.config is None:
            raise ValueError(
                f"{arguments.weights} does not say on which pictures to evaluate it; name a recipe, such as "
                "--config=conditional_detr_r50"
            )
        config = change_config(weights.config, fields)
    evaluated = evaluate(config, weights)
    if evaluated is None:
        return
    print(evaluated.metrics.format_table())
    if arguments.report:
        from cdetr_jax.visualization.report import write_report

        folder = Path(arguments.report)
        best = write_report(
            folder, *evaluated, f"Evaluation of {arguments.weights}", shlex.join(["cdetr", *sys.argv[1:]])
        )
        print(f"\nthe best F1 is at a score of {best:.3f}; where it errs: {folder / 'report.html'}")
