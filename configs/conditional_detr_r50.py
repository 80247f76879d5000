"""Conditional DETR R50, 50 epochs unless told otherwise.

Published COCO val2017 AP: 40.9 after 50 epochs, 42.1 after 75, 43.0 after 108; as reported by others 32.6 after 12
and 39.4 after 36.

    cdetr train --config=conditional_detr_r50 --workdir=W
"""

import ml_collections

from configs import common


def get_config(epochs: str = "50") -> ml_collections.ConfigDict:
    """`epochs`: 12, 36, 50, 75 or 108, as --config=conditional_detr_r50:75."""
    return common.get_config(epochs)
