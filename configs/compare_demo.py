"""Figure 2 and table 4 of the paper on drawn shapes: the same model, budget and data, DETR's parts changed one by one.

cdetr compare --config=configs/compare_demo.py --workdir=runs/compare
"""

import ml_collections

from configs import demo

# The first is the baseline: epochs are counted until the others have its final AP.
VARIANTS = {
    "DETR": {
        "model.decoder": "detr",
        "model.class_loss": "softmax",
        "model.box_offset": False,
        "matcher.class_cost": 1.0,
        "loss.class_weight": 1.0,
    },
    "DETR + focal loss": {"model.decoder": "detr", "model.box_offset": False},
    "DETR + box offset": {
        "model.decoder": "detr",
        "model.class_loss": "softmax",
        "matcher.class_cost": 1.0,
        "loss.class_weight": 1.0,
    },
    "DETR + both": {"model.decoder": "detr"},
    "Conditional DETR": {},
}


def get_config() -> ml_collections.ConfigDict:
    """The demo's model with the published initialisation, evaluated every epoch."""
    config = demo.get_config()
    config.model.local_gain = 0.0
    config.eval.every_epochs = 1
    return config
