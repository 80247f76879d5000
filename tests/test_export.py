"""Exported files: equal to our own function, whole or absent, and readable without this package."""

import argparse
import json
import pathlib
import re
import subprocess
import sys
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from cdetr_jax import export
from cdetr_jax.cli import export as command
from cdetr_jax.inference import Detector
from cdetr_jax.models.detector import model_of
from cdetr_jax.onnx_convert import to_onnx
from cdetr_jax.structs import Category
from cdetr_jax.weights.load import Preprocessing, Weights

README = pathlib.Path(__file__).parents[1] / "README.md"
SHAPE_HW = (64, 96)
QUERIES, TOP_K = 7, 11
# Logits 0 and 2 stand for nothing.
CLASSES = (None, Category(3, "kite"), None, Category(-17, "Bär"), Category(5, "newt"))
FIELDS = {
    "decoder": "conditional",
    "backbone": "resnet18",
    "backbone_width": 8,
    "width": 16,
    "num_heads": 2,
    "ffn_width": 24,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "num_queries": QUERIES,
    "num_classes": len(CLASSES),
    "compute_dtype": "float32",
}
DETR = {"decoder": "detr", "class_loss": "softmax", "box_offset": False, "backbone_norm": "group", "dc5": True}
VARIANTS = [
    {"compute_dtype": "bfloat16"},
    {"attention": "fused"},
    {"backbone": "resnet50", "reference_point": "learned"},
    {"class_loss": "softmax", "reference_point": "zero"},
    {"encoder_layers": 0},
    *({"spatial_query": form} for form in "ctpi"),
    *({"transformation": form} for form in ("identity", "scalar", "block", "full")),
]
TOLERANCE = 1e-4  # of scores and fractions of a picture; float32 in another order gives 1e-6


def random_weights(**fields):
    """Random numbers under which queries and pictures differ."""
    fields = FIELDS | fields
    model = model_of(fields)
    images, sizes_hw = jnp.zeros((1, *SHAPE_HW, 3), jnp.uint8), jnp.full((1, 2), 64)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), images, sizes_hw))
    rng = np.random.default_rng(0)

    def fill(path, spec):
        x = rng.normal(size=spec.shape).astype(np.float32)
        if path[-1].key == "kernel":
            return x / np.sqrt(np.float32(np.prod(spec.shape[:-1])))
        return x if path[-1].key == "query_embed" else 0.1 * x + (path[-1].key in ("scale", "var"))

    variables = jax.tree_util.tree_map_with_path(fill, shapes)
    return Weights("runs/tiny", fields, CLASSES, variables, Preprocessing(64, 96, (SHAPE_HW,)), TOP_K)


def candidates_of(weights, images, sizes_hw, **model_fields):
    """Our own jitted function's answers of all queries and classes."""
    model = weights.make_model().clone(**model_fields)
    detect = jax.jit(export.make_detect(model, weights.classes, 10_000))
    return jax.tree.map(np.asarray, detect(weights.variables, images, sizes_hw))


def part(found, rows):
    return {name: x[rows] for name, x in found.items()}


@pytest.fixture(scope="module")
def weights():
    return random_weights()


@pytest.fixture(scope="module")
def pictures():
    return command.made_up_pictures(3, SHAPE_HW)


@pytest.fixture(scope="module")
def candidates(weights, pictures):
    return candidates_of(weights, *pictures)


@pytest.fixture(scope="module")
def stablehlo(weights, tmp_path_factory):
    """A file for any batch."""
    path = tmp_path_factory.mktemp("export") / "detector.zip"
    export.export_stablehlo(weights, path, shape_hw=SHAPE_HW, batch=None, top_k=TOP_K)
    return path


@pytest.fixture(scope="module")
def loaded(stablehlo):
    return export.load_stablehlo(stablehlo)


# ------------------------------------------------------------------------------------------------- make_detect


@pytest.mark.parametrize("class_loss", ["focal", "softmax"])
def test_logits_that_stand_for_nothing_are_left_out(pictures, class_loss):
    weights = random_weights(class_loss=class_loss)
    model = weights.make_model()
    detect = export.make_detect(model, CLASSES, 10_000)
    predictions, found = jax.jit(lambda *x: (model.apply(*x), detect(*x)))(weights.variables, *pictures)
    found = part(found, 0)
    logits, boxes = (np.asarray(x)[-1, 0].astype(np.float64) for x in (predictions.logits, predictions.boxes_cxcywh))
    known = [1, 3, 4]
    if class_loss == "focal":
        scores = (1 / (1 + np.exp(-logits)))[:, known]
        order = np.argsort(-scores.ravel())
        expected = scores.ravel()[order]
        queries, labels = order // len(known), order % len(known)
    else:
        scores = (np.exp(logits) / np.exp(logits).sum(-1, keepdims=True))[:, known]  # out of all, "nothing" included
        queries = np.argsort(-scores.max(-1))
        expected, labels = scores.max(-1)[queries], scores.argmax(-1)[queries]
    np.testing.assert_allclose(found["scores"], expected, atol=1e-6)
    np.testing.assert_array_equal(found["category_ids"], np.array([3, -17, 5])[labels])
    centre, size = boxes[queries, :2], boxes[queries, 2:]
    corners = np.concatenate([centre - size / 2, centre + size / 2], -1)
    assert corners.max() > 1  # these are cut off
    np.testing.assert_allclose(found["boxes_xyxy"], corners.clip(0, 1), atol=1e-6)


def test_classes_that_cannot_be_exported(weights):
    model = weights.make_model()
    with pytest.raises(ValueError, match="none of the detector's logits stands for a class"):
        export.make_detect(model, (None,) * 5, TOP_K)
    with pytest.raises(ValueError, match=r"the category ids go up to 4294967296; an exported detector gives .* int32"):
        export.make_detect(model, (Category(2**32, "far"),) * 5, TOP_K)


# --------------------------------------------------------------------------------------------------- StableHLO


@pytest.mark.parametrize("batch", [1, 3])
def test_a_stablehlo_file_finds_the_same(loaded, pictures, candidates, batch):
    found = loaded(pictures[0][:batch], pictures[1][:batch])
    assert [found[name].shape for name in export.OUTPUTS] == [(batch, TOP_K, 4), (batch, TOP_K), (batch, TOP_K)]
    assert command.difference(found, part(candidates, slice(batch))) <= TOLERANCE


def test_what_lies_outside_of_a_picture_does_not_count(loaded, pictures):
    images, sizes_hw = pictures
    noisy = np.random.default_rng(0).integers(0, 256, images.shape, np.uint8)
    for image, original, (height, width) in zip(noisy, images, sizes_hw, strict=True):
        image[:height, :width] = original[:height, :width]
    assert (noisy != images).any()
    jax.tree.map(np.testing.assert_array_equal, loaded(noisy, sizes_hw), loaded(images, sizes_hw))


def test_a_static_batch(weights, pictures, candidates, tmp_path):
    export.export_stablehlo(weights, tmp_path / "two.zip", shape_hw=SHAPE_HW, batch=2, top_k=TOP_K)
    detect = export.load_stablehlo(tmp_path / "two.zip")
    found = detect(pictures[0][:2], pictures[1][:2])
    assert command.difference(found, part(candidates, slice(2))) <= TOLERANCE
    with pytest.raises(ValueError, match=r"batch|shape"):
        detect(*pictures)


def test_the_lines_in_the_readme_find_what_a_detector_does(weights, stablehlo):
    """For pictures of several forms, where neither this package nor flax can be imported."""
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    (snippet,) = [block for block in blocks if "detect.stablehlo" in block]
    rng = np.random.default_rng(0)
    sizes_hw = [(100, 100), (171, 301), (301, 171), (50, 3001), (7, 5), (1, 999), (1, 1)]
    exif = Image.Exif()
    exif[0x0112] = 6  # the right side of what is stored is the bottom
    for i, size in enumerate(sizes_hw):
        picture = Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8))
        picture.save(stablehlo.with_name(f"{i}.png"), exif=exif if i == 1 else None)
    program = f"""
import json, sys
blocked = ("cdetr_jax", "flax", "orbax", "optax", "jaxtyping")
sys.modules.update(dict.fromkeys(blocked))  # importing them is an error
outputs = []
for i in range({len(sizes_hw)}):
    exec(compile({snippet!r}.replace("street.jpg", f"{{i}}.png"), "README.md", "exec"))
    outputs.append([boxes.tolist(), found["scores"][0].tolist(), found["category_ids"][0].tolist()])
json.dump([names, signature, outputs], open("found.json", "w"))
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], cwd=stablehlo.parent, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    names, signature, outputs = json.loads(stablehlo.with_name("found.json").read_text())
    expected = Detector(weights)([stablehlo.with_name(f"{i}.png") for i in range(len(sizes_hw))], threshold=0)
    for i, ((boxes, scores, ids), objects) in enumerate(zip(outputs, expected, strict=True)):
        # Another program for another number of detections adds up in another order; a picture that were resized to one
        # pixel more or less would change scores by 1e-2.
        known = len(objects)
        np.testing.assert_allclose(scores[:known], objects.scores, atol=TOLERANCE, err_msg=str(sizes_hw[i]))
        sides = [*objects.image.shape[1::-1]] * 2
        gaps = np.abs((np.array(boxes)[:known, None] - objects.boxes_xyxy_px[None]) / sides).max(-1)
        same = np.array(ids)[:known, None] == objects.class_ids[None]
        assert np.where(same, gaps, np.inf).min(1).max() <= TOLERANCE
    assert names == {"3": "kite", "-17": "Bär", "5": "newt"}
    assert signature["inputs"]["images"]["shape"] == ["B", *SHAPE_HW, 3]
    assert signature["outputs"]["scores"]["shape"] == ["B", TOP_K]
    assert signature["preprocessing"]["short_side_px"] == 64
    assert signature["preprocessing"]["long_side_max_px"] == 96
    assert (signature["jax"], signature["platforms"]) == (jax.__version__, ["cpu", "cuda", "tpu"])


def test_no_folder_of_this_machine_is_in_the_file(stablehlo):
    with zipfile.ZipFile(stablehlo) as file:
        module = file.read(export.MODULE)
    assert b"detector.py" in module
    assert b"/detector.py" not in module


@pytest.mark.parametrize("damage", ["cut", "changed", "empty"])
def test_a_damaged_stablehlo_file(stablehlo, tmp_path, damage):
    whole = stablehlo.read_bytes()
    middle = len(whole) // 2
    changed = whole[:middle] + bytes([whole[middle] ^ 255]) + whole[middle + 1 :]
    path = tmp_path / "damaged.zip"
    path.write_bytes({"cut": whole[:middle], "changed": changed, "empty": b""}[damage])
    with pytest.raises(
        ValueError, match=r"damaged\.zip is not a whole detector \(.*write it again with `cdetr export`"
    ):
        export.load_stablehlo(path)


def test_a_write_that_fails_leaves_what_was_there(weights, tmp_path, monkeypatch):
    path = tmp_path / "detector.zip"
    path.write_bytes(b"before")
    write = zipfile.ZipFile.writestr

    def full_disk(self, name, data):
        if name == export.WEIGHTS:
            raise OSError(28, "No space left on device")
        write(self, name, data)

    monkeypatch.setattr(zipfile.ZipFile, "writestr", full_disk)
    with pytest.raises(OSError, match="No space left"):
        export.export_stablehlo(weights, path, shape_hw=SHAPE_HW, batch=1, top_k=TOP_K)
    assert [entry.name for entry in tmp_path.iterdir()] == ["detector.zip"]
    assert path.read_bytes() == b"before"


# -------------------------------------------------------------------------------------------------------- ONNX


def check_onnx(weights, pictures, path, batch, candidates=None):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    export.export_onnx(weights, path, shape_hw=SHAPE_HW, batch=batch, top_k=TOP_K)
    onnx.checker.check_model(path, full_check=True)
    detect = export.load_onnx(path)
    if candidates is None:
        candidates = candidates_of(weights, *pictures, dtype=jnp.float32)
    for size in {batch or 1, batch or 3}:
        found = detect(pictures[0][:size], pictures[1][:size])
        assert command.difference(found, part(candidates, slice(size))) <= TOLERANCE


def test_an_onnx_file_finds_the_same(weights, pictures, candidates, tmp_path):
    path = tmp_path / "detector.onnx"
    check_onnx(weights, pictures, path, None, candidates)
    import onnxruntime

    metadata = onnxruntime.InferenceSession(path).get_modelmeta().custom_metadata_map
    expected = [{"id": 3, "name": "kite"}, {"id": -17, "name": "Bär"}, {"id": 5, "name": "newt"}]
    assert json.loads(metadata["classes"]) == expected
    assert json.loads(metadata["signature"])["outputs"]["scores"]["shape"] == ["B", TOP_K]


def test_detr_with_group_norm_and_dc5_as_onnx(pictures, tmp_path):
    check_onnx(random_weights(**DETR), pictures, tmp_path / "detector.onnx", 3)


@pytest.mark.slow
@pytest.mark.parametrize("fields", VARIANTS, ids=str)
def test_every_form_of_the_model_as_onnx(pictures, tmp_path, fields):
    check_onnx(random_weights(**fields), pictures, tmp_path / "detector.onnx", None)


def test_a_damaged_onnx_file(tmp_path):
    pytest.importorskip("onnxruntime")
    (tmp_path / "damaged.onnx").write_bytes(b"onnx")
    with pytest.raises(ValueError, match=r"damaged\.onnx is not a whole detector \(.*write it again with"):
        export.load_onnx(tmp_path / "damaged.onnx")
    with pytest.raises(FileNotFoundError, match=r"there is no file .*absent\.onnx"):
        export.load_onnx(tmp_path / "absent.onnx")


def test_without_the_onnx_package(weights, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ModuleNotFoundError, match=r"needs the onnx package: pip install 'cdetr_jax\[onnx\]'"):
        export.export_onnx(weights, tmp_path / "detector.onnx", shape_hw=SHAPE_HW, batch=1, top_k=TOP_K)


def test_an_operation_without_a_conversion():
    pytest.importorskip("onnx")
    spec = jax.ShapeDtypeStruct((3, 5), np.float32)
    with pytest.raises(NotImplementedError, match="uses the operation 'sort', which has no conversion to ONNX"):
        to_onnx(lambda x: {"y": jnp.sort(x)}, {"x": spec})


# ------------------------------------------------------------------------------------------------- the command


def arguments(**changes):
    given = {"weights": "runs/tiny", "to": "stablehlo", "output": "x.zip", "batch": None, "size": None}
    return argparse.Namespace(**(given | {"top_k": None, "checkpoint": "best", "dc5": False} | changes))


def test_the_command_writes_checks_and_times(weights, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "load_weights", lambda *_: weights)
    output = str(tmp_path / "new" / "detector.zip")
    command.run(arguments(output=output))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{output}: StableHLO for CPU, CUDA and TPU, 1.0 MB")
    assert lines[1] == "input          any number of x 64x96, the best 11"
    assert [line.split("  ")[0] for line in lines[2:]] == ["load", "first call", "later calls", "difference"]
    assert float(lines[-1].split()[1]) <= TOLERANCE


def test_the_command_refuses_a_file_that_finds_something_else(weights, candidates, capsys):
    def wrong(images, _):
        found = part(candidates, slice(len(images)))
        return found | {"boxes_xyxy": found["boxes_xyxy"] + 0.01}

    settings = {"in_float32": False, "shape_hw": SHAPE_HW, "batch": 3, "top_k": TOP_K}
    with pytest.raises(ValueError, match=r"x\.zip finds something else than runs/tiny does: they differ by 1\.0e-02"):
        command.check(weights, "x.zip", lambda _: wrong, **settings)


def test_detections_that_score_the_same_may_change_places(candidates):
    def without(k):
        return {name: np.delete(x, k, axis=1) for name, x in candidates.items()}

    equal = candidates | {"scores": np.full_like(candidates["scores"], 0.5)}
    swapped = {name: x[:, ::-1] for name, x in equal.items()}
    assert command.difference(swapped, equal) == 0
    assert command.difference(without(0), candidates) > 1e-3  # the best one is missing
    nothing_found = {"category_ids": np.full_like(candidates["category_ids"], 99)}
    assert command.difference(candidates | nothing_found, candidates) == np.inf
