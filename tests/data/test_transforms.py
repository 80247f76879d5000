import dataclasses

import numpy as np
import pytest
from PIL import Image
from published import draw_plan

from cdetr_jax.data.plan import ROW, Augmentation, eval_plan
from cdetr_jax.data.transforms import (
    count_training_objects,
    resize_for_evaluation,
    training_objects,
    transform_boxes,
    transform_picture,
)
from cdetr_jax.structs import Record

HEIGHT, WIDTH = 53, 71


def _record(boxes, *, is_crowd=None, category_ids=None):
    boxes = np.array(boxes, np.float64).reshape(-1, 4)
    return Record(
        image_id=7,
        file_name="seven.png",
        height=HEIGHT,
        width=WIDTH,
        boxes_xywh_px=boxes,
        category_ids=np.arange(len(boxes)) + 10 if category_ids is None else np.array(category_ids),
        is_crowd=np.zeros(len(boxes), bool) if is_crowd is None else np.array(is_crowd),
        areas=boxes[:, 2] * boxes[:, 3],
    )


def _row(**fields):
    row = np.zeros((), ROW)
    for name, value in fields.items():
        row[name] = value
    return row[()]


def _apply(image, record, row):
    return np.asarray(transform_picture(Image.fromarray(image), row)), *transform_boxes(record, row)


IMAGE = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)


def _published(image, record, row):
    """METHOD's words, one picture and one box at a time: flip, then a resize, or a resize, a crop and a resize."""
    picture, objects = Image.fromarray(image), []
    full_height, full_width = image.shape[:2]
    for (x, y, w, h), category, crowd in zip(record.boxes_xywh_px, record.category_ids, record.is_crowd, strict=True):
        box = [max(x, 0), max(y, 0), min(x + w, full_width), min(y + h, full_height)]
        if not crowd and box[2] > box[0] and box[3] > box[1]:
            objects.append((box, category))

    def resize(picture, objects, size_hw):
        height, width = (int(v) for v in size_hw)
        rx, ry = width / picture.width, height / picture.height
        objects = [([b[0] * rx, b[1] * ry, b[2] * rx, b[3] * ry], c) for b, c in objects]
        return picture.resize((width, height), Image.BILINEAR), objects

    if row["flip"]:
        picture = picture.transpose(Image.FLIP_LEFT_RIGHT)
        objects = [([full_width - b[2], b[1], full_width - b[0], b[3]], c) for b, c in objects]
    if row["crop"]:
        picture, objects = resize(picture, objects, row["first_hw"])
        top, left, height, width = (int(v) for v in row["window"])
        picture = picture.crop((left, top, left + width, top + height))
        cropped = []
        for b, c in objects:
            box = [
                min(max(b[0] - left, 0), width),
                min(max(b[1] - top, 0), height),
                min(max(b[2] - left, 0), width),
                min(max(b[3] - top, 0), height),
            ]
            if box[2] > box[0] and box[3] > box[1]:
                cropped.append((box, c))
        objects = cropped
    picture, objects = resize(picture, objects, row["size_hw"])
    w, h = picture.size
    boxes = [[(b[0] + b[2]) / 2 / w, (b[1] + b[3]) / 2 / h, (b[2] - b[0]) / w, (b[3] - b[1]) / h] for b, _ in objects]
    return np.array(picture), np.array(boxes).reshape(-1, 4), [c for _, c in objects]


def test_drawn_rows_give_the_published_picture_and_boxes():
    rng = np.random.default_rng(1)
    corners = rng.uniform(-10, 60, (12, 2))
    record = _record(np.concatenate([corners, rng.uniform(-5, 30, (12, 2))], -1), is_crowd=rng.random(12) < 0.2)
    settings = Augmentation((40, 61, 79), 97, 0.5, 0.5, (45, 53), (20, 44))
    rows = draw_plan(np.tile((HEIGHT, WIDTH), (120, 1)), settings, [(97, 97)], batch_size=1, seed=0, epoch=0).rows[:, 0]
    dropped = 0
    for row in rows:
        image, boxes, category_ids = _apply(IMAGE, record, row)
        expected = _published(IMAGE, record, row)
        np.testing.assert_array_equal(image, expected[0])
        np.testing.assert_array_equal(boxes, expected[1].astype(np.float32))
        np.testing.assert_array_equal(category_ids, expected[2])
        assert boxes.dtype == np.float32
        dropped += len(training_objects(record)[0]) - len(boxes)
    assert dropped > 0  # some boxes did lie outside a window
    assert len(np.unique(rows[["flip", "crop"]])) == 4


def test_published_sizes_give_the_published_picture_and_boxes():
    """As the test above, with the published settings and pictures of COCO's sizes: every branch, flipped and not."""
    settings = Augmentation(tuple(range(480, 801, 32)), 1333, 0.5, 0.5, (400, 500, 600), (384, 600))
    sizes = [(480, 640), (640, 427), (218, 640)]
    rng = np.random.default_rng(2)
    plan = draw_plan(np.tile(sizes, (10, 1)), settings, [(1344, 1344)], batch_size=1, seed=1, epoch=0)
    for row in plan.rows[:, 0]:
        height, width = sizes[row["index"] % 3]
        image = rng.integers(0, 256, (height, width, 3), np.uint8)
        corners = rng.uniform(-20, (width, height), (9, 2)).round(2)
        boxes = np.concatenate([corners, rng.uniform(-20, 300, (9, 2)).round(2)], -1)
        record = dataclasses.replace(_record(boxes, is_crowd=rng.random(9) < 0.2), height=height, width=width)
        picture, boxes, category_ids = _apply(image, record, row)
        expected = _published(image, record, row)
        np.testing.assert_array_equal(picture, expected[0])
        np.testing.assert_array_equal(boxes, expected[1].astype(np.float32))
        np.testing.assert_array_equal(category_ids, expected[2])
    assert len(np.unique(plan.rows[["flip", "crop"]])) == 4


def test_flip_moves_boxes_with_their_pixels():
    image = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    image[10:20, 5:35] = 255
    flipped, boxes, _ = _apply(image, _record([5, 10, 30, 10]), _row(flip=True, size_hw=(HEIGHT, WIDTH)))
    assert (flipped[10:20, 36:66] == 255).all()
    assert flipped.sum() == image.sum()
    np.testing.assert_allclose(boxes, [[51 / 71, 15 / 53, 30 / 71, 10 / 53]], rtol=1e-6)


def test_crop_clips_boxes_and_drops_those_outside():
    row = _row(crop=True, first_hw=(106, 142), window=(20, 40, 50, 80), size_hw=(25, 20))
    # In the doubled picture: across the window's corner, inside, left of it, touching its right side from outside.
    record = _record([[15, 5, 15, 10], [30, 20, 10, 10], [0, 0, 20, 50], [60, 10, 5, 5]])
    image, boxes, category_ids = _apply(IMAGE, record, row)
    assert image.shape == (25, 20, 3)
    np.testing.assert_array_equal(category_ids, [10, 11])
    np.testing.assert_allclose(boxes, [[10 / 80, 5 / 50, 20 / 80, 10 / 50], [30 / 80, 30 / 50, 0.25, 0.4]], rtol=1e-6)


def test_unusable_objects_are_left_out():
    record = _record(
        [
            [-5, -5, 20, 20],  # reaches out at the upper left
            [60, 40, 50, 50],  # and at the lower right
            [80, 10, 5, 5],  # wholly outside
            [10, 10, 0, 9],
            [30, 30, -9, 9],
            [1, 2, 3, 4],
        ],
        is_crowd=[False] * 5 + [True],
    )
    boxes, category_ids = training_objects(record)
    np.testing.assert_array_equal(boxes, [[0, 0, 15, 15], [60, 40, 71, 53]])
    np.testing.assert_array_equal(category_ids, [10, 11])


def test_objects_are_counted_as_they_are_used():
    records = [
        _record([]),
        _record([[1, 1, 5, 5], [1, 1, 0, 5]]),
        _record([[1, 1, 5, 5]] * 3, is_crowd=[False, True, False]),
    ]
    np.testing.assert_array_equal(count_training_objects(records), [0, 1, 2])
    np.testing.assert_array_equal(count_training_objects(records[:1]), [0])


@pytest.mark.parametrize("crop", [False, True])
def test_pictures_without_objects(crop):
    row = _row(crop=crop, first_hw=(53, 71), window=(1, 2, 30, 40), size_hw=(31, 41))
    image, boxes, category_ids = _apply(IMAGE, _record([]), row)
    assert (image.shape, boxes.shape, category_ids.shape) == ((31, 41, 3), (0, 4), (0,))


def test_evaluation_resize_is_that_of_the_evaluation_plan():
    row = eval_plan(np.array([(HEIGHT, WIDTH)]), np.array([0]), 40, 60, [(64, 64)], batch_size=1).rows[0, 0]
    image, _, _ = _apply(IMAGE, _record([]), row)
    np.testing.assert_array_equal(resize_for_evaluation(IMAGE, 40, 60, [(64, 64)]), image)
    np.testing.assert_array_equal(image, np.array(Image.fromarray(IMAGE).resize((53, 40), Image.BILINEAR)))
