"""`cdetr prepare`."""

import argparse

from cdetr_jax.cli.settings import set_up_logging


def run(arguments: argparse.Namespace) -> None:
    """Downloads and writes a TFDS set once, and says how to train on it.

    Raises: as `prepare`.
    """
    set_up_logging()
    from cdetr_jax.data.tfds_prepare import prepare

    done = prepare(
        arguments.dataset,
        arguments.data_dir,
        arguments.archives,
        check_archives=not arguments.any_archives,
    )
    counts = ", ".join(f"{split} {count}" for split, count in done.pictures.items())
    print(f"{done.name} {'was' if done.was_there else 'is'} prepared in {done.folder}\npictures: {counts}")
    if done.leftovers and not done.was_there:
        print(f"{done.leftovers} is not needed any more")
    print(
        f"train on it with --config.data.source=tfds --config.data.tfds_name={done.name} "
        f"--config.data.tfds_data_dir={arguments.data_dir}"
    )
