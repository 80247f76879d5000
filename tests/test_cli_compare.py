"""`cdetr compare`: what is trained, in which order, and what becomes of it when a run or the command itself ends early.

Training processes are made up: what they would leave is there at once.
"""

import json
import os
import signal

import pytest

from cdetr_jax.cli import compare, main
from cdetr_jax.training.stopping import StoppedError

RECIPE = """
from configs import demo
VARIANTS = {"a": {}, "b": {"model.decoder": "detr"}, "c": {"model.num_queries": 7}}
def get_config():
    config = demo.get_config()
    config.train.num_epochs = 2
    return config
"""


class MadeUp:
    """Takes the place of a training process; `fails` and `stops` name runs."""

    begun, fails, stops = (), (), ()

    def __init__(self, run, cores):
        MadeUp.begun += ((run.variant, run.seed, cores),)
        self.sentinel, end = os.pipe()
        os.close(end)  # as a process that has ended
        run.workdir.mkdir(parents=True, exist_ok=True)
        is_failure = run.variant in self.fails
        self.exitcode = 1 if is_failure else 0
        (run.workdir / "train.log").write_text("all well\n" if not is_failure else "Traceback\nValueError: no\n\n")
        epochs = 1 if is_failure or run.variant in self.stops else 2
        rows = [{"step": e, "epoch": e, "kind": "eval", **dict.fromkeys(NUMBERS, e / 10)} for e in range(1, epochs + 1)]
        (run.workdir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        if run.variant in self.stops:
            os.kill(os.getpid(), signal.SIGTERM)

    def is_alive(self):
        return False

    def terminate(self):
        """Nothing is left to end."""

    join = terminate


NUMBERS = ("AP", "AP50", "AP75", "APS", "APM", "APL")


@pytest.fixture
def command(tmp_path, monkeypatch):
    """Calls `cdetr compare` in a folder with a recipe of three variants."""
    (tmp_path / "recipe.py").write_text(RECIPE)
    monkeypatch.setattr(compare, "_start", MadeUp)
    monkeypatch.setattr(MadeUp, "begun", ())

    def call(*options):
        main.run(["compare", f"--config={tmp_path}/recipe.py", f"--workdir={tmp_path}/runs", *options])

    return call


def rows(tmp_path):
    """The table's lines, and the last cell of each."""
    lines = [line.strip("|").split("|") for line in (tmp_path / "runs/compare.md").read_text().splitlines()]
    return {line[0].strip(): line[-1].strip() for line in lines[4:] if len(line) > 1}


def test_all_are_trained_once(command, tmp_path, capsys):
    command("--seeds=0,1", "--only=a,b")
    assert [(variant, seed) for variant, seed, _ in MadeUp.begun] == [("a", 0), ("b", 0), ("a", 1), ("b", 1)]
    assert rows(tmp_path) == {"a": "2", "b": "2"}
    first = (tmp_path / "runs/compare.md").read_text()
    assert "report.html" in capsys.readouterr().out
    command("--seeds=0,1", "--only=a,b")
    assert len(MadeUp.begun) == 4, "they are done"
    assert (tmp_path / "runs/compare.md").read_text() == first
    command("--seeds=0,1")
    assert [(variant, seed) for variant, seed, _ in MadeUp.begun[4:]] == [("c", 0), ("c", 1)]


def test_a_run_that_fails_is_named_and_loses_no_other(command, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(MadeUp, "fails", ("b",))
    with pytest.raises(SystemExit, match="1"):
        command()
    assert "1 of 3 runs failed: b, seed 0 (ValueError: no)" in capsys.readouterr().err
    assert rows(tmp_path) == {"a": "1", "b": "0 of 1, failed: ValueError: no", "c": "1"}
    monkeypatch.setattr(MadeUp, "fails", ())
    command()
    assert [variant for variant, _, _ in MadeUp.begun] == ["a", "b", "c", "b"]
    assert rows(tmp_path) == {"a": "1", "b": "1", "c": "1"}


def test_stopped_it_says_how_to_go_on_and_does(command, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(MadeUp, "stops", ("b",))
    with pytest.raises(SystemExit, match=str(StoppedError.exit_status)):
        command("--jobs=1", "--config.eval.top_k=7")
    said = capsys.readouterr().err
    assert "stopped; 1 of 3 runs are done; to go on: cdetr compare --config=" in said
    assert said.strip().endswith("--seeds=0 --jobs=1 --config.eval.top_k=7")
    monkeypatch.setattr(MadeUp, "stops", ())
    command("--jobs=1", "--config.eval.top_k=7")
    assert [variant for variant, _, _ in MadeUp.begun] == ["a", "b", "b", "c"]


def test_side_by_side_each_has_its_share_of_the_cores(command, monkeypatch):
    monkeypatch.setattr(compare, "usable_cores", lambda: 5)
    monkeypatch.setattr(os, "sched_setaffinity", lambda *_: None, raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3, 7}, raising=False)
    command("--jobs=2")
    assert [cores for _, _, cores in MadeUp.begun] == [{0, 2, 7}, {1, 3}, {0, 2, 7}]


def test_report_only_trains_nothing(command, tmp_path):
    command("--report-only")
    assert MadeUp.begun == ()
    assert rows(tmp_path) == {"a": "0 of 1", "b": "0 of 1", "c": "0 of 1"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--only=a,d"], "has no variant 'd'; it has a, b, c"),
        (["--config.seed=1"], "takes its seeds from --seeds"),
        (["--workdir=gs://bucket/a"], "needs a folder of this machine"),
        (["--config=demo"], "demo has no VARIANTS to compare"),
        (["--config.eval.every_epochs=0"], "variant 'a': config.eval.every_epochs is 0"),
    ],
)
def test_mistakes_are_named_before_anything_trains(command, options, message, capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: True)  # of gcsfs
    with pytest.raises(SystemExit, match="1"):
        command(*options)
    assert message in capsys.readouterr().err
    assert MadeUp.begun == ()
