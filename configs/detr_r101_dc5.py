"""DETR DC5-R101, the baseline.

Published COCO val2017 AP: 38.6 after 50 epochs, 44.9 after 500.

    cdetr train --config=detr_r101_dc5 --workdir=W
"""

import ml_collections

from configs import detr_r50


def get_config(epochs: str = "50") -> ml_collections.ConfigDict:
    """`epochs`: 12, 36, 50, 75 or 108, as --config=detr_r101_dc5:75."""
    config = detr_r50.get_config(epochs)
    config.init = "hf://timm/resnet101.tv_in1k"
    config.model.backbone = "resnet101"
    config.model.dc5 = True
    return config
