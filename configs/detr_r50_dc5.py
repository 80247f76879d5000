"""DETR DC5-R50, the baseline.

Published COCO val2017 AP: 36.7 after 50 epochs, 43.3 after 500.

    cdetr train --config=detr_r50_dc5 --workdir=W
"""

import ml_collections

from configs import detr_r50


def get_config(epochs: str = "50") -> ml_collections.ConfigDict:
    """`epochs`: 12, 36, 50, 75 or 108, as --config=detr_r50_dc5:75."""
    config = detr_r50.get_config(epochs)
    config.model.dc5 = True
    return config
