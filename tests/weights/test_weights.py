"""Weights from one format to the other bit for bit, what is refused and how, and what a new run starts from.

The models have one block a stage and a few channels, so that reading and writing them takes no time.
"""

import dataclasses
import functools
import json
import os
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
import safetensors
from flax import traverse_util
from PIL import Image
from safetensors.numpy import load_file, save_file

import cdetr_jax
from cdetr_jax.checkpoints.io import Checkpoints
from cdetr_jax.data.plan import evaluation_shapes
from cdetr_jax.data.sources import BadPictureError
from cdetr_jax.inference import Detector, Objects
from cdetr_jax.models import resnet
from cdetr_jax.models.detector import model_of, normalize, padding_mask, published_fields
from cdetr_jax.structs import Category
from cdetr_jax.weights import load, start, torch_files
from cdetr_jax.weights.architecture import HEADS
from cdetr_jax.weights.load import Backbone, Preprocessing, Weights, load_initial, load_weights
from cdetr_jax.weights.save import save_hub, save_pth, save_run
from cdetr_jax.weights.start import check_form, start_from
from cdetr_jax.weights.torch_convert import BACKBONE, OFFICIAL, to_torch

SMALL = {
    "backbone": "resnet18",
    "backbone_width": 8,
    "width": 16,
    "num_heads": 2,
    "ffn_width": 24,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "num_queries": 7,
}
DETR = {"decoder": "detr", **HEADS["detr"]}
# A hole, an id that is not the logit's index, one beyond ASCII, and the order is not that of the ids.
CLASSES = (Category(30, "disc"), None, Category(7, "Fußgänger"), Category(8, "ring"), None)


@pytest.fixture(scope="module", autouse=True)
def one_block_a_stage():
    """Small backbones."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("resnet18", "resnet50"):
            patch.setitem(resnet.STAGE_SIZES, name, (1, 1, 1, 1))
        yield


def number(path, shape, rng):
    """Numbers with which every part of the network changes what comes out."""
    name = path.rsplit("/", 1)[-1]
    if name == "kernel":
        sharp = 3 if re.search(r"/\w*[qk]\w*_proj/", path) else 1  # else all queries attend to everything
        return rng.normal(0, sharp * np.sqrt(2 / np.prod(shape[:-1])), shape)
    if name in ("var", "scale"):
        return rng.uniform(0.6, 1.4, shape)
    return rng.normal(0, 1.0 if name == "query_embed" else 0.3, shape)


@functools.cache
def template_of(fields):
    flat = traverse_util.flatten_dict(load._template(dict(fields)), sep="/")
    return {path: flat[path].shape for path in sorted(flat)}


def made_up(classes=CLASSES, sides_px=(64, 96), seed=0, **changes):
    fields = published_fields() | SMALL | {"num_classes": len(classes)} | changes
    rng = np.random.default_rng(seed)
    shapes = template_of(tuple(sorted(fields.items())))
    flat = {path: number(path, shape, rng).astype(np.float32) for path, shape in shapes.items()}
    flat["params/query_embed"][0, :3] = [-0.0, 1e-42, np.finfo(np.float32).max]  # bits that arithmetic would not keep
    preprocessing = Preprocessing(*sides_px, evaluation_shapes(*sides_px))
    return Weights("made up", fields, classes, traverse_util.unflatten_dict(flat, sep="/"), preprocessing)


def bits(variables):
    return {
        name: (leaf.shape, str(leaf.dtype), leaf.tobytes())
        for name, leaf in traverse_util.flatten_dict(variables, sep="/").items()
    }


def check_same(found, expected):
    assert found.model == expected.model
    assert found.classes == expected.classes
    assert found.preprocessing == expected.preprocessing
    assert found.top_k == expected.top_k
    found, expected = bits(found.variables), bits(expected.variables)
    assert found.keys() == expected.keys()
    assert [name for name in found if found[name] != expected[name]] == []


def change_json(path, **fields):
    content = json.loads(path.read_text(encoding="utf-8")) | fields
    path.write_text(json.dumps({name: value for name, value in content.items() if value is not ...}), encoding="utf-8")


def change_tensors(path, **tensors):
    """Tensors changed, added, or with None taken away; a double underscore stands for the dot."""
    content = load_file(path) | {name.replace("__", "."): array for name, array in tensors.items()}
    save_file({name: array for name, array in content.items() if array is not None}, path, metadata={"format": "pt"})


@pytest.fixture
def folder(tmp_path):
    """A folder in the hub's layout with the weights of `made_up()`."""
    save_hub(made_up(), tmp_path / "folder", without_timm=True)
    return tmp_path / "folder"


# ------------------------------------------------------------------------------------------------- there and back


@pytest.mark.parametrize(
    "changes",
    [{}, DETR, {"norm_between_layers": True}, {"backbone": "resnet50", "dropout": 0.0}],
    ids=str,
)
def test_to_the_hub_without_timm_and_back(changes, tmp_path):
    made = made_up(**changes)
    save_hub(made, tmp_path, without_timm=True)
    check_same(load_weights(tmp_path), made)
    check_same(load_weights(tmp_path / "model.safetensors"), made)
    with safetensors.safe_open(tmp_path / "model.safetensors", framework="numpy") as file:
        assert "model.backbone.conv_encoder.model.encoder.stages.3.layers.0.layer.1.convolution.weight" in file.keys()  # noqa: SIM118


@pytest.mark.parametrize("changes", [{}, {"dc5": True, **DETR}], ids=str)
def test_to_the_hub_and_back(changes, tmp_path):
    made = made_up(backbone_width=64, **changes)
    save_hub(made, tmp_path)
    check_same(load_weights(str(tmp_path)), made)
    assert "model.backbone.conv_encoder.model.layer4.0.conv2.weight" in load_file(tmp_path / "model.safetensors")


def test_from_the_hub_to_a_workdir_and_back_to_the_same_files(tmp_path):
    save_hub(made_up(backbone_width=64, norm_between_layers=True), tmp_path / "hub")
    save_run(load_weights(tmp_path / "hub"), tmp_path / "run")
    save_hub(load_weights(tmp_path / "run"), tmp_path / "again")
    for name in ("config.json", "preprocessor_config.json"):
        assert (tmp_path / "hub" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    first, again = (load_file(tmp_path / name / "model.safetensors") for name in ("hub", "again"))
    assert first.keys() == again.keys()
    assert [name for name in first if first[name].tobytes() != again[name].tobytes()] == []
    assert [name for name in first if first[name].shape != again[name].shape] == []


VARIANTS = [
    {},
    DETR,
    {"backbone_norm": "group", "frozen_stages": 0, "temperature": 20.0, "local_gain": 6.0},
    {"spatial_query": "p", "reference_point": "learned"},
    {"transformation": "block", "dc5": True, "compute_dtype": "bfloat16"},
    {**DETR, "box_offset": True},
]


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_to_a_workdir_and_back(changes, tmp_path):
    """Every form, also those that the hub's layout has not."""
    made = dataclasses.replace(made_up(**changes), top_k=11)
    save_run(made, tmp_path / "run")
    found = load_weights(tmp_path / "run")
    check_same(found, made)
    assert found.config is None  # it does not say on what it was trained


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_to_a_pth_and_back(changes, tmp_path):
    pytest.importorskip("torch")
    made = made_up(**changes)
    save_pth(made, tmp_path / "new" / "w.pth")
    check_same(load_weights(tmp_path / "new" / "w.pth"), made)


@pytest.mark.parametrize("changes", [{}, DETR], ids=str)
def test_from_a_pth_to_the_hub_and_back_to_the_same_tensors(changes, tmp_path):
    torch = pytest.importorskip("torch")
    save_pth(made_up(**changes), tmp_path / "w.pth")
    save_hub(load_weights(tmp_path / "w.pth"), tmp_path / "hub", without_timm=True)
    save_pth(load_weights(tmp_path / "hub"), tmp_path / "again.pth")
    first, again = (torch.load(tmp_path / name, weights_only=True) for name in ("w.pth", "again.pth"))
    assert first["cdetr_jax"] == again["cdetr_jax"]
    assert first["model"].keys() == again["model"].keys()
    assert [name for name, tensor in first["model"].items() if not torch.equal(tensor, again["model"][name])] == []


def test_a_pth_of_the_authors_is_read_by_its_arguments(tmp_path):
    torch = pytest.importorskip("torch")
    made = made_up(dc5=True)
    model = {name: torch.from_numpy(array) for name, array in to_torch(made.variables, OFFICIAL).items()}
    args = {"hidden_dim": 16, "nheads": 2, "dim_feedforward": 24, "enc_layers": 1, "dec_layers": 2, "num_queries": 7}
    torch.save({"model": model, "args": args | {"dilation": True, "backbone": "resnet18"}}, tmp_path / "w.pth")
    found = load_weights(tmp_path / "w.pth")
    assert found.model == made.model
    assert bits(found.variables) == bits(made.variables)
    assert found.classes == tuple(Category(i, f"class {i}") for i in range(5))
    assert found.preprocessing == Preprocessing(800, 1333, evaluation_shapes(800, 1333))


@pytest.mark.parametrize(("name", "dc5"), [("w.safetensors", False), ("w_dc5.safetensors", True)])
def test_a_bare_file_is_dc5_by_its_name_or_as_asked_for(name, dc5, tmp_path):
    path = tmp_path / "folder" / name  # its name counts too
    path.parent.mkdir()
    save_file(to_torch(made_up(num_heads=8).variables, OFFICIAL), path)
    assert load_weights(path).model["dc5"] is dc5
    assert load_weights(path, dc5=True).model == made_up(num_heads=8, dc5=True).model


def test_half_precision_weights_become_float32(folder):
    content = load_file(folder / "model.safetensors")
    content["model.query_position_embeddings.weight"][0, :3] = 1  # what is there fits into no float16
    save_file({name: array.astype(np.float16) for name, array in content.items()}, folder / "model.safetensors")
    found = load_weights(folder).variables["params"]["bbox_embed"]["layers_0"]["kernel"]
    expected = made_up().variables["params"]["bbox_embed"]["layers_0"]["kernel"]
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, expected.astype(np.float16).astype(np.float32))


# ----------------------------------------------------------------------------------------------------- of a workdir


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A workdir with the checkpoints 3, which has the best AP, and 5."""
    workdir = tmp_path_factory.mktemp("run")
    save_run(made_up(seed=0), workdir)
    shutil.rmtree(workdir / "checkpoints")
    checkpoints = Checkpoints(workdir, keep=2)
    for step, precision in ((3, 0.5), (5, 0.2)):
        checkpoints.save(step, made_up(seed=step).variables, {"epoch": 0, "batch": 0})
        checkpoints.set_score(step, precision)
    checkpoints.close()
    return workdir


@pytest.mark.parametrize(
    ("place", "checkpoint", "seed"),
    [
        ("", "best", 3),
        ("./", "latest", 5),
        ("checkpoints", "best", 3),
        ("checkpoints/3", "latest", 3),
        ("checkpoints/5", "best", 5),
        ("checkpoints/5/", "best", 5),
    ],
)
def test_a_checkpoint_of_a_workdir(place, checkpoint, seed, run):
    check_same(load_weights(f"{run}/{place}", checkpoint), made_up(seed=seed))


def test_a_checkpoint_that_there_is_not(run):
    with pytest.raises(FileNotFoundError, match=r"checkpoints has no checkpoint 4, only \[3, 5\]"):
        load_weights(run / "checkpoints" / "4")


def test_a_workdir_without_checkpoints(run, tmp_path):
    shutil.copytree(run, tmp_path / "w", ignore=shutil.ignore_patterns("3", "5"))
    with pytest.raises(FileNotFoundError, match="w/checkpoints holds no finished checkpoint"):
        load_weights(tmp_path / "w")
    shutil.rmtree(tmp_path / "w" / "checkpoints")
    with pytest.raises(FileNotFoundError, match="w holds no checkpoints; `cdetr train --workdir="):
        load_weights(tmp_path / "w")


@pytest.mark.parametrize("name", ["config.json", "classes.json"])
def test_a_workdir_that_is_not_whole(name, run, tmp_path):
    shutil.copytree(run, tmp_path / "w")
    (tmp_path / "w" / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"{name} is missing: .* is not the workdir of a run"):
        load_weights(tmp_path / "w")


@pytest.mark.parametrize("name", ["config.json", "classes.json"])
def test_a_damaged_file_of_a_workdir_is_named(name, run, tmp_path):
    shutil.copytree(run, tmp_path / "w")
    (tmp_path / "w" / name).write_text('{"model": ')
    with pytest.raises(ValueError, match=f"w/{name}"):
        load_weights(tmp_path / "w")


def test_a_workdir_whose_config_is_of_another_model(run, tmp_path):
    shutil.copytree(run, tmp_path / "w")
    config = json.loads((tmp_path / "w" / "config.json").read_text())
    change_json(tmp_path / "w" / "config.json", model=config["model"] | {"num_queries": 11, "decoder_layers": 1})
    with pytest.raises(
        ValueError, match=r"checkpoint 3 of .*/w does not fit its own config\.json: missing none"
    ) as error:
        load_weights(tmp_path / "w")
    assert "unused params/transformer/decoder_layers_1/" in str(error.value)
    assert "mis-shaped params/query_embed (7, 16), expected (11, 16)" in str(error.value)


def test_a_run_from_before_a_field_was_there_goes_into_every_format(run, tmp_path):
    """Of a workdir that an earlier version trained: the field has the value that the code had then."""
    shutil.copytree(run, tmp_path / "w")
    model = json.loads((tmp_path / "w" / "config.json").read_text())["model"]
    del model["norm_between_layers"]
    change_json(tmp_path / "w" / "config.json", model=model)
    found = load_weights(tmp_path / "w")
    save_hub(found, tmp_path / "hub", without_timm=True)
    check_same(load_weights(tmp_path / "hub"), made_up(seed=3))


def test_a_run_is_not_written_over(tmp_path):
    save_run(made_up(), tmp_path / "w")
    with pytest.raises(FileExistsError, match=r"/w holds a run already; name another folder"):
        save_run(made_up(seed=1), tmp_path / "w")
    check_same(load_weights(tmp_path / "w"), made_up())


def test_a_whole_run_keeps_its_config(run, tmp_path):
    shutil.copytree(run, tmp_path / "w")
    change_json(tmp_path / "w" / "config.json", train={"batch_size": 4})
    config = load_weights(tmp_path / "w").config
    assert isinstance(config, ml_collections.ConfigDict)
    assert config.train.batch_size == 4
    assert config.data.synthetic.hue_by_class is True, "a field that came later has its published value"
    assert config.is_locked


# ---------------------------------------------------------------------------------------------- what is refused


HUB_CONV = "model__backbone__conv_encoder__model__embedder__embedder__convolution__weight"


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (
            {"bbox_predictor__layers__1__bias": None},
            r"missing bbox_predictor\.layers\.1\.bias; unused none; mis-shaped none",
        ),
        ({"model__mask_head__weight": np.ones(2)}, r"missing none; unused model\.mask_head\.weight; mis-shaped none"),
        (
            {"bbox_predictor__layers__2__bias": np.ones(5, np.float32)},
            r"missing none; unused none; mis-shaped bbox_predictor\.layers\.2\.bias \(5,\), expected \(4,\)",
        ),
        ({"class_labels_classifier__bias": None}, r"missing class_labels_classifier\.bias"),
        ({HUB_CONV: None}, r"missing model\.backbone\.conv_encoder\.model\.embedder\.embedder\.convolution\.weight"),
    ],
)
def test_what_does_not_fit_is_named_with_the_file(tensors, message, folder):
    change_tensors(folder / "model.safetensors", **tensors)
    with pytest.raises(ValueError, match=message) as error:
        load_weights(folder)
    assert str(error.value).startswith(f"{folder}: the weights do not fit the model: ")


def test_a_missing_layer_is_named(folder):
    """It is the config that says how many there are."""
    content = load_file(folder / "model.safetensors")
    layer = {name: None for name in content if name.startswith("model.decoder.layers.1.")}
    assert len(layer) > 12
    change_tensors(folder / "model.safetensors", **layer)
    with pytest.raises(
        ValueError, match=rf"missing model\.decoder\.layers\.1\..* and {len(layer) - 12} more; unused none"
    ):
        load_weights(folder)


def test_a_layer_that_the_config_does_not_know_is_named(folder):
    change_json(folder / "config.json", decoder_layers=1)
    with pytest.raises(ValueError, match=r"missing none; unused model\.decoder\.layers\.1\..* more; mis-shaped none"):
        load_weights(folder)


def test_heads_that_do_not_divide_the_width_are_refused(folder):
    change_json(folder / "config.json", encoder_attention_heads=3, decoder_attention_heads=3)
    with pytest.raises(ValueError, match="3") as error:
        load_weights(folder)
    assert str(error.value).startswith(f"{folder}")
    assert "heads" in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "yolos"}, "its config.json says model_type 'yolos', expected conditional_detr or detr"),
        ({"model_type": "detr"}, "model_type is 'detr', expected 'conditional_detr', of which the weights are"),
        ({"id2label": {"0": "one"}}, "id2label names 1 classes, but the class head has 5"),
        ({"category_ids": [1, 2]}, "category_ids"),
    ],
    ids=str,
)
def test_a_config_that_does_not_fit_is_refused(changes, message, folder):
    change_json(folder / "config.json", **changes)
    with pytest.raises(ValueError, match=message) as error:
        load_weights(folder)
    assert str(error.value).startswith(str(folder))


def test_a_preprocessor_that_does_not_fit_is_refused(folder):
    change_json(folder / "preprocessor_config.json", image_mean=[0.5, 0.5, 0.5])
    with pytest.raises(ValueError, match=r"folder/preprocessor_config\.json: image_mean is \[0\.5, 0\.5, 0\.5\]"):
        load_weights(folder)


def test_the_weights_of_something_else(tmp_path):
    save_file({"vit.encoder.layer.0.weight": np.ones(2), "cls": np.ones(2)}, tmp_path / "w.safetensors")
    with pytest.raises(
        ValueError, match=r"w\.safetensors: these are the weights of no Conditional DETR, DETR or ResNet"
    ) as error:
        load_weights(tmp_path / "w.safetensors")
    assert str(error.value).endswith("the first names are cls, vit.encoder.layer.0.weight")


def test_a_file_without_tensors(tmp_path):
    save_file({}, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match="the first names are none at all"):
        load_weights(tmp_path / "w.safetensors")


# ----------------------------------------------------------------------------------------------- a backbone alone


def backbone_file(path, **changes):
    """A ResNet as torchvision saves it, classifier and counters included. Returns: its weights in our tree."""
    made = made_up(seed=9, **changes)
    only = {name: {"backbone": tree["backbone"]} for name, tree in made.variables.items()}
    extra = {
        "fc.weight": np.ones((1000, 64), np.float32),
        "fc.bias": np.ones(1000, np.float32),
        "bn1.num_batches_tracked": np.array(0),
    }
    save_file(to_torch(only, BACKBONE) | extra, path)
    return only


def test_a_backbone_finds_no_objects(tmp_path):
    path = tmp_path / "resnet18.safetensors"
    backbone_file(path)
    with pytest.raises(ValueError, match=r"is a backbone alone, which finds no objects") as error:
        load_weights(path)
    assert str(error.value).endswith(f"a training run can start from it: --config.init={path}")


@pytest.mark.parametrize(
    "beside", [None, {"architecture": "resnet18", "num_classes": 1000}, {"model_type": "timm_backbone"}]
)
def test_a_run_starts_from_a_backbone(beside, tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    loaded = backbone_file(path)
    if beside:
        (tmp_path / "config.json").write_text(json.dumps(beside))
    lines = logged(monkeypatch)
    new = made_up(seed=1).variables
    initial = load_initial(str(tmp_path))
    assert isinstance(initial, Backbone)
    found = bits(start_from(initial, new, CLASSES, tmp_path / "run" / "init.json"))
    expected = bits(new) | bits(loaded)
    assert found == expected
    assert bits(new) != expected
    report = json.loads((tmp_path / "run" / "init.json").read_text())
    assert report == {
        "source": str(tmp_path),
        "loaded": sorted(bits(loaded)),
        "made_new": sorted(bits(new).keys() - bits(loaded).keys()),
        "left_over": ["bn1.num_batches_tracked", "fc.bias", "fc.weight"],
    }
    arrays = len(report["made_new"]) - 1 - 2 - 2  # those of transformer and bbox_embed
    boxes = sum(name.startswith("params/bbox_embed") for name in report["made_new"])
    assert [line.removeprefix(f"config.init={tmp_path}, ") for line in lines] == [
        f"loaded: backbone ({len(report['loaded'])} arrays)",
        f"made new: bbox_embed ({boxes} arrays), transformer ({arrays - boxes} arrays), params/class_embed/bias, "
        "params/class_embed/kernel, params/input_proj/bias, params/input_proj/kernel, params/query_embed",
        "left over: bn1.num_batches_tracked, fc.bias, fc.weight",
    ]


def test_a_pth_of_torchvision_is_a_backbone(tmp_path):
    torch = pytest.importorskip("torch")
    loaded = backbone_file(tmp_path / "w.safetensors")
    content = load_file(tmp_path / "w.safetensors")
    torch.save({name: torch.from_numpy(array) for name, array in content.items()}, tmp_path / "resnet18-f37072fd.pth")
    found = start_from(load_initial(str(tmp_path / "resnet18-f37072fd.pth")), made_up(seed=1).variables, CLASSES)
    assert bits(found) == bits(made_up(seed=1).variables) | bits(loaded)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"backbone": "resnet50"},
            r"missing layer1\.0\.bn3\.bias.* more; unused none; mis-shaped .*\.1\.bias \(16,\), expected \(64,\)",
        ),
        (
            {"backbone_width": 12},
            r"missing none; unused none; mis-shaped bn1\.bias \(8,\), expected \(12,\), .* and \d+ more",
        ),
        ({"backbone_norm": "group"}, r"missing bn1\.group_norm\.bias.*unused bn1\.bias"),
    ],
    ids=str,
)
def test_a_backbone_that_does_not_fit(changes, message, tmp_path):
    path = tmp_path / "resnet18.safetensors"
    backbone_file(path)
    with pytest.raises(ValueError, match=message) as error:
        start_from(load_initial(str(path)), made_up(**changes).variables, CLASSES, tmp_path / "init.json")
    assert str(error.value).startswith(f"config.init={path}: the weights do not fit the model: ")
    assert not (tmp_path / "init.json").exists()


def test_a_backbone_that_cannot_be_downloaded(monkeypatch):
    def no_network(name):
        raise OSError(f"{name} is not in the cache and could not be downloaded")

    monkeypatch.setattr(torch_files, "download", no_network)
    with pytest.raises(OSError, match="could not be downloaded") as error:
        load_initial("hf://timm/resnet50.tv_in1k")
    assert str(error.value) == (
        "config.init: hf://timm/resnet50.tv_in1k is not in the cache and could not be downloaded; or train from random "
        "weights: --config.init= --config.model.backbone_norm=group --config.model.frozen_stages=0"
    )


def test_a_file_that_is_not_there_is_no_matter_of_the_network():
    with pytest.raises(FileNotFoundError, match=r"^there is no file or folder none\.pth; a hub name is written hf://"):
        load_initial("none.pth")


# ------------------------------------------------------------------------------------------ from another detector


def logged(monkeypatch):
    lines = []
    monkeypatch.setattr(start.logging, "info", lambda text, *values: lines.append(text % values))
    return lines


def named(*names):
    return tuple(name and Category(100 + i, name) for i, name in enumerate(names))


HEAD = ["params/class_embed/bias", "params/class_embed/kernel"]
SHAPES = ("disc", "ring", "cross")


@pytest.mark.parametrize(
    ("before", "now", "is_new"),
    [
        (SHAPES, SHAPES, False),
        (SHAPES, ("disc", "ring", "kite"), True),
        (SHAPES, ("ring", "disc", "cross"), True),  # the logits would change places
        (SHAPES, (*SHAPES, "kite"), True),
        (SHAPES, SHAPES[:2], True),
        (("class 100", "class 101", "class 102"), SHAPES, False),  # nobody says that they are others
        (SHAPES, ("class 100", "class 101", "class 102"), False),
        (("class 100", "class 101"), SHAPES, True),  # their number does
        ((None, "ring", "cross"), ("disc", "ring", None), False),
        ((None, "ring", "cross"), ("disc", "ring", "kite"), True),
    ],
    ids=str,
)
def test_the_class_head_is_kept_where_the_classes_are_the_same(before, now, is_new, tmp_path, monkeypatch):
    lines = logged(monkeypatch)
    old, new = made_up(classes=named(*before)), made_up(classes=named(*now), seed=1)
    found = start_from(old, new.variables, new.classes, tmp_path / "init.json")
    expected = bits(old.variables) | {name: bits(new.variables)[name] for name in HEAD if is_new}
    assert bits(found) == expected
    assert json.loads((tmp_path / "init.json").read_text()) == {
        "source": "made up",
        "loaded": sorted(bits(old.variables).keys() - (set(HEAD) if is_new else set())),
        "made_new": HEAD if is_new else [],
        "left_over": HEAD if is_new else [],
    }
    head = ", ".join(HEAD) if is_new else "nothing"
    assert lines[0].startswith("config.init=made up, loaded: ")
    assert lines[1:] == [f"config.init=made up, made new: {head}", f"config.init=made up, left over: {head}"]


def test_without_a_report_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    start_from(made_up(), made_up(seed=1).variables, CLASSES)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"num_queries": 11},
            r"missing none; unused none; mis-shaped params/query_embed \(7, 16\), expected \(11, 16\)",
        ),
        ({"decoder_layers": 1}, r"missing none; unused params/transformer/decoder_layers_1/.* more; mis-shaped none"),
        ({"decoder_layers": 3}, r"missing params/transformer/decoder_layers_2/.* more; unused none; mis-shaped none"),
        (
            {"backbone_norm": "group"},
            r"missing params/backbone/bn1/group_norm/bias.*unused constants/backbone/bn1/bias",
        ),
        ({"reference_point": "zero"}, r"missing none; unused params/transformer/ref_point_head/"),
    ],
    ids=str,
)
def test_another_model_is_refused(changes, message, tmp_path):
    new = made_up(**changes)
    with pytest.raises(ValueError, match=message) as error:
        start_from(made_up(), new.variables, CLASSES, tmp_path / "init.json")
    assert str(error.value).startswith("config.init=made up does not fit config.model: ")
    own = str(error.value).split("its own model is ")[1]
    assert "num_queries=7, " in own
    assert "decoder=conditional, backbone=resnet18" in own
    assert "dropout" not in own
    assert not (tmp_path / "init.json").exists()


def test_of_another_loss_the_class_head_is_made_new():
    """As many logits, but the last of softmax stands for no object, and that of the focal loss for a class."""
    old = made_up(classes=named("disc", "ring"), **DETR)
    new = made_up(classes=named("disc", "ring", "kite"), seed=1, **DETR | {"class_loss": "focal"})
    found = bits(start_from(old, new.variables, new.classes))
    assert {name: found[name] for name in HEAD} == {name: bits(new.variables)[name] for name in HEAD}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 4}, "config.model.num_heads is 4, expected 2"),
        ({"norm_between_layers": True}, "config.model.norm_between_layers is True, expected False"),
        ({"class_loss": "softmax"}, "config.model.class_loss is 'softmax', expected 'focal'"),
        (
            {"temperature": 20.0, "spatial_query": "p"},
            "config.model.spatial_query is 'p', expected 'full'; config.model.temperature is 20.0, expected 10000.0",
        ),
    ],
    ids=str,
)
def test_a_model_that_computes_something_else_is_refused(changes, message):
    made = made_up()
    with pytest.raises(ValueError, match="is of another model") as error:
        check_form(made, made.model | changes)
    assert str(error.value) == f"config.init=made up is of another model: {message}"


def test_what_a_new_run_may_change():
    made = made_up()
    changes = {"dropout": 0.0, "frozen_stages": 5, "compute_dtype": "bfloat16", "num_classes": 9, "dc5": True}
    check_form(made, made.model | changes | {"local_gain": 6.0})


@pytest.mark.parametrize("kind", ["hub", "run", "checkpoint"])
def test_a_run_starts_from_every_format(kind, tmp_path):
    made = made_up()
    save_hub(made, tmp_path / "hub", without_timm=True)
    save_run(made, tmp_path / "run")
    source = {"hub": "hub", "run": "run", "checkpoint": "run/checkpoints/0"}[kind]
    found = start_from(load_initial(f"{tmp_path}/{source}"), made_up(seed=1).variables, CLASSES)
    assert bits(found) == bits(made.variables)


# ------------------------------------------------------------------------------------------------------ a detector


def picture(seed=0, height=50, width=70):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def tame(made):
    """Without the numbers that no network computes with."""
    made.variables["params"]["query_embed"][0, :3] = 1.0
    return made


def test_a_list_runs_in_batches_and_finds_what_each_picture_alone_does():
    detector = Detector(tame(made_up()))
    batches, detect = [], detector._detect
    detector._detect = lambda *arguments: batches.append(arguments[1].shape) or detect(*arguments)
    upright, wide = picture(), np.ascontiguousarray(picture().swapaxes(0, 1))
    pictures = [upright, wide, upright[::-1], upright[:, ::-1], wide[::-1]]
    together = detector(pictures, threshold=0.0, batch_size=2)
    assert sorted(shape[0] for shape in batches) == [1, 2, 2]
    for found, one in zip(together, pictures, strict=True):
        alone = detector(one, threshold=0.0)
        np.testing.assert_array_equal(found.image, one)
        # Another batch size may add up in another order, which moves logits of size 5 by some 1e-5 (2e-6 of them).
        np.testing.assert_allclose(found.scores, alone.scores, rtol=1e-4)
        np.testing.assert_allclose(found.boxes_xyxy_px, alone.boxes_xyxy_px, rtol=1e-4, atol=1e-3)
    with pytest.raises(ValueError, match="batch_size is 0, expected a whole number, at least 1"):
        detector(pictures, batch_size=0)
    assert detector([]) == []


@pytest.fixture(scope="module")
def detector():
    return Detector(tame(made_up()))


def test_what_means_one_picture_is_taken(detector, tmp_path):
    expected = detector(picture(), threshold=0.0)
    assert same_objects(detector(jnp.array(picture()), 0.0), expected)
    assert same_objects(detector(Image.fromarray(picture()), 0.0), expected)
    (found,) = detector((one for one in [picture()]), 0.0)
    assert same_objects(found, expected)
    exif = Image.Exif()
    exif[0x0112] = 6  # the right side of what is stored is the bottom
    path = tmp_path / "turned.png"
    Image.fromarray(picture()).save(path, exif=exif)
    with Image.open(path) as image:
        from_memory = detector(image, 0.0)
    assert from_memory.image.shape == (70, 50, 3)
    for source in (path, str(path)):
        assert same_objects(detector(source, 0.0), from_memory)


@pytest.mark.parametrize("size_hw", [(1, 1), (10, 4000), (4000, 10), (60, 2000), (100, 300), (1, 5000)])
def test_a_picture_of_any_size(detector, size_hw):
    found = detector(picture(0, *size_hw), threshold=0.0)
    assert len(found) == 21
    assert (found.boxes_xyxy_px >= 0).all()
    assert (found.boxes_xyxy_px <= [*size_hw[::-1], *size_hw[::-1]]).all()
    assert found.draw().width >= size_hw[1]


def test_warmed_up_it_compiles_nothing_for_twenty_sizes(detector):
    """Neither the network for another shape, nor anything else for a size."""
    detector.warm_up(batch_size=2)
    pictures = [picture(0, 20 + 7 * i, 150 - 5 * i) for i in range(20)]
    events = []
    jax.monitoring.register_event_duration_secs_listener(lambda name, _, **__: events.append(name))
    try:
        detector([*pictures, pictures[0]], threshold=0.0, batch_size=2)
        for one in pictures:
            detector(one, threshold=0.0)
    finally:
        jax.monitoring.clear_event_listeners()
    assert not [name for name in events if "compile" in name or "trace" in name]


@pytest.mark.parametrize(
    ("given", "kind", "message"),
    [
        (None, TypeError, "the picture is of type NoneType, expected a path, a PIL image or a uint8 array"),
        (b"abc", TypeError, "the picture is of type bytes, expected"),
        ([[[1, 2, 3]]], TypeError, "picture 0 is of type list, expected"),
        ([picture(), 3], TypeError, "picture 1 is of type int, expected"),
        (picture()[:0], ValueError, r"the picture is uint8 \[0, 70, 3\], expected"),
        (picture()[..., 0], ValueError, r"the picture is uint8 \[50, 70\], expected"),
        (picture().astype(object), ValueError, r"the picture is object \[50, 70, 3\], expected"),
        (picture() / 255, ValueError, r"the picture is float64 \[50, 70, 3\], expected .* red, green, blue"),
        (Image.new("F", (3, 2)), BadPictureError, "the picture: cannot read this picture .*floating-point"),
        (".", BadPictureError, r"\.: cannot read this picture .*directory"),
        ("none.png", BadPictureError, "none.png: cannot read this picture .no such file"),
        (__file__, BadPictureError, "test_weights.py: cannot read this picture"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_no_picture(given, kind, message, detector):
    with pytest.raises(kind, match=message):
        detector(given)


@pytest.mark.parametrize("threshold", [50, -0.1, float("nan"), "0.5", None])
def test_a_threshold_is_a_score(threshold, detector):
    with pytest.raises(ValueError, match=f"threshold is {threshold!r}, expected a score from 0 to 1"):
        detector(picture(), threshold=threshold)


def test_a_checkpoint_is_best_or_latest(tmp_path):
    with pytest.raises(ValueError, match="checkpoint is 'newest', expected 'best' or 'latest'"):
        Detector.from_pretrained(tmp_path, checkpoint="newest")


def test_boxes_end_at_the_sides(detector):
    found = detector(picture(), threshold=0.0).boxes_xyxy_px
    assert found.min() == 0


def same_objects(found, expected):
    for field in dataclasses.fields(Objects):
        np.testing.assert_array_equal(getattr(found, field.name), getattr(expected, field.name))
    return len(found) > 0


def test_a_detector_finds_the_same_from_every_format(tmp_path, monkeypatch):
    made = tame(made_up())
    save_hub(made, tmp_path / "hub", without_timm=True)
    save_run(made, tmp_path / "run")
    expected = Detector(load_weights(tmp_path / "hub"))(picture(), threshold=0.0)
    assert set(expected.class_ids.tolist()) == {30, 7, 8}
    assert len(expected) == 7 * 3  # every pair of query and class that stands for something
    assert len(set(expected.scores.tolist())) > 10
    asked = []

    def download(name):
        asked.append(name)
        return tmp_path / "hub"

    monkeypatch.setattr(torch_files, "download", download)
    monkeypatch.chdir(tmp_path)
    for source in ("hub", tmp_path / "run", "owner/model"):
        assert same_objects(cdetr_jax.Detector.from_pretrained(source)(picture(), threshold=0.0), expected)
    for source in ("hf://owner/model", "owner/m.2@v1.0"):
        assert Detector.from_pretrained(source).classes == CLASSES
    assert asked == ["hf://owner/model", "hf://owner/model", "hf://owner/m.2@v1.0"]


def test_a_local_folder_is_not_looked_for_in_the_hub(tmp_path, monkeypatch):
    save_hub(tame(made_up()), tmp_path / "owner" / "model", without_timm=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch_files, "download", lambda name: pytest.fail(f"{name} was looked for"))
    assert Detector.from_pretrained("owner/model").classes == CLASSES


def test_what_is_neither_here_nor_in_the_hub(tmp_path, monkeypatch):
    def download(name):
        raise OSError(f"{name} could not be downloaded")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch_files, "download", download)
    message = "there is no file or folder runs/nope here, and as a model of the hub: hf://runs/nope could not be down"
    with pytest.raises(OSError, match=message):
        Detector.from_pretrained("runs/nope")


def test_a_run_loads_without_warnings(tmp_path, caplog):
    save_run(made_up(), tmp_path)
    caplog.clear()  # saving warns
    with caplog.at_level("WARNING", logger="absl"):
        load_weights(tmp_path)
    assert caplog.messages == []


def test_the_lines_in_the_readme(folder, tmp_path, monkeypatch, capsys):
    save_hub(tame(made_up()), folder, without_timm=True)
    readme = Path(cdetr_jax.__file__).parents[1] / "README.md"
    blocks = re.findall(r"```python\n(.*?)```", readme.read_text(encoding="utf-8"), re.DOTALL)
    (snippet,) = [block for block in blocks if "from cdetr_jax import Detector" in block]
    monkeypatch.setattr(torch_files, "download", lambda name: folder)
    monkeypatch.setitem(sys.modules, "supervision", types.SimpleNamespace(Detections=lambda **fields: fields))
    monkeypatch.chdir(tmp_path)
    Image.fromarray(picture()).save("street.jpg")
    exec(snippet.replace("threshold=0.5", "threshold=0.0"), {})  # random weights are sure of nothing
    expected = Detector(load_weights(folder))("street.jpg", threshold=0.0)
    assert len(capsys.readouterr().out.splitlines()) == len(expected) > 0
    with Image.open("street_found.png") as drawing:
        assert drawing.format == "PNG"


@pytest.mark.parametrize("source", ["none.pth", "a/b/c", "./none"])
def test_what_is_no_name_of_the_hub_is_a_missing_file(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch_files, "download", lambda name: pytest.fail(f"{name} was looked for"))
    with pytest.raises(FileNotFoundError, match="there is no file or folder"):
        Detector.from_pretrained(source)


BLOCKED = """
import sys
for name in ("torch", "tensorflow", "transformers", "timm", "huggingface_hub"):
    sys.modules[name] = None
from cdetr_jax.models import resnet
resnet.STAGE_SIZES["resnet18"] = (1, 1, 1, 1)
from cdetr_jax import Detector
objects = Detector.from_pretrained(sys.argv[1])(sys.argv[2], threshold=0.0)
print(len(objects), objects.scores.tobytes().hex(), objects.boxes_xyxy_px.tobytes().hex())
"""


def test_safetensors_need_no_pytorch(folder, tmp_path):
    save_hub(tame(made_up()), folder, without_timm=True)
    Image.fromarray(picture()).save(tmp_path / "picture.png")
    expected = Detector(load_weights(folder))(tmp_path / "picture.png", threshold=0.0)
    ran = subprocess.run(
        [sys.executable, "-c", BLOCKED, str(folder), str(tmp_path / "picture.png")],
        capture_output=True,
        text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    count, scores, boxes = ran.stdout.split()
    assert int(count) == len(expected) == 21
    # The other process compiled the same program for the same machine.
    assert bytes.fromhex(scores) == expected.scores.tobytes()
    assert bytes.fromhex(boxes) == expected.boxes_xyxy_px.tobytes()


# ----------------------------------------------------------------------------------------------------- supervision

FOUND = Objects(
    image=np.zeros((5, 7, 3), np.uint8),
    boxes_xyxy_px=np.array([[0, 1, 2, 3], [1, 1, 4, 5]], np.float32),
    scores=np.array([0.75, 0.5], np.float32),
    class_ids=np.array([30, 8]),
    names=["disc", "ring"],
    class_names=["disc", "ring", "kite"],
)
NOTHING = Objects(
    FOUND.image, np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int64), [], FOUND.class_names
)


def test_objects_are_one_line():
    assert repr(FOUND) == "<Objects: 1 disc, 1 ring in a picture of 7 x 5 pixels>"
    assert repr(NOTHING) == "<Objects: nothing in a picture of 7 x 5 pixels>"


def test_some_of_the_objects_and_their_crops():
    ring = FOUND[np.array(FOUND.names) == "ring"]
    assert (ring.names, ring.class_ids.tolist(), ring.scores.tolist()) == (["ring"], [8], [0.5])
    np.testing.assert_array_equal(ring.boxes_xyxy_px, FOUND.boxes_xyxy_px[1:])
    assert len(FOUND[FOUND.scores > 0.9]) == 0
    assert FOUND[[1, 0]].names == ["ring", "disc"]
    for crop, (left, top, right, bottom) in zip(FOUND.crops(), FOUND.boxes_xyxy_px, strict=True):
        assert crop.size == (round(right) - int(left), round(bottom) - int(top))
    assert NOTHING.crops() == []


def test_without_supervision_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "supervision", None)
    with pytest.raises(ModuleNotFoundError, match="needs the supervision package: install it with `pip install superv"):
        FOUND.to_supervision()


@pytest.mark.parametrize(("found", "count"), [(FOUND, 2), (NOTHING, 0)])
def test_what_supervision_is_given(found, count, monkeypatch):
    monkeypatch.setitem(sys.modules, "supervision", types.SimpleNamespace(Detections=lambda **fields: fields))
    fields = found.to_supervision()
    assert fields.keys() == {"xyxy", "confidence", "class_id", "data"}
    assert fields["xyxy"].shape == (count, 4)
    assert fields["confidence"].tolist() == [0.75, 0.5][:count]
    assert fields["class_id"].tolist() == [30, 8][:count]
    assert fields["data"]["class_name"].tolist() == ["disc", "ring"][:count]
    assert fields["data"]["class_name"].dtype.kind == "U"


def test_supervision_takes_it():
    supervision = pytest.importorskip("supervision")
    detections = FOUND.to_supervision()
    assert isinstance(detections, supervision.Detections)
    assert len(detections) == 2
    assert detections[detections.class_id == 8].data["class_name"].tolist() == ["ring"]
    assert len(NOTHING.to_supervision()) == 0


# ------------------------------------------------------------------------------------- against transformers itself


@pytest.mark.parametrize("norm_between_layers", [False, True])
@pytest.mark.parametrize("decoder", [{}, DETR], ids=["conditional", "detr"])
def test_transformers_computes_the_same_with_what_we_write(decoder, norm_between_layers, tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    made = tame(made_up(norm_between_layers=norm_between_layers, decoder_layers=3, encoder_layers=2, **decoder))
    save_hub(made, tmp_path, without_timm=True)
    kind = transformers.DetrForObjectDetection if decoder else transformers.ConditionalDetrForObjectDetection
    theirs, info = kind.from_pretrained(tmp_path, output_loading_info=True)
    assert {name: names for name, names in info.items() if names} == {}
    assert theirs.config.id2label == {0: "disc", 1: "N/A", 2: "Fußgänger", 3: "ring", 4: "N/A"}

    sizes_hw = np.array([[64, 96], [50, 70]], np.int32)
    pictures = np.random.default_rng(0).integers(0, 256, (2, 64, 96, 3), np.uint8)
    is_pad = np.asarray(padding_mask(sizes_hw, (64, 96)))
    images = np.asarray(normalize(pictures, is_pad))

    def ours(fields):
        model = model_of(fields)
        found = model.apply(load_weights(tmp_path).variables, images, is_pad, method="stages").predictions
        return np.asarray(found.logits[-1]), np.asarray(found.boxes_cxcywh[-1])

    with torch.no_grad():
        expected = theirs.eval()(
            pixel_values=torch.from_numpy(images.transpose(0, 3, 1, 2).copy()),
            pixel_mask=torch.from_numpy((~is_pad).astype(np.int64)),
        )
    logits, boxes = ours(load_weights(tmp_path).model)
    scale = np.abs(expected.logits.numpy()).max()
    # Both sides are float32 and add up in different orders; measured: below 2e-6.
    np.testing.assert_allclose(logits, expected.logits.numpy(), rtol=0, atol=1e-4 * scale)
    np.testing.assert_allclose(boxes, expected.pred_boxes.numpy(), rtol=0, atol=1e-4)
    # Far more than that lies between two queries, between two pictures, and between this form and the other one.
    assert (np.ptp(logits, axis=1).max(-1) > 0.01 * scale).all()
    assert (np.ptp(boxes, axis=1).max(-1) > 0.01).all()
    assert np.abs(logits[0] - logits[1]).max() > 0.01 * scale
    other, _ = ours(made.model | {"norm_between_layers": not norm_between_layers})
    assert np.abs(logits - other).max() > 0.01 * scale


def test_transformers_keeps_the_category_ids(tmp_path):
    """Through its own config, so that a model fine-tuned there comes back with them."""
    transformers = pytest.importorskip("transformers")
    save_hub(tame(made_up()), tmp_path / "ours", without_timm=True)
    kind = transformers.ConditionalDetrForObjectDetection
    kind.from_pretrained(tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    found = load_weights(tmp_path / "theirs")
    assert found.classes == CLASSES
    assert found.model == made_up().model
    assert bits(found.variables) == bits(tame(made_up()).variables)
