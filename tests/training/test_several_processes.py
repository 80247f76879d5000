"""Real processes on this machine: the same weights however many there are, and what comes between them ends all.

`pytest -m processes`. What process 0 compiles it finds again; the others compile at every start, as JAX has it.
"""

import dataclasses
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import orbax.checkpoint as ocp
import pytest

from cdetr_jax.training.stopping import STOPPED

pytestmark = pytest.mark.processes

ROOT = pathlib.Path(__file__).parents[2]
RECIPE = "tests/training/recipe_with_faults.py"
STEPS = 24
LONGEST_S = 30  # until the other process has ended
# In turn in one workdir: which process, in its how many-th call of what, meets what; and how the two end.
FAULTS = {
    "0:checkpoint:1:error": (1, 1),
    "1:step:2:KILL": (None, -signal.SIGKILL),
    "0:evaluation:2:INT": (STOPPED, STOPPED),
    "1:step:1:TERM": (STOPPED, STOPPED),
    "0:step:2:KILL": (-signal.SIGKILL, None),
    "1:step:1:STOP": (None, -signal.SIGKILL),
    "1:evaluation:2:error": (1, 1),
}


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
            }
            words = [sys.executable, "-m", "cdetr_jax", "train", f"--config={RECIPE}", f"--workdir={own['workdir']}"]
            if processes > 1:
                words += [f"--coordinator=localhost:{port}", f"--num-processes={processes}", f"--process-id={i}"]
            words += [*fields, *own["fields"]]
            with (tmp_path / f"log{i}").open("w") as log:
                running.append(subprocess.Popen(words, cwd=ROOT, env=environment, stdout=log, stderr=log))
        started.extend(running)
        stopped = int(fault.split(":")[0]) if fault.endswith("STOP") else None
        for i, process in enumerate(running):
            if i != stopped:
                process.wait(600)
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


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


def weights(workdir, step=STEPS):
    state = ocp.StandardCheckpointer().restore(workdir / "checkpoints" / str(step) / "state")
    return {name: np.asarray(x) for name, x in ocp.utils.to_flat_dict(state).items() if x is not None}


def evaluations(workdir):
    rows = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [row for row in rows if row["kind"] == "eval"]


def test_faults_in_two_processes_change_no_bit(train, folder):
    """Against one process with two devices, which is left alone."""
    alone, disturbed = folder / "alone", folder / "disturbed"
    assert train(1, 2, alone).statuses == [0]
    longest_s = 0.0
    for fault, statuses in FAULTS.items():
        ended = train(2, 1, disturbed, fault=fault)
        print(fault, ended.statuses, f"{ended.after_s:.1f} s", *ended.logs, sep="\n")
        for status, expected in zip(ended.statuses, statuses, strict=True):
            assert status == expected if expected is not None else status not in (0, STOPPED)
        if fault.endswith("error"):
            assert "a fault that was asked for" in ended.logs[0]
            assert "a fault that was asked for" in ended.logs[1]
        longest_s = max(longest_s, ended.after_s)
    assert longest_s < LONGEST_S
    assert train(2, 1, disturbed).statuses == [0, 0]
    expected, found = weights(alone), weights(disturbed)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=str(name))
    assert evaluations(disturbed) == evaluations(alone)
    print(f"{len(FAULTS)} faults; at most {longest_s:.1f} s until all had ended")


def test_two_devices_in_each_of_two_processes_are_as_four_in_one(train, folder):
    """Gradients are summed in another order, so the bits differ; the same weights have the same AP."""
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
    first, again = evaluations(copy)
    assert abs(first["AP"] - again["AP"]) < 1e-6
    assert first["AP"] > 0


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
