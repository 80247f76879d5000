"""The launchers against stubs of the tools that they call, and the restart loop against a stub of `cdetr`."""

import os
import pathlib
import shlex
import shutil
import signal
import subprocess
import sys

import pytest
import yaml

import cdetr_jax

ROOT = pathlib.Path(cdetr_jax.__file__).parents[1]
GIVEN = {
    "host": {"WORKDIR": "runs/r50"},
    "slurm": {"WORKDIR": "/shared/r50", "HOSTS": "2", "GPUS": "8"},
    "ssh": {"WORKDIR": "/shared/r50", "HOSTS": "me@a b", "JAX": "cuda12"},
    "tpu": {"WORKDIR": "gs://b/r50", "PROJECT": "p", "ZONE": "z", "TPU": "v5litepod-16", "IMAGE": "registry/image:1"},
    "gke": {
        "WORKDIR": "gs://b/r50",
        "HOSTS": "2",
        "GPUS": "8",
        "ACCELERATOR": "nvidia-l4",
        "IMAGE": "registry/image:1",
    },
}
TPU_SLICE = {**GIVEN["gke"], "GPUS": "", "ACCELERATOR": "tpu-v6e-slice", "TOPOLOGY": "4x4", "CHIPS": "8"}
TRAIN = ["cdetr", "train", "--config=configs/demo.py:12", "--workdir=WORKDIR", "--config.data.train_shapes=((64, 64),)"]
STUBBED = ["cdetr", "gcloud", "kubectl", "sbatch", "scancel", "scontrol", "scp", "setsid", "srun", "ssh"]
# Nothing else of this machine is on the path: it may have a real gcloud with an account.
REAL = "basename bash cat cp date dirname env git grep head mkdir rm sed sleep tail tr".split()  # noqa: SIM905
# A stub logs how it was called. Then it does what the line of its own file says, which it takes off that file.
STUB = """#!/bin/bash
echo "$(basename "$0")$(printf ' %q' "$@")" >>"$STUBS/calls"
script=$STUBS/$(basename "$0").does
[[ -s $script ]] || exit 0
does=$(head -n 1 "$script")
sed -i 1d "$script"
eval "$does"
"""


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """A repository with the launchers, a config and one commit."""
    root = tmp_path_factory.mktemp("repository")
    shutil.copytree(ROOT / "launch", root / "launch")
    (root / "configs").mkdir()
    (root / "configs/demo.py").write_text("")
    (root / ".gitignore").write_text("/runs/\n")
    as_someone = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["add", "."], [*as_someone, "commit", "-qm", "first"]):
        subprocess.run(["git", *words], cwd=root, check=True)
    return root


class Stubs:
    """Tools that only log how they are called, and what is run with them first on the path."""

    def __init__(self, repository, folder):
        self.repository, self.folder = repository, folder
        for name in STUBBED:
            (folder / name).write_text(STUB)
            (folder / name).chmod(0o755)
        for name in REAL:
            (folder / name).symlink_to(shutil.which(name))
        (folder / "python3").write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
        (folder / "python3").chmod(0o755)
        self.environment = {"PATH": str(folder), "STUBS": str(folder), "PYTHONPATH": str(ROOT), "RESTART_WAIT_S": "0"}

    def will(self, tool, *scripts):
        (self.folder / f"{tool}.does").write_text("".join(f"{script}\n" for script in scripts))

    def calls(self):
        """The words of each call so far."""
        file = self.folder / "calls"
        return [shlex.split(line) for line in file.read_text().splitlines()] if file.exists() else []

    def start(self, *words, pass_fds=(), **given):
        """What was started, with its output as one text."""
        environment = self.environment | given
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen(words, cwd=self.repository, env=environment, pass_fds=pass_fds, **pipes)

    def run(self, *words, **given):
        """Exit status and output."""
        process = self.start(*words, **given)
        return process.communicate()[0], process.returncode

    def launch(self, name, *words, **given):
        if not words or words[0] == "--dry-run":
            words = [*words, TRAIN[-1]]
        return self.run(f"launch/{name}.sh", *words, **{"CONFIG": "configs/demo.py:12", **GIVEN[name], **given})


@pytest.fixture
def stubs(repository, tmp_path):
    shutil.rmtree(repository / "runs", ignore_errors=True)
    return Stubs(repository, tmp_path)


def train(name):
    return [word.replace("WORKDIR", GIVEN[name]["WORKDIR"]) for word in TRAIN]


# ----------------------------------------------------------------------------------------------------- launchers


@pytest.mark.parametrize("name", GIVEN)
def test_dry_run_prints_what_start_calls_and_calls_nothing(stubs, name):
    printed, status = stubs.launch(name, "--dry-run")
    assert status == 0, printed
    assert stubs.calls() == []
    assert not (stubs.repository / "runs").exists()
    started, status = stubs.launch(name)
    assert status == 0, started
    tools = {"cdetr", "gcloud", "kubectl", "sbatch", "scp", "ssh"}
    commands = [shlex.split(line[2:]) for line in printed.splitlines() if line.startswith("+ ")]
    same = lambda words: [word for word in words if "/.launch" not in word]  # noqa: E731 # it has the time in it
    expected = sorted(same(words) for words in commands if words[0] in tools)
    assert sorted(same(words) for words in stubs.calls() if words[0] in tools) == expected
    assert expected or name == "host"


def test_host(stubs):
    end, held = os.pipe()  # the end of the pipe is read when all that hold it, also in the background, have ended
    given = {**GIVEN["host"], "CONFIG": "configs/demo.py:12"}
    started = stubs.start("launch/host.sh", TRAIN[-1], pass_fds=[held], **given)
    os.close(held)
    assert started.wait() == 0
    with os.fdopen(end, "rb") as pipe:
        assert pipe.read() == b""
    assert stubs.calls() == [["setsid", "launch/restart.sh", "runs/r50", *train("host")]]
    assert int((stubs.repository / "runs/launch/r50/pid").read_text()) > 0


def test_slurm_job(stubs):
    assert stubs.launch("slurm")[1] == 0
    [[*_, script, job, field]] = stubs.calls()
    assert (script, job, field) == ("launch/slurm.sh", "job", TRAIN[-1])
    log, status = stubs.launch("slurm", "job", field)
    assert status == 0, log
    assert stubs.calls()[1:] == [["srun", "--kill-on-bad-exit=0", "--wait=60", *train("slurm"), "--multihost"]]


@pytest.mark.parametrize(("number", "is_queued"), [(signal.SIGUSR1, True), (signal.SIGTERM, False)])
def test_slurm_job_goes_back_to_the_queue_before_its_time_limit(stubs, number, is_queued):
    stubs.will("srun", WAITS)
    given = {**GIVEN["slurm"], "CONFIG": "configs/demo.py", "SLURM_JOB_ID": "77"}
    job = stubs.start("launch/slurm.sh", "job", **given)
    assert job.stdout.readline() == "started\n"
    job.send_signal(number)
    log = job.communicate()[0]
    assert job.returncode == 75, log
    assert (["scontrol", "requeue", "77"] in stubs.calls()) == is_queued


def test_ssh(stubs):
    log, status = stubs.launch("ssh")
    assert status == 0, log
    assert sum(words[0] == "scp" for words in stubs.calls()) == 2
    *_, (*_, first, command_0), (*_, second, command_1) = stubs.calls()
    assert (first, second) == ("me@a", "b")
    assert command_0.replace("CDETR_PROCESS_ID=0", "CDETR_PROCESS_ID=1") == command_1
    words = shlex.split(command_0)
    assert {"CDETR_COORDINATOR=a:8476", "CDETR_NUM_PROCESSES=2", "CDETR_PROCESS_ID=0"} < set(words)
    assert "JAX_COMPILATION_CACHE_DIR=/shared/r50/compiled" in words
    loop = ["setsid", "launch/restart.sh", "/shared/r50", *train("ssh")]
    assert words[words.index("setsid") :][: len(loop)] == loop


def test_ssh_ends_where_a_host_does_not_see_the_workdir(stubs):
    sees = '[[ "$*" != *"b grep"* ]]'
    stubs.will("ssh", *[sees] * 20)
    log, status = stubs.launch("ssh")
    assert status == 2, log
    assert "a host has failed, see above" in log
    assert "setsid" not in str(stubs.calls())


def test_tpu_watch_makes_what_was_taken_away_and_deletes_what_has_ended(stubs):
    stubs.launch("tpu")
    (stubs.folder / "calls").unlink()
    states = ["MISSING", "WAITING_FOR_RESOURCES", "ACTIVE", "SUSPENDED", "MISSING", "ACTIVE"]
    script = []
    for state in states:
        script += ["exit 1", "exit 1" if state == "MISSING" else f"echo {state}"]  # no exit status yet, and the state
        script += ["exit 0"] * (state in ("MISSING", "SUSPENDED"))
    stubs.will("gcloud", *script, "echo 70", "exit 0", "exit 0")
    log, status = stubs.launch("tpu", "watch", WATCH_S="0")
    assert status == 70, log
    verbs = [word for words in stubs.calls() for word in words if word in ("create", "delete")]
    assert verbs == ["create", "delete", "create", "delete"]
    created = next(words for words in stubs.calls() if "create" in words)
    assert {"--spot", "--runtime-version=v2-alpha-tpuv5-lite", "--node-id=r50", "--project=p"} < set(created)


def test_tpu_startup_script(stubs):
    stubs.launch("tpu", DATA_DISK="disk")
    script = (stubs.repository / "runs/launch/r50/startup.sh").read_text()
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    words = shlex.split(script[script.index("docker run") : script.index("status=")])
    assert words[words.index("registry/image:1") + 1 :] == [
        "/cdetr_jax/launch/restart.sh", "gs://b/r50", *train("tpu"), "--multihost",
    ]  # fmt: skip
    assert "\nmount -o ro" in script


@pytest.mark.parametrize("given", [GIVEN["gke"], TPU_SLICE], ids=["gpu", "tpu"])
def test_gke(stubs, given):
    log, status = stubs.launch("gke", **given, DATA_BUCKET="pictures")
    assert status == 0, log
    jobset = yaml.safe_load((stubs.repository / "runs/launch/r50/jobset.yaml").read_text())
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = job["template"]["spec"]
    [container] = pod["containers"]
    assert job["parallelism"] == job["completions"] == 2
    assert container["command"] == ["/cdetr_jax/launch/restart.sh", "gs://b/r50", *train("gke"), "--multihost"]
    variables = {entry["name"]: entry.get("value") for entry in container["env"]}
    assert variables["JAX_COMPILATION_CACHE_DIR"] == "gs://b/r50/compiled"
    if given is TPU_SLICE:
        assert container["resources"]["limits"] == {"google.com/tpu": 8}
        assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == "4x4"
        assert "CDETR_COORDINATOR" not in variables
    else:
        assert container["resources"]["limits"] == {"nvidia.com/gpu": 8}
        assert variables["CDETR_COORDINATOR"] == "r50-host-0-0.r50:8476"
    assert pod["volumes"][-1]["csi"]["volumeAttributes"] == {"bucketName": "pictures"}


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("host", {"WORKDIR": ""}, "set WORKDIR"),
        ("host", {"CONFIG": "configs/dem.py"}, "there is no config configs/dem.py"),
        ("slurm", {"GPUS": "eight"}, "GPUS eight: expected a whole number"),
        ("slurm", {"WORKDIR": "runs/r50"}, "WORKDIR runs/r50: expected gs://bucket/folder or /a/shared/folder"),
        ("ssh", {"WORKDIR": "/tmp/r50"}, "WORKDIR /tmp/r50: other hosts do not see that folder"),
        ("ssh", {"HOSTS": ""}, "set HOSTS"),
        ("tpu", {"WORKDIR": "/shared/r50"}, "WORKDIR /shared/r50: expected gs://bucket/folder"),
        ("tpu", {"ZONE": ""}, "set ZONE"),
        ("tpu", {"NAME": "R50"}, "NAME R50: expected"),
        ("gke", {**TPU_SLICE, "CHIPS": "4"}, "TOPOLOGY 4x4 has other chips than 2 hosts of 4"),
    ],
)
def test_wrong_inputs_are_refused_before_anything_is_called(stubs, name, given, message):
    log, status = stubs.launch(name, **given)
    assert status == 2, log
    assert f"{name}.sh: error: {message}" in log
    assert stubs.calls() == []


def test_tools_that_are_missing_are_named(stubs):
    (stubs.folder / "gcloud").unlink()
    assert stubs.launch("tpu") == ("tpu.sh: error: gcloud is not on PATH\n", 2)


def test_changes_that_are_not_committed_are_refused(stubs):
    new = stubs.repository / "new.py"
    new.touch()
    try:
        for name in ("ssh", "tpu", "gke"):
            assert "changes that are not committed" in stubs.launch(name)[0]
    finally:
        new.unlink()
    assert stubs.calls() == []


def test_shellcheck():
    if not shutil.which("shellcheck"):
        pytest.skip("shellcheck is not installed")
    subprocess.run(["shellcheck", "-x", *map(str, sorted((ROOT / "launch").glob("*.sh")))], cwd=ROOT, check=True)


# -------------------------------------------------------------------------------------------------- restart loop

# Says that it has started, and ends with `status` when it gets SIGTERM.
WAITS = "sleep 20 & trap 'kill $!; exit ${status:-143}' TERM; echo started; wait $!"


def restart(stubs, workdir, *scripts):
    stubs.will("cdetr", *scripts)
    log, status = stubs.run("launch/restart.sh", str(workdir), "cdetr", "train")
    return status, len(stubs.calls()), log


@pytest.mark.parametrize(
    ("scripts", "status", "starts"),
    [
        (["exit 0"], 0, 1),
        (["exit 2"], 2, 1),
        (["exit 1", "exit 0"], 0, 2),
        (["exit 1", "exit 134"], 70, 2),
        (["exit 75", "exit 143", "exit 130", "exit 75", "exit 0"], 0, 5),
        (["exit 1", "exit 75", "exit 1"], 70, 3),
        (["exit 1", "save 5; exit 1", "save 10; exit 1", "exit 0"], 0, 4),
        (["save 5; exit 1", "save 10; exit 1", "exit 137"], 70, 3),
    ],
)
def test_restart_goes_on_until_it_fails_twice_at_a_step(stubs, tmp_path, scripts, status, starts):
    workdir = tmp_path / "a run"
    scripts = [script.replace("save ", f"mkdir -p {shlex.quote(f'{workdir}/checkpoints')}/") for script in scripts]
    ended, started, log = restart(stubs, workdir, *scripts)
    assert (ended, started) == (status, starts), log


@pytest.mark.parametrize(("own", "status"), [("143", 75), ("75", 75), ("0", 0)])
def test_restart_passes_sigterm_on_and_ends(stubs, tmp_path, own, status):
    stubs.will("cdetr", WAITS)
    loop = stubs.start("launch/restart.sh", str(tmp_path), "cdetr", status=own)
    assert loop.stdout.readline() == "started\n"
    loop.send_signal(signal.SIGTERM)
    log = loop.communicate()[0]
    assert loop.returncode == status, log
    assert len(stubs.calls()) == 1


def test_restart_without_a_command_is_refused(stubs):
    assert stubs.run("launch/restart.sh", "runs/r50")[1] == 2
