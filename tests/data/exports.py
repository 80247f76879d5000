"""Four drawn pictures with the same objects, written as each tool exports them; knows nothing of the readers."""

import json

import numpy as np
from PIL import Image

NAMES = ("kite", "oak")
# Of each split: file name, width, height, and of each object its class and left, top, right, bottom in pixels.
PICTURES = {
    "train": [
        ("a.png", 40, 30, [("oak", 0, 0, 10, 20), ("kite", 5, 7, 40, 30)]),
        ("b.png", 30, 40, [("kite", 3, 3, 8, 9)]),
        ("empty.png", 40, 30, []),
    ],
    "valid": [("c.png", 50, 30, [("oak", 11, 0, 50, 13)])],
}


def _draw(path, width, height, seed):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)).save(path)


def _each():
    for split, pictures in PICTURES.items():
        for i, picture in enumerate(pictures):
            yield split, i + 100 * (split == "valid"), *picture


def roboflow_coco(folder):
    for split, pictures in PICTURES.items():
        ids = {name: i for i, name in enumerate(("things", *NAMES))}
        categories = [{"id": i, "name": n, "supercategory": "things" if i else "none"} for n, i in ids.items()]
        content = {"categories": categories, "images": [], "annotations": []}
        for i, (name, width, height, objects) in enumerate(pictures):
            content["images"].append({"id": i, "file_name": name, "height": height, "width": width})
            content["annotations"] += [
                {"id": 10 * i + k, "image_id": i, "category_id": ids[label], "bbox": [x, y, r - x, b - y], "iscrowd": 0}
                for k, (label, x, y, r, b) in enumerate(objects)
            ]
            _draw(folder / split / name, width, height, len(name) + width + i)
        (folder / split / "_annotations.coco.json").write_text(json.dumps(content))


def coco(folder):
    """The layout of COCO itself."""
    roboflow_coco(folder)
    (folder / "annotations").mkdir()
    for split, name in (("train", "train2017"), ("valid", "val2017")):
        (folder / split).rename(folder / name)
        (folder / name / "_annotations.coco.json").rename(folder / "annotations" / f"instances_{name}.json")


def yolo(folder):
    for split, seed, name, width, height, objects in _each():
        _draw(folder / split / "images" / name, width, height, seed)
        lines = [
            f"{NAMES.index(label)} {(x + r) / 2 / width} {(y + b) / 2 / height} {(r - x) / width} {(b - y) / height}"
            for label, x, y, r, b in objects
        ]
        label = folder / split / "labels" / name.replace(".png", ".txt")
        label.parent.mkdir(exist_ok=True)
        label.write_text("\n".join(lines))
    (folder / "data.yaml").write_text(
        f"train: ../train/images\nval: ../valid/images\ntest: ../test/images\n\nnc: 2\nnames: {list(NAMES)}\n"
    )


def _xml(name, width, height, objects, shift, database):
    lines = ["<annotation>", f"<filename>{name}</filename>", f"<source><database>{database}</database></source>"]
    lines += [f"<size><width>{width}</width><height>{height}</height></size>"]
    for label, *corners in objects:
        sides = zip(("xmin", "ymin", "xmax", "ymax"), corners, shift, strict=True)
        box = "".join(f"<{side}>{corner + by}</{side}>" for side, corner, by in sides)
        lines += ["<object>", f"<name>{label}</name>", f"<bndbox>{box}</bndbox>", "</object>"]
    return "\n".join([*lines, "</annotation>"])


def voc(folder, shift=(1, 1, 0, 0), database="The VOC2007 Database", pictures=slice(None)):
    for split, seed, name, width, height, objects in list(_each())[pictures]:
        _draw(folder / "JPEGImages" / name, width, height, seed)
        stem = name.removesuffix(".png")
        for path, text in (
            (folder / "Annotations" / f"{stem}.xml", _xml(name, width, height, objects, shift, database)),
            (folder / "ImageSets" / "Main" / f"{split.removesuffix('id')}.txt", f"{stem}\n"),
        ):
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a") as file:
                file.write(text)


def voc_labelimg(folder):
    voc(folder, (0, 0, 0, 0), "Unknown")


def voc_years(folder):
    for year, pictures in (("VOC2007", slice(0, None, 2)), ("VOC2012", slice(1, None, 2))):
        voc(folder / year, pictures=pictures)
    (folder / "devkit_doc").mkdir()


def voc_roboflow(folder):
    for split, seed, name, width, height, objects in _each():
        _draw(folder / split / name, width, height, seed)
        text = _xml(name, width, height, objects, (1, 1, 1, 1), "roboflow.com")
        (folder / split / name.replace(".png", ".xml")).write_text(text)


FORMATS = {f.__name__: f for f in (coco, roboflow_coco, yolo, voc, voc_labelimg, voc_years, voc_roboflow)}
