"""`cdetr train`."""

import argparse
import shlex

from cdetr_jax.cli.processes import join_processes
from cdetr_jax.cli.settings import set_up_logging
from cdetr_jax.files import as_path, check_writable_folder


def run(arguments: argparse.Namespace, fields: list[str]) -> None:
    """Trains, and says where things are."""
    set_up_logging()
    join_processes(arguments)  # so that the others hear of what goes wrong from here on
    from cdetr_jax.cli.data_flag import config_of, default_workdir

    arguments.workdir = arguments.workdir or default_workdir(arguments.data)
    workdir = as_path(arguments.workdir)
    check_writable_folder(workdir)  # before anything is read
    config = config_of(arguments.config, arguments.data, fields, arguments.workdir)
    import jax

    from cdetr_jax.training.loop import train_and_evaluate
    from cdetr_jax.training.stopping import StoppedError

    try:
        train_and_evaluate(config, workdir)
    except StoppedError as stopped:
        given = {"config": arguments.config, "data": arguments.data, "workdir": arguments.workdir}
        command = ["cdetr", "train", *(f"--{name}={value}" for name, value in given.items() if value), *fields]
        raise StoppedError(f"{stopped}; to go on: {shlex.join(command)}") from None
    if jax.process_index() > 0:
        return
    print(f"checkpoints  {workdir / 'checkpoints'}\nmetrics      {workdir / 'metrics.jsonl'}")
    for name, what in (("curve.png", "curve"), ("eval.png", "pictures")):
        if (workdir / name).exists():
            print(f"{what:<11}  {workdir / name}")
