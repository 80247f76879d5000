"""Comparisons: which runs a recipe makes, what is still to train, and that tables, CSV, JSON and page say the same."""

import csv
import json
import re

import pytest

from cdetr_jax import compare
from cdetr_jax.checkpoints import workdir as run_files
from cdetr_jax.cli.settings import read_recipe
from cdetr_jax.structs import Category

VARIANTS = {"DETR": {"model.decoder": "detr"}, "Conditional DETR": {}}
EPOCHS = "--config.train.num_epochs=4"


def make_runs(workdir, variants=VARIANTS, seeds=(0, 1), fields=(EPOCHS,)):
    config, _ = read_recipe("configs/compare_demo.py", list(fields))
    return compare.make_runs(config, variants, workdir, seeds)


def leave(run, aps):
    """What a run with one evaluation an epoch leaves; 10 pictures a second."""
    run_files.save_config(run.workdir, run.config)
    run_files.save_classes(run.workdir, (Category(1, "disc"),))
    (run.workdir / "size.json").write_text('{"picture_hw": [96, 96], "parameters": 1500000, "multiply_adds": 2e9}')
    rows = []
    for epoch, ap in enumerate(aps, start=1):
        train = {"step": 10 * epoch, "epoch": epoch, "kind": "train", "loss": 5.0}
        rows.append(train | ({"images_per_second": 10.0} if epoch > 1 else {}))
        others = dict.fromkeys(compare.NUMBERS, ap / 2) | {"APL": -1.0}
        rows.append({"step": 10 * epoch, "epoch": epoch, "kind": "eval", **others, "AP": ap})
    (run.workdir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


APS = {
    ("DETR", 0): (0.0, 0.1, 0.3, 0.25),  # the last counts, not the best
    ("DETR", 1): (0.0, 0.1, 0.2, 0.35),
    ("Conditional DETR", 0): (0.1, 0.3, 0.5, 0.5),
    ("Conditional DETR", 1): (0.1, 0.4, 0.5, 0.7),
}


@pytest.fixture
def runs(tmp_path):
    runs = make_runs(tmp_path)
    for run in runs:
        leave(run, APS[run.variant, run.seed])
    return runs


def test_what_a_run_was_trained_with_is_said_by_its_last_start(tmp_path):
    (run, *_) = make_runs(tmp_path)
    assert run.trained_with() == {}
    leave(run, [0.1])
    lines = [json.dumps({"step": 0, "devices": "1 x cpu", "cores": cores, "git_commit": ""}) for cores in (1, 2)]
    (run.workdir / "environment.jsonl").write_text("\n".join(lines) + "\n")
    assert run.trained_with() == {"devices": "1 x cpu", "cores": 2}


def test_every_variant_has_one_seed_before_any_has_two(tmp_path):
    runs = make_runs(tmp_path)
    assert [run.name for run in runs] == [
        "DETR, seed 0", "Conditional DETR, seed 0", "DETR, seed 1", "Conditional DETR, seed 1"
    ]  # fmt: skip
    assert [run.config.model.decoder for run in runs] == ["detr", "conditional"] * 2
    assert [(run.config.seed, run.config.train.num_epochs) for run in runs] == [(0, 4), (0, 4), (1, 4), (1, 4)]
    assert runs[3].workdir == tmp_path / "conditional-detr" / "seed1"


@pytest.mark.parametrize(
    ("variants", "message"),
    [
        ({"a": {}, "b": {"model.decodr": "detr"}}, "variant 'b': there is no config.model.decodr"),
        ({"a": {}, "b": {"model.decoder": "other"}}, "variant 'b': config.model.decoder is 'other', expected one of"),
        ({"a": {}, "b": {"model.width": "wide"}}, "variant 'b': .*"),
        ({"a": {"eval.every_epochs": 0}}, "variant 'a': config.eval.every_epochs is 0"),
        ({"A b": {}, "a-b": {}}, "need names that differ in letters or digits"),
    ],
)
def test_a_wrong_variant_is_refused_before_anything_trains(tmp_path, variants, message):
    with pytest.raises(ValueError, match=message):
        make_runs(tmp_path, variants)


def test_a_changed_recipe_in_an_old_workdir_is_refused(tmp_path, runs):
    assert all(run.is_done() for run in make_runs(tmp_path))
    with pytest.raises(
        ValueError, match=r"variant 'DETR': .*seed0 holds another run: config\.optimizer\.lr was 0\.0005"
    ):
        make_runs(tmp_path, fields=(EPOCHS, "--config.optimizer.lr=1e-3"))


def test_the_number_of_epochs_may_change(tmp_path, runs):
    """A run of fewer epochs is the beginning of a longer one."""
    assert not any(run.is_done() for run in make_runs(tmp_path, fields=("--config.train.num_epochs=5",)))
    shorter = make_runs(tmp_path, fields=("--config.train.num_epochs=3",))
    assert [run.evaluations()[-1]["AP"] for run in shorter] == [0.3, 0.5, 0.2, 0.5]


def test_what_runs_came_to(runs):
    summary = compare.summarize(runs, VARIANTS)
    detr, conditional = summary["variants"]
    assert summary["target_ap"] == pytest.approx(0.3)
    assert detr["AP"]["mean"] == pytest.approx(0.3)
    assert detr["AP"]["std"] == pytest.approx(0.0707, abs=1e-4)
    assert detr["APL"]["mean"] is None, "COCO's -1: there was nothing to find"
    assert conditional["difference"]["mean"] == pytest.approx(0.3)  # 0.25 and 0.35, seed by seed
    assert conditional["difference"]["std"] == pytest.approx(0.0707, abs=1e-4)
    assert (detr["epochs_to_target"], conditional["epochs_to_target"]) == (4, 2)
    assert (detr["times_faster"], conditional["times_faster"]) == (1.0, 2.0)
    assert detr["train_seconds"]["mean"] == pytest.approx(4 * 10 * 16 / 10)  # the first interval has no pace
    assert compare.summarize(runs, VARIANTS, target_ap=0.65)["variants"][1]["epochs_to_target"] is None


def test_runs_that_are_not_complete_do_not_count(tmp_path, runs):
    leave(runs[3], (0.1, 0.9))
    runs[2].workdir.joinpath("metrics.jsonl").unlink()
    detr, conditional = compare.summarize(runs, VARIANTS, {runs[2]: "ValueError: no"})["variants"]
    assert [detr["seeds"]["1"]["state"], conditional["seeds"]["1"]["state"]] == [
        "failed: ValueError: no",
        "not complete",
    ]
    assert (detr["AP"]["values"], conditional["AP"]["values"]) == ([0.25], [0.5])
    assert compare._cells(detr)[-1] == "1 of 2, failed: ValueError: no"
    assert compare._cells(conditional)[-1] == "1 of 2"


def test_nothing_trained_yet_gives_an_empty_table(tmp_path):
    summary = compare.summarize(make_runs(tmp_path), VARIANTS)
    compare.write_report(tmp_path, summary, {"AP": tuple(VARIANTS)}, {"command": "cdetr compare"})
    assert not (tmp_path / "compare.png").exists()
    assert "0 of 2" in (tmp_path / "compare.md").read_text()


def test_table_csv_json_and_page_say_the_same(tmp_path, runs):
    summary = compare.summarize(runs, VARIANTS)
    groups = {"Figure 2": tuple(VARIANTS), "Left out": ("Another",)}
    compare.write_report(tmp_path, summary, groups, {"command": "cdetr compare --config=a", "jax": "1 & 2"})
    written = json.loads((tmp_path / "compare.json").read_text())
    assert written["variants"] == summary["variants"]
    markdown = (tmp_path / "compare.md").read_text()
    [row] = [line for line in markdown.splitlines() if line.startswith("| Conditional")]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells == [
        "Conditional DETR", "0.600 ± 0.141", "0.300 ± 0.071", "0.300 ± 0.071", "0.300 ± 0.071", "0.300 ± 0.071",
        "+0.300 ± 0.071", "1.5", "2", "64", "2", "2.0", "2",
    ]  # fmt: skip
    assert "Left out" not in markdown
    assert "APL" not in markdown, "a column without a number is left out"
    with (tmp_path / "compare.csv").open(newline="") as file:
        of_csv = {row["variant"]: row for row in csv.DictReader(file)}
    assert float(of_csv["Conditional DETR"]["AP_mean"]) == summary["variants"][1]["AP"]["mean"]
    page = (tmp_path / "report.html").read_text()
    text = re.sub(r"<[^>]*>", "|", page)
    for expected in (
        *cells[:1],
        *cells[1:3],
        "model.decoder = detr",
        "cdetr compare --config=a",
        "1 &amp; 2",
        "Figure 2",
    ):
        assert f"|{expected}|" in text
    assert page.count("<img ") == 1
    assert "http" not in page
