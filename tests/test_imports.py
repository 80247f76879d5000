"""Which file may import which, and that nothing heavy or optional is imported before it is needed."""

import ast
import pathlib
import subprocess
import sys

import pytest

import cdetr_jax

PACKAGE = pathlib.Path(cdetr_jax.__file__).parent

# Bottom up: a file imports only what is listed above it, or beside it where one line names several.
ORDER = """
records
structs
classes
boxes files device_memory
models/elementwise
models/fused_attention
models/attention
models/position models/resnet
models/transformer
models/detector
configs/common
matching/cost matching/assign
losses/focal losses/box
losses/criterion
data/coco_categories data/cache data/synthetic
data/sources
data/coco data/tfds_source
data/joined data/archives data/yolo data/voc
data/folders data/findings
data/tfds_prepare
data/buckets
data/plan
data/transforms
data/workers
data/reader
data/pipeline
evaluation/postprocess evaluation/attention_maps
evaluation/coco_eval
visualization/draw visualization/figure visualization/page
visualization/curve
visualization/report visualization/attention
training/optimizer
training/step training/tensorboard training/ahead training/processes
training/trackers
training/parallel training/metrics training/feed training/stopping
training/memory
checkpoints/mismatch checkpoints/workdir
checkpoints/io
weights/torch_convert weights/torch_files
weights/architecture
weights/load
weights/start weights/save
inference
onnx_convert
export
config_check
build
training/start
training/evaluate
training/attention
training/loop
compare
cli/settings cli/environment cli/arguments cli/predict_video
cli/processes cli/data_flag
cli/benchmark_input cli/benchmark_compile
cli/train cli/compare cli/curve cli/evaluate cli/predict cli/convert cli/export cli/benchmark cli/prepare cli/configs
cli/attention cli/data
cli/main
"""
RANK = {
    "cdetr_jax." + name.replace("/", "."): rank
    for rank, line in enumerate(ORDER.strip().splitlines())
    for name in line.split()
}
UNRANKED = {"__init__.py", "__main__.py"}  # they only re-export and start


def imports_of(source):
    """Names of this package's modules that a source imports, wherever the statement is."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "relative imports hide what is imported"
            # `from cdetr_jax.models import resnet` names a module, `from cdetr_jax.boxes import area` does not.
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= inside & RANK.keys() or {node.module}
    return {name for name in found if name.split(".")[0] == "cdetr_jax"}


def downward(name, source):
    """The imports that point at a file of the same rank or below."""
    return sorted(other for other in imports_of(source) if other in RANK and RANK[other] >= RANK[name])


def test_every_file_has_its_place():
    files = {path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py") if path.name not in UNRANKED}
    names = {"cdetr_jax." + ".".join(path.with_suffix("").parts) for path in files}
    assert names - RANK.keys() == set()


@pytest.mark.parametrize("name", list(RANK))
def test_no_file_imports_one_below_it(name):
    path = PACKAGE.parent / (name.replace(".", "/") + ".py")
    if not path.exists():
        pytest.skip("not there")
    source = path.read_text(encoding="utf-8")
    assert downward(name, source) == []
    assert imports_of(source) - RANK.keys() == set()  # nor a package, whose contents nobody sees


@pytest.mark.parametrize(
    "source",
    [
        "from cdetr_jax.training.loop import train_and_evaluate",
        "from cdetr_jax.training import loop",
        "import cdetr_jax.training.loop",
        "def late():\n    from cdetr_jax.training.loop import train_and_evaluate",
    ],
)
def test_the_walk_sees_a_wrong_import(source):
    assert downward("cdetr_jax.boxes", source) == ["cdetr_jax.training.loop"]
    assert downward("cdetr_jax.cli.train", source) == []


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("__init__.py")), ids=lambda path: path.parent.name)
def test_packages_import_nothing_at_once(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert [ast.unparse(node) for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)] in (
        [],
        ["from typing import Any"],
    )


def test_nothing_optional_is_imported_before_it_is_needed():
    modules = ("training.loop", "inference", *(f"cli.{path.stem}" for path in (PACKAGE / "cli").glob("[a-z]*.py")))
    code = "import sys\n" + "".join(f"import cdetr_jax.{module}\n" for module in modules)
    heavy = (
        "tensorflow",
        "torch",
        "tensorflow_datasets",
        "matplotlib",
        "torchvision",
        "pycocotools",
        "tensorboard",
        "huggingface_hub",
        "supervision",
        "jax.experimental.pallas.triton",
    )
    code += f"print([name for name in {heavy} if name in sys.modules], 'jax' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PACKAGE.parent)
    assert found.stdout.strip() == "[] True"
