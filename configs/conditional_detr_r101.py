"""Conditional DETR R101, 50 epochs unless told otherwise.

Published COCO val2017 AP: 42.8 after 50 epochs, 43.7 after 75, 44.5 after 108.

    cdetr train --config=conditional_detr_r101 --workdir=W
"""

import ml_collections

from configs import common


def get_config(epochs: str = "50") -> ml_collections.ConfigDict:
    """`epochs`: 12, 36, 50, 75 or 108, as --config=conditional_detr_r101:75."""
    config = common.get_config(epochs)
    config.init = "hf://timm/resnet101.tv_in1k"
    config.model.backbone = "resnet101"
    return config
