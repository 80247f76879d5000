"""The paper's ablations on drawn shapes, and those of our initialisation and temperature.

cdetr compare --config=ablations_demo --workdir=runs/ablations --seeds=0,1,2 --jobs=2
"""

import ml_collections

from configs import demo

_ONE_BY_ONE = {
    "Reference point (section 3.5)": {
        "reference point zero": {"model.reference_point": "zero"},
        "reference point learned": {"model.reference_point": "learned"},
    },
    # lambda_q times p_s without lambda_q is CSQ-P, and T the identity: one function.
    "Spatial query (table 3)": {
        "CSQ-C": {"model.spatial_query": "c"},
        "CSQ-T": {"model.spatial_query": "t"},
        "CSQ-P = T identity": {"model.spatial_query": "p"},
        "CSQ-I": {"model.spatial_query": "i"},
    },
    "Transformation (figure 5)": {
        "CSQ-P = T identity": {"model.spatial_query": "p"},
        "T scalar": {"model.transformation": "scalar"},
        "T block": {"model.transformation": "block"},
        "T full": {"model.transformation": "full"},
    },
    "Decoder layers and queries": {
        "1 decoder layer": {"model.decoder_layers": 1},
        "4 decoder layers": {"model.decoder_layers": 4},
        "15 queries": {"model.num_queries": 15},
        "60 queries": {"model.num_queries": 60},
    },
    "Initialisation and temperature": {
        "local_gain 6": {"model.local_gain": 6.0},
        "temperature 10000": {"model.temperature": 10000.0},
    },
}
VARIANTS = {"default": {}} | {name: changes for group in _ONE_BY_ONE.values() for name, changes in group.items()}
GROUPS = {title: ("default", *group) for title, group in _ONE_BY_ONE.items()}


def get_config() -> ml_collections.ConfigDict:
    """A model narrower than the demo's, with the published initialisation: 1000 steps of 8 pictures."""
    config = demo.get_config()
    config.model.local_gain = 0.0
    config.model.backbone_width = 8
    config.model.width = 64
    config.data.threads = 0
    config.data.synthetic.train_pictures = 1600
    config.data.synthetic.eval_pictures = 200
    config.data.synthetic.max_objects = 4
    config.data.synthetic.sides = (0.15, 0.5)
    config.optimizer.lr = 1e-3
    config.optimizer.drop_epoch = 4
    config.train.batch_size = 8
    config.train.num_epochs = 5
    config.eval.every_epochs = 1
    return config
