"""Joining the processes of one command: those of a pod slice, a cluster, or a list of hosts."""

import argparse
import os
import socket

from cdetr_jax.cli.arguments import host_and_port, whole

# Option, environment variable, type, placeholder, help.
OPTIONS = (
    ("--coordinator", "CDETR_COORDINATOR", host_and_port, "HOST:PORT", "where process 0 runs, and a free port there"),
    ("--num-processes", "CDETR_NUM_PROCESSES", whole(1), "N", "how many processes there are"),
    ("--process-id", "CDETR_PROCESS_ID", whole(0), "I", "which of them this is, from 0"),
)


def add_processes(command: argparse.ArgumentParser) -> None:
    """Adds the options that say that a process is one of several."""
    group = command.add_argument_group(
        "several processes",
        "Start the same command in each, with --multihost where JAX detects which one\n"
        "it is, else with the three other options or their environment variables.",
    )
    group.add_argument(
        "--multihost",
        action="store_true",
        help="this is one of the processes of a Cloud TPU slice, or of a job under GKE, SLURM or Open MPI",
    )
    for option, variable, kind, placeholder, text in OPTIONS:
        # argparse reads a default that is a text as it reads an argument.
        group.add_argument(
            option, type=kind, metavar=placeholder, default=os.environ.get(variable), help=f"{text} (or {variable})"
        )


def join_processes(arguments: argparse.Namespace) -> None:
    """Connects this process with the others, if it is one of several. Comes before any use of a device.

    Raises: ValueError, if it is not known how many there are and which one this is; OSError, if the port is taken.
    """
    given = [arguments.coordinator, arguments.num_processes, arguments.process_id]
    names = [f"{option} ({variable})" for option, variable, *_ in OPTIONS]
    if given == [None] * 3 and not arguments.multihost:
        return
    import jax
    from absl import logging

    from cdetr_jax.training.processes import HEARTBEAT_S, watch_others

    if given == [None] * 3:
        try:
            jax.distributed.initialize(heartbeat_timeout_seconds=HEARTBEAT_S)
        except ValueError as error:
            raise ValueError(
                f"--multihost: JAX detects no Cloud TPU, GKE, SLURM or Open MPI here ({error}); say which process this "
                f"is by {', '.join(names)}; for one process leave --multihost out"
            ) from None
        watch_others()
        return
    missing = [name for name, value in zip(names, given, strict=True) if value is None]
    if missing:
        raise ValueError(f"{', '.join(missing)} missing: of several processes each needs {', '.join(names)}")
    coordinator, num_processes, process_id = given
    if process_id >= num_processes:
        raise ValueError(f"--process-id {process_id} of --num-processes {num_processes}: they count from 0")
    if process_id == 0:
        _check_free(coordinator)
    # JAX ends the process with a stack trace when it has waited in vain, so say before what it waits for.
    logging.info(
        "process %d of %d: waiting up to 5 minutes for the others at %s", process_id, num_processes, coordinator
    )
    jax.distributed.initialize(coordinator, num_processes, process_id, heartbeat_timeout_seconds=HEARTBEAT_S)
    watch_others()


def _check_free(coordinator: str) -> None:
    """Raises OSError if something listens at the port already; JAX would crash."""
    port = int(coordinator.rpartition(":")[2])
    try:
        socket.create_server(("", port)).close()
    except OSError as error:
        raise OSError(f"--coordinator {coordinator}: port {port} of this host cannot be used: {error}") from None
