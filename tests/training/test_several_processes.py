"""Real processes on this machine: the same weights however many there are, and what comes between them ends all.

`make test-processes`, and `make test-chaos` for the one with many faults, which takes the longest.
"""

import collections
import dataclasses
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import orbax.checkpoint as ocp
import pytest
from recipe_with_faults import MESSAGE

from cdetr_jax.checkpoints.workdir import locked
from cdetr_jax.training.stopping import STOPPED

pytestmark = pytest.mark.processes

ROOT = pathlib.Path(__file__).parents[2]
RECIPE = "tests/training/recipe_with_faults.py"
STEPS = 24
LONGEST_S = 30  # until the other process has ended
# Of the chaos: in which part of a run, and in one of how many calls of it since the start, a process meets what.
CALLS = {"start": 1, "compilation": 1, "step": 6, "checkpoint": 2, "evaluation": 3, "score": 1}
KINDS = ["TERM"] * 9 + ["KILL"] * 10 + ["STOP"] * 3 + ["error"] * 8
LONG_STEPS = 180
SMALL_DISK = "1700k"  # of checkpoints of 700k: the third is always one too many


@dataclasses.dataclass
class Ended:
    """How the processes of one call ended.

    Attributes:
      statuses: exit statuses.
      after_s: seconds from the fault to the last one's end; None if there was no fault.
      logs: their outputs.
    """

    statuses: list[int]
    after_s: float | None
    logs: list[str]


@pytest.fixture
def train(tmp_path):
    """Trains in so many processes of so many devices. Ends those that are left."""
    started = []

    def train(processes, devices, workdir, *fields, fault="", each=()):
        with socket.create_server(("localhost", 0)) as server:
            port = server.getsockname()[1]
        mark = tmp_path / "fault"
        mark.unlink(missing_ok=True)
        running = []
        for i in range(processes):
            own = {"devices": devices, "fields": (), "workdir": workdir} | (each[i] if each else {})
            environment = os.environ | {
                "FAULT": fault,
                "FAULT_MARK": str(mark),
                "JAX_PLATFORMS": "cpu",
                "XLA_FLAGS": f"--xla_force_host_platform_device_count={own['devices']} "
                "--xla_cpu_multi_thread_eigen=false",
                "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            }
            words = [sys.executable, "-m", "cdetr_jax", "train", f"--config={RECIPE}", f"--workdir={own['workdir']}"]
            if processes > 1:
                words += [f"--coordinator=localhost:{port}", f"--num-processes={processes}", f"--process-id={i}"]
            words += [*fields, *own["fields"]]
            with (tmp_path / f"log{i}").open("w") as log:
                running.append(subprocess.Popen(words, cwd=ROOT, env=environment, stdout=log, stderr=log))
        started.extend(running)
        stopped = int(fault.split(":")[0]) if ":STOP" in fault else None
        for i, process in enumerate(running):
            if i != stopped:
                process.wait(300)
        ended = time.time()
        if stopped is not None:
            running[stopped].kill()
        after_s = ended - mark.stat().st_mtime if mark.exists() else None
        logs = [(tmp_path / f"log{i}").read_text() for i in range(processes)]
        return Ended([process.wait(600) for process in running], after_s, logs)

    yield train
    for process in started:
        process.kill()
        process.wait()


@pytest.fixture
def small_disk(tmp_path):
    """A folder with room for two checkpoints."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SMALL_DISK}", "tmpfs", disk]).returncode:
        pytest.skip("only root can mount a small disk")
    yield disk
    subprocess.run(["umount", disk], check=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


def weights(workdir, step=STEPS):
    state = ocp.StandardCheckpointer().restore(workdir / "checkpoints" / str(step) / "state")
    return {name: np.asarray(x) for name, x in ocp.utils.to_flat_dict(state).items() if x is not None}


def check_same(alone, disturbed, step=STEPS):
    """Every bit of the state and of the evaluations."""
    expected, found = weights(alone, step), weights(disturbed, step)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=str(name))
    assert evaluations(disturbed) == evaluations(alone)


def saved_steps(workdir):
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit())


def evaluations(workdir):
    rows = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [row for row in rows if row["kind"] == "eval"]


def draw_faults(seed):
    """As many of each part, at random places in it, to one process or all."""
    rng = np.random.default_rng(seed)
    parts = rng.permutation(list(CALLS) * (len(KINDS) // len(CALLS))).tolist()
    for part, kind in zip(parts, rng.permutation(KINDS).tolist(), strict=True):
        process = rng.choice(["0", "1", "all"] if kind != "STOP" else ["0", "1"])
        yield f"{process}:{part}:{rng.integers(CALLS[part]) + 1}:{kind}:{rng.integers(500)}"


def check_end(fault, ended):
    """What met the fault ends as it says; the others because of it, and name it."""
    process, _, _, kind, _ = fault.split(":")
    own = {"TERM": STOPPED, "KILL": -signal.SIGKILL, "STOP": -signal.SIGKILL, "error": 1}[kind]
    others = {"TERM": (STOPPED, ""), "error": (1, f" has failed: {MESSAGE}")}.get(kind, (STOPPED, " has ended, or is"))
    for i, (status, log) in enumerate(zip(ended.statuses, ended.logs, strict=True)):
        if process in ("all", str(i)):
            assert status == own, log
        else:
            assert status == others[0], log
            assert not others[1] or f"process {process} ({socket.gethostname()}){others[1]}" in log


@pytest.mark.chaos
def test_faults_in_two_processes_change_no_bit(train, folder):
    """Against one process with two devices, which is left alone."""
    alone, disturbed, steps, start = folder / "long", folder / "disturbed", LONG_STEPS, time.monotonic()
    long = [f"--config.train.num_epochs={steps // 6}", "--config.train.checkpoint_every_steps=3"]
    assert train(1, 2, alone, *long).statuses == [0]
    faults, reached, steps_again, longest_s = list(draw_faults(0)), 0, 0, 0.0
    for fault in faults:
        ended = train(2, 1, disturbed, *long, fault=fault)
        going_on, done = (re.findall(form, ended.logs[0]) for form in (r"Going on from step (\d+)", r" step (\d+)/"))
        again = reached - int(going_on[0] if going_on else 0) if done else 0
        reached = int(done[-1]) if done else reached
        print(f"{fault}: {ended.statuses} after {ended.after_s:.1f} s, {again} steps again, step {reached}")
        check_end(fault, ended)
        steps_again += again
        longest_s = max(longest_s, ended.after_s)
    print(
        f"{len(faults)} faults, as many restarts, {steps_again} of {steps} steps done again, at most {longest_s:.1f} s "
        f"until all had ended; {time.monotonic() - start:.0f} s in all"
    )
    assert longest_s < LONGEST_S
    assert train(2, 1, disturbed, *long).statuses == [0, 0]
    check_same(alone, disturbed, steps)


def test_what_goes_wrong_on_one_process_is_a_line_of_both_and_loses_nothing(train, folder, small_disk):
    """A disk that is full, a picture that cannot be read, another run in the workdir, and a damaged checkpoint."""
    alone, workdir = folder / "alone", folder / "w"
    workdir.mkdir()
    (workdir / "checkpoints").symlink_to(small_disk)  # alone, so that it is always a checkpoint that finds it full
    assert train(1, 2, alone).statuses == [0]

    def fails(line, **settings):
        ended = train(2, 1, workdir, **settings)
        assert ended.statuses == [1, 1], ended.logs
        for log in ended.logs:
            assert line in log
            assert "Traceback" not in log
        return saved_steps(workdir)

    steps = fails("the disk is full; the earlier ones are whole: free some space")
    assert 0 < steps[-1] < STEPS
    subprocess.run(["mount", "-o", "remount,size=99m", small_disk], check=True)
    assert fails(MESSAGE, fault="1:picture:9:error") >= steps
    with locked(workdir):
        newest = fails(f"another run trains in {workdir}: process {os.getpid()} on {socket.gethostname()}")[-1]
    [first, *_] = sorted((workdir / "checkpoints" / str(newest) / "state").rglob("d/*"))
    first.write_bytes(first.read_bytes()[:-9])
    ended = train(2, 1, workdir)
    assert ended.statuses == [0, 0], ended.logs
    for log in ended.logs:
        assert f"checkpoints/{newest} is damaged" in log
    check_same(alone, workdir)


def test_two_devices_in_each_of_two_processes_are_as_four_in_one(train, folder, tmp_path, monkeypatch):
    """Gradients are summed in another order, so the bits differ, and with them APs; the same weights have the same."""
    evaluated = tmp_path / "evaluated"
    monkeypatch.setenv("EVALUATED", str(evaluated))
    one, two, copy = (folder / name for name in ("1x4", "2x2", "copy"))
    short = "--config.train.num_epochs=2"
    assert train(1, 4, one, short).statuses == [0]
    assert train(2, 2, two, short, "--config.eval.every_epochs=0").statuses == [0, 0]
    expected, found = weights(one, 12), weights(two, 12)
    for name, value in expected.items():
        if name[0] == "params":
            assert np.linalg.norm(found[name] - value) < 1e-3 * np.linalg.norm(value), name
    shutil.copytree(one, copy)
    shutil.rmtree(copy / "checkpoints" / "12" / "metrics")  # so that it is evaluated again
    assert train(2, 2, copy, short).statuses == [0, 0]
    [first], [again] = evaluations(one), evaluations(copy)
    assert abs(first["AP"] - again["AP"]) < 1e-6
    assert first["AP"] > 0
    counts = [collections.Counter(json.loads(line)) for line in evaluated.read_text().splitlines()]
    assert counts[0] == counts[1]  # each process wrote what it computes an AP from, and only the first one computes one
    assert len(counts) == 2
    assert len(counts[0]) == 11
    assert set(counts[0].values()) == {min(counts[0].values())}


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ({"fields": ("--config.seed=1",)}, "config.seed is 0 on process 0 ({host}), 1 on process 1 ({host})"),
        ({"devices": 2}, "the number of devices is 1 on process 0 ({host}), 2 on process 1 ({host})"),
        ({"workdir": "elsewhere"}, "what process 0 writes to the workdir is seen on process 0 ({host}), not seen in "),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_differs_is_refused_by_both(second, message, train, tmp_path):
    if "workdir" in second:
        second = {"workdir": tmp_path / "elsewhere"}
    ended = train(2, 1, tmp_path / "w", each=[{}, second])
    assert ended.statuses == [1, 1]
    for log in ended.logs:
        assert message.format(host=socket.gethostname()) in log
