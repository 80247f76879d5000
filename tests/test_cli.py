"""The `cdetr` command: help, what it refuses and how, and train, evaluate, predict and convert on small pictures."""

import ctypes
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import threading
import types

import huggingface_hub
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run
from huggingface_hub.errors import LocalEntryNotFoundError
from PIL import Image
from safetensors.numpy import load_file, save_file

import cdetr_jax
from cdetr_jax import boxes
from cdetr_jax.cli.environment import keep_compiled_programs, keep_freed_memory
from cdetr_jax.cli.main import run
from cdetr_jax.cli.predict import find_pictures
from cdetr_jax.cli.predict_video import _newest, is_live
from cdetr_jax.evaluation.coco_eval import SUMMARY
from cdetr_jax.models import resnet

ROOT = cdetr_jax.__path__[0] + "/.."
PICTURES = {"data.synthetic.eval_pictures": 5, "data.synthetic.width": 40, "train.num_epochs": 1}
SMALL = [f"--config.{field}={value}" for field, value in (tiny_run.FIELDS | PICTURES).items()]


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    """As the commands are run; the import path is left as it was."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "path", list(sys.path))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A workdir that the command trained: one epoch of two steps, with one block a stage."""
    workdir = tmp_path_factory.mktemp("run") / "new" / "folder"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setattr(sys, "path", list(sys.path))
        patch.setitem(resnet.STAGE_SIZES, "resnet18", tiny_run.ONE_BLOCK_A_STAGE)
        run(["train", "--config=configs/demo.py", f"--workdir={workdir}", *SMALL])
        yield workdir


def fails(capsys, arguments, status=1):
    """Runs a command that must fail with this status; returns what it wrote to standard error."""
    with pytest.raises(SystemExit) as error:
        run(arguments)
    assert error.value.code == status
    return capsys.readouterr().err


@pytest.mark.parametrize("folder", [None, "/elsewhere"])
def test_commands_keep_what_they_compile(folder, monkeypatch):
    names = (
        "JAX_COMPILATION_CACHE_DIR",
        "JAX_COMPILATION_CACHE_MAX_SIZE",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS",
    )
    environment = {"XDG_CACHE_HOME": "/cache"} | ({names[0]: folder} if folder else {})
    monkeypatch.setattr(os, "environ", environment)
    keep_compiled_programs()
    found = [environment.get(name) for name in names]
    assert found == (["/elsewhere", None, None] if folder else ["/cache/cdetr_jax/compiled", "4294967296", "0.1"])


@pytest.mark.parametrize(
    ("cores", "variables", "are_set"), [(2, {}, 3), (64, {}, 0), (2, {"MALLOC_ARENA_MAX": "4"}, 0)]
)
def test_commands_keep_freed_memory_on_few_cores(cores, variables, are_set, monkeypatch):
    calls = []
    library = types.SimpleNamespace(mallopt=lambda parameter, value: calls.append((parameter, value)))
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    monkeypatch.setattr(os, "environ", variables)
    keep_freed_memory()
    assert len(calls) == are_set
    monkeypatch.setattr(ctypes, "CDLL", lambda name: types.SimpleNamespace())  # a C library that has no such thing
    keep_freed_memory()


# --------------------------------------------------------------------------------------------------------- help


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ([], ["train", "evaluate", "predict", "convert", "benchmark", "go on with a run that was stopped"]),
        (["train"], ["--config RECIPE", "--workdir DIR", "--multihost", "--config.optimizer.lr=2e-4", "--config=demo"]),
        (
            ["evaluate"],
            [
                "--weights SOURCE",
                "--workdir SOURCE",
                "--checkpoint {best,latest}",
                "--dc5",
                "12 numbers",
                "--config RECIPE",
            ],
        ),
        (
            ["predict"],
            ["--weights SOURCE", "--workdir SOURCE", "--output DIR", "--threshold SCORE", "--from-eval N", "sheet.png"],
        ),
        (["predict"], ["predictions.json", "hf://microsoft/conditional-detr-resnet-50", "ConditionalDETR_r50.pth"]),
        (
            ["convert"],
            ["SOURCE DESTINATION", "--to {hub,pth,orbax}", "--without-timm", "--checkpoint", "--config.init"],
        ),
        (["benchmark"], ["--config RECIPE", "--batch N", "--size HxW", "--targets N", "--steps N"]),
        (["prepare"], ["--dataset NAME", "--archives"]),
        (["export"], ["--size HxW"]),
        (
            ["attention"],
            ["--weights SOURCE", "--point X,Y", "--measure", "--query WHICH", "[layers, heads, rows, columns]"],
        ),
    ],
)
def test_help(command, expected, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as end:
        run([*command, "--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert [words for words in expected if words not in text] == []
    assert [line for line in text.splitlines() if len(line) > 80] == []


def test_help_imports_nothing_heavy():
    code = """if True:
        import sys
        from cdetr_jax.cli.main import run
        for arguments in ([], ["train"], ["evaluate"], ["predict"], ["convert"], ["benchmark"]):
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
        (
            [],
            "name a command: train, compare, curve, evaluate, data, predict, attention, convert, prepare, export,",
        ),
        (["trian"], "unknown command 'trian'; did you mean train?; see"),
        (["train", "--workdri=w"], "unknown argument '--workdri=w'; did you mean --workdir?; see `cdetr train --help`"),
        (["train", DEMO, "--workdir="], "argument --workdir: '' is empty, expected a name"),
        (["train", DEMO], "the following arguments are required: --workdir"),
        (["train"], "the following arguments are required: --config and --workdir, or --data=FOLDER instead"),
        (["benchmark", "input"], "the following arguments are required: --config, or --data=FOLDER instead"),
        (["train", DEMO, "--workdir=w", "--lr=3"], "unknown argument '--lr=3'; see `cdetr train --help`"),
        (["train", DEMO, "--workdir=w", "stray"], "unknown argument 'stray'"),
        (["train", DEMO, "--work=w"], "unknown argument '--work=w'; did you mean --workdir?"),  # no abbreviations
        (["predict", "--workdir=w", "--output=o", "--config.seed=1"], "unknown argument '--config.seed=1'"),
        (
            ["predict", "--workdir=w", "--output=o", "--threshold=half"],
            "argument --threshold: 'half', expected a score",
        ),
        (["attention", "--weights=w", "--output=o", "--query=1,2"], "'1,2', expected best, a query's number, or a box"),
        (
            ["attention", "--weights=w", "--output=o", "--point=1"],
            "'1', expected a point x,y in pixels, such as 120,80",
        ),
        (["attention", "--weights=w", "--output=o", "--head=-1"], "'-1', expected all, mean, or a head's number"),
        (["evaluate", "--workdir=w", "--checkpoint=first"], "argument --checkpoint: invalid choice: 'first'"),
        (["evaluate", "--checkpoint=best"], "the following arguments are required: --weights/--workdir"),
        (["convert", "w", "folder"], "the following arguments are required: --to"),
        (["convert", "w", "--to=hub"], "the following arguments are required: DESTINATION"),
        (["convert", "w", "folder", "--to=onnx"], "argument --to: invalid choice: 'onnx'"),
    ],
)
def test_wrong_arguments(arguments, message, capsys):
    assert message in fails(capsys, arguments, status=2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--config=missing.py", "--workdir=foo://run"], "foo://run: cannot write to foo://; use a local"),
        (["predict", "--weights=missing", "--output=s3://b/o", "missing.jpg"], "s3://b/o: cannot write to s3://"),
        (["export", "--weights=missing", "--output=foo://b/o", "--to=onnx"], "foo://b/o: cannot write to foo://"),
    ],
)
def test_where_nothing_can_be_written_is_said_first(arguments, message, capsys):
    assert message in fails(capsys, arguments)


def test_an_export_stays_on_this_machine(bucket, capsys):
    error = fails(capsys, ["export", "--weights=missing", "--output=gs://bucket/o", "--to=onnx"])
    assert "--output is gs://bucket/o, expected a local file" in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config.optimizer.lrr=1"], "there is no config.optimizer.lrr; did you mean --config.optimizer.lr?"),
        (["--config.train.batch_size=many"], "config.train.batch_size"),
        (["--config.train.batch_size=2.5"], "config.train.batch_size"),
        (["--config.model.backbone=resnet19"], "config.model.backbone is 'resnet19', expected one of resnet18, "),
        (["--config.train.batch_size=5"], "config.train.batch_size 5 is not divisible by 2 devices"),
        (["--config.data.source=coco_folder", "--config.data.train_images="], "must name a folder of pictures"),
        (["--config.train.max_steps=0"], "config.train.max_steps is 0, expected None or a whole number from 1"),
        (["--config.data.short_sides_px=abc"], "config.data.short_sides_px is 'abc', expected sides in pixels"),
    ],
)
def test_wrong_config_fields(arguments, message, capsys, tmp_path):
    error = fails(capsys, ["train", DEMO, f"--workdir={tmp_path / 'w'}", *arguments])
    assert message in error
    assert error.startswith("cdetr train: error: ")
    assert error.count("\n") == 1
    assert "Traceback" not in error
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize("config", ["configs/dmeo.py", "dmeo", "configs/dmeo.py:12", "dmeo:12"])
def test_a_config_that_is_not_there(config, capsys, tmp_path):
    error = fails(capsys, ["train", f"--config={config}", f"--workdir={tmp_path}"])
    meant = "did you mean --config=demo?"
    assert error == f"cdetr train: error: there is no config {config}; {meant}; `cdetr configs` lists the recipes\n"


def test_a_recipe_can_be_named_from_anywhere(tmp_path):
    """Its neighbours are found wherever it and the reader are, and one's own folder `configs` is in nobody's way."""
    mine = tmp_path / "mine.py"
    mine.write_text("from configs import coco_folder\nget_config = coco_folder.get_config\n")
    (tmp_path / "elsewhere" / "configs").mkdir(parents=True)
    code = "import sys; from cdetr_jax.cli.settings import read_config as r; print(r(sys.argv[1], []).train.num_epochs)"
    for folder, recipe in (
        (tmp_path, f"{ROOT}/configs/coco_folder.py"),
        (tmp_path / "elsewhere", str(mine)),
        (tmp_path / "elsewhere", "detr_r50"),
    ):
        command = [sys.executable, "-c", code, recipe]
        done = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
        assert int(done.stdout) == 50, recipe


def test_recipes_go_by_their_names(capsys):
    run(["configs"])
    lines = capsys.readouterr().out.splitlines()
    listed = dict(line.split(maxsplit=1) for line in lines)
    assert listed["detr_r50"] == "DETR R50, the baseline (arXiv:2005.12872)."
    assert listed.keys() == {file.stem for file in pathlib.Path(ROOT, "configs").glob("*.py")} - {"__init__", "common"}
    assert all(len(line) <= 140 for line in lines)
    run(["configs", "conditional_detr_r50:108"])
    assert "config.optimizer.drop_epoch = 80" in capsys.readouterr().out.splitlines()


def test_a_schedule_that_there_is_not(capsys, tmp_path):
    error = fails(capsys, ["train", "--config=configs/conditional_detr_r50.py:13", f"--workdir={tmp_path}"])
    assert "there is no recipe for 13 epochs, only for 12, 36, 50, 75, 108" in error


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def get_config(:", "SyntaxError: invalid syntax (mine.py, line 1)"),
        ("import confgs\n", "ModuleNotFoundError: No module named 'confgs', in line 1"),
        ("config = 3", "it has no function get_config; configs/demo.py shows how one looks"),
        ("def get_config():\n    return {}['a']", "KeyError: 'a', in line 2"),
        ("def get_config():\n    return {}", "its get_config returned dict, expected a ConfigDict"),
        ("def get_config(epochs):\n    pass", "its get_config needs an argument: --config=mine.py:ARGUMENT"),
    ],
)
def test_a_recipe_that_is_none(text, message, capsys, tmp_path):
    (tmp_path / "mine.py").write_text(text)
    error = fails(capsys, ["train", f"--config={tmp_path}/mine.py", f"--workdir={tmp_path}/w"])
    assert error == f"cdetr train: error: {tmp_path}/mine.py cannot be read: {message}\n"


def test_a_colon_where_the_recipe_takes_none(capsys, tmp_path):
    error = fails(capsys, ["train", f"{DEMO}:12", f"--workdir={tmp_path}"])
    assert "configs/demo.py:12 cannot be read: its get_config takes nothing after a colon" in error


def test_a_workdir_that_cannot_be_written_to(capsys, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    for workdir in ("file", "file/run"):
        error = fails(capsys, ["train", DEMO, f"--workdir={tmp_path}/{workdir}"])
        assert error.endswith(
            f"{tmp_path}/file is a file, so {tmp_path}/{workdir} cannot be a folder; name another one\n"
        )
    monkeypatch.setattr("os.access", lambda *_: False)  # the tests' user may write anywhere
    error = fails(capsys, ["train", DEMO, f"--workdir={tmp_path}/w"])
    assert f"{tmp_path}/w: {tmp_path} cannot be written to; use another folder" in error


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
    assert error == (
        f"cdetr {command[0]}: error: the folder {tmp_path} holds neither model.safetensors nor pytorch_model.bin, nor "
        "is it the workdir of a run\n"
    )


@pytest.mark.parametrize("size", ["480", "axb", "480x640x3"])
def test_benchmark_of_a_wrong_size(size, capsys):
    error = fails(capsys, ["benchmark", DEMO, f"--size={size}"], status=2)
    assert f"argument --size: '{size}', expected height x width in pixels" in error


@pytest.mark.parametrize("threshold", ["1.5", "-0.1", "nan"])
def test_a_threshold_out_of_range(threshold, capsys, tmp_path):
    arguments = ["predict", f"--workdir={tmp_path}", f"--output={tmp_path}", f"--threshold={threshold}", "a.png"]
    assert f"argument --threshold: '{threshold}', expected a score from 0 to 1" in fails(capsys, arguments, status=2)


# ---------------------------------------------------------------------------------------------- train and evaluate


def test_train_leaves_a_workdir(trained):
    assert sorted(path.name for path in (trained / "checkpoints").iterdir() if path.name.isdigit()) == ["2"]
    config = json.loads((trained / "config.json").read_text())
    assert config["model"]["width"] == 16
    assert config["data"]["eval_shapes"] == [[64, 64]]
    with Image.open(trained / "curve.png") as curve:
        assert curve.format == "PNG"
    classes = json.loads((trained / "classes.json").read_text())
    assert [entry["id"] for entry in classes] == [1, 2, 3, 5, 8]


def test_evaluate_prints_the_table_of_the_run_and_writes_a_report(trained, capsys, tmp_path):
    run(["evaluate", f"--workdir={trained}", "--checkpoint=latest", f"--report={tmp_path / 'report'}"])
    *lines, empty, said = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:12]] == list(SUMMARY)
    assert {line.split()[0] for line in lines[12:] if line} == {"class", "disc", "square", "triangle", "cross", "ring"}
    assert not empty
    assert said.endswith(f"where it errs: {tmp_path / 'report' / 'report.html'}")
    reported = json.loads((tmp_path / "report" / "report.json").read_text())
    assert [f"{value:.3f}" if value >= 0 else "-" for value in reported["summary"].values()] == [
        line.split()[1] for line in lines[:12]
    ]


def test_evaluate_refuses_a_field_that_is_not_there(trained, capsys):
    error = fails(capsys, ["evaluate", f"--workdir={trained}", "--config.eval.batchsize=2"])
    assert "there is no config.eval.batchsize; did you mean --config.eval.batch_size?" in error


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
    assert f"\n{pictures}/broken.jpg: cannot read this picture" in printed.out

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
        assert 0 <= left <= left + width <= sizes[result["image_id"]][0] + 1e-4  # as a sum of two float32
        assert 0 <= top <= top + height <= sizes[result["image_id"]][1] + 1e-4
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


def test_predict_writes_over_nobodys_pictures(trained, pictures, capsys):
    """With the output among them, under other spellings and letters, and again over its own drawings."""
    for name in ("sheet.png", "SAME.png", "one/found.png"):
        shutil.copy(pictures / "gray.png", pictures / name)
    (pictures / "link").symlink_to(pictures / "one")
    before = {path: path.read_bytes() for path in pictures.rglob("*.*")}
    names = ["gray.png", "sheet.png", "SAME.png", "one/same.png"]
    run_predict = ["predict", f"--weights={trained}", "--threshold=0", f"--output={pictures}/link/.."]
    for _ in range(2):
        run([*run_predict, *(str(pictures / name) for name in names)])
        drawings = [line.rsplit("/", 1)[1] for line in capsys.readouterr().out.splitlines() if " -> " in line]
        assert drawings == ["gray_2.png", "sheet_3.png", "SAME_2.png", "same.png"]
    for _ in range(2):  # what is in the output is not looked for
        run([*run_predict[:3], f"--output={pictures}/one/found", f"{pictures}/SAME.png", f"{pictures}/link"])
        assert "3 pictures: " in capsys.readouterr().out
        drawings = {path.name for path in (pictures / "one" / "found").glob("*.png")}
        assert drawings == {"SAME.png", "same_2.png", "found.png", "sheet.png"}
    error = fails(capsys, [*run_predict[:3], f"--output={pictures}/link", str(pictures / "one")])
    assert f"--output={pictures}/link is the folder of the pictures; name another one, such as" in error
    shutil.copy(pictures / "gray.png", pictures / "predictions.json")
    error = fails(capsys, [*run_predict, str(pictures / "predictions.json")])
    assert "predictions.json is one of the pictures, and would be written over; name another --output" in error
    assert {path: path.read_bytes() for path in before} == before


# ------------------------------------------------------------------------------------------------------ attention


def attention(workdir, output, *arguments):
    return ["attention", f"--weights={workdir}", f"--output={output}", "--checkpoint=latest", *arguments]


def test_attention_draws_a_sheet_an_object_and_keeps_its_maps(trained, tmp_path, capsys):
    run(attention(trained, tmp_path, f"--weights={trained}", "--from-eval=1", "--objects=2", "--threshold=0"))
    assert "2 sheets of 1 pictures, with their maps as .npz" in capsys.readouterr().out
    sheets = sorted(tmp_path.glob("*.png"))
    assert len(list(tmp_path.iterdir())) == 4
    for sheet in sheets:
        with Image.open(sheet) as image:
            image.load()
        maps = np.load(sheet.with_suffix(".npz"))
        number = int(maps["query"])
        assert sheet.name == f"eval_synthetic-1-0_query{number}.png"
        assert 0 < maps["score"] < 1
        assert (str(maps["side"]), str(maps["model"])) == ("decoder", "Conditional DETR")
        rows, columns = np.ceil(maps["size_in_cells"]).astype(int)  # 64 x 51 pixels of 64 x 64
        assert (rows, columns) == (2, 2)
        for name in ("spatial", "content", "combined"):
            assert maps[name].shape == (2, 2, rows, columns)  # layers, heads
            np.testing.assert_allclose(maps[name].sum((-1, -2)), 1, rtol=1e-6)
        x, y = maps["point_xy_px"]
        assert 0 < x < 40
        assert 0 < y < 32
        np.testing.assert_allclose(maps["box_xyxy_px"], maps["box_xyxy_px"].clip(0, [40, 32, 40, 32]))
        assert {name for name in maps if name.endswith("_2")} == {f"{name}_2" for name in maps if name[-2:] != "_2"}


def test_attention_of_a_chosen_query_a_box_and_a_point(trained):
    detector = cdetr_jax.Detector.from_pretrained(trained)
    picture = np.full((32, 40, 3), 77, np.uint8)
    best = detector.attention(picture, threshold=0, objects=7)
    assert sorted(best.queries.tolist()) == list(range(7))
    assert (np.diff(best.scores) <= 0).all()
    assert len(detector.attention(picture, threshold=1)) == 1  # at least the best
    one = detector.attention(picture, query=3)
    place = best.queries.tolist().index(3)
    np.testing.assert_array_equal(one.combined[:, 0], best.combined[:, place])
    assert one.title(0) == best.title(place)
    of_box = detector.attention(picture, query=one.boxes_xyxy_px[0])
    fits = boxes.iou_and_union(*map(jnp.asarray, (best.boxes_xyxy_px, one.boxes_xyxy_px)))[0] >= 0.5
    assert of_box.queries == best.queries[fits.argmax()]  # the best score of those that overlap
    point = detector.attention(picture, point=(39.5, 31))
    assert point.queries == 3  # the lower right one of 2 x 2 cells
    assert point.spatial.shape == (1, 1, 2, 2, 2)
    assert np.isnan(point.scores)
    for arguments, message in (
        ({"query": 7}, "query is 7, expected a number from 0 to 6, or 'best', or a box"),
        ({"query": "worst"}, "query is 'worst', expected 'best'"),
        ({"query": (1, 2, 3)}, "query is .*, expected 4 numbers"),
        ({"query": (9, 9, 3, 12)}, "expected left, top, right, bottom of a box in pixels"),
        ({"point": (41, 3)}, "expected one in the picture of 40 x 32 pixels"),
    ):
        with pytest.raises(ValueError, match=message):
            detector.attention(picture, **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--from-eval=1", "--layer=2"], "layer is 2, expected 0 to 1, or -1 for the last one"),
        ([], "name at least one picture or folder, or ask for some with --from-eval=N"),
        (["missing.png"], "there is no picture or folder missing.png"),
        (["missing.png", "--measure"], "--measure takes a whole evaluation set; leave out pictures"),
        (["--from-eval=1", "--config=demo"], "demo is for --measure, which is not asked for"),
        (
            ["--measure", "--threshold=1"],
            "objects is detected with a score of 1 and an IoU of 0.5, so there is nothing",
        ),
    ],
)
def test_attention_that_there_is_not(trained, arguments, message, tmp_path, capsys):
    error = fails(capsys, attention(trained, tmp_path, *arguments))
    assert error.startswith("cdetr attention: error: ")
    assert message in error


def test_attention_is_measured(trained, tmp_path, capsys, monkeypatch):
    """Of every object, as nothing is detected after two steps."""
    monkeypatch.setattr("cdetr_jax.training.attention.MIN_IOU", 0.0)
    run(attention(trained, tmp_path, "--measure", "--threshold=0"))
    lines = capsys.readouterr().out.splitlines()
    [measure] = json.loads((tmp_path / "attention.json").read_text())
    objects = measure["objects"]
    assert objects == measure["annotated"] > 4
    assert f"spatial attention at {objects} of {objects} objects" in lines[0]
    assert lines[2].split()[0] == "uniform"
    assert len([line for line in lines[3:] if line.endswith("%")]) == 2 * 2  # layers, heads
    assert [(row["part"], row["layer"], row["head"]) for row in measure["rows"][:3]] == [
        ("spatial", 0, 0),
        ("spatial", 0, 1),
        ("spatial", 1, 0),
    ]
    for row in measure["rows"]:
        assert 0.2 <= row["consistency"] <= 1
        assert 0 <= row["middle"] <= row["box"] <= 1
    assert len((tmp_path / "attention.csv").read_text().splitlines()) == 1 + 3 * 2 * 2


def test_predict_keeps_what_it_has_when_it_fails(trained, pictures, capsys, monkeypatch):
    from cdetr_jax.inference import Detector

    def find(self, images, *arguments):
        if images[0].shape[:2] == (30, 44):
            raise MemoryError("too large")
        return call(self, images, *arguments)

    call = Detector.__call__
    monkeypatch.setattr(Detector, "__call__", find)
    files = [str(pictures / name) for name in ("one", "gray.png", "two")]
    error = fails(capsys, ["predict", f"--weights={trained}", f"--output={pictures}/o", "--threshold=0", *files])
    assert f"error: out of memory: too large; with {pictures}/gray.png, 44 x 30 pixels" in error
    assert {result["image_id"] for result in json.loads((pictures / "o" / "predictions.json").read_text())} == {1}
    assert (pictures / "o" / "same.png").exists()


def test_ids_of_pictures_and_of_the_evaluation_set_differ(trained, pictures, capsys):
    output = pictures / "o"
    run(["predict", f"--weights={trained}", f"--output={output}", "--threshold=0", "--from-eval=2", f"{pictures}/one"])
    results = json.loads((output / "predictions.json").read_text())
    assert {result["image_id"] for result in results if "same" in result["file_name"]} == {6}  # the set has 5
    assert {result["image_id"] for result in results} == {1, 2, 6}


def test_predict_in_every_form(trained, pictures, capsys, monkeypatch):
    """Pictures by a pattern and an address, in batches; only some classes, as lines, rows, texts and crops."""
    import http.server

    monkeypatch.chdir(pictures)
    handler = type("Quiet", (http.server.SimpleHTTPRequestHandler,), {"log_message": lambda *_: None})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_address[1]}/"
        files = [
            f"{pictures}/???/same.png",
            f"{address}gray.png?size=1",
            f"{address}none.png",
            address,
            f"{pictures}/gray.png",
        ]
        options = ["--threshold=0", "--classes=ring,disc", "--save=jsonl,csv,yolo", "--crops", "--batch=3"]
        with pytest.raises(SystemExit):
            run(["predict", f"--weights={trained}", f"--output={pictures}/o", *options, *files])
        server.shutdown()
    printed = capsys.readouterr()
    assert "2 of 6 pictures could not be read, see above" in printed.err
    assert f"{address}: cannot read this picture (ValueError: this is the address of a web page" in printed.out
    lines = [json.loads(line) for line in (pictures / "o" / "predictions.jsonl").read_text().splitlines()]
    assert [(line["height"], line["width"]) for line in lines] == [(32, 40), (32, 40), (30, 44), (30, 44)]
    objects = [(line["file_name"], found) for line in lines for found in line["objects"]]
    assert {found["class_name"] for _, found in objects} == {"ring", "disc"}
    header, *rows = (pictures / "o" / "predictions.csv").read_text().splitlines()
    assert header == "file_name,class_id,class_name,score,left,top,right,bottom"
    assert rows == [
        ",".join(map(str, (name, o["class_id"], o["class_name"], o["score"], *o["box_xyxy"]))) for name, o in objects
    ]
    labels = pictures / "o" / "labels"
    assert (labels / "classes.txt").read_text().split() == ["disc", "square", "triangle", "cross", "ring"]
    for name, line in zip(("same", "same_2", "gray", "gray_2"), lines, strict=True):
        for text, found in zip((labels / f"{name}.txt").read_text().splitlines(), line["objects"], strict=True):
            number, x, y, width, height, score = map(float, text.split())
            corners = np.array([x - width / 2, y - height / 2, x + width / 2, y + height / 2])
            box = corners * np.tile([line["width"], line["height"]], 2)
            np.testing.assert_allclose(box, found["box_xyxy"], atol=1e-4)  # six decimals of a fraction
            assert number == {"disc": 0, "ring": 4}[found["class_name"]]
            assert score == pytest.approx(found["score"], abs=1e-6)
    assert len(list((pictures / "o" / "crops").glob("*.png"))) == len(objects)
    assert not (pictures / "o" / "predictions.json").exists()
    # The same boxes as one by one.
    run(["predict", f"--weights={trained}", f"--output={pictures}/p", *options[:2], f"{pictures}/gray.png"])
    alone = json.loads((pictures / "p" / "predictions.json").read_text())
    np.testing.assert_allclose([o["score"] for o in alone], [o["score"] for o in lines[3]["objects"]], rtol=1e-5)


def test_predict_does_not_know_a_class(trained, pictures, capsys):
    command = ["predict", f"--weights={trained}", f"--output={pictures}/o", f"{pictures}/gray.png"]
    for name in ("rign", "RING"):
        assert f"does not know '{name}'; did you mean ring?" in fails(capsys, [*command, f"--classes=disc,{name}"])
    known = "'zebra'; it knows disc, square, triangle, cross, ring\n"
    assert known in fails(capsys, [*command, "--classes=zebra"])


def test_predict_in_a_video(trained, tmp_path, capsys):
    """Of a variable frame rate, and once more turned as phones do."""
    av = pytest.importorskip("av")
    path, times_s = tmp_path / "moving.mp4", [0, 0.1, 0.2, 0.7, 1.5]
    with av.open(str(path), "w") as video:
        stream = video.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for time_s in times_s:
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), int(100 * time_s), np.uint8), format="rgb24")
            frame.pts = round(10 * time_s)
            video.mux(stream.encode(frame))
        video.mux(stream.encode(None))
    matrix = path.read_bytes().index(b"tkhd") + 4 + 40  # of the track's header
    clockwise = np.array([0, 1 << 16, 0, -1 << 16, 0, 0, 48 << 16, 0, 1 << 30], ">i4").tobytes()
    turned = path.read_bytes()[:matrix] + clockwise + path.read_bytes()[matrix + 36 :]
    (tmp_path / "turned.mp4").write_bytes(turned)
    (tmp_path / "o").mkdir()
    shutil.copy(path, tmp_path / "o" / "turned.mp4")  # somebody's, so not written over; but what was drawn is
    command = ["predict", f"--weights={trained}", "--threshold=0", "--batch=2", f"--output={tmp_path}/o"]
    for _ in range(2):
        run([*command, str(path), f"{tmp_path}/turned.mp4"])
        printed = capsys.readouterr().out
        assert f"objects in 5 frames -> {tmp_path}/o/moving.mp4, {tmp_path}/o/moving.jsonl" in printed
        assert f"objects in 5 frames -> {tmp_path}/o/turned_2.mp4, {tmp_path}/o/turned_2.jsonl" in printed
    assert (tmp_path / "o" / "turned.mp4").read_bytes() == path.read_bytes()
    for name, size_hw in (("moving", (48, 64)), ("turned_2", (64, 48))):
        lines = [json.loads(line) for line in (tmp_path / "o" / f"{name}.jsonl").read_text().splitlines()]
        assert [line["frame"] for line in lines] == [0, 1, 2, 3, 4]
        assert [line["time_s"] for line in lines] == pytest.approx(times_s)
        assert all(line["objects"] for line in lines)
        assert {(line["height"], line["width"]) for line in lines} == {size_hw}
        assert drawn_times_s(av, tmp_path / "o" / f"{name}.mp4") == pytest.approx(times_s)
    (tmp_path / "broken.mp4").write_text("no video")
    assert "cannot read this video" in fails(capsys, [*command, f"{tmp_path}/broken.mp4"])


def drawn_times_s(av, path):
    with av.open(str(path)) as drawn:
        return [frame.time for frame in drawn.decode(video=0)]


def test_predict_from_a_camera(trained, tmp_path, capsys, monkeypatch):
    """FFmpeg's test picture stands for the camera, and a second recording does not replace the first."""
    av = pytest.importorskip("av")
    from cdetr_jax.cli import predict_video
    from cdetr_jax.inference import Detector

    calls, call, signals = [], Detector.__call__, iter((signal.SIGINT, signal.SIGTERM))

    def find(self, images, *arguments):
        calls.append(len(images))
        if len(calls) % 3 == 0:
            signal.raise_signal(next(signals))
        return call(self, images, *arguments)

    monkeypatch.setattr(Detector, "__call__", find)
    monkeypatch.setattr(
        predict_video, "_input", lambda source: {"file": "testsrc=size=64x48:rate=10", "format": "lavfi"}
    )
    command = ["predict", f"--weights={trained}", "--threshold=0", "--batch=4", f"--output={tmp_path}"]
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    for name in ("camera_1", "camera_1_2"):
        run([*command, "camera:1"])
        lines = [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        seen = lines[-1]["frame"] + 1
        assert f" objects in 3 frames ({seen - 3} of {seen} skipped, to be in time) -> " in capsys.readouterr().out
        assert [line["time_s"] for line in lines] == pytest.approx(
            [(line["frame"] - lines[0]["frame"]) / 10 for line in lines]
        )
        assert [line["utc"] for line in lines] == sorted(line["utc"] for line in lines)
        assert drawn_times_s(av, tmp_path / f"{name}.mp4") == pytest.approx([line["time_s"] for line in lines])
    assert calls == [1] * 6
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_a_source_that_is_not_there_keeps_its_password(trained, tmp_path, capsys):
    pytest.importorskip("av")
    command = ["predict", f"--weights={trained}", f"--output={tmp_path}/o"]
    error = fails(capsys, [*command, "rtsp://me:secret@127.0.0.1:1/x"])
    assert "rtsp://127.0.0.1:1/x: cannot read this source (ConnectionRefusedError" in error
    assert "secret" not in error
    assert "camera runs until it is stopped; name it alone" in fails(capsys, [*command, "camera", "--from-eval=1"])
    assert not (tmp_path / "o").exists()


def test_what_is_live(tmp_path, monkeypatch):
    """A file that is called like a camera stays a file."""
    monkeypatch.chdir(tmp_path)
    words = ["camera", "camera:1", "rtsp://me:secret@host:554/a/b?c=d"]
    assert find_pictures(words, tmp_path / "o") == list(zip(words, ("camera", "camera_1", "host_554_a_b"), strict=True))
    (tmp_path / "camera").touch()
    ((found, name),) = find_pictures(["camera"], tmp_path / "o")
    assert (found, name) == (pathlib.Path("camera"), "camera")
    assert not is_live(found)


def test_folders_that_are_links_and_pictures_that_nobody_reads(tmp_path, capsys):
    (tmp_path / "store").mkdir()
    for name in ("a.png", ".hidden.png", "b.HEIC", "c.dng"):
        (tmp_path / "store" / name).touch()
    (tmp_path / "all").mkdir()
    (tmp_path / "all" / "linked").symlink_to(tmp_path / "store")
    assert find_pictures([str(tmp_path / "all")], tmp_path / "o") == [(tmp_path / "all/linked/a.png", "linked/a")]
    printed = capsys.readouterr().out
    first = f"{tmp_path}/all/linked/b.HEIC"
    assert printed == f"{tmp_path}/all: 2 files cannot be read and are left out, the first is {first}\n"


def test_the_newest_frame_is_taken():
    """What came while one was looked at is skipped; the last one and the source's error are not."""
    go_on, over, stop = threading.Event(), threading.Event(), threading.Event()

    def source():
        yield "first"
        go_on.wait()
        yield from ("skipped", "also", "last")
        over.set()
        raise ValueError("unplugged")

    with _newest(source(), stop) as frames:
        assert next(frames) == (0, "first")
        go_on.set()
        over.wait()
        assert next(frames) == (3, "last")
        with pytest.raises(ValueError, match="unplugged"):
            next(frames)
    assert stop.is_set()


def test_predict_in_a_video_without_a_reader(trained, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    (tmp_path / "a.mp4").touch()
    error = fails(capsys, ["predict", f"--weights={trained}", f"--output={tmp_path}/o", f"{tmp_path}/a.mp4"])
    assert error.endswith("a.mp4 is a video: reading it needs `pip install cdetr_jax[video]`\n")


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


# -------------------------------------------------------------------------------------------------------- convert


@pytest.fixture(scope="module")
def converted(trained, tmp_path_factory):
    """The trained run as a folder of the hub's layout."""
    folder = tmp_path_factory.mktemp("converted") / "hub"
    run(["convert", str(trained), str(folder), "--to=hub", "--without-timm"])
    return folder


def predictions(source, pictures, output):
    files = [str(pictures / name) for name in ("gray.png", "one", "turned.jpg")]
    run(["predict", f"--weights={source}", f"--output={output}", "--threshold=0", *files])
    return (output / "predictions.json").read_text()


def test_what_was_converted_predicts_the_same(trained, converted, pictures, capsys):
    run(["convert", str(trained), str(pictures / "orbax"), "--to=orbax", "--checkpoint=latest"])
    printed = capsys.readouterr().out
    assert printed == (
        f"{pictures}/orbax: ConditionalDetr, resnet18, 5 classes\n"
        f"load it with cdetr predict --weights={pictures}/orbax, or cdetr train --config.init={pictures}/orbax\n"
    )
    expected = predictions(trained, pictures, pictures / "out")
    assert len(json.loads(expected)) == 3 * 7 * 5
    for source in (converted, pictures / "orbax"):
        assert predictions(source, pictures, pictures / f"out_{source.name}") == expected


def test_convert_says_how_to_load_a_folder(converted, tmp_path, capsys):
    """Also one that was converted itself."""
    run(["convert", str(converted), str(tmp_path / "again"), "--to=hub", "--without-timm"])
    assert capsys.readouterr().out == (
        f"{tmp_path}/again: ConditionalDetr, resnet18, 5 classes\n"
        f'load it with transformers.ConditionalDetrForObjectDetection.from_pretrained("{tmp_path}/again")\n'
    )
    for path in converted.iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()


def test_convert_to_a_pth(converted, pictures, capsys):
    pytest.importorskip("torch")
    run(["convert", str(converted), str(pictures / "w.pth"), "--to=pth"])
    assert f"or cdetr predict --weights={pictures}/w.pth" in capsys.readouterr().out
    expected = predictions(converted, pictures, pictures / "out")
    assert predictions(pictures / "w.pth", pictures, pictures / "out_pth") == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--to=pth", "--without-timm"], "--without-timm is of --to=hub, not of --to=pth"),
        (["--to=orbax", "--without-timm"], "--without-timm is of --to=hub, not of --to=orbax"),
        (
            ["--to=hub"],
            "the hub's layout has only the published form, but model.backbone_width is 8, not 64; use --to=pth",
        ),
    ],
)
def test_what_cannot_be_converted(arguments, message, converted, tmp_path, capsys):
    error = fails(capsys, ["convert", str(converted), str(tmp_path / "new"), *arguments])
    assert error == f"cdetr convert: error: {message}\n"
    assert not (tmp_path / "new").exists()


def test_convert_to_a_pth_without_pytorch(converted, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    error = fails(capsys, ["convert", str(converted), str(tmp_path / "w.pth"), "--to=pth"])
    assert error.endswith("`pip install cdetr_jax[torch]`, or use the model's .safetensors\n")
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_convert_does_not_write_over_a_run(trained, converted, capsys):
    before = (trained / "config.json").read_text()
    error = fails(capsys, ["convert", str(converted), str(trained), "--to=orbax"])
    assert error == f"cdetr convert: error: {trained} holds a run already; name another folder\n"
    assert (trained / "config.json").read_text() == before


# ----------------------------------------------------------------------------------- weights that are not of a run


def test_evaluate_needs_to_know_on_what(converted, capsys):
    error = fails(capsys, ["evaluate", f"--weights={converted}"])
    assert error == (
        f"cdetr evaluate: error: {converted} does not say on which pictures to evaluate it; name them, "
        "--data=FOLDER, or a recipe, such as --config=conditional_detr_r50\n"
    )


def test_evaluate_with_a_recipe_gives_the_table_of_the_run(trained, converted, capsys):
    run(["evaluate", f"--weights={trained}"])
    expected = capsys.readouterr().out
    run(["evaluate", f"--weights={converted}", DEMO, *SMALL])
    assert capsys.readouterr().out == expected


def test_pictures_of_the_evaluation_set_need_a_run(converted, tmp_path, capsys):
    error = fails(capsys, ["predict", f"--weights={converted}", f"--output={tmp_path}/o", "--from-eval=2"])
    assert error == (
        f"cdetr predict: error: --from-eval needs the workdir of a run, and {converted} is none; name pictures "
        "instead\n"
    )


def truncated(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def renamed(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors = {name.replace("model.", "vit.", 1): array for name, array in tensors.items()}
    save_file(tensors, folder / "model.safetensors")


def without_a_tensor(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["bbox_predictor.layers.1.bias"]
    save_file(tensors, folder / "model.safetensors")


def with_a_damaged_config(folder):
    path = folder / "config.json"
    path.write_text(path.read_text()[:100])


def empty(folder):
    for path in folder.iterdir():
        path.unlink()


@pytest.mark.parametrize("command", ["predict", "convert", "evaluate"])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncated, "{0}/model.safetensors is damaged or no safetensors file: "),
        (renamed, "{0}: these are the weights of no Conditional DETR, DETR or ResNet in a published layout; the first"),
        (
            without_a_tensor,
            "{0}: the weights do not fit the model: missing bbox_predictor.layers.1.bias; unused none; mis",
        ),
        (with_a_damaged_config, "{0}/config.json is damaged: "),
        (empty, "the folder {0} holds neither model.safetensors nor pytorch_model.bin, nor is it the workdir of a run"),
    ],
)
def test_broken_weights_are_one_line(damage, message, command, converted, tmp_path, capsys):
    folder = tmp_path / "w"
    shutil.copytree(converted, folder)
    damage(folder)
    Image.new("RGB", (40, 32)).save(tmp_path / "picture.png")
    arguments = {
        "predict": [f"--weights={folder}", f"--output={tmp_path}/o", f"{tmp_path}/picture.png"],
        "convert": [str(folder), f"{tmp_path}/o", "--to=hub", "--without-timm"],
        "evaluate": [f"--weights={folder}", DEMO],
    }[command]
    error = fails(capsys, [command, *arguments])
    assert error.startswith(f"cdetr {command}: error: {message.format(folder)}")
    assert error.count("\n") == 1
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "hf://owner/model",
            "hf://owner/model is not in the cache and could not be downloaded (no route to the hub). With",
        ),
        ("hf://model", "hf://model is no hub name; expected hf://owner/model, or hf://owner/model@revision"),
        ("none.pth", "there is no file or folder none.pth; a hub name is written hf://owner/model"),
    ],
)
def test_weights_that_are_not_there_are_one_line(name, message, tmp_path, capsys, monkeypatch):
    def no_network(*_, **__):
        raise LocalEntryNotFoundError("no route to the hub")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", no_network)
    Image.new("RGB", (40, 32)).save(tmp_path / "picture.png")
    error = fails(capsys, ["predict", f"--weights={name}", f"--output={tmp_path}/o", f"{tmp_path}/picture.png"])
    assert error.startswith(f"cdetr predict: error: {message}")
    assert error.count("\n") == 1


def test_a_run_that_cannot_start_from_the_hub_says_what_else_it_can_do(tmp_path, capsys, monkeypatch):
    def no_network(*_, **__):
        raise LocalEntryNotFoundError("no route to the hub")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", no_network)
    init = "--config.init=hf://timm/resnet18.tv_in1k"
    error = fails(capsys, ["train", DEMO, f"--workdir={tmp_path}/w", *SMALL, init]).splitlines()[-1]
    assert error.startswith("cdetr train: error: config.init: hf://timm/resnet18.tv_in1k is not in the cache and could")
    assert error.endswith("or train from random weights: --config.init= --config.model.backbone_norm=group "
                          "--config.model.frozen_stages=0")  # fmt: skip
