"""From a config to objects: what is refused and how, class tables, every recipe's model, and the published values."""

import contextlib
import dataclasses
import importlib
import json
import pathlib

import jax
import numpy as np
import pytest
from PIL import Image

from cdetr_jax import build
from cdetr_jax.classes import class_table
from cdetr_jax.data.plan import train_plan
from cdetr_jax.data.synthetic import SyntheticShapes
from configs import coco_folder_small, common, demo

RECIPES = sorted(
    path.stem for path in pathlib.Path(common.__file__).parent.glob("*.py") if path.stem not in ("__init__", "common")
)


def changed(**fields):
    """The published config with some fields changed; a double underscore stands for the dot."""
    config = common.get_config()
    with config.unlocked():
        for field, value in fields.items():
            group, name = field.split("__")
            config[group][name] = value
    return config


# -------------------------------------------------------------------------------------------------- make_source


@pytest.mark.parametrize("split", ["train", "eval"])
@pytest.mark.parametrize(("images", "annotations"), [("", "a.json"), ("folder", ""), ("", "")])
def test_an_empty_field_is_named(split, images, annotations):
    config = changed(**{f"data__{split}_images": images, f"data__{split}_annotations": annotations})
    with pytest.raises(
        ValueError, match=f"config.data.{split}_images and config.data.{split}_annotations must"
    ) as error:
        build.make_source(config, split)
    assert f"they are {images!r} and {annotations!r}" in str(error.value)
    assert f"--config.data.{split}_annotations=..." in str(error.value)


def test_without_evaluation_pictures_the_error_says_how_to_do_without():
    for source in ("coco_folder", "coco_folder+tfds", "tfds"):
        config = changed(data__source=source, data__eval_images="", data__eval_annotations="", data__eval_split="")
        with pytest.raises(ValueError, match=r"or train without evaluation: --config\.eval\.every_epochs=0$"):
            build.make_source(config, "eval")


def test_a_path_may_have_a_comma_and_commas_part_paths(tmp_path):
    for folder in ("my,pictures", "b"):
        (tmp_path / folder).mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / folder / f"{folder}.png")
        content = {
            "images": [{"id": 1, "file_name": f"{folder}.png", "width": 8, "height": 8}],
            "annotations": [],
            "categories": [{"id": 1, "name": "a"}],
        }
        (tmp_path / folder / "a.json").write_text(json.dumps(content))
    folder = f"{tmp_path}/my,pictures"
    config = changed(data__train_images=folder, data__train_annotations=f"{folder}/a.json")
    assert build.make_source(config, "train").records[0].file_name == "my,pictures.png"
    b = f"{tmp_path}/b"
    config = changed(data__train_images=f"{b},{b}", data__train_annotations=f"{b}/a.json, {b}/a.json")
    assert len(build.make_source(config, "train")) == 2


@pytest.mark.parametrize(("devices", "rows"), [(1, 3), (2, 4), (8, 8)])
def test_an_evaluation_batch_is_rounded_up_to_the_devices(devices, rows):
    config = demo.get_config()
    config.eval.batch_size = 3
    config.data.synthetic.eval_pictures = 5
    source = build.make_source(config, "eval")
    plan = build.make_eval_plan(config, source, devices)
    with contextlib.closing(build.make_eval_batches(config, source, plan)) as batches:
        index = [batch.index for batch in batches]
    assert {len(some) for some in index} == {rows}
    assert sorted(i for some in index for i in some if i >= 0) == [0, 1, 2, 3, 4]


def test_a_folder_that_is_not_there(tmp_path):
    config = changed(data__train_images=str(tmp_path / "none"), data__train_annotations="a.json")
    with pytest.raises(FileNotFoundError, match="none: no such folder of pictures"):
        build.make_source(config, "train")


def test_made_up_pictures_of_the_two_sets_differ_for_any_two_seeds():
    pictures = []
    for seed in (0, 1, 2):
        config = demo.get_config()
        config.seed = seed
        config.data.synthetic.train_pictures = 3
        config.data.synthetic.eval_pictures = 2
        for split, size in (("train", 3), ("eval", 2)):
            source = build.make_source(config, split)
            assert isinstance(source, SyntheticShapes)
            assert len(source) == size
            pictures.append(source.load_image(0).tobytes())
    assert len(set(pictures)) == 6


# ------------------------------------------------------------------------------------------------------ recipes


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_builds_its_model(recipe):
    config = importlib.import_module(f"configs.{recipe}").get_config()
    num_classes = config.model.num_classes or 5
    functions = build.make_step_functions(config, num_classes, build.make_schedules(config, 1000))
    batch, (height, width) = 2, (64, 96)
    model = functions.model

    def run():
        images, sizes = np.zeros((batch, height, width, 3), np.uint8), np.full((batch, 2), height, np.int32)
        return model.init_with_output(jax.random.key(0), images, sizes)

    predictions, variables = jax.eval_shape(run)
    logits = num_classes + (config.model.class_loss == "softmax")
    layers, queries = config.model.decoder_layers, config.model.num_queries
    assert predictions.logits.shape == (layers, batch, queries, logits)
    assert predictions.boxes_cxcywh.shape == (layers, batch, queries, 4)
    assert variables["params"]["query_embed"].shape == (queries, config.model.width)


EXPECTED = {  # backbone, dc5, decoder, queries, class loss
    "conditional_detr_r50": ("resnet50", False, "conditional", 300, "focal"),
    "conditional_detr_r50_dc5": ("resnet50", True, "conditional", 300, "focal"),
    "conditional_detr_r101": ("resnet101", False, "conditional", 300, "focal"),
    "conditional_detr_r101_dc5": ("resnet101", True, "conditional", 300, "focal"),
    "detr_r50": ("resnet50", False, "detr", 100, "softmax"),
    "detr_r50_dc5": ("resnet50", True, "detr", 100, "softmax"),
    "detr_r101": ("resnet101", False, "detr", 100, "softmax"),
    "detr_r101_dc5": ("resnet101", True, "detr", 100, "softmax"),
}


@pytest.mark.parametrize("epochs", ["12", "36", "50", "75", "108"])
@pytest.mark.parametrize("recipe", list(EXPECTED))
def test_every_schedule_of_every_published_recipe(recipe, epochs):
    config = importlib.import_module(f"configs.{recipe}").get_config(epochs)
    model, detr = config.model, config.model.decoder == "detr"
    found = (model.backbone, model.dc5, model.decoder, model.num_queries, model.class_loss)
    assert found == EXPECTED[recipe]
    assert config.train.num_epochs == int(epochs)
    drop = {"12": 11, "36": 30, "50": 40, "75": 60, "108": 80}[epochs]
    assert config.optimizer.drop_epoch == drop
    assert model.box_offset is not detr
    assert config.matcher.class_cost == config.loss.class_weight == (1.0 if detr else 2.0)
    schedules = build.make_schedules(config, steps_per_epoch=7)
    for schedule, lr in ((schedules.lr, 1e-4), (schedules.backbone_lr, 1e-5)):
        np.testing.assert_allclose([float(schedule(step)) for step in (0, 7 * drop - 1)], lr, rtol=1e-6)
        np.testing.assert_allclose(float(schedule(7 * drop)), lr / 10, rtol=1e-6)


def test_a_schedule_that_there_is_not():
    with pytest.raises(ValueError, match="there is no recipe for 13 epochs, only for 12, 36, 50, 75, 108"):
        common.get_config("13")


def test_the_published_values():
    config = common.get_config()
    expected = {
        "model": {
            "decoder": "conditional",
            "backbone": "resnet50",
            "backbone_width": 64,
            "backbone_norm": "frozen_batch",
            "frozen_stages": 2,
            "dc5": False,
            "width": 256,
            "num_heads": 8,
            "ffn_width": 2048,
            "encoder_layers": 6,
            "decoder_layers": 6,
            "num_queries": 300,
            "dropout": 0.1,
            "num_classes": 91,
            "class_loss": "focal",
            "box_offset": True,
            "reference_point": "predicted",
            "spatial_query": "full",
            "transformation": "diagonal",
            "temperature": 10000.0,
            "local_gain": 0.0,
            "norm_between_layers": False,
            "attention": "einsum",
            "matmul_precision": "default",
            "compute_dtype": "float32",
        },
        "matcher": {"class_cost": 2.0, "l1_cost": 5.0, "giou_cost": 2.0},
        "loss": {
            "class_weight": 2.0,
            "l1_weight": 5.0,
            "giou_weight": 2.0,
            "focal_alpha": 0.25,
            "focal_gamma": 2.0,
            "no_object_weight": 0.1,
        },
        "optimizer": {
            "lr": 1e-4,
            "backbone_lr": 1e-5,
            "weight_decay": 1e-4,
            "clip_norm": 0.1,
            "warmup_steps": 0,
            "drop_epoch": 40,
            "drop_factor": 0.1,
            "ema_decay": 0.0,
        },
    }
    for group, fields in expected.items():
        assert config[group].to_dict() == fields
    assert (config.train.batch_size, config.train.num_epochs, config.eval.top_k) == (16, 50, 100)
    data = config.data
    assert data.short_sides_px == (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800)
    assert (data.long_side_max_px, data.eval_short_side_px) == (1333, 800)
    assert (data.flip_probability, data.crop_probability) == (0.5, 0.5)
    assert (data.crop_short_sides_px, data.crop_sides_px) == ((400, 500, 600), (384, 600))
    assert data.class_ids == "category_id"


@pytest.mark.parametrize("recipe", ["common", *RECIPES])
def test_every_recipe_is_locked_and_can_be_written_down(recipe):
    config = importlib.import_module(f"configs.{recipe}").get_config()
    assert json.loads(json.dumps(config.to_dict()))["seed"] == 0
    with pytest.raises(AttributeError, match="learning_rate"):
        config.optimizer.learning_rate = 1.0


def test_the_compute_dtype_reaches_the_model():
    assert build.make_model(changed(model__compute_dtype="bfloat16"), 3).dtype == jax.numpy.bfloat16
    assert build.make_model(common.get_config(), 3).dtype == jax.numpy.float32
    assert build.make_model(common.get_config(), 3).num_classes == 3


def test_the_plan_to_look_at_is_the_one_that_is_followed(caplog):
    caplog.set_level("INFO", logger="absl")
    config = demo.get_config()
    config.data.synthetic.train_pictures = 40
    config.train.update({"batch_size": 8, "accumulation_steps": 2})
    source = build.make_source(config, "train")
    classes = class_table(source.categories, "contiguous", 0)
    plan_settings = build.make_plan_settings(config, source)
    plan = train_plan(plan_settings, 1)
    with contextlib.closing(build.make_train_batches(config, source, classes, plan_settings, (1, 0))) as batches:
        assert len(plan) == batches.batches_per_epoch == 10
        for rows, max_targets, batch in zip(plan.rows, plan.max_targets, batches, strict=False):
            np.testing.assert_array_equal(batch.index, rows["index"])
            assert batch.targets.valid.shape[1] == max_targets
    assert "Buckets of epoch 2:\npadded shape" in caplog.text
    assert "4 targets in 100.0% of the batches" in caplog.text


def test_pictures_that_are_scaled_down_are_counted_in_one_line(caplog):
    caplog.set_level("INFO", logger="absl")
    config = coco_folder_small.get_config()
    source = SyntheticShapes(seed=0, size=9, height=300, width=100, max_objects=2)
    build.make_plan_settings(config, source)
    build.make_eval_plan(config, source)
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 2
    for line, field in zip(lines, ("train_shapes", "eval_shapes"), strict=True):
        assert line.startswith(f"9 of 9 pictures are scaled down where config.data.{field} cannot hold them, such as ")
        assert line.endswith("synthetic-0-0, 100 x 300 pixels")


def test_pictures_without_an_object(caplog):
    """Nothing can be learnt from them, and their AP is -1."""
    caplog.set_level("WARNING", logger="absl")
    config = coco_folder_small.get_config()
    config.data.train_annotations, config.data.eval_annotations = "my/train.json", "my/val.json"
    source = SyntheticShapes(seed=0, size=2, height=96, width=96, max_objects=1)
    build.make_eval_plan(config, source)
    assert not caplog.records
    source.records = tuple(dataclasses.replace(record, is_crowd=~record.is_crowd) for record in source.records)
    message = "none of the 2 training pictures has an object to learn from: 2 boxes .* crowds .* my/train.json"
    with pytest.raises(ValueError, match=message):
        build.make_plan_settings(config, source)
    build.make_eval_plan(config, source)
    assert "none of the 2 pictures of config.data.eval_annotations, my/val.json has an object" in caplog.text
