"""Conditional DETR DC5-R101, 50 epochs unless told otherwise.

Published COCO val2017 AP: 45.0 after 50 epochs, 45.6 after 75, 45.9 after 108.

    cdetr train --config=conditional_detr_r101_dc5 --workdir=W
"""

import ml_collections

from configs import common


def get_config(epochs: str = "50") -> ml_collections.ConfigDict:
    """`epochs`: 12, 36, 50, 75 or 108, as --config=conditional_detr_r101_dc5:75."""
    config = common.get_config(epochs)
    config.init = "hf://timm/resnet101.tv_in1k"
    config.model.backbone = "resnet101"
    config.model.dc5 = True
    return config
