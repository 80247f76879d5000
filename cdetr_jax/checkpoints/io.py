"""Save, restore and keep the last n and the best of the whole training state, through Orbax."""

import contextlib
import logging
import os
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from cdetr_jax.checkpoints import mismatch
from cdetr_jax.files import as_path, is_remote


class Checkpoints:
    """The checkpoints of a run, in `workdir/checkpoints`. Saving goes on in the background; close it at the end.

    A checkpoint appears under its name only when it is whole, so that a process killed while saving leaves the one
    before as the latest.
    """

    def __init__(self, workdir: str | os.PathLike, *, keep: int = 2, read_only: bool = False):
        """Opens the folder. `keep`: how many of the latest to keep, beside the best by AP.

        Raises: FileNotFoundError, if it is read only and not there; ValueError, see `as_path`.
        """
        folder = as_path(workdir)
        self.directory = (folder if is_remote(folder) else folder.resolve()) / "checkpoints"
        policy = checkpoint_managers.AnyPreservationPolicy(
            [
                checkpoint_managers.LatestN(keep),
                checkpoint_managers.BestN(
                    get_metric_fn=_average_precision, n=1, keep_checkpoints_without_metrics=False
                ),
            ]
        )
        if read_only and not self.directory.is_dir():
            raise FileNotFoundError(f"{workdir} holds no checkpoints; `cdetr train --workdir={workdir}` makes them")
        with _without_warnings():
            self._manager = ocp.CheckpointManager(
                self.directory,
                options=ocp.CheckpointManagerOptions(
                    preservation_policy=None if read_only else policy,
                    best_fn=_average_precision,
                    keep_checkpoints_without_metrics=True,
                    read_only=read_only,
                    cleanup_tmp_directories=not read_only,
                ),
                # Without these a manager that has saved nothing yet cannot tell the shapes of what it holds.
                item_handlers={"state": ocp.StandardCheckpointHandler(), "position": ocp.JsonCheckpointHandler()},
            )

    def save(self, step: int, state: Any, position: dict[str, int], metrics: dict[str, float] | None = None) -> None:
        """Starts saving; `metrics` with an "AP" take part in the choice of the best.

        Args:
          step: optimiser steps taken.
          state: pytree of arrays, not replicated.
          position: what the data iterator needs to go on.
        Raises: OSError, if this or the save before could not be written (a full disk); what was saved before stays.
        """
        args = ocp.args.Composite(state=ocp.args.StandardSave(state), position=ocp.args.JsonSave(position))
        try:
            self._manager.save(step, args=args, metrics=metrics, force=True)
        except OSError as error:
            raise self._write_error(error) from error

    def latest_step(self) -> int | None:
        """The newest checkpoint's step; None if there is none."""
        return self._manager.latest_step()

    def best_step(self) -> int | None:
        """The step of the checkpoint with the highest AP; the newest one if none was evaluated."""
        return self._manager.best_step() or self.latest_step()

    def restore(self, step: int, template: Any) -> tuple[Any, dict[str, int]]:
        """Reads a checkpoint.

        Args:
          step: which.
          template: the state's `jax.eval_shape`.
        Returns: the state as NumPy arrays, and the position.
        Raises: ValueError, if it holds other names or shapes, with what is missing, unused and mis-shaped.
        """
        saved = {_name(path): leaf.shape for path, leaf in _leaves(self._manager.item_metadata(step)["state"])}
        expected = {_name(path): leaf.shape for path, leaf in _leaves(template)}
        problems = mismatch.compare(saved, expected)
        if problems:
            raise ValueError(
                f"checkpoint {step} in {self.directory} does not fit the config's model and optimizer: {problems}; "
                "use the config of that run, or another workdir"
            )
        arrays = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), template)
        args = ocp.args.Composite(state=ocp.args.StandardRestore(arrays), position=ocp.args.JsonRestore())
        restored = self._manager.restore(step, args=args)
        return restored["state"], restored["position"]

    def restore_weights(self, step: int) -> dict[str, Any]:
        """The weights that a checkpoint predicts with, without the optimiser's state.

        Returns: {"params": the moving average if there is one, "constants"}, NumPy arrays.
        """
        saved = self._manager.item_metadata(step)["state"]
        names = {"params": "ema_params" if saved.get("ema_params") else "params", "constants": "constants"}
        template = jax.tree.map(
            lambda leaf: np.empty(leaf.shape, leaf.dtype),
            {name: saved[name] for name in names.values() if saved.get(name)},
        )
        with ocp.PyTreeCheckpointer() as reader:
            restored = reader.restore(
                self.directory / str(step) / "state",
                args=ocp.args.PyTreeRestore(
                    template, restore_args=jax.tree.map(_as_numpy, template), partial_restore=True
                ),
            )
        return {ours: restored[name] for ours, name in names.items() if name in restored}

    def steps(self) -> list[int]:
        """All finished checkpoints."""
        return sorted(self._manager.all_steps())

    def close(self) -> None:
        """Waits for what is being saved.

        Raises: OSError, as `save`.
        """
        try:
            self._manager.wait_until_finished()
        except OSError as error:
            raise self._write_error(error) from error
        finally:
            self._manager.close()

    def _write_error(self, error: OSError) -> OSError:
        return OSError(
            error.errno,
            f"could not write a checkpoint to {self.directory}: {error}; the earlier ones are whole: free some space "
            "and run the same command again to go on",
        )


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    """Leaves out Orbax's warnings: it has three for every folder that is opened for reading only."""

    def is_shown(record: logging.LogRecord) -> bool:
        return "orbax" not in record.pathname or record.levelno > logging.WARNING

    logger = logging.getLogger("absl")
    logger.addFilter(is_shown)
    try:
        yield
    finally:
        logger.removeFilter(is_shown)


def _as_numpy(leaf: np.ndarray) -> ocp.RestoreArgs:
    return ocp.RestoreArgs(restore_type=np.ndarray)


def _average_precision(metrics: dict[str, float]) -> float:
    return metrics["AP"]


def _leaves(tree: Any) -> list[tuple[Any, Any]]:
    return [(path, leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree) if hasattr(leaf, "shape")]


def _name(path: Any) -> str:
    """One name for a leaf, whether the tree is made of dataclasses and tuples or of Orbax's dicts."""
    return jax.tree_util.keystr(path, simple=True, separator="/")
