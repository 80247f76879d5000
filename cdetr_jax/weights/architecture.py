"""Which model published weights are of, read from their names, shapes and `config.json`; and the way back."""

import re
from collections.abc import Mapping
from typing import Any

from absl import logging

from cdetr_jax.data.coco_categories import COCO_CATEGORIES
from cdetr_jax.models.detector import MEAN_RGB, STD_RGB, published_fields
from cdetr_jax.models.resnet import BOTTLENECK, STAGE_SIZES
from cdetr_jax.structs import Category
from cdetr_jax.weights.torch_convert import HUB_WITHOUT_TIMM, Layout, torch_name
from cdetr_jax.weights.torch_files import CONFIG, PREPROCESSOR, WeightsFile

NOTHING = "N/A"  # how the hub's configs name a logit that stands for no class
MODEL_TYPES = {"conditional": "conditional_detr", "detr": "detr"}
HEADS = {
    "conditional": {"class_loss": "focal", "box_offset": True},
    "detr": {"class_loss": "softmax", "box_offset": False},
}
# Our field: the field of the hub's config, and of the authors' command line.
SAME_FIELDS = {
    "width": ("d_model", "hidden_dim"),
    "num_heads": ("encoder_attention_heads", "nheads"),
    "ffn_width": ("encoder_ffn_dim", "dim_feedforward"),
    "encoder_layers": ("encoder_layers", "enc_layers"),
    "decoder_layers": ("decoder_layers", "dec_layers"),
    "num_queries": ("num_queries", "num_queries"),
    "dropout": ("dropout", "dropout"),
    "dc5": ("dilation", "dilation"),
    # transformers then also normalises between the decoder's layers; the authors' code has the losses without that.
    "norm_between_layers": ("auxiliary_loss", None),
}


def model_fields(file: WeightsFile, layout: Layout) -> dict[str, Any]:
    """The fields of `config.model` that the weights were made with.

    What `config.json` or the authors' `args` say counts; the rest is read from names and shapes. Nothing in the names
    and shapes tells DC5 and the number of heads: without the first two, DC5 is taken from the file's name, and the
    heads are 8.
    Raises: ValueError, if it is another architecture, or one that we do not have.
    """
    if "cdetr_jax" in file.extra:
        return _our_fields(file)
    shapes = {name: array.shape for name, array in file.state_dict.items()}
    fields = published_fields() | _fields_of_shapes(shapes, layout)
    if file.config is None and "args" not in file.extra:
        fields["dc5"] = "dc5" in f"{file.path.parent.name}/{file.path.name}".lower()
        logging.info(
            "%s says nothing of its model's heads and dilation: %d heads%s",
            file.path, fields["num_heads"], ", DC5 as its name says" if fields["dc5"] else ", not DC5",
        )  # fmt: skip
        _check_fields(fields, file)
        return fields
    said = file.config if file.config is not None else file.extra["args"]
    kind = 0 if file.config is not None else 1
    fields |= {ours: said[names[kind]] for ours, names in SAME_FIELDS.items() if said.get(names[kind]) is not None}
    if file.config is not None:
        fields |= _fields_of_hub_config(file, fields)
    elif said.get("backbone"):
        fields["backbone"] = said["backbone"]
    _check_fields(fields, file)
    return fields


def classes_of(file: WeightsFile, num_classes: int) -> tuple[Category | None, ...]:
    """What each class logit stands for.

    The category id is the logit's index, as the published models use COCO's own ids, unless a file of ours says
    otherwise. Without names 91 logits are COCO's.
    Raises: ValueError, if the names are not as many as the logits.
    """
    if "cdetr_jax" in file.extra:
        return tuple(entry and Category(**entry) for entry in file.extra["cdetr_jax"]["classes"])
    names: dict[int, str] = {}
    if file.config is not None and file.config.get("id2label"):
        names = {int(logit): name for logit, name in file.config["id2label"].items()}
        if sorted(names) != list(range(num_classes)):
            raise ValueError(
                f"{file.path.with_name(CONFIG)}: id2label names {len(names)} classes, but the class head has "
                f"{num_classes}, counted from 0; correct the one that is wrong"
            )
    ids = (file.config or {}).get("category_ids")  # only we write them
    if ids is not None:
        if not isinstance(ids, list) or len(ids) != len(names):
            raise ValueError(
                f"{file.path.with_name(CONFIG)}: category_ids are {ids}, expected one for each of the {num_classes} "
                "classes of id2label"
            )
        return tuple(None if ids[i] is None else Category(ids[i], names[i]) for i in range(num_classes))
    if all(name == f"LABEL_{logit}" for logit, name in names.items()):  # transformers' way of saying: no names
        if num_classes == 91:
            logging.info("%s names no classes; its 91 logits are taken as COCO's category ids", file.path)
            by_id = {category.id: category for category in COCO_CATEGORIES}
            return tuple(by_id.get(logit) for logit in range(num_classes))
        return tuple(Category(logit, f"class {logit}") for logit in range(num_classes))
    return tuple(None if names[i] == NOTHING else Category(i, names[i]) for i in range(num_classes))


def sides_of(file: WeightsFile) -> tuple[int, int]:
    """Short side and longest side in pixels that pictures are resized to.

    Raises: ValueError, if the folder asks for another preparation of pictures than ours.
    """
    if "cdetr_jax" in file.extra:
        return tuple(file.extra["cdetr_jax"]["sides_px"])
    said = file.preprocessor or {}
    where = file.path.with_name(PREPROCESSOR)
    size = said.get("size", 800)
    if isinstance(size, Mapping):
        short, long = size.get("shortest_edge"), size.get("longest_edge")
    else:
        short, long = size, said.get("max_size", 1333)
    if not isinstance(short, int) or not isinstance(long, int):
        raise ValueError(f"{where}: size is {size!r}, expected shortest_edge and longest_edge in pixels")
    for field, ours in (("image_mean", MEAN_RGB), ("image_std", STD_RGB)):
        if tuple(said.get(field, ours)) != ours:
            raise ValueError(f"{where}: {field} is {said[field]}, expected {list(ours)}")
    return short, long


def hub_config(model: Mapping[str, Any], classes: tuple[Category | None, ...], layout: Layout) -> dict[str, Any]:
    """The hub's `config.json`, with the categories' own ids in a field that transformers keeps and ignores.

    Raises: ValueError, if transformers has no such model.
    """
    expected = {name: published_fields()[name] for name in _NOT_IN_TRANSFORMERS} | HEADS[model["decoder"]]
    if layout != HUB_WITHOUT_TIMM:
        expected["backbone_width"] = 64
    elif model["dc5"]:
        raise ValueError("transformers' own ResNet has no DC5; leave out --without-timm")
    wrong = [
        f"model.{name} is {model[name]!r}, not {value!r}" for name, value in expected.items() if model[name] != value
    ]
    if wrong:
        raise ValueError(f"the hub's layout has only the published form, but {', '.join(wrong)}; use --to=pth")
    names = [category.name if category else NOTHING for category in classes]
    kind = "ConditionalDetr" if model["decoder"] == "conditional" else "Detr"
    config: dict[str, Any] = {
        "architectures": [f"{kind}ForObjectDetection"],
        "model_type": MODEL_TYPES[model["decoder"]],
        "activation_function": "relu",
        "attention_dropout": 0.0,
        "activation_dropout": 0.0,
        "decoder_attention_heads": model["num_heads"],
        "decoder_ffn_dim": model["ffn_width"],
        "is_encoder_decoder": True,
        "num_channels": 3,
        "num_hidden_layers": model["encoder_layers"],
        "position_embedding_type": "sine",
        "id2label": {str(i): name for i, name in enumerate(names)},
        "label2id": {name: i for i, name in enumerate(names)},
        "category_ids": [category.id if category else None for category in classes],
    }
    config |= {theirs: model[ours] for ours, (theirs, _) in SAME_FIELDS.items()}
    if layout != HUB_WITHOUT_TIMM:
        # Not "pretrained": else transformers would first download weights that ours replace.
        return config | {"use_timm_backbone": True, "use_pretrained_backbone": False, "backbone": model["backbone"]}
    is_deep = BOTTLENECK[model["backbone"]]
    resnet = {
        "model_type": "resnet",
        "embedding_size": model["backbone_width"],
        "hidden_sizes": [model["backbone_width"] * 2**stage * (4 if is_deep else 1) for stage in range(4)],
        "depths": list(STAGE_SIZES[model["backbone"]]),
        "layer_type": "bottleneck" if is_deep else "basic",
        "hidden_act": "relu",
        "downsample_in_first_stage": False,
        "downsample_in_bottleneck": False,
        "out_features": ["stage4"],
    }
    return config | {
        "use_timm_backbone": False,
        "use_pretrained_backbone": False,
        "backbone": None,
        "backbone_config": resnet,
    }


def added_by_us(file: WeightsFile) -> dict[str, Any]:
    """What a file of ours says that the published formats have no place for; empty for others."""
    return file.extra.get("cdetr_jax") or (file.config or {}).get("cdetr_jax") or {}


def hub_preprocessor(decoder: str, short_side_px: int, long_side_max_px: int) -> dict[str, Any]:
    """The hub's `preprocessor_config.json`."""
    return {
        "image_processor_type": "ConditionalDetrImageProcessor" if decoder == "conditional" else "DetrImageProcessor",
        "format": "coco_detection",
        "do_resize": True,
        "size": {"shortest_edge": short_side_px, "longest_edge": long_side_max_px},
        "resample": 2,  # bilinear
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(MEAN_RGB),
        "image_std": list(STD_RGB),
        "do_pad": True,
    }


_NOT_IN_TRANSFORMERS = ("backbone_norm", "reference_point", "spatial_query", "transformation", "temperature")


def _our_fields(file: WeightsFile) -> dict[str, Any]:
    fields = file.extra["cdetr_jax"].get("model", {})
    unknown = sorted(fields.keys() - published_fields().keys())
    if unknown:
        raise ValueError(f"{file.path}: its model has the fields {unknown}, unknown here; use a newer cdetr_jax")
    return published_fields() | fields


def _fields_of_shapes(shapes: Mapping[str, tuple[int, ...]], layout: Layout) -> dict[str, Any]:
    def name_of(path: str) -> str:
        return torch_name(path, layout)[0]

    def shape(path: str) -> tuple[int, ...]:
        if name_of(path) not in shapes:
            raise ValueError(f"the weights do not fit the model: missing {name_of(path)}")
        return shapes[name_of(path)]

    def count(path: str) -> int:
        """How many there are of what the path numbers with 9999: so that one that is missing is noticed."""
        pattern = re.compile(re.escape(name_of(f"{path}/conv1/kernel")).split("9999")[0] + r"(\d+)\.")
        found = [pattern.match(name) for name in shapes]
        return max((int(match[1]) + 1 for match in found if match), default=0)

    stages = tuple(count(f"backbone/layer{stage}_9999") for stage in (1, 2, 3, 4))
    is_deep = name_of("backbone/layer1_0/conv3/kernel") in shapes
    backbones = [name for name, sizes in STAGE_SIZES.items() if sizes == stages and BOTTLENECK[name] == is_deep]
    if not backbones:
        raise ValueError(
            f"the backbone has stages of {stages} {'bottleneck' if is_deep else 'basic'} blocks; expected one of "
            f"{', '.join(STAGE_SIZES)}"
        )
    decoder = "conditional" if any(".ca_qcontent_proj." in name for name in shapes) else "detr"
    num_queries, width = shape("query_embed")
    num_logits = shape("class_embed/bias")[0]
    return {
        "decoder": decoder,
        "backbone": backbones[0],
        "backbone_width": shape("backbone/conv1/kernel")[0],
        "backbone_norm": "frozen_batch" if any(name.endswith(".running_mean") for name in shapes) else "group",
        "width": width,
        "ffn_width": shape("transformer/decoder_layers_0/linear1/bias")[0],
        "encoder_layers": count("transformer/encoder_layers_9999"),
        "decoder_layers": count("transformer/decoder_layers_9999"),
        "num_queries": num_queries,
        "num_classes": num_logits if decoder == "conditional" else num_logits - 1,
        **HEADS[decoder],
    }


def _fields_of_hub_config(file: WeightsFile, fields: Mapping[str, Any]) -> dict[str, Any]:
    """What the hub's config says in other words than a field with a value."""
    config, where = file.config, file.path.with_name(CONFIG)
    expected = MODEL_TYPES[fields["decoder"]]
    choices = {"model_type": expected, "position_embedding_type": "sine", "activation_function": "relu"}
    for name, value in choices.items():
        if config.get(name, value) != value:
            raise ValueError(f"{where}: {name} is {config[name]!r}, expected {value!r}, of which the weights are")
    for ours, theirs in (("num_heads", "decoder_attention_heads"), ("ffn_width", "decoder_ffn_dim")):
        if config.get(theirs, fields[ours]) != fields[ours]:
            raise ValueError(
                f"{where}: {theirs} is {config[theirs]}, but {SAME_FIELDS[ours][0]} {fields[ours]}; expected the same"
            )
    inner = config.get("backbone_config") or {}
    if inner.get("model_type") == "resnet":
        is_deep = inner.get("layer_type", "bottleneck") == "bottleneck"
        depths = tuple(inner.get("depths", (3, 4, 6, 3)))
        names = [name for name, sizes in STAGE_SIZES.items() if sizes == depths and BOTTLENECK[name] == is_deep]
        if inner.get("downsample_in_first_stage") or inner.get("downsample_in_bottleneck"):
            raise ValueError(f"{where}: backbone_config strides elsewhere than torchvision's ResNet, which is ours")
        return {"backbone": names[0] if names else f"ResNet of {depths} blocks"}
    output_stride = inner.get("output_stride") or (config.get("backbone_kwargs") or {}).get("output_stride")
    name = config.get("backbone") or inner.get("backbone") or fields["backbone"]
    return {"backbone": name.split(".")[0], "dc5": bool(fields["dc5"] or output_stride == 16)}


def _check_fields(fields: Mapping[str, Any], file: WeightsFile) -> None:
    for name, default in published_fields().items():
        if type(fields[name]) is not type(default) and not (name == "dropout" and fields[name] == 0):
            raise ValueError(
                f"{file.path}: its config says {fields[name]!r} for what we call model.{name}, expected something like "
                f"{default!r}"
            )
    if fields["width"] % fields["num_heads"]:
        raise ValueError(
            f"{file.path}: {fields['num_heads']} attention heads do not divide the width {fields['width']}; say in a "
            "config.json beside it how many there are"
        )
    if fields["backbone"] not in STAGE_SIZES:
        raise ValueError(
            f"{file.path}: its backbone is {fields['backbone']!r}, expected one of {', '.join(STAGE_SIZES)}"
        )
