"""DETR and Conditional DETR on drawn shapes under one budget, with DETR's parts one by one: table 4.

cdetr compare --config=compare_demo --workdir=runs/compare --jobs=2
"""

import ml_collections

from configs import demo

_SOFTMAX = {"model.class_loss": "softmax", "matcher.class_cost": 1.0, "loss.class_weight": 1.0}

# The first is the baseline: epochs are counted until the others have its final AP.
VARIANTS = {
    "DETR": {"model.decoder": "detr", "model.box_offset": False, **_SOFTMAX},
    "DETR + focal loss": {"model.decoder": "detr", "model.box_offset": False},
    "DETR + box offset": {"model.decoder": "detr", **_SOFTMAX},
    "DETR + both": {"model.decoder": "detr"},
    "Conditional DETR (published initialisation)": {"model.local_gain": 0.0},
    "Conditional DETR": {},
}


def get_config() -> ml_collections.ConfigDict:
    """The demo, shorter, and evaluated after every epoch."""
    config = demo.get_config()
    config.optimizer.drop_epoch = 8
    config.train.num_epochs = 10
    config.eval.every_epochs = 1
    return config
