"""`cdetr curve`."""

import argparse
import itertools
from collections.abc import Sequence

from cdetr_jax.files import as_path
from cdetr_jax.visualization.curve import compare_runs


def run(arguments: argparse.Namespace) -> None:
    """Draws the runs' curves into one picture.

    Raises: FileNotFoundError, if a folder is not a run's; ValueError, if none has a number yet.
    """
    metrics = {
        name: as_path(workdir) / "metrics.jsonl"
        for name, workdir in zip(_names(arguments.runs), arguments.runs, strict=True)
    }
    for path in metrics.values():
        if not path.exists():
            raise FileNotFoundError(f"{path} is missing: {path.parent} is not the workdir of a run that was trained")
    compare_runs(metrics, arguments.output)
    print(f"curve  {arguments.output}")


def _names(workdirs: Sequence[str]) -> list[str]:
    """The runs' paths without the folders that all of them are in."""
    paths = [workdir.rstrip("/").split("/") for workdir in workdirs]
    shared = itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*(path[:-1] for path in paths), strict=False))
    begin = len(list(shared))
    return ["/".join(path[begin:]) for path in paths]
