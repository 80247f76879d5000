r"""Your own pictures, small: DETR and Conditional DETR from random weights under one budget.

    cdetr compare --config=compare_folder --workdir=runs/compare \
        --config.data.train_images=my/train --config.data.train_annotations=my/train.json \
        --config.data.eval_images=my/val --config.data.eval_annotations=my/val.json
"""

import ml_collections

from configs import coco_folder_small
from configs.compare_demo import VARIANTS  # noqa: F401  read by the command


def get_config() -> ml_collections.ConfigDict:
    """The recipe for small pictures."""
    return coco_folder_small.get_config()
