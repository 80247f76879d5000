"""The `cdetr` command: help, what it refuses and how, and train, evaluate and predict on small made-up pictures."""

import json
import subprocess
import sys

import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache
from PIL import Image

import cdetr_jax
from cdetr_jax.cli.main import run
from cdetr_jax.evaluation.coco_eval import SUMMARY
from cdetr_jax.models import resnet

ROOT = cdetr_jax.__path__[0] + "/.."
SMALL = [
    f"--config.{field}={value}"
    for field, value in {
        "model.backbone_width": 8,
        "model.width": 16,
        "model.num_heads": 2,
        "model.ffn_width": 16,
        "model.num_queries": 7,
        "data.synthetic.train_pictures": 8,
        "data.synthetic.eval_pictures": 5,
        "data.synthetic.height": 32,
        "data.synthetic.width": 40,
        "data.train_shapes": "((48, 48),)",
        "data.eval_shapes": "((48, 48),)",
        "data.short_sides_px": "(32,)",
        "data.long_side_max_px": 48,
        "data.eval_short_side_px": 32,
        "train.batch_size": 4,
        "train.num_epochs": 1,
        "train.log_every_steps": 1,
        "eval.batch_size": 2,
    }.items()
]


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    """As the commands are run; the import path is left as it was."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "path", list(sys.path))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A workdir that the command trained: one epoch of two steps, with one block a stage."""
    import jax

    workdir = tmp_path_factory.mktemp("run") / "new" / "folder"
    cache = str(tmp_path_factory.getbasetemp() / "compiled")
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", cache)
    compilation_cache.reset_cache()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setattr(sys, "path", list(sys.path))
        patch.setitem(resnet.STAGE_SIZES, "resnet18", (1, 1, 1, 1))
        run(["train", "--config=configs/demo.py", f"--workdir={workdir}", *SMALL])
        yield workdir
    jax.config.update("jax_compilation_cache_dir", before)
    compilation_cache.reset_cache()


def fails(capsys, arguments, status=1):
    """Runs a command that must fail with this status; returns what it wrote to standard error."""
    with pytest.raises(SystemExit) as error:
        run(arguments)
    assert error.value.code == status
    return capsys.readouterr().err


# --------------------------------------------------------------------------------------------------------- help


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ([], ["train", "evaluate", "predict", "benchmark", "go on with a run that was stopped"]),
        (["train"], ["--config FILE", "--workdir DIR", "--multihost", "--config.optimizer.lr=2e-4", "configs/demo.py"]),
        (["evaluate"], ["--workdir DIR", "--checkpoint {best,latest}", "12 numbers", "cdetr evaluate --workdir="]),
        (
            ["predict"],
            ["--workdir DIR", "--output DIR", "--threshold SCORE", "--from-eval N", "predictions.json", "sheet.png"],
        ),
        (["benchmark"], ["--config FILE", "--batch N", "--size HxW", "--targets N", "--steps N"]),
    ],
)
def test_help(command, expected, capsys):
    with pytest.raises(SystemExit) as end:
        run([*command, "--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert [words for words in expected if words not in text] == []


def test_help_imports_nothing_heavy():
    code = """if True:
        import sys
        from cdetr_jax.cli.main import run
        for arguments in ([], ["train"], ["evaluate"], ["predict"], ["benchmark"]):
            try:
                run([*arguments, "--help"])
            except SystemExit as end:
                assert end.code == 0
        heavy = ("jax", "flax", "numpy", "tensorflow", "torch", "matplotlib", "PIL", "ml_collections")
        print([name for name in heavy if name in sys.modules])
    """
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert found.stdout.splitlines()[-1] == "[]"


def test_the_module_can_be_run():
    found = subprocess.run([sys.executable, "-m", "cdetr_jax", "--help"], capture_output=True, text=True, cwd=ROOT)
    assert found.returncode == 0
    assert found.stdout.startswith("usage: cdetr [-h] COMMAND")


# ----------------------------------------------------------------------------------------------- wrong arguments

DEMO = "--config=configs/demo.py"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["trian"], "invalid choice: 'trian'"),
        (["train", DEMO], "the following arguments are required: --workdir"),
        (["train", DEMO, "--workdir=w", "--lr=3"], "unknown argument '--lr=3'; see `cdetr train --help`"),
        (["train", DEMO, "--workdir=w", "stray"], "unknown argument 'stray'"),
        (["train", DEMO, "--work=w"], "required: --workdir"),  # no abbreviations
        (["predict", "--workdir=w", "--output=o", "--config.seed=1"], "unknown argument '--config.seed=1'"),
        (["predict", "--workdir=w", "--output=o", "--threshold=half"], "argument --threshold: invalid float value"),
        (["evaluate", "--workdir=w", "--checkpoint=first"], "argument --checkpoint: invalid choice: 'first'"),
    ],
)
def test_wrong_arguments(arguments, message, capsys):
    assert message in fails(capsys, arguments, status=2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config.optimizer.lrr=1"], 'there is no such config field: \'lrr\' Did you mean "lr" instead of "lrr"?'),
        (["--config.optimiser.lr=1"], 'Did you mean "optimizer" instead of "optimiser"?'),
        (["--config.train.batch_size=many"], "config.train.batch_size"),
        (["--config.train.batch_size=2.5"], "config.train.batch_size"),
        (["--config.model.backbone=resnet19"], "config.model.backbone is 'resnet19', expected one of resnet18, "),
        (["--config.train.batch_size=5"], "config.train.batch_size 5 is not divisible by 2 devices"),
        (["--config.data.source=coco_folder", "--config.data.train_images="], "must name a folder of pictures"),
    ],
)
def test_wrong_config_fields(arguments, message, capsys, tmp_path):
    error = fails(capsys, ["train", DEMO, f"--workdir={tmp_path / 'w'}", *arguments])
    assert message in error
    assert error.startswith("cdetr train: error: ")
    assert error.count("\n") == 1
    assert "Traceback" not in error
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize("config", ["configs/dmeo.py", "configs", "configs/dmeo.py:12"])
def test_a_config_that_is_not_there(config, capsys, tmp_path):
    error = fails(capsys, ["train", f"--config={config}", f"--workdir={tmp_path}"])
    assert error.startswith(f"cdetr train: error: there is no config {config}; the recipes are in configs/")


def test_a_schedule_that_there_is_not(capsys, tmp_path):
    error = fails(capsys, ["train", "--config=configs/conditional_detr_r50.py:13", f"--workdir={tmp_path}"])
    assert "there is no recipe for 13 epochs, only for 12, 36, 50, 75, 108" in error


def test_a_schedule_after_the_colon_is_used(capsys, tmp_path):
    fields = ["--config.data.train_images=", "--config.model.backbone=resnet18"]
    arguments = ["train", "--config=configs/conditional_detr_r50.py:12", f"--workdir={tmp_path}", *fields]
    assert "must name a folder of pictures" in fails(capsys, arguments)  # reading the recipe went well


@pytest.mark.parametrize("command", [["evaluate"], ["predict", "--output=found", "picture.png"]])
def test_a_folder_that_is_no_workdir(command, capsys, tmp_path):
    Image.new("RGB", (40, 32)).save(tmp_path / "picture.png")
    arguments = [str(tmp_path / word) if word == "picture.png" else word for word in command]
    arguments = [f"--output={tmp_path / 'found'}" if word == "--output=found" else word for word in arguments]
    error = fails(capsys, [*arguments, f"--workdir={tmp_path}"])
    assert error.strip().splitlines()[-1] == (
        f"cdetr {command[0]}: error: {tmp_path}/config.json is missing: {tmp_path} is not the workdir of a run; train "
        "one with `cdetr train`"
    )


@pytest.mark.parametrize("size", ["480", "axb", "480x640x3"])
def test_benchmark_of_a_wrong_size(size, capsys):
    error = fails(capsys, ["benchmark", DEMO, f"--size={size}"])
    assert f"--size is '{size}', expected height x width in pixels, such as 480x640" in error


@pytest.mark.parametrize("threshold", ["1.5", "-0.1", "nan"])
def test_a_threshold_out_of_range(threshold, capsys, tmp_path):
    arguments = ["predict", f"--workdir={tmp_path}", f"--output={tmp_path}", f"--threshold={threshold}", "a.png"]
    assert f"--threshold is {threshold}, expected a score from 0 to 1" in fails(capsys, arguments)


# ---------------------------------------------------------------------------------------------- train and evaluate


def test_train_leaves_a_workdir(trained):
    assert sorted(path.name for path in (trained / "checkpoints").iterdir() if path.name.isdigit()) == ["2"]
    config = json.loads((trained / "config.json").read_text())
    assert config["model"]["width"] == 16
    assert config["data"]["eval_shapes"] == [[48, 48]]
    with Image.open(trained / "curve.png") as curve:
        assert curve.format == "PNG"
    classes = json.loads((trained / "classes.json").read_text())
    assert [entry["id"] for entry in classes] == [1, 2, 3, 5, 8]


def test_evaluate_prints_the_table_of_the_run(trained, capsys):
    run(["evaluate", f"--workdir={trained}", "--checkpoint=latest"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:12]] == list(SUMMARY)
    assert {line.split()[0] for line in lines[12:] if line} == {"class", "disc", "square", "triangle", "cross", "ring"}


def test_evaluate_refuses_a_field_that_is_not_there(trained, capsys):
    error = fails(capsys, ["evaluate", f"--workdir={trained}", "--config.eval.batchsize=2"])
    assert 'Did you mean "batch_size" instead of "batchsize"?' in error


def test_train_again_with_another_model_is_refused(trained, capsys):
    arguments = ["train", DEMO, f"--workdir={trained}", *SMALL, "--config.model.ffn_width=24"]
    assert "config.model.ffn_width was 16, is 24" in fails(capsys, arguments)


# -------------------------------------------------------------------------------------------------------- predict


@pytest.fixture
def pictures(tmp_path):
    """Two folders with a same name, a gray picture, one turned by its EXIF tag, and a text that is called .jpg."""
    rng = np.random.default_rng(0)
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        Image.fromarray(rng.integers(0, 256, (32, 40, 3), np.uint8)).save(tmp_path / folder / "same.png")
    Image.fromarray(rng.integers(0, 256, (30, 44), np.uint8)).save(tmp_path / "gray.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # the right side of what is stored is the bottom
    Image.fromarray(rng.integers(0, 256, (24, 48, 3), np.uint8)).save(tmp_path / "turned.jpg", exif=exif)
    (tmp_path / "broken.jpg").write_text("this is no picture")
    return tmp_path


def test_predict(trained, pictures, capsys):
    names = ["gray.png", "broken.jpg", "one", "two", "turned.jpg"]
    output = pictures / "out" / "put"
    files = [str(pictures / name) for name in names]
    arguments = ["predict", f"--workdir={trained}", f"--output={output}", "--threshold=0", *files]
    with pytest.raises(SystemExit) as end:
        run(arguments)
    assert end.value.code == 1
    printed = capsys.readouterr()
    assert "1 of 5 pictures could not be read, see above" in printed.err
    assert f"{pictures}/broken.jpg: not read: {pictures}/broken.jpg: cannot read this picture" in printed.out

    drawings = {"gray.png": (44, 30), "same.png": (40, 32), "same_2.png": (40, 32), "turned.png": (24, 48)}
    for name, (width, height) in drawings.items():
        with Image.open(output / name) as drawing:
            assert drawing.width >= width
            assert drawing.height >= height
            assert (drawing.height > drawing.width) == (height > width)
    assert {path.name for path in output.iterdir()} == {*drawings, "sheet.png", "predictions.json"}

    results = json.loads((output / "predictions.json").read_text())
    sizes = {1: (44, 30), 3: (40, 32), 4: (40, 32), 5: (24, 48)}  # 2 could not be read
    assert {result["image_id"] for result in results} == sizes.keys()
    known = {1: "disc", 2: "square", 3: "triangle", 5: "cross", 8: "ring"}
    for result in results:
        assert list(result) == ["image_id", "category_id", "bbox", "score", "file_name", "category_name"]
        assert known[result["category_id"]] == result["category_name"]
        assert 0 <= result["score"] <= 1
        left, top, width, height = result["bbox"]
        assert width >= 0
        assert height >= 0
        # A box may reach over the side of its picture, by half of its size: its centre may not.
        assert 0 <= left + width / 2 <= sizes[result["image_id"]][0]
        assert 0 <= top + height / 2 <= sizes[result["image_id"]][1]
    assert {result["file_name"] for result in results if result["image_id"] == 5} == {f"{pictures}/turned.jpg"}


def test_predict_writes_what_coco_evaluation_reads(trained, tmp_path, capsys):
    run(["predict", f"--workdir={trained}", f"--output={tmp_path}", "--threshold=0", "--from-eval=2"])
    assert f"2 pictures: {tmp_path}/predictions.json" in capsys.readouterr().out
    results = json.loads((tmp_path / "predictions.json").read_text())
    assert {result["image_id"] for result in results} == {1, 2}  # the data set's own ids
    pycocotools = pytest.importorskip("pycocotools.coco")
    truth = pycocotools.COCO()
    truth.dataset = {
        "images": [{"id": i, "height": 32, "width": 40} for i in (1, 2)],
        "categories": [{"id": i, "name": str(i)} for i in (1, 2, 3, 5, 8)],
        "annotations": [],
    }
    truth.createIndex()
    assert len(truth.loadRes(results).getAnnIds()) == len(results)


def test_predict_above_every_score(trained, tmp_path, capsys):
    Image.new("RGB", (40, 32)).save(tmp_path / "black.png")
    run(["predict", f"--workdir={trained}", f"--output={tmp_path}/o", "--threshold=1", f"{tmp_path}/black.png"])
    assert "black.png: nothing -> " in capsys.readouterr().out
    assert json.loads((tmp_path / "o" / "predictions.json").read_text()) == []


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "name at least one picture or folder, or ask for some with --from-eval=N"),
        (["none.png"], "there is no picture or folder"),
        (["empty"], "there are no pictures in the folder"),
    ],
)
def test_predict_on_nothing(names, message, trained, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    files = [str(tmp_path / name) for name in names]
    assert message in fails(capsys, ["predict", f"--workdir={trained}", f"--output={tmp_path}/o", *files])
    assert not (tmp_path / "o").exists()
