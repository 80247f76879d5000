"""COCO 2017 in small: archives in COCO's own layout, with pictures that are drawn here."""

import io
import json
import zipfile

import numpy as np
from PIL import Image

from cdetr_jax.data.coco_categories import COCO_CATEGORIES

CATEGORIES = [{"id": c.id, "name": c.name, "supercategory": "thing"} for c in COCO_CATEGORIES]
FILE_NAMES = (
    "train2017.zip",
    "val2017.zip",
    "test2017.zip",
    "annotations_trainval2017.zip",
    "image_info_test2017.zip",
)
WITHOUT_BOXES = 2  # which pictures of a split are special, by their place
GRAY, CMYK = 1, 3


def write_archives(folder):
    """Writes the archives that TFDS's coco/2017 wants, and unpacks them beside. Returns: the folder of the unpacked."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(9)
    contents = {}
    for split, count in (("train2017", 6), ("val2017", 9), ("test2017", 1)):
        instances = {"images": [], "annotations": [], "categories": CATEGORIES}
        with zipfile.ZipFile(folder / f"{split}.zip", "w") as archive:
            # As in COCO neither the ids are in a row nor the list is in their order.
            for place, image_id in enumerate(rng.permutation(np.arange(1, count + 1) * 37).tolist()):
                height, width = rng.integers(101, 640, 2).tolist()
                name = f"{image_id:012d}.jpg"
                archive.writestr(f"{split}/{name}", _jpeg(rng, height, width, place))
                instances["images"].append({"id": image_id, "file_name": name, "height": height, "width": width})
                if place != WITHOUT_BOXES:
                    _annotate(rng, instances["annotations"], image_id, height, width)
        contents[split] = instances
    with zipfile.ZipFile(folder / "annotations_trainval2017.zip", "w") as archive:
        for split in ("train2017", "val2017"):
            archive.writestr(f"annotations/instances_{split}.json", json.dumps(contents[split]))
    with zipfile.ZipFile(folder / "image_info_test2017.zip", "w") as archive:
        test = {name: contents["test2017"][name] for name in ("images", "categories")}
        archive.writestr("annotations/image_info_test2017.json", json.dumps(test))
    for name in FILE_NAMES:
        with zipfile.ZipFile(folder / name) as archive:
            archive.extractall(folder / "unpacked")
    return folder / "unpacked"


def _jpeg(rng, height, width, place):
    coarse = Image.fromarray(rng.integers(0, 256, (5, 7, 3), np.uint8)).resize((width, height))
    stream = io.BytesIO()
    coarse.convert({GRAY: "L", CMYK: "CMYK"}.get(place, "RGB")).save(stream, "JPEG")
    return stream.getvalue()


def _annotate(rng, annotations, image_id, height, width):
    """Boxes, most with two decimals, up to the border; areas of the outline or of the box, many at COCO's limits."""
    for kind in rng.integers(0, 8, 25).tolist():
        x, y = np.round(rng.uniform(0, [width - 40, height - 40]), 2).tolist()
        w, h = np.round(rng.uniform(2, [width - x, height - y]), 2).tolist()
        area = w * h * 0.6
        if kind == 0:
            w, h, area = 32.0, 32.0, 1024.0  # fills its box, and is both small and medium
        elif kind == 1:
            w, h = round(width - x, 2), round(height - y, 2)
            area = w * h
        elif kind in (3, 4):  # the same at a place that float32 does not keep, and both medium and large
            w = h = 32.0 if kind == 3 else 96.0
            x, y = rng.uniform(0, [width - w, height - h]).tolist()
            area = w * h
        elif kind == 2:
            area = float(rng.choice([1023.0, 1024.0, 9215.0, 9216.0])) + rng.uniform(0.01, 0.99)
        annotations.append(
            {
                "id": 1000 + len(annotations) * 3,
                "image_id": image_id,
                "category_id": int(rng.choice([1, 13, 27, 90])),
                "bbox": [x, y, w, h],
                "area": area,
                "iscrowd": int(rng.uniform() < 0.1),
                "segmentation": [],
            }
        )


def detections(instances, seed=3):
    """Results in COCO's format, good and bad ones, for the pictures of an instances file."""
    rng = np.random.default_rng(seed)
    results = []
    for annotation in instances["annotations"]:
        x, y, w, h = annotation["bbox"]
        for spread in (0.02, 0.1, 0.3):
            dx, dy, dw, dh = rng.normal(0, spread, 4)
            box = [x + dx * w, y + dy * h, w * np.exp(dw), h * np.exp(dh)]
            category = annotation["category_id"] if rng.uniform() < 0.9 else 90
            results.append(
                {
                    "image_id": annotation["image_id"],
                    "category_id": category,
                    "bbox": [float(v) for v in box],
                    "score": float(rng.uniform()),
                }
            )
    return results
