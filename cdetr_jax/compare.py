"""Variants of one recipe, trained under the same budget and seeds: their runs, and what those came to."""

import dataclasses
import json
import math
import os
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections

from cdetr_jax import build
from cdetr_jax.checkpoints import workdir as run_files
from cdetr_jax.config_check import check_config, flat_fields
from cdetr_jax.files import as_csv, as_path, write_json, write_text
from cdetr_jax.training.start import ENVIRONMENT, check_same_run
from cdetr_jax.visualization.curve import Series, draw_panels, read_metrics
from cdetr_jax.visualization.page import Page

NUMBERS = ("AP", "AP50", "AP75", "APS", "APM", "APL")
SIZE = "size.json"  # in a run's workdir: how large its model is
TRAINED_WITH = ("devices", "processor", "cores", "cdetr_jax", "jax", "git_commit")  # of its environment
Changes = Mapping[str, Any]  # a variant: fields by their full names, such as "model.decoder", and their values


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """One variant with one seed.

    Attributes:
      workdir: as `cdetr train` leaves it, with its output in train.log.
    """

    variant: str
    seed: int
    config: ml_collections.ConfigDict
    workdir: Path

    @property
    def name(self) -> str:
        return f"{self.variant}, seed {self.seed}"

    def rows(self) -> list[dict[str, Any]]:
        """Its metrics so far, up to the config's last epoch."""
        path = self.workdir / "metrics.jsonl"
        rows = read_metrics(path) if path.exists() else []
        return [row for row in rows if row["epoch"] <= self.config.train.num_epochs]

    def evaluations(self) -> list[dict[str, Any]]:
        """The rows with COCO's numbers."""
        return [row for row in self.rows() if row["kind"] == "eval"]

    def epoch(self) -> float:
        """How far it is."""
        return max((row["epoch"] for row in self.rows()), default=0.0)

    def train_seconds(self) -> float | None:
        """Of its training steps at the logged pace, without compilation, evaluation and what came before a resume."""
        before, images, paces = 0, 0, []
        for row in self.rows():
            if row["kind"] == "train":
                count, before = (row["step"] - before) * self.config.train.batch_size, row["step"]
                images += count
                if row.get("images_per_second"):
                    paces.append((count, count / row["images_per_second"]))
        known = sum(count for count, _ in paces)
        return images * sum(seconds for _, seconds in paces) / known if known else None

    def trained_with(self) -> dict[str, Any]:
        """What it was last started with."""
        path = self.workdir / ENVIRONMENT
        last = json.loads(path.read_text(encoding="utf-8").splitlines()[-1]) if path.exists() else {}
        return {name: last[name] for name in TRAINED_WITH if last.get(name)}

    def is_done(self) -> bool:
        """Whether the last evaluation is there."""
        evaluations = self.evaluations()
        last = evaluations[-1] if evaluations else {"epoch": 0, "step": 0}
        return last["epoch"] >= self.config.train.num_epochs or last["step"] == self.config.train.max_steps


def make_runs(
    config: ml_collections.ConfigDict, variants: Mapping[str, Changes], workdir: str | os.PathLike, seeds: Sequence[int]
) -> list[Run]:
    """All runs in the order in which they are trained: every variant with the first seed, then with the next.

    Seeds make the weights, the order of the pictures and, of made-up ones, the pictures: the same for all variants.

    Raises: ValueError, if a variant names a field that is not there or has a wrong value, or if its workdir holds
      another run.
    """
    folders = {name: re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-") for name in variants}
    if len(set(folders.values())) < len(folders):
        raise ValueError(f"the variants {', '.join(folders)} need names that differ in letters or digits")
    runs = []
    for seed in seeds:
        for name, changes in variants.items():
            workdir_of_run = as_path(workdir) / folders[name] / f"seed{seed}"
            try:
                run = Run(name, seed, _changed(config, {**changes, "seed": seed}), workdir_of_run)
                check_config(run.config)
                if (workdir_of_run / run_files.CLASSES).exists():
                    check_same_run(run.config, run_files.load_classes(workdir_of_run), workdir_of_run)
            except ValueError as error:
                raise ValueError(f"variant {name!r}: {error}") from error
            if run.config.eval.every_epochs == 0:
                raise ValueError(f"variant {name!r}: config.eval.every_epochs is 0, so there would be no AP to compare")
            runs.append(run)
    return runs


def _changed(config: ml_collections.ConfigDict, changes: Changes) -> ml_collections.ConfigDict:
    changed = ml_collections.ConfigDict(config.to_dict()).lock()
    if unknown := [field for field in changes if field not in flat_fields(config)]:
        raise ValueError(f"there is no config.{unknown[0]}; configs/common.py lists the fields")
    try:
        changed.update_from_flattened_dict(dict(changes))
    except TypeError as error:
        raise ValueError(str(error)) from None
    return changed


def summarize(
    runs: Sequence[Run],
    variants: Mapping[str, Changes],
    failed: Mapping[Run, str] | None = None,
    target_ap: float | None = None,
) -> dict[str, Any]:
    """All numbers of a comparison, as compare.json holds them.

    A run's AP is its last evaluation's, as papers have it, not its best one's. Means, and standard deviations over the
    seeds, are of those runs that are complete.

    Args:
      runs: of `make_runs`, the first one's variant is the baseline.
      variants: the changed fields of each.
      failed: of `train_all`.
      target_ap: what the epochs are counted until; None: the baseline's final mean AP.
    """
    failed = failed or {}
    names = list(dict.fromkeys(run.variant for run in runs))
    entries = {}
    for name in names:
        own = [run for run in runs if run.variant == name]
        parameters, multiply_adds = _size(own[0])
        seeds = {str(run.seed): _outcome(run, failed.get(run)) for run in own}
        done = [each["last"] for each in seeds.values() if each["state"] == "complete"]
        entries[name] = {
            "name": name,
            "changes": dict(variants[name]),
            "folder": own[0].workdir.parent.name,
            "parameters": parameters,
            "multiply_adds": multiply_adds,
            "seeds": seeds,
            **{number: _mean([each[number] for each in done]) for number in NUMBERS},
            "train_seconds": _mean([each["train_seconds"] for each in seeds.values() if each["state"] == "complete"]),
        }
    baseline = entries[names[0]]
    target_ap = baseline["AP"]["mean"] if target_ap is None else target_ap
    for entry in entries.values():
        shared = [seed for seed in entry["seeds"] if seed in baseline["seeds"]]
        pairs = [[each["seeds"][seed].get("last", {}).get("AP") for each in (entry, baseline)] for seed in shared]
        entry["difference"] = _mean([ap - base for ap, base in pairs if ap is not None and base is not None])
        entry["epochs_to_target"] = _epochs_to(target_ap, entry)
    for entry in entries.values():
        epochs = entry["epochs_to_target"], baseline["epochs_to_target"]
        entry["times_faster"] = epochs[1] / epochs[0] if all(epochs) else None
    return {"baseline": names[0], "target_ap": target_ap, "variants": list(entries.values())}


def _outcome(run: Run, failure: str | None) -> dict[str, Any]:
    """What one run came to."""
    evaluations = run.evaluations()
    is_done = run.is_done()
    state = (
        "complete" if is_done else f"failed: {failure}" if failure else "not complete" if run.rows() else "not begun"
    )
    return {
        "state": state,
        "epochs": [row["epoch"] for row in evaluations],
        "AP": [row["AP"] for row in evaluations],
        "train_seconds": run.train_seconds(),
        "trained_with": run.trained_with(),
        **({"last": {k: v for k, v in evaluations[-1].items() if k not in ("kind",)}} if is_done else {}),
    }


def _mean(values: Sequence[float | None]) -> dict[str, Any]:
    """Mean and standard deviation (n - 1) of the numbers that there are; COCO's -1 is none."""
    known = [value for value in values if value is not None and value > -1]
    return {
        "mean": statistics.fmean(known) if known else None,
        "std": statistics.stdev(known) if len(known) > 1 else None,
        "values": known,
    }


def _epochs_to(target_ap: float | None, entry: Mapping[str, Any]) -> float | None:
    """The first evaluation at which the mean over the complete runs has the AP."""
    done = [dict(zip(each["epochs"], each["AP"], strict=True)) for each in entry["seeds"].values() if "last" in each]
    epochs = sorted(set.intersection(*map(set, done))) if done else []
    if target_ap is None:
        return None
    # Sums of the same numbers in another order may differ by a rounding.
    reached = (epoch for epoch in epochs if statistics.fmean(each[epoch] for each in done) >= target_ap - 1e-12)
    return next(reached, None)


def _size(run: Run) -> tuple[int | None, float | None]:
    """Parameters, and multiply-adds of a picture of `picture_hw`: half of the operations that XLA counts.

    Kept in the run's workdir: a full-size model takes half a minute. None before the number of classes is known.
    """
    if not (run.workdir / run_files.CLASSES).exists():
        return None, None
    path, shape_hw = run.workdir / SIZE, picture_hw(run.config)
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if known.get("picture_hw") != list(shape_hw):
        model = build.make_model(run.config, len(run_files.load_classes(run.workdir)))
        images, sizes = jax.ShapeDtypeStruct((1, *shape_hw, 3), jnp.uint8), jax.ShapeDtypeStruct((1, 2), jnp.int32)
        variables = jax.eval_shape(model.init, jax.random.key(0), images, sizes)
        cost = jax.jit(model.apply).lower(variables, images, sizes).cost_analysis()
        parameters = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(variables["params"]))
        known = {"picture_hw": list(shape_hw), "parameters": parameters, "multiply_adds": cost["flops"] / 2}
        write_json(path, known)
    return known["parameters"], known["multiply_adds"]


def picture_hw(config: ml_collections.ConfigDict) -> tuple[int, int]:
    """The size of the picture whose multiply-adds are counted: the first evaluation shape, or a 4 : 3 picture's."""
    if config.data.eval_shapes:
        return tuple(config.data.eval_shapes[0])
    short = config.data.eval_short_side_px
    return short, min(math.ceil(short * 4 / 3 / 32) * 32, config.data.long_side_max_px)


def write_report(
    workdir: str | os.PathLike,
    summary: dict[str, Any],
    groups: Mapping[str, Sequence[str]],
    about: Mapping[str, str],
) -> str:
    """Writes compare.json, compare.csv, compare.md, compare.png and report.html. Returns: the tables as Markdown.

    Args:
      summary: of `summarize`.
      groups: title to variants; each group gets a table and a panel. Those that are not in the summary are left out,
        and so are groups of which only one is.
      about: what else to say of the comparison, "command" and versions for example.
    """
    workdir = as_path(workdir)
    entries = {entry["name"]: entry for entry in summary["variants"]}
    groups = {title: [entries[name] for name in names if name in entries] for title, names in groups.items()}
    groups = {title: chosen for title, chosen in groups.items() if chosen}
    groups = {title: chosen for title, chosen in groups.items() if len(chosen) > 1} or groups  # the baseline alone
    write_json(workdir / "compare.json", {**about, **summary})
    _write_csv(workdir / "compare.csv", summary)
    panels = {title: {entry["name"]: _curves(entry) for entry in chosen} for title, chosen in groups.items()}
    has_curve = draw_panels(panels, workdir / "compare.png", columns=min(2, len(panels)))
    header = _header(summary)
    tables = {title: [_cells(entry) for entry in chosen] for title, chosen in groups.items()}
    shown = [i for i in range(len(header)) if any(row[i] != "-" for rows in tables.values() for row in rows)]
    header = [header[i] for i in shown]
    tables = {title: [[row[i] for i in shown] for row in rows] for title, rows in tables.items()}
    notes = _notes(summary)
    markdown = "\n\n".join(
        [f"### {title}\n\n{_markdown(header, rows)}" for title, rows in tables.items()] + [" ".join(notes)]
    )
    write_text(workdir / "compare.md", markdown + "\n")

    page = Page(f"Comparison: {', '.join(entries)}" if len(entries) < 4 else "Comparison")
    page.heading("What was compared")
    page.text("One recipe, trained with the changed fields of each variant and otherwise alike.")
    rows = [
        [
            entry["name"],
            "; ".join(f"{field} = {value}" for field, value in entry["changes"].items()) or "the recipe itself",
        ]
        for entry in entries.values()
    ]
    page.table(["variant", "changed fields"], rows, of="words")
    if has_curve:
        page.picture(
            workdir / "compare.png", "AP over epochs: mean of the seeds, and a band from the lowest to the highest"
        )
    for title, rows in tables.items():
        page.heading(title)
        page.table(header, rows)
    for note in notes:
        page.text(note)
    page.heading("Every run")
    page.table(
        ["run", "state", "last AP", "best AP", "training, s"],
        [
            [
                f"{entry['name']}, seed {seed}",
                each["state"],
                _number(each.get("last", {}).get("AP")),
                _number(max(each["AP"], default=None)),
                _number(each["train_seconds"], ".0f"),
            ]
            for entry in entries.values()
            for seed, each in entry["seeds"].items()
        ],
    )
    page.heading("How to repeat it")
    page.command(about["command"])
    trained_with = {
        "; ".join(f"{name}: {value}" for name, value in each["trained_with"].items())
        for entry in entries.values()
        for each in entry["seeds"].values()
    }
    rows = [[name, value] for name, value in about.items() if name != "command"]
    page.table(["", "this report"], rows, of="words")
    page.table(["", "trained with"], [["", each] for each in sorted(trained_with) if each], of="words")
    page.save(workdir / "report.html")
    return markdown


def _curves(entry: Mapping[str, Any]) -> list[Series]:
    return [
        Series(each["epochs"], [ap if ap >= 0 else math.nan for ap in each["AP"]]) for each in entry["seeds"].values()
    ]


def _header(summary: Mapping[str, Any]) -> list[str]:
    target = "-" if summary["target_ap"] is None else f"{summary['target_ap']:.3f}"
    return [
        "variant", *NUMBERS, f"AP against {summary['baseline']}", "parameters, M", "multiply-adds, G", "training, s",
        f"epochs to AP {target}", "times faster", "seeds",
    ]  # fmt: skip


def _cells(entry: Mapping[str, Any]) -> list[str]:
    states = [each["state"] for each in entry["seeds"].values()]
    done = states.count("complete")
    trouble = next((f", {state}" for state in states if state.startswith("failed")), "")
    return [
        entry["name"],
        *(_spread(entry[number]) for number in NUMBERS),
        _spread(entry["difference"], "+.3f"),
        _number(entry["parameters"] and entry["parameters"] / 1e6, ".3g"),
        _number(entry["multiply_adds"] and entry["multiply_adds"] / 1e9, ".3g"),
        _number(entry["train_seconds"]["mean"], ".0f"),
        _number(entry["epochs_to_target"], "g") if entry["epochs_to_target"] or not done else "not reached",
        _number(entry["times_faster"], ".1f"),
        (f"{done}" if done == len(states) else f"{done} of {len(states)}") + trouble,
    ]


def _number(value: float | None, form: str = ".3f") -> str:
    return "-" if value is None else format(value, form)


def _spread(values: Mapping[str, Any], form: str = ".3f") -> str:
    return _number(values["mean"], form) + ("" if values["std"] is None else f" ± {values['std']:.3f}")


def _notes(summary: Mapping[str, Any]) -> list[str]:
    several = any(len(entry["seeds"]) > 1 for entry in summary["variants"])
    return [
        "AP is COCO's, as a fraction, of the last evaluation, not of the best one."
        + " Means over the seeds, ± the standard deviation; differences are taken seed by seed." * several,
        "Multiply-adds: of the inference of one picture, half of the operations that XLA counts. Training: seconds of "
        "the steps alone, without compilation and evaluation.",
        f"Epochs are counted until the {'mean ' * several}AP reaches {summary['baseline']}'s last one, or the one that "
        "was asked for; times faster is against the same count for it.",
    ]


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _write_csv(path: Path, summary: Mapping[str, Any]) -> None:
    spread = (*NUMBERS, "difference")
    header = ["variant", *(f"{name}_{what}" for name in spread for what in ("mean", "std"))]
    header += ["parameters", "multiply_adds", "train_seconds", "epochs_to_target", "times_faster", "complete", "seeds"]
    rows = []
    for entry in summary["variants"]:
        row = [entry["name"], *(entry[name][what] for name in spread for what in ("mean", "std"))]
        row += [entry["parameters"], entry["multiply_adds"], entry["train_seconds"]["mean"]]
        row += [entry["epochs_to_target"], entry["times_faster"]]
        rows.append([*row, len(entry["AP"]["values"]), len(entry["seeds"])])
    write_text(path, as_csv([header, *rows]))
