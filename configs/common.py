"""Every field of a run, written once, with the published recipe's values (Conditional DETR R50, 50 epochs).

The other files in this folder start from here and change only their own lines. Override any field on the command
line: `--config.optimizer.lr=2e-4`. The config is locked: a field that is not listed here is an error.
"""

import ml_collections
from ml_collections import config_dict

from cdetr_jax.models.detector import published_fields

# Epochs of a run: the epoch from which both learning rates are times 0.1. 50, 75 and 108 as published; 12 as in the
# papers that report a short schedule.
DROP_EPOCHS = {"12": 11, "36": 30, "50": 40, "75": 60, "108": 80}


def get_config(epochs: str = "50") -> ml_collections.ConfigDict:
    """The published Conditional DETR R50 recipe on COCO: batch 16, 50 epochs, learning rate drop after 40.

    `epochs` comes from the command line: --config=conditional_detr_r50:108
    """
    if epochs not in DROP_EPOCHS:
        raise ValueError(f"there is no recipe for {epochs} epochs, only for {', '.join(DROP_EPOCHS)}")
    config = ml_collections.ConfigDict()
    config.seed = 0
    # What a new run starts from: a ResNet or a detector, as a hub name, file, folder or workdir; "": random weights.
    # A detector's class head for other classes is made new. Without a network: name a local copy of the file.
    config.init = "hf://timm/resnet50.tv_in1k"

    # decoder, backbone, dc5, num_queries, ...: every field with its choices is in cdetr_jax/models/detector.py.
    config.model = ml_collections.ConfigDict(published_fields())

    config.matcher = matcher = ml_collections.ConfigDict()
    matcher.class_cost = 2.0
    matcher.l1_cost = 5.0
    matcher.giou_cost = 2.0

    config.loss = loss = ml_collections.ConfigDict()
    loss.class_weight = 2.0
    loss.l1_weight = 5.0
    loss.giou_weight = 2.0
    loss.focal_alpha = 0.25
    loss.focal_gamma = 2.0
    loss.no_object_weight = 0.1  # softmax only

    config.data = data = ml_collections.ConfigDict()
    data.source = "coco_folder"  # folder | coco_folder | tfds | coco_folder+tfds | synthetic
    # folder: COCO, YOLO or Pascal VOC, found out; --data=FOLDER sets these. train_split and eval_split, below, name its
    # splits: train, validation, test. Where it has but one, a part is held out, as the seed decides, and written down.
    data.folder = ""
    data.split_file = ""  # JSON with the names of both parts: used if it is there, else written
    data.split_seed = 0
    # Several folders, or several TFDS sets: the names with commas between them, as in "a/train,b/train" (a single path
    # may have a comma itself). Categories are joined by name. With coco_folder+tfds an empty name leaves that part
    # out, for example of the evaluation.
    data.train_images = "data/coco/train2017"  # coco_folder: folder of the pictures
    data.train_annotations = "data/coco/annotations/instances_train2017.json"  # coco_folder: instances JSON
    data.eval_images = "data/coco/val2017"
    data.eval_annotations = "data/coco/annotations/instances_val2017.json"
    data.tfds_name = "coco/2017"  # tfds: a set with objects/bbox and objects/label, made by `cdetr prepare`
    data.tfds_data_dir = "data/tfds"  # tfds: --data_dir of `cdetr prepare`
    data.train_split = "train"  # folder; tfds: as TFDS writes it, "train+validation" or "train[:1%]" too
    data.eval_split = "validation"
    data.class_ids = "category_id"  # category_id: logit = COCO id (published) | contiguous: logit = rank of the id
    data.on_error = "raise"  # raise: stop at a damaged picture and name it | skip: replace it, count it
    data.max_bad_fraction = 0.01  # with skip: a process stops after more damaged pictures than this, but one may be
    data.workers = 0  # processes that read pictures; 0: threads of this one do, as fast where cores are few
    data.threads = 0  # of each process that reads; 0: one for each core, all processes together
    data.max_targets = 0  # T, objects an image can hold; 0: one of two sizes, by what each batch needs
    # Padded (H, W) in pixels, each a program to compile. (): chosen from the data's sizes, num_... of them, so that the
    # least is padded.
    data.train_shapes = ()
    data.eval_shapes = ()
    data.num_train_shapes = 12
    data.num_eval_shapes = 5
    data.last_batch = "drop"  # pictures that fill no batch: drop, as published | fill: others of the epoch join them
    data.short_sides_px = (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800)
    data.long_side_max_px = 1333
    data.flip_probability = 0.5
    data.crop_probability = 0.5
    data.crop_short_sides_px = (400, 500, 600)  # resized to one of these before the crop
    data.crop_sides_px = (384, 600)  # sides of the crop window, from and to
    data.eval_short_side_px = 800
    data.synthetic = synthetic = ml_collections.ConfigDict()
    synthetic.train_pictures = 2000
    synthetic.eval_pictures = 200
    synthetic.height = 128
    synthetic.width = 128
    synthetic.max_objects = 6
    synthetic.sides = (0.12, 0.5)  # longer side of a box, from and to, as fractions of the picture's shorter side
    synthetic.hue_by_class = True  # False: classes differ in shape alone

    config.optimizer = optimizer = ml_collections.ConfigDict()
    optimizer.lr = 1e-4
    optimizer.backbone_lr = 1e-5
    optimizer.weight_decay = 1e-4
    optimizer.clip_norm = 0.1  # global gradient norm
    optimizer.warmup_steps = 0
    optimizer.drop_epoch = DROP_EPOCHS[epochs]  # both learning rates times drop_factor from this epoch on
    optimizer.drop_factor = 0.1
    optimizer.ema_decay = 0.0  # 0: no moving average of the weights; else it is what evaluation and prediction use

    config.train = train = ml_collections.ConfigDict()
    # Pictures per optimiser step, over all devices and processes: a multiple of their number times accumulation_steps,
    # or on one machine fewer pictures than devices, which then get one each while the others have no work.
    train.batch_size = 16
    train.accumulation_steps = 1  # micro-batches of a step, one after the other, each of one padded shape
    train.num_epochs = int(epochs)
    train.max_steps = config_dict.placeholder(int)  # stop earlier, for a trial
    train.log = "tensorboard"  # besides metrics.jsonl: tensorboard, csv, wandb, mlflow, with commas between; or none
    train.log_every_steps = 50
    train.checkpoint_every_steps = 1000  # and at the end of every epoch
    train.keep_checkpoints = 2  # the last n, and the best by AP

    config.eval = evaluation = ml_collections.ConfigDict()
    evaluation.batch_size = 8  # rounded up to a multiple of the number of devices
    evaluation.every_epochs = 1  # 0: never, and no evaluation pictures are needed
    evaluation.top_k = 100  # detections per picture

    return config.lock()
