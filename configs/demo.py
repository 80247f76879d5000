"""Drawn shapes, small enough to learn in minutes on two CPU cores. No files needed.

cdetr train --config=demo --workdir=runs/demo
"""

import ml_collections

from configs import common


def get_config() -> ml_collections.ConfigDict:
    """A narrow ResNet-18 with group norm, trained from scratch."""
    config = common.get_config()
    with config.unlocked():
        config.init = ""
        model = config.model
        model.backbone = "resnet18"
        model.backbone_width = 16
        model.backbone_norm = "group"
        model.frozen_stages = 0
        model.dc5 = True
        model.width = 128
        model.num_heads = 8
        model.ffn_width = 256
        model.encoder_layers = 1
        model.decoder_layers = 2
        model.num_queries = 30
        model.dropout = 0.0
        model.temperature = 20.0
        model.local_gain = 6.0
        model.num_classes = 0

        data = config.data
        data.source = "synthetic"
        data.synthetic.height = 96
        data.synthetic.width = 96
        data.synthetic.max_objects = 4
        data.class_ids = "contiguous"
        data.threads = 2
        data.train_shapes = ((96, 96),)
        data.eval_shapes = ((96, 96),)
        data.short_sides_px = (96,)
        data.long_side_max_px = 96
        data.crop_probability = 0.0
        data.eval_short_side_px = 96

        config.optimizer.lr = 5e-4
        config.optimizer.backbone_lr = 1e-3
        config.optimizer.warmup_steps = 50
        config.optimizer.clip_norm = 0.0
        config.optimizer.drop_epoch = 11

        config.train.num_epochs = 14
        config.train.batch_size = 16
        config.train.log_every_steps = 25
        config.eval.batch_size = 20
        config.eval.every_epochs = 2
    return config.lock()
