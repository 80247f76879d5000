"""Conditional DETR DC5-R50, 50 epochs unless told otherwise.

Published COCO val2017 AP: 43.8 after 50 epochs, 44.5 after 75, 45.1 after 108; 36.4 after 12 as reported by others.

    cdetr train --config=conditional_detr_r50_dc5 --workdir=W
"""

import ml_collections

from configs import common


def get_config(epochs: str = "50") -> ml_collections.ConfigDict:
    """`epochs`: 12, 36, 50, 75 or 108, as --config=conditional_detr_r50_dc5:75."""
    config = common.get_config(epochs)
    config.model.dc5 = True
    return config
