"""The small run of all tests that train, on `configs/demo.py`: what one of their processes compiles, the others find.

Two micro-batches of one picture a device are a step, two steps an epoch. Dropout and the moving average are on. The
model is of the published form, and pictures are padded to what their sides say, as the hub's files can say it.
"""

ONE_BLOCK_A_STAGE = (1, 1, 1, 1)
FIELDS = {
    "model.backbone_width": 8,
    "model.backbone_norm": "frozen_batch",
    "model.dc5": False,
    "model.temperature": 10000.0,
    "model.width": 16,
    "model.num_heads": 2,
    "model.ffn_width": 16,
    "model.num_queries": 7,
    "model.dropout": 0.1,
    "data.max_targets": 4,
    "data.train_shapes": ((64, 64),),
    "data.eval_shapes": ((64, 64),),
    "data.short_sides_px": (64,),
    "data.long_side_max_px": 64,
    "data.eval_short_side_px": 64,
    "data.synthetic.train_pictures": 8,
    "data.synthetic.height": 32,
    "optimizer.lr": 1e-3,
    "optimizer.backbone_lr": 5e-4,
    "optimizer.warmup_steps": 4,
    "optimizer.ema_decay": 0.9,
    "train.batch_size": 4,
    "train.accumulation_steps": 2,
    "train.log_every_steps": 1,
    "eval.batch_size": 2,
}
