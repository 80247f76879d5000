"""How `cdetr train` and `cdetr evaluate` learn that they are one of several processes."""

import socket

import jax
import pytest

from cdetr_jax.cli.main import parser, run
from cdetr_jax.cli.processes import OPTIONS, join_processes
from cdetr_jax.training import processes

THREE = ["--coordinator=node1:8476", "--num-processes=4", "--process-id=3"]
COMMANDS = {"train": ["train", "--config=c.py", "--workdir=w"], "evaluate": ["evaluate", "--weights=w"]}


@pytest.fixture
def join(monkeypatch):
    """Joins as a command with some more arguments does; returns what JAX was given, None if it was not called."""
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *given, heartbeat_timeout_seconds: calls.append(given))
    for _, variable, *_ in OPTIONS:
        monkeypatch.delenv(variable, raising=False)

    def call(*more, command="train"):
        calls.clear()
        join_processes(parser().parse_args([*COMMANDS[command], *more]))
        return calls[0] if calls else None

    return call


@pytest.mark.parametrize("command", COMMANDS)
def test_processes_are_detected_or_named(join, command):
    assert join(command=command) is None
    assert join("--multihost", command=command) == ()
    assert join(*THREE, command=command) == ("node1:8476", 4, 3)
    assert join("--multihost", *THREE, command=command) == ("node1:8476", 4, 3)


def test_environment_names_processes_and_options_go_before_it(join, monkeypatch):
    for (_, variable, *_), value in zip(OPTIONS, ("node1:8476", "4", "3"), strict=True):
        monkeypatch.setenv(variable, value)
    assert join() == ("node1:8476", 4, 3)
    assert join("--process-id=2") == ("node1:8476", 4, 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (THREE[:2], r"^--process-id \(CDETR_PROCESS_ID\) missing: "),
        (
            ["--multihost", THREE[0]],
            r"^--num-processes \(CDETR_NUM_PROCESSES\), --process-id \(CDETR_PROCESS_ID\) miss",
        ),
        ([*THREE[:2], "--process-id=4"], "^--process-id 4 of --num-processes 4: they count from 0"),
    ],
)
def test_half_named_processes_are_refused(join, arguments, message):
    with pytest.raises(ValueError, match=message):
        join(*arguments)


def test_without_a_cluster_the_error_names_the_options(join, monkeypatch):
    def initialize(**_):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    with pytest.raises(
        ValueError, match=r"--multihost: JAX detects no .*--coordinator .*--num-processes .*--process-id"
    ):
        join("--multihost")


def test_a_port_in_use_is_an_error(join):
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(OSError, match=f"--coordinator localhost:{port}: port {port} of this host cannot be used"):
            join(f"--coordinator=localhost:{port}", "--num-processes=2", "--process-id=0")


@pytest.mark.parametrize(
    ("error", "status", "cause"),
    [(ValueError("no such"), 1, "no such"), (KeyError("x"), 1, "KeyError: 'x'"), (KeyboardInterrupt(), 130, "Ctrl-C")],
)
def test_what_ends_a_command_is_told_to_the_other_processes(error, status, cause, monkeypatch):
    left = []

    def fail(*_):
        raise error

    monkeypatch.setattr("cdetr_jax.cli.train.run", fail)
    monkeypatch.setattr(processes, "are_several", lambda: True)
    monkeypatch.setattr(processes, "leave", lambda *given, **how: left.append((*given, how)))
    with pytest.raises((SystemExit, KeyError)):
        run(COMMANDS["train"])
    assert left == [(status, cause, error, {"with_traceback": isinstance(error, KeyError)})]


@pytest.mark.parametrize("value", ["node1", "node1:", ":8476", "node1:0", "node1:65536", "http://node1:8476"])
def test_coordinator_must_be_host_and_port(join, value, capsys):
    with pytest.raises(SystemExit):
        join(f"--coordinator={value}")
    assert "expected host:port, such as node1:8476" in capsys.readouterr().err
