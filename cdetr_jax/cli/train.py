"""`cdetr train`."""

import argparse

from cdetr_jax.cli.settings import read_config, set_up_logging
from cdetr_jax.files import as_path, check_writable_folder


def run(arguments: argparse.Namespace, fields: list[str]) -> None:
    """Trains, and says where things are."""
    workdir = as_path(arguments.workdir)
    check_writable_folder(workdir)  # before anything is read
    config = read_config(arguments.config, fields)
    set_up_logging()
    import jax

    from cdetr_jax.training.loop import train_and_evaluate
    from cdetr_jax.visualization.curve import training_curve

    if arguments.multihost:
        jax.distributed.initialize()
    train_and_evaluate(config, workdir)
    if jax.process_index() > 0:
        return
    metrics, curve = workdir / "metrics.jsonl", workdir / "curve.png"
    training_curve(metrics, curve)
    print(f"checkpoints  {workdir / 'checkpoints'}\nmetrics      {metrics}\ncurve        {curve}")
