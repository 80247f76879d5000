"""Which model weights are of: from names and shapes, from what lies beside them, what is refused, and the way back."""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cdetr_jax.data.coco_categories import COCO_CATEGORIES
from cdetr_jax.models.detector import model_of, published_fields
from cdetr_jax.structs import Category
from cdetr_jax.weights.architecture import (
    HEADS,
    classes_of,
    hub_config,
    hub_preprocessor,
    model_fields,
    sides_of,
)
from cdetr_jax.weights.torch_convert import HUB, HUB_WITHOUT_TIMM, OFFICIAL, from_torch, to_torch
from cdetr_jax.weights.torch_files import WeightsFile

LAYOUTS = {"official": OFFICIAL, "hub": HUB, "hub_without_timm": HUB_WITHOUT_TIMM}
SMALL = {
    "backbone": "resnet18",
    "backbone_width": 8,
    "width": 16,
    "ffn_width": 24,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "num_queries": 7,
    "num_classes": 5,
}
DETR = {"decoder": "detr", **HEADS["detr"]}


def fields_with(**changes):
    return published_fields() | SMALL | changes


@functools.cache
def _template(items):
    model = model_of(dict(items))
    images, sizes = jnp.zeros((1, 64, 64, 3), jnp.uint8), jnp.full((1, 2), 64)
    return jax.eval_shape(lambda: model.init(jax.random.key(0), images, sizes))


def template_of(fields):
    """The shapes of the model's variables."""
    return _template(tuple(sorted(fields.items())))


def state_dict_of(fields, layout):
    """Only names and shapes count here: the arrays are single bytes."""
    return to_torch(jax.tree.map(lambda leaf: np.zeros(leaf.shape, bool), template_of(fields)), layout)


def weights_file(state_dict, config=None, *, preprocessor=None, extra=None, path="folder/model.safetensors"):
    return WeightsFile(pathlib.Path(path), state_dict, config, preprocessor, extra or {})


def hub_file(fields, layout=HUB_WITHOUT_TIMM, **changes):
    """A folder as `save_hub` writes it, with some fields of its config changed; None leaves one out."""
    classes = tuple(Category(i, f"thing {i}") for i in range(fields["num_classes"]))
    config = hub_config(fields, classes, layout) | changes
    config = {name: value for name, value in config.items() if name not in changes or value is not None}
    return weights_file(state_dict_of(fields, layout), json.loads(json.dumps(config)))


def differences(found, expected):
    return {
        name: (found.get(name), expected.get(name))
        for name in found.keys() | expected.keys()
        if found.get(name) != expected.get(name)
    }


# ---------------------------------------------------------------------------------------- from names and shapes


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        DETR,
        {"backbone": "resnet34"},
        {"backbone": "resnet50"},
        {"backbone": "resnet101", **DETR},
        {"backbone_width": 12, "width": 24, "ffn_width": 40, "num_queries": 11, "num_classes": 3},
        {"encoder_layers": 3, "decoder_layers": 1},
        {"encoder_layers": 0, "decoder_layers": 11, **DETR},
        {"backbone_norm": "group"},
    ],
    ids=str,
)
def test_the_model_is_read_from_names_and_shapes(changes, layout):
    fields = fields_with(**changes)
    found = model_fields(weights_file(state_dict_of(fields, LAYOUTS[layout])), LAYOUTS[layout])
    assert differences(found, fields) == {}


def test_the_published_model_is_read_from_names_and_shapes():
    fields = published_fields()
    found = model_fields(weights_file(state_dict_of(fields, OFFICIAL), path="ConditionalDETR_r50.pth"), OFFICIAL)
    assert differences(found, fields) == {}
    assert (found["backbone"], found["backbone_width"], found["width"], found["num_classes"]) == (
        "resnet50", 64, 256, 91,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("path", "dc5"),
    [
        ("ConditionalDETR_r50dc5.pth", True),
        ("detr-r50-DC5-f0fb7ef5.pth", True),
        ("conditional-detr-resnet-50-dc5/model.safetensors", True),
        ("dc5/of/others/model.safetensors", False),
        ("detr-r50-e632da11.pth", False),
    ],
)
def test_without_a_word_dc5_is_read_from_the_file_name(path, dc5):
    assert model_fields(weights_file(state_dict_of(fields_with(), OFFICIAL), path=path), OFFICIAL)["dc5"] is dc5


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("query_embed.weight", "the weights do not fit the model: missing query_embed.weight"),
        ("class_embed.bias", "the weights do not fit the model: missing class_embed.bias"),
        ("backbone.0.body.conv1.weight", "missing backbone.0.body.conv1.weight"),
    ],
)
def test_what_the_model_cannot_be_read_without_is_named(name, message):
    state_dict = state_dict_of(fields_with(), OFFICIAL)
    del state_dict[name]
    with pytest.raises(ValueError, match=message):
        model_fields(weights_file(state_dict), OFFICIAL)


def test_a_backbone_that_there_is_not():
    state_dict = state_dict_of(fields_with(), OFFICIAL)
    state_dict["backbone.0.body.layer3.2.conv1.weight"] = np.zeros((3, 3, 2, 2))
    with pytest.raises(
        ValueError, match=r"has stages of \(2, 2, 3, 2\) basic blocks; expected one of resnet18, resnet34"
    ):
        model_fields(weights_file(state_dict), OFFICIAL)


def test_a_backbone_without_its_first_block_is_not_taken_for_a_smaller_one():
    state_dict = state_dict_of(fields_with(), HUB)
    state_dict = {name: array for name, array in state_dict.items() if ".layer4." not in name}
    with pytest.raises(ValueError, match=r"has stages of \(2, 2, 2, 0\) basic blocks"):
        model_fields(weights_file(state_dict), HUB)


# ------------------------------------------------------------------------------------------- from a config.json


@pytest.mark.parametrize("layout", ["hub", "hub_without_timm"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        DETR,
        {"num_heads": 2, "dropout": 0.25},
        {"dropout": 0.0},
        {"norm_between_layers": True},
        {"backbone": "resnet50", "decoder_layers": 1, "num_heads": 4, **DETR},
    ],
    ids=str,
)
def test_a_folder_of_ours_gives_the_fields_back(changes, layout):
    fields = fields_with(**changes)
    if layout == "hub":
        fields["backbone_width"] = 64  # timm has no other
    assert differences(model_fields(hub_file(fields, LAYOUTS[layout]), LAYOUTS[layout]), fields) == {}


def test_a_folder_of_ours_says_that_it_is_dc5():
    fields = fields_with(backbone_width=64, dc5=True)
    assert differences(model_fields(hub_file(fields, HUB), HUB), fields) == {}


def test_a_config_that_says_nothing_leaves_names_and_shapes():
    fields = fields_with(**DETR)
    assert differences(model_fields(weights_file(state_dict_of(fields, HUB), {}), HUB), fields) == {}


def test_the_config_of_the_published_model():
    """Its fields as transformers 4 wrote them, where they matter here."""
    config = {
        "model_type": "conditional_detr",
        "activation_function": "relu",
        "position_embedding_type": "sine",
        "auxiliary_loss": False,
        "backbone": "resnet50",
        "use_timm_backbone": True,
        "d_model": 16,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 24,
        "decoder_ffn_dim": 24,
        "encoder_layers": 1,
        "decoder_layers": 2,
        "num_queries": 7,
        "dilation": True,
        "dropout": 0.1,
        "num_hidden_layers": 1,
    }
    fields = fields_with(backbone="resnet50", num_heads=4, dc5=True)
    assert differences(model_fields(weights_file(state_dict_of(fields, HUB), config), HUB), fields) == {}


@pytest.mark.parametrize(
    ("config", "dc5"),
    [
        ({"dilation": True, "backbone": "resnet18"}, True),
        ({"dilation": False, "backbone": "resnet18"}, False),
        ({"backbone": "resnet18", "backbone_kwargs": {"output_stride": 16}}, True),
        ({"backbone": "resnet18", "backbone_kwargs": {"out_indices": [1, 2, 3, 4]}}, False),
        ({"backbone_config": {"model_type": "timm_backbone", "backbone": "resnet18", "output_stride": 16}}, True),
        ({"backbone_config": {"model_type": "timm_backbone", "backbone": "resnet18", "output_stride": None}}, False),
        ({"backbone_config": {"model_type": "timm_backbone", "backbone": "resnet18.tv_in1k"}, "dilation": True}, True),
    ],
    ids=str,
)
def test_dc5_is_what_the_config_says(config, dc5):
    """Not what the folder is called."""
    file = weights_file(state_dict_of(fields_with(), HUB), config, path="detr-dc5/model.safetensors")
    assert differences(model_fields(file, HUB), fields_with(dc5=dc5)) == {}


def test_the_backbone_of_transformers_has_its_depths_in_the_config():
    config = {
        "use_timm_backbone": False,
        "backbone": None,
        "backbone_config": {"model_type": "resnet", "layer_type": "basic", "depths": [3, 4, 6, 3]},
    }
    fields = fields_with(backbone="resnet34")
    found = model_fields(weights_file(state_dict_of(fields, HUB_WITHOUT_TIMM), config), HUB_WITHOUT_TIMM)
    assert differences(found, fields) == {}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model_type": "detr"},
            "config.json: model_type is 'detr', expected 'conditional_detr', of which the weights",
        ),
        ({"position_embedding_type": "learned"}, "position_embedding_type is 'learned', expected 'sine'"),
        ({"activation_function": "gelu"}, "activation_function is 'gelu', expected 'relu'"),
        (
            {"decoder_attention_heads": 4},
            "decoder_attention_heads is 4, but encoder_attention_heads 8; expected the same",
        ),
        ({"decoder_ffn_dim": 48}, "decoder_ffn_dim is 48, but encoder_ffn_dim 24; expected the same"),
        (
            {"d_model": "wide"},
            "model.safetensors: its config says 'wide' for what we call model.width, expected something",
        ),
        (
            {"encoder_layers": 1.5},
            "its config says 1.5 for what we call model.encoder_layers, expected something like 6",
        ),
        ({"dilation": "yes"}, "its config says 'yes' for what we call model.dc5, expected something like False"),
    ],
    ids=str,
)
def test_another_architecture_is_refused(changes, message):
    with pytest.raises(ValueError, match=message) as error:
        model_fields(hub_file(fields_with(), **changes), HUB_WITHOUT_TIMM)
    assert str(error.value).startswith("folder/")


@pytest.mark.parametrize(
    ("backbone", "message"),
    [
        (
            {"backbone": "swin_tiny", "backbone_config": None},
            "its backbone is 'swin_tiny', expected one of resnet18, res",
        ),
        ({"backbone_config": {"backbone": "resnet26"}}, "its backbone is 'resnet26', expected one of"),
        ({"backbone_config": {"model_type": "resnet", "depths": [2, 2, 2, 2]}}, r"'ResNet of \(2, 2, 2, 2\) blocks'"),
        (
            {"backbone_config": {"model_type": "resnet", "downsample_in_bottleneck": True}},
            "backbone_config strides elsewhere than torchvision's ResNet, which is ours",
        ),
        ({"backbone_config": {"model_type": "resnet", "downsample_in_first_stage": True}}, "strides elsewhere than"),
    ],
    ids=str,
)
def test_another_backbone_is_refused(backbone, message):
    with pytest.raises(ValueError, match=message):
        model_fields(hub_file(fields_with(), **backbone), HUB_WITHOUT_TIMM)


def test_detr_weights_beside_the_config_of_a_conditional_one():
    file = hub_file(fields_with(**DETR), model_type="conditional_detr")
    with pytest.raises(ValueError, match="model_type is 'conditional_detr', expected 'detr', of which the weights are"):
        model_fields(file, HUB_WITHOUT_TIMM)


# ----------------------------------------------------------------------- from the authors' arguments, and from ours

ARGS = {
    "backbone": "resnet18",
    "hidden_dim": 16,
    "nheads": 2,
    "dim_feedforward": 24,
    "enc_layers": 1,
    "dec_layers": 2,
    "num_queries": 7,
    "dropout": 0.0,
    "dilation": True,
    "position_embedding": "sine",
    "lr": 1e-4,
}


def test_the_authors_arguments_count():
    """Not what the file is called."""
    fields = fields_with(num_heads=2, dropout=0.0, dc5=True)
    file = weights_file(state_dict_of(fields, OFFICIAL), extra={"args": ARGS}, path="r50.pth")
    assert differences(model_fields(file, OFFICIAL), fields) == {}
    file = weights_file(state_dict_of(fields, OFFICIAL), extra={"args": ARGS | {"dilation": False}}, path="r50dc5.pth")
    assert differences(model_fields(file, OFFICIAL), fields | {"dc5": False}) == {}


def test_a_backbone_in_the_arguments_that_there_is_not():
    file = weights_file(state_dict_of(fields_with(), OFFICIAL), extra={"args": ARGS | {"backbone": "vgg16"}})
    with pytest.raises(ValueError, match="its backbone is 'vgg16', expected one of resnet18"):
        model_fields(file, OFFICIAL)


def test_what_our_own_files_say_counts():
    fields = fields_with(spatial_query="p", temperature=20.0, num_heads=2)
    extra = {"cdetr_jax": {"model": fields, "classes": [None, {"id": 30, "name": "kite"}], "sides_px": [96, 128]}}
    file = weights_file({}, extra=extra)
    assert model_fields(file, OFFICIAL) == fields
    assert classes_of(file, 2) == (None, Category(30, "kite"))
    assert sides_of(file) == (96, 128)


def test_a_file_of_a_newer_version_is_refused():
    extra = {"cdetr_jax": {"model": fields_with() | {"more": 1}, "classes": [], "sides_px": [96, 128]}}
    with pytest.raises(ValueError, match=r"its model has the fields \['more'\], unknown here; use a newer cdetr_jax"):
        model_fields(weights_file({}, extra=extra), OFFICIAL)


def test_a_file_from_before_a_field_was_there_has_its_published_value():
    fields = fields_with(num_heads=2)
    del fields["norm_between_layers"]
    extra = {"cdetr_jax": {"model": fields, "classes": [], "sides_px": [96, 128]}}
    assert model_fields(weights_file({}, extra=extra), OFFICIAL) == fields_with(num_heads=2)


# ---------------------------------------------------------------------------------------------- every form we have


@pytest.mark.parametrize(
    "changes",
    [
        {"backbone_norm": "group"},
        *({"reference_point": value} for value in ("zero", "learned", "predicted")),
        *({"spatial_query": value} for value in ("full", "c", "t", "p", "i")),
        *({"transformation": value} for value in ("identity", "scalar", "block", "full", "diagonal")),
        {**DETR, "box_offset": True},
        {**DETR, "class_loss": "focal"},
        {"norm_between_layers": True},
        {"backbone": "resnet50", "dc5": True},
    ],
    ids=str,
)
def test_every_form_has_names_of_its_own_and_comes_back_bit_for_bit(changes):
    template = template_of(fields_with(**changes))
    rng = np.random.default_rng(0)
    variables = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape, np.float32), template)
    for layout in LAYOUTS.values():
        state_dict = to_torch(variables, layout)
        assert sum(array.size for array in state_dict.values()) == sum(leaf.size for leaf in jax.tree.leaves(template))
        jax.tree.map(np.testing.assert_array_equal, from_torch(state_dict, template, layout), variables)


# --------------------------------------------------------------------------------------------------------- classes


def named(names, **more):
    return weights_file({}, {"id2label": {str(i): name for i, name in enumerate(names)}, **more})


def test_a_logit_is_called_as_the_config_says_and_its_id_is_its_index():
    assert classes_of(named(["N/A", "person", "N/A", "kite"]), 4) == (
        None, Category(1, "person"), None, Category(3, "kite"),
    )  # fmt: skip


def test_the_keys_count_and_not_their_order():
    file = weights_file({}, {"id2label": {"10": "k", **{str(i): f"c{i}" for i in range(9, -1, -1)}}})
    assert classes_of(file, 11) == (*(Category(i, f"c{i}") for i in range(10)), Category(10, "k"))


def test_category_ids_of_ours_count():
    assert classes_of(named(["disc", "N/A", "ring"], category_ids=[30, None, 10]), 3) == (
        Category(30, "disc"), None, Category(10, "ring"),
    )  # fmt: skip


@pytest.mark.parametrize(
    "config", [None, {}, {"id2label": {}}, {"id2label": {str(i): f"LABEL_{i}" for i in range(91)}}]
)
def test_91_logits_without_names_are_cocos(config):
    classes = classes_of(weights_file({}, config), 91)
    assert len(classes) == 91
    assert tuple(category for category in classes if category) == COCO_CATEGORIES
    assert classes[0] is None
    assert (classes[1], classes[12], classes[90]) == (Category(1, "person"), None, Category(90, "toothbrush"))
    assert all(category is None or category.id == i for i, category in enumerate(classes))


@pytest.mark.parametrize("config", [None, {"id2label": {str(i): f"LABEL_{i}" for i in range(3)}}])
def test_other_logits_without_names_are_called_by_their_number(config):
    classes = classes_of(weights_file({}, config), 3)
    assert classes == (Category(0, "class 0"), Category(1, "class 1"), Category(2, "class 2"))
    assert all(category.is_unnamed for category in classes)


def test_91_logits_with_some_real_names_are_not_cocos():
    names = [f"LABEL_{i}" for i in range(91)]
    names[7] = "newt"
    classes = classes_of(named(names), 91)
    assert classes[7] == Category(7, "newt")
    assert classes[1] == Category(1, "LABEL_1")


@pytest.mark.parametrize("ids", [{"0": "a", "1": "b"}, {"0": "a", "1": "b", "3": "c"}, {str(i): "a" for i in range(4)}])
def test_names_that_are_not_as_many_as_the_logits(ids):
    with pytest.raises(ValueError) as error:  # noqa: PT011, the whole text is compared
        classes_of(weights_file({}, {"id2label": ids}), 3)
    assert str(error.value) == (
        f"folder/config.json: id2label names {len(ids)} classes, but the class head has 3, counted from 0; correct the "
        "one that is wrong"
    )


def test_category_ids_that_are_not_as_many_as_the_logits():
    with pytest.raises(ValueError, match=r"config\.json: .*category_ids"):
        classes_of(named(["disc", "ring", "kite"], category_ids=[30, 10]), 3)


@pytest.mark.parametrize("classes", [
    (Category(30, "disc"), None, Category(10, "ring")),
    (Category(5, "LABEL_0"), Category(7, "LABEL_1")),
    (Category(3, "N/A"), None),
    (Category(4, "same"), Category(2, "same")),
    (Category(-3, "below"), Category(90_000, "newt")),
    (Category(1, "class 1"), Category(0, "class 0")),
    tuple(Category(100 + i, f"thing {i}") for i in range(91)),
], ids=lambda classes: str(classes)[:60])  # fmt: skip
def test_classes_of_ours_come_back_from_the_config(classes):
    config = hub_config(fields_with(num_classes=len(classes)), classes, HUB_WITHOUT_TIMM)
    assert classes_of(weights_file({}, json.loads(json.dumps(config))), len(classes)) == classes


# ----------------------------------------------------------------------------------------------------------- sides


@pytest.mark.parametrize(
    ("preprocessor", "sides"),
    [
        (None, (800, 1333)),
        ({}, (800, 1333)),
        ({"size": 480, "max_size": 640}, (480, 640)),
        ({"size": 480}, (480, 1333)),
        ({"size": {"shortest_edge": 320, "longest_edge": 544}}, (320, 544)),
        ({"size": {"shortest_edge": 320, "longest_edge": 544}, "max_size": 1333}, (320, 544)),
        ({"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}, (800, 1333)),
        (hub_preprocessor("detr", 96, 128), (96, 128)),
    ],
    ids=str,
)
def test_the_sides_of_a_preprocessor(preprocessor, sides):
    assert sides_of(weights_file({}, preprocessor=preprocessor)) == sides


@pytest.mark.parametrize(
    ("preprocessor", "message"),
    [
        ({"image_mean": [0.5, 0.5, 0.5]}, r"image_mean is \[0.5, 0.5, 0.5\], expected \[0.485, 0.456, 0.406\]"),
        ({"image_std": [1, 1, 1]}, r"image_std is \[1, 1, 1\], expected \[0.229, 0.224, 0.225\]"),
        ({"size": {"height": 640, "width": 640}}, "size is {'height': 640, 'width': 640}, expected shortest_edge and"),
        ({"size": {"shortest_edge": 800}}, "expected shortest_edge and longest_edge in pixels"),
        ({"size": "large"}, "size is 'large', expected shortest_edge and longest_edge in pixels"),
    ],
    ids=str,
)
def test_another_preparation_of_pictures_is_refused(preprocessor, message):
    with pytest.raises(ValueError, match=message) as error:
        sides_of(weights_file({}, preprocessor=preprocessor))
    assert str(error.value).startswith("folder/preprocessor_config.json: ")


# ------------------------------------------------------------------------------------------------------ to the hub


def things(count=5):
    return tuple(Category(i, f"thing {i}") for i in range(count))


@pytest.mark.parametrize(
    ("changes", "layout", "message"),
    [
        (
            {"backbone_norm": "group"},
            HUB_WITHOUT_TIMM,
            "model.backbone_norm is 'group', not 'frozen_batch'; use --to=pth",
        ),
        ({"reference_point": "learned"}, HUB_WITHOUT_TIMM, "model.reference_point is 'learned', not 'predicted'"),
        ({"spatial_query": "p"}, HUB_WITHOUT_TIMM, "model.spatial_query is 'p', not 'full'"),
        ({"transformation": "block"}, HUB_WITHOUT_TIMM, "model.transformation is 'block', not 'diagonal'"),
        ({"temperature": 20.0}, HUB_WITHOUT_TIMM, "model.temperature is 20.0, not 10000.0"),
        ({"class_loss": "softmax"}, HUB_WITHOUT_TIMM, "model.class_loss is 'softmax', not 'focal'"),
        ({**DETR, "box_offset": True}, HUB_WITHOUT_TIMM, "model.box_offset is True, not False"),
        ({}, HUB, "model.backbone_width is 8, not 64"),
        ({"dc5": True}, HUB_WITHOUT_TIMM, "transformers' own ResNet has no DC5; leave out --without-timm"),
    ],
    ids=str,
)
def test_what_transformers_does_not_have_is_refused(changes, layout, message):
    with pytest.raises(ValueError, match=message):
        hub_config(fields_with(**changes), things(), layout)


def test_all_that_transformers_does_not_have_is_listed():
    fields = fields_with(backbone_norm="group", spatial_query="c", box_offset=False)
    with pytest.raises(ValueError, match="the hub's layout has only the published form, but ") as error:
        hub_config(fields, things(), HUB)
    wrong = str(error.value).split("but ")[1].split("; use")[0].split(", model.")
    assert [entry.removeprefix("model.") for entry in wrong] == [
        "backbone_norm is 'group', not 'frozen_batch'",
        "spatial_query is 'c', not 'full'",
        "box_offset is False, not True",
        "backbone_width is 8, not 64",
    ]


def test_what_does_not_touch_the_result_is_not_refused():
    fields = fields_with(local_gain=6.0, compute_dtype="bfloat16", frozen_stages=0)
    assert hub_config(fields, things(), HUB_WITHOUT_TIMM)["num_queries"] == 7


@pytest.mark.parametrize(("changes", "kind"), [({}, "ConditionalDetr"), (DETR, "Detr")], ids=str)
def test_the_config_for_the_hub(changes, kind):
    fields = fields_with(num_heads=2, dropout=0.25, num_classes=3, backbone_width=64, dc5=True, **changes)
    config = hub_config(fields, (None, Category(7, "kite"), Category(3, "newt")), HUB)
    assert config == {
        "architectures": [f"{kind}ForObjectDetection"],
        "model_type": {"ConditionalDetr": "conditional_detr", "Detr": "detr"}[kind],
        "activation_function": "relu",
        "attention_dropout": 0.0,
        "activation_dropout": 0.0,
        "d_model": 16,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 24,
        "decoder_ffn_dim": 24,
        "encoder_layers": 1,
        "decoder_layers": 2,
        "num_hidden_layers": 1,
        "num_queries": 7,
        "num_channels": 3,
        "dropout": 0.25,
        "dilation": True,
        "auxiliary_loss": False,
        "is_encoder_decoder": True,
        "position_embedding_type": "sine",
        "id2label": {"0": "N/A", "1": "kite", "2": "newt"},
        "label2id": {"N/A": 0, "kite": 1, "newt": 2},
        "category_ids": [None, 7, 3],
        "use_timm_backbone": True,
        "use_pretrained_backbone": False,
        "backbone": "resnet18",
    }


@pytest.mark.parametrize(
    ("backbone", "hidden", "depths", "layer"),
    [
        ("resnet18", [8, 16, 32, 64], [2, 2, 2, 2], "basic"),
        ("resnet101", [32, 64, 128, 256], [3, 4, 23, 3], "bottleneck"),
    ],
)
def test_the_backbone_without_timm(backbone, hidden, depths, layer):
    config = hub_config(fields_with(backbone=backbone), things(), HUB_WITHOUT_TIMM)
    assert config["backbone"] is None
    assert config["use_timm_backbone"] is False
    assert config["backbone_config"] == {
        "model_type": "resnet",
        "embedding_size": 8,
        "hidden_sizes": hidden,
        "depths": depths,
        "layer_type": layer,
        "hidden_act": "relu",
        "downsample_in_first_stage": False,
        "downsample_in_bottleneck": False,
        "out_features": ["stage4"],
    }
