r"""Your own pictures: folders and COCO instances JSON files with any category ids and names.

    cdetr train --config=coco_folder --workdir=W \
        --config.data.train_images=my/train --config.data.train_annotations=my/train.json \
        --config.data.eval_images=my/val --config.data.eval_annotations=my/val.json

It starts from the published COCO detector, which is downloaded once; the class head is made new for your classes. To
start from an ImageNet backbone alone add --config.init=hf://timm/resnet50.tv_in1k (and train for longer); without a
network name a local copy of either, such as --config.init=my/conditional-detr-resnet-50. Pictures of at most 640
pixels, batch 4. Not measured yet with the published weights.
"""

import ml_collections

from configs import common


def get_config() -> ml_collections.ConfigDict:
    """The published model; classes are counted from the annotations."""
    config = common.get_config()
    config.init = "hf://microsoft/conditional-detr-resnet-50"
    config.model.num_classes = 0

    config.data.class_ids = "contiguous"
    config.data.train_images = ""
    config.data.train_annotations = ""
    config.data.eval_images = ""
    config.data.eval_annotations = ""
    config.data.train_shapes = ((480, 640), (640, 480), (640, 640))
    config.data.eval_shapes = ((480, 640), (640, 480), (640, 640))
    config.data.short_sides_px = (320, 352, 384, 416, 448, 480)
    config.data.long_side_max_px = 640
    config.data.crop_short_sides_px = (400, 500, 600)
    config.data.crop_sides_px = (256, 480)
    config.data.eval_short_side_px = 480

    config.optimizer.warmup_steps = 200
    config.optimizer.drop_epoch = 40
    config.train.num_epochs = 50
    config.train.batch_size = 4
    config.eval.batch_size = 4
    config.eval.every_epochs = 5
    return config
