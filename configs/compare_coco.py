"""DETR and Conditional DETR on COCO at full size, four backbones each: tables 1 and 2. For a pod.

Published COCO val2017 AP after 50 epochs: DETR 34.9, 36.7 (DC5), 36.9 (R101), 38.6 (DC5-R101); Conditional DETR 40.9,
43.8, 42.8, 45.0. Not run by this project yet.

    cdetr compare --config=compare_coco --workdir=W

Variants train one after the other, each on all devices of one machine. On several machines start `cdetr train` with
each variant's fields and the folder that this command names for it, W/detr-r50/seed0 for example; then report with
--report-only.
"""

import ml_collections

from configs import common

_DETR = {
    "model.decoder": "detr",
    "model.num_queries": 100,
    "model.class_loss": "softmax",
    "model.box_offset": False,
    "matcher.class_cost": 1.0,
    "loss.class_weight": 1.0,
}
_R101 = {"model.backbone": "resnet101", "init": "hf://timm/resnet101.tv_in1k"}
_BACKBONES = {"R50": {}, "DC5-R50": {"model.dc5": True}, "R101": _R101, "DC5-R101": {**_R101, "model.dc5": True}}
_DECODERS = {"DETR": _DETR, "Conditional DETR": {}}

VARIANTS = {
    f"{decoder} {backbone}": {**of_decoder, **of_backbone}
    for backbone, of_backbone in _BACKBONES.items()
    for decoder, of_decoder in _DECODERS.items()
}
GROUPS = {backbone: tuple(f"{decoder} {backbone}" for decoder in _DECODERS) for backbone in _BACKBONES}


def get_config(epochs: str = "50") -> ml_collections.ConfigDict:
    """`epochs`: 12, 36, 50, 75 or 108, as --config=compare_coco:12."""
    return common.get_config(epochs)
