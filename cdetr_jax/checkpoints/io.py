"""Save, restore and keep the last n and the best of the whole training state, through Orbax."""

import contextlib
import json
import logging
import os
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging as absl_logging

from cdetr_jax.checkpoints import mismatch
from cdetr_jax.files import FULL, as_path, is_remote, write_json
from cdetr_jax.training.processes import agree

Content = TypeVar("Content")

FINISH_S = 5
CHECKSUMS = "checksums"  # of a checkpoint's arrays, by the first part of their names; kept beside its position


class DamagedCheckpointError(ValueError):
    """A checkpoint that cannot be read, or holds other bytes than were saved."""


class Checkpoints:
    """The checkpoints of a run, in `workdir/checkpoints`. Saving goes on in the background; close it at the end.

    Of several processes the first one writes, and each reads for itself: Orbax's own way, in which all write and read
    together, hangs for minutes when a disk is full, and takes a process that is gone for a damaged checkpoint.

    A checkpoint appears under its name only when it is whole, so that a process killed while saving leaves the one
    before as the latest. What was saved is checked at reading by a checksum, which Orbax's own files lack.
    """

    def __init__(self, workdir: str | os.PathLike, *, keep: int = 2, read_only: bool = False):
        """Opens the folder. `keep`: how many of the latest to keep, beside the best by AP.

        Raises: FileNotFoundError, if it is read only and not there; ValueError, see `as_path`.
        """
        folder = as_path(workdir)
        self.directory = (folder if is_remote(folder) else folder.resolve()) / "checkpoints"
        if read_only and not self.directory.is_dir():
            raise FileNotFoundError(f"{workdir} holds no checkpoints; `cdetr train --workdir={workdir}` makes them")
        self._writes = not read_only and jax.process_index() == 0
        if not read_only:
            self.directory.mkdir(parents=True, exist_ok=True)
        self._scores: dict[int, float] = {}
        self._saving: int | None = None
        self._policy = _LatestAndBest(keep, self._scores)
        with _without_warnings():
            self._manager = _Manager(
                self.directory,
                options=ocp.CheckpointManagerOptions(
                    preservation_policy=self._policy if self._writes else None,
                    read_only=not self._writes,
                    create=False,
                    cleanup_tmp_directories=self._writes,
                    lightweight_initialize=True,  # a damaged checkpoint does no harm until it is read
                    multiprocessing_options=_alone(),
                ),
                # Without these a manager that has saved nothing yet cannot tell the shapes of what it holds.
                item_handlers={
                    "state": ocp.StandardCheckpointHandler(multiprocessing_options=_alone()),
                    "position": ocp.JsonCheckpointHandler(multiprocessing_options=_alone()),
                },
            )
        for step in self.steps():
            score = self._read_score(step)
            if score is not None:
                self._scores[step] = score

    def save(self, step: int, state: Any, position: dict[str, Any]) -> None:
        """Starts saving.

        Args:
          step: optimiser steps taken.
          state: pytree of arrays, not replicated.
          position: what the data iterator needs to go on.
        Raises: OSError, if this or the save before could not be written (a full disk); what was saved before stays.
        """
        if not self._writes:
            return
        self._wait()
        position = {**position, CHECKSUMS: {**checksums(state), "position": _checksum_of_json(position)}}
        args = ocp.args.Composite(state=ocp.args.StandardSave(state), position=ocp.args.JsonSave(position))
        self._saving = step
        with self._writing():
            self._manager.save(step, args=args, force=True)

    def check(self) -> None:
        """Raises OSError, as `save`, if what was being saved has failed. Does not wait."""
        if self._saving is not None and not self._manager.is_saving_in_progress():
            self._wait()

    def set_score(self, step: int, average_precision: float) -> None:
        """Adds the AP to a checkpoint, which thereby takes part in the choice of the best; waits until it is saved.

        Raises: OSError, as `save`.
        """
        self._scores[step] = average_precision
        if not self._writes:
            return
        self._wait()
        with self._writing(step):
            write_json(self._score_file(step), {"AP": average_precision})
            for other in set(self.steps()) - self._policy.kept(self.steps()):
                self._manager.delete(other)

    def score(self, step: int) -> float | None:
        """The AP of a checkpoint; None if it was not evaluated."""
        return self._scores.get(step)

    def steps(self) -> list[int]:
        """All finished checkpoints."""
        return sorted(self._manager.all_steps())

    def latest_step(self) -> int | None:
        """The newest checkpoint's step; None if there is none."""
        return self._manager.latest_step()

    def best_step(self) -> int | None:
        """The step of the checkpoint with the highest AP; the newest one if none was evaluated."""
        return _best(self.steps(), self._scores) or self.latest_step()

    def restore(self, step: int, template: Any) -> tuple[Any, dict[str, Any]]:
        """Reads a checkpoint.

        Args:
          step: which.
          template: the state's `jax.eval_shape`.
        Returns: the state as NumPy arrays, and the position.
        Raises: ValueError, if it holds other names or shapes, with what is missing, unused and mis-shaped;
          DamagedCheckpointError.
        """
        saved = {_name(path): leaf.shape for path, leaf in _leaves(self._saved(step))}
        expected = {_name(path): leaf.shape for path, leaf in _leaves(template)}
        problems = mismatch.compare(saved, expected)
        if problems:
            raise ValueError(
                f"checkpoint {step} in {self.directory} does not fit the config's model and optimizer: {problems}; "
                "use the config of that run, or another workdir"
            )
        arrays = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), template)
        with self._reading(step):
            state = self._manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(arrays)))
            return state["state"], self._verified_position(step, state["state"])

    def restore_weights(self, step: int) -> dict[str, Any]:
        """The weights that a checkpoint predicts with, without the optimiser's state.

        Returns: {"params": the moving average if there is one, "constants"}, NumPy arrays.
        Raises: DamagedCheckpointError.
        """
        saved = self._saved(step)
        names = {"params": "ema_params" if saved.get("ema_params") else "params", "constants": "constants"}
        template = jax.tree.map(
            lambda leaf: np.empty(leaf.shape, leaf.dtype),
            {name: saved[name] for name in names.values() if saved.get(name)},
        )
        handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=_alone())
        with self._reading(step), ocp.Checkpointer(handler, multiprocessing_options=_alone()) as reader:
            restored = reader.restore(
                self.directory / str(step) / "state",
                args=ocp.args.PyTreeRestore(
                    template, restore_args=jax.tree.map(_as_numpy, template), partial_restore=True
                ),
            )
            self._verified_position(step, restored)
        return {ours: restored[name] for ours, name in names.items() if name in restored}

    def first_whole(self, steps: Sequence[int], read: Callable[[int], Content]) -> tuple[int, Content]:
        """What `read` makes of the first of some checkpoints that is not damaged, and its step; warns of the others.

        Raises: DamagedCheckpointError, if all are; whatever else `read` raises.
        """
        for step, following in zip(steps, [*steps[1:], None], strict=True):
            try:
                return step, read(step)
            except DamagedCheckpointError as error:
                if following is None:
                    raise DamagedCheckpointError(
                        f"{error}; there is no other checkpoint to fall back to: put back a copy of that folder, or "
                        "train again in another workdir"
                    ) from error
                absl_logging.warning("%s; falling back to the checkpoint of step %d", error, following)
        raise AssertionError("no checkpoint was asked for")

    def set_aside(self, step: int) -> None:
        """Renames a damaged checkpoint, so that the run can save that step again.

        Raises: ValueError on all processes, if not all of them found it damaged.
        """
        if jax.process_index() == 0:
            damaged = self.directory / str(step)
            damaged.rename(self.directory / f"{step}.damaged")
        agree({"the damaged checkpoint": step})  # and so the others look when it is gone
        self._manager.reload()
        self._scores.pop(step, None)

    def finish(self) -> None:
        """Waits for what is being saved, but not for long."""
        deadline = time.monotonic() + FINISH_S
        while self._manager.is_saving_in_progress() and time.monotonic() < deadline:
            time.sleep(0.05)

    def close(self) -> None:
        """Waits for what is being saved.

        Raises: OSError, as `save`.
        """
        try:
            self._wait()
        finally:
            with contextlib.suppress(Exception):  # it raises once more what `_wait` has raised
                self._manager.close()

    def _wait(self) -> None:
        with self._writing():
            self._manager.wait_until_finished()
        self._saving = None

    @contextlib.contextmanager
    def _writing(self, step: int | None = None) -> Iterator[None]:
        """Makes one OSError with advice of the many kinds that a failed save raises in Orbax and TensorStore."""
        try:
            yield
        except Exception as error:
            is_full = getattr(error, "errno", None) in FULL or any(
                sign in str(error) for sign in ("No space left", "Disk quota", "RESOURCE_EXHAUSTED")
            )
            reason = "the disk is full" if is_full else _one_line(error)
            raise OSError(
                f"could not write the checkpoint of step {self._saving if step is None else step} to {self.directory}: "
                f"{reason}; the earlier ones are whole: {'free some space' if is_full else 'mend that'} and run the "
                "same command again to go on"
            ) from error

    @contextlib.contextmanager
    def _reading(self, step: int) -> Iterator[None]:
        try:
            yield
        except DamagedCheckpointError:
            raise
        except Exception as error:  # JSON, TensorStore, zstd and Orbax all have their own kinds
            raise DamagedCheckpointError(
                f"the checkpoint {self.directory / str(step)} is damaged ({_one_line(error)})"
            ) from error

    def _saved(self, step: int) -> Any:
        """Shapes and types of a checkpoint's state."""
        with self._reading(step):
            return self._manager.item_metadata(step)["state"]

    def _verified_position(self, step: int, state: Any) -> dict[str, Any]:
        """The position, if all arrays of the state, or of a part of it, are as they were saved."""
        position = self._manager.restore(step, args=ocp.args.Composite(position=ocp.args.JsonRestore()))["position"]
        expected = position.pop(CHECKSUMS, None)
        if expected is not None:  # else it was saved before there were any
            found = {**checksums(state), "position": _checksum_of_json(position)}
            wrong = [name for name, checksum in found.items() if checksum != expected.get(name)]
            if wrong:
                raise DamagedCheckpointError(
                    f"the checkpoint {self.directory / str(step)} is damaged (the checksum of {', '.join(wrong)} is "
                    "not the one that was saved)"
                )
        return position

    def _score_file(self, step: int) -> Any:
        return self.directory / str(step) / "metrics" / "metrics"  # where Orbax keeps a checkpoint's metrics

    def _read_score(self, step: int) -> float | None:
        try:
            return float(json.loads(self._score_file(step).read_text())["AP"])
        except (OSError, ValueError, KeyError, TypeError):
            return None


class _Manager(ocp.CheckpointManager):
    """Does not ask JAX itself whether the run is to stop: JAX takes the step for one of the numbers of `Stop.ask`."""

    def reached_preemption(self, step: int) -> bool:
        return False


def _alone() -> Any:
    """For Orbax: no other process takes part."""
    process = jax.process_index()
    return ocp.options.MultiprocessingOptions(process, {process}, barrier_sync_key_prefix=f"process{process}")


class _LatestAndBest:
    """Orbax's preservation policy: the last n and the best."""

    def __init__(self, latest: int, scores: dict[int, float]):
        self._latest, self._scores = latest, scores

    def kept(self, steps: Sequence[int]) -> set[int]:
        return {*sorted(steps)[-self._latest :], _best(steps, self._scores)} - {None}

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        del context
        kept = self.kept([checkpoint.step for checkpoint in checkpoints])
        return [checkpoint.step in kept for checkpoint in checkpoints]


def _best(steps: Sequence[int], scores: dict[int, float]) -> int | None:
    """The step with the highest score, of equal ones the last; None if none has one."""
    return max((step for step in steps if step in scores), key=lambda step: (scores[step], step), default=None)


def checksums(tree: Any) -> dict[str, int]:
    """CRC-32 of all arrays whose names start alike, such as those of "params"."""
    sums: dict[str, int] = {}
    for path, leaf in _leaves(tree):
        part = _name(path[:1])
        data = np.ascontiguousarray(leaf).reshape(-1).view(np.uint8)
        sums[part] = zlib.crc32(data, sums.get(part, 0))
    return sums


def _checksum_of_json(content: Any) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}{'...' if len(text) > 200 else ''}"


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


def _leaves(tree: Any) -> list[tuple[Any, Any]]:
    return [(path, leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree) if hasattr(leaf, "shape")]


def _name(path: Any) -> str:
    """One name for a leaf, whether the tree is made of dataclasses and tuples or of Orbax's dicts."""
    return jax.tree_util.keystr(path, simple=True, separator="/")
