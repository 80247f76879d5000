"""A COCO folder small enough to write anew for each test."""

import json

import numpy as np
import pytest
from PIL import Image


@pytest.fixture
def content():
    """Instances of three pictures, on purpose not in order of id; height 30, width 40 each."""
    return {
        "images": [
            {"id": image_id, "file_name": f"{name}.png", "height": 30, "width": 40}
            for image_id, name in ((90_000_000_007, "c"), (-3, "a"), (11, "b"))
        ],
        "categories": [{"id": 700, "name": "kite"}, {"id": 2, "name": "oak"}],
        "annotations": [
            {"id": 1, "image_id": 11, "category_id": 700, "bbox": [1, 2, 10.5, 20]},
            {"id": 2, "image_id": -3, "category_id": 2, "bbox": [0, 0, 40, 30], "iscrowd": 1, "area": 77},
            {"id": 3, "image_id": 11, "category_id": 2, "bbox": [5, 6, 7, 8], "iscrowd": 0, "area": 9.5},
        ],
    }


@pytest.fixture
def write(tmp_path):
    """Returns a function that writes instances and their pictures; it returns the arguments of CocoFolder."""

    def write(content):
        folder, file = tmp_path / "pictures", tmp_path / "instances.json"
        folder.mkdir(exist_ok=True)
        file.write_text(content if isinstance(content, str) else json.dumps(content))
        for k, image in enumerate(content["images"] if isinstance(content, dict) and "images" in content else []):
            pixels = np.full((30, 40, 3), 20 * k, np.uint8)
            if isinstance(image, dict) and isinstance(image.get("file_name"), str):
                Image.fromarray(pixels).save(folder / image["file_name"])
        return folder, file

    return write
