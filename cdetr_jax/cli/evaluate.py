"""`cdetr evaluate`."""

import argparse
import shlex
import signal
import sys
from pathlib import Path

from cdetr_jax.cli.processes import join_processes
from cdetr_jax.cli.settings import set_up_logging
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
    from cdetr_jax.cli.data_flag import config_of, evaluation_of
    from cdetr_jax.training.evaluate import evaluate
    from cdetr_jax.weights.load import load_weights

    config = config_of(arguments.config, arguments.data, fields) if arguments.config else None
    weights = load_weights(arguments.weights, arguments.checkpoint, arguments.dc5)
    config = config or evaluation_of(weights, arguments.data, fields)
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
