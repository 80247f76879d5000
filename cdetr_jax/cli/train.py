"""`cdetr train`."""

import argparse

from cdetr_jax.cli.settings import read_config, set_up_logging


def run(arguments: argparse.Namespace, fields: list[str]) -> None:
    """Trains, and says where things are."""
    config = read_config(arguments.config, fields)
    set_up_logging()
    import jax

    from cdetr_jax.training.loop import train_and_evaluate
    from cdetr_jax.visualization.curve import training_curve

    if arguments.multihost:
        jax.distributed.initialize()
    train_and_evaluate(config, arguments.workdir)
    if jax.process_index() > 0:
        return
    curve = f"{arguments.workdir}/curve.png"
    training_curve(f"{arguments.workdir}/metrics.jsonl", curve)
    print(
        f"checkpoints  {arguments.workdir}/checkpoints\n"
        f"metrics      {arguments.workdir}/metrics.jsonl\n"
        f"curve        {curve}"
    )
