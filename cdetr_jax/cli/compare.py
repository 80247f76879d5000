"""`cdetr compare`."""

import argparse
import itertools
import multiprocessing
import os
import shlex
import sys
import threading
import time
from collections.abc import Sequence
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import jax
import ml_collections
from absl import logging

from cdetr_jax.cli.environment import keep_freed_memory
from cdetr_jax.cli.settings import read_recipe, set_up_logging
from cdetr_jax.compare import Run, make_runs, summarize, write_report
from cdetr_jax.data.reader import usable_cores
from cdetr_jax.files import as_path, check_writable_folder, is_remote
from cdetr_jax.training.loop import train_and_evaluate
from cdetr_jax.training.processes import code_version
from cdetr_jax.training.start import git_commit
from cdetr_jax.training.stopping import StoppedError, watch_signals

_LOOK_S = 2.0  # between two looks at how the runs go


def run(arguments: argparse.Namespace, fields: list[str]) -> None:
    """Trains what is missing, and reports.

    Raises: ValueError, if the recipe has no variants, or one that is asked for is not there, or a run failed;
      StoppedError, after Ctrl-C or SIGTERM.
    """
    set_up_logging()
    jax.config.update("jax_platforms", "cpu")  # of this process; accelerators are the training processes'
    workdir = as_path(arguments.workdir)
    if is_remote(workdir):
        raise ValueError(f"--workdir {workdir}: a comparison needs a folder of this machine")
    check_writable_folder(workdir)
    if any(field.startswith("--config.seed") for field in fields):
        raise ValueError("--config.seed: a comparison takes its seeds from --seeds")
    config, recipe = read_recipe(arguments.config, fields)
    variants = getattr(recipe, "VARIANTS", None)
    if not variants:
        raise ValueError(f"{arguments.config} has no VARIANTS to compare; compare_demo in configs/ shows how they look")
    groups = getattr(recipe, "GROUPS", {"COCO average precision": tuple(variants)})
    if unknown := [name for name in (*arguments.only, *itertools.chain(*groups.values())) if name not in variants]:
        raise ValueError(f"{arguments.config} has no variant {unknown[0]!r}; it has {', '.join(variants)}")
    chosen = {name: changes for name, changes in variants.items() if not arguments.only or name in arguments.only}
    runs = make_runs(config, chosen, workdir, arguments.seeds)
    command = ["cdetr", "compare", f"--config={arguments.config}", f"--workdir={arguments.workdir}"]
    command.append(f"--seeds={','.join(map(str, arguments.seeds))}")
    command += [f"--only={','.join(chosen)}"] if arguments.only else []
    command += [f"--jobs={arguments.jobs}", *fields]
    failed = {}
    if not arguments.report_only:
        try:
            failed = train_all(runs, arguments.jobs)
        except StoppedError as stopped:
            raise StoppedError(f"{stopped}; to go on: {shlex.join(command)}") from None
    about = {
        "command": shlex.join(command),
        "date": time.strftime("%Y-%m-%d"),
        **code_version(),
        "git_commit": git_commit() or "not known",
    }
    print(write_report(workdir, summarize(runs, chosen, failed, arguments.ap), groups, about))
    print(f"\nreport  {workdir / 'report.html'}")
    if failed:
        names = ", ".join(f"{run.name} ({why})" for run, why in failed.items())
        raise ValueError(f"{len(failed)} of {len(runs)} runs failed: {names}; the same command tries them again")


def train_all(runs: Sequence[Run], jobs: int = 1) -> dict[Run, str]:
    """Trains what is not done yet, each run in a process of its own, so that one that fails loses no other.

    Args:
      jobs: how many at a time; each gets its share of the cores.

    Returns: the runs that failed, each with the last line of its output.
    Raises: StoppedError, after Ctrl-C or SIGTERM, when what was running has saved all; the same call goes on.
    """
    waiting = [run for run in runs if not run.is_done()]
    progress = _Progress(runs, waiting)
    if len(waiting) < len(runs):
        logging.info("%d of %d runs are done already", len(runs) - len(waiting), len(runs))
    shares = _shares(jobs)
    active: dict[int, tuple[Run, BaseProcess]] = {}
    failed: dict[Run, str] = {}
    with watch_signals() as stop:
        while (waiting and not stop) or active:
            for slot in range(jobs):
                if waiting and slot not in active and not stop:
                    run = waiting.pop(0)
                    active[slot] = run, _start(run, shares[slot])
                    progress.say_start(run)
            connection.wait([process.sentinel for _, process in active.values()], _LOOK_S)
            if stop:
                for _, process in active.values():
                    process.terminate()
                    process.join()
            for slot, (run, process) in list(active.items()):
                if not process.is_alive():
                    del active[slot]
                    if not run.is_done() and not stop:
                        failed[run] = _last_line(run.workdir / "train.log", process.exitcode)
                        logging.error("%s failed: %s; see %s", run.name, failed[run], run.workdir / "train.log")
            progress.say([run for run, _ in active.values()])
    if stop:
        raise StoppedError(f"stopped; {sum(run.is_done() for run in runs)} of {len(runs)} runs are done")
    return failed


class _Progress:
    """Says after every evaluation how far all is; the time left is at the pace of this call so far."""

    def __init__(self, runs: Sequence[Run], waiting: Sequence[Run]):
        self._runs, self._waiting = runs, tuple(waiting)
        self._begun = time.monotonic()
        self._epochs = {run.workdir: run.epoch() for run in waiting}
        self._said = {run.workdir: len(run.evaluations()) for run in waiting}
        self._left_at_start = sum(run.config.train.num_epochs - self._epochs[run.workdir] for run in waiting)

    def say_start(self, run: Run) -> None:
        number = self._runs.index(run) + 1
        logging.info("run %d of %d: %s, in %s", number, len(self._runs), run.name, run.workdir)

    def say(self, active: Sequence[Run]) -> None:
        for run in active:
            evaluations = run.evaluations()
            if len(evaluations) <= self._said[run.workdir]:
                continue
            self._said[run.workdir] = len(evaluations)
            last = evaluations[-1]
            logging.info(
                "%s: epoch %g of %d, AP %.3f; left for all runs %s",
                run.name, last["epoch"], run.config.train.num_epochs, last["AP"], self._time_left(),
            )  # fmt: skip

    def _time_left(self) -> str:
        done = sum(run.epoch() - self._epochs[run.workdir] for run in self._waiting)
        if done <= 0:
            return "?"
        seconds = round((time.monotonic() - self._begun) / done * (self._left_at_start - done))
        return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"


def _shares(jobs: int) -> list[set[int] | None]:
    """The cores of each of so many processes side by side; None: all, where a system cannot be told or has too few."""
    if jobs == 1 or not hasattr(os, "sched_setaffinity") or usable_cores() < jobs:
        return [None] * jobs
    cores = sorted(os.sched_getaffinity(0))
    return [set(cores[slot::jobs]) for slot in range(jobs)]


def _start(run: Run, cores: set[int] | None) -> BaseProcess:
    run.workdir.mkdir(parents=True, exist_ok=True)
    arguments = (run.config.to_dict(), run.workdir, cores)
    process = multiprocessing.get_context("spawn").Process(target=_train, args=arguments, name=run.name)
    process.start()
    return process


def _train(config: dict[str, Any], workdir: Path, cores: set[int] | None) -> None:
    """One run, in a process of its own, which ends when the process that started it is killed."""
    keep_freed_memory()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if cores is not None:
        os.sched_setaffinity(0, cores)
    with (workdir / "train.log").open("a", encoding="utf-8") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    set_up_logging()
    try:
        train_and_evaluate(ml_collections.ConfigDict(config).lock(), workdir)
    except StoppedError as stopped:
        print(stopped, file=sys.stderr)
        sys.stderr.flush()
        os._exit(StoppedError.exit_status)  # all is saved, and Python would wait for what is being compiled


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def _last_line(log: Path, status: int | None) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n") if log.exists() else []
    last = next((line.strip() for line in reversed(lines) if line.strip()), "it wrote nothing")
    return last if status and status > 0 else f"{last} (killed by signal {-(status or 0)})"
