"""Made-up shapes: what they depend on, and that boxes lie around what is drawn."""

import numpy as np
import pytest

from cdetr_jax.data.synthetic import SyntheticShapes


def _shapes(seed=5, size=40, height=96, width=128, max_objects=5):
    return SyntheticShapes(seed=seed, size=size, height=height, width=width, max_objects=max_objects)


def test_synthetic_depends_on_seed_and_index_alone():
    long, short = _shapes(size=40), _shapes(size=7)
    for i in (6, 0):  # in another order, too
        np.testing.assert_array_equal(short.load_image(i), long.load_image(i))
        np.testing.assert_array_equal(short.records[i].boxes_xywh_px, long.records[i].boxes_xywh_px)
    assert not np.array_equal(long.load_image(0), long.load_image(1))


def test_synthetic_seeds_share_no_picture():
    boxes = [tuple(record.boxes_xywh_px.ravel()) for seed in (0, 1) for record in _shapes(seed).records]
    assert len(set(boxes)) == 80


def test_synthetic_records():
    source = _shapes(size=300)
    counts = np.bincount([len(record.areas) for record in source.records], minlength=6)
    assert counts[0] == 0
    assert (counts[1:] > 20).all()
    ids = np.bincount(np.concatenate([record.category_ids for record in source.records]))
    assert {c.id for c in source.categories} == set(np.flatnonzero(ids)) == {1, 2, 3, 5, 8}
    for record in source.records:
        x, y, w, h = record.boxes_xywh_px.T
        assert (x >= 0).all() and (y >= 0).all() and (x + w <= 128).all() and (y + h <= 96).all()  # noqa: PT018
        longer = np.maximum(w, h) / 96
        assert (longer > 0.119).all()
        assert (longer < 0.501).all()


def test_synthetic_boxes_are_tight_to_what_is_drawn():
    """A picture with one object against one where that object is all background: found by its flat, distinct colour."""
    source = _shapes(size=120, max_objects=1)
    for i, record in enumerate(source.records):
        pixels = source.load_image(i).astype(int)
        x, y, w, h = record.boxes_xywh_px[0]
        if record.category_ids[0] == 8:  # the colour of a ring is not found at its centre
            cy, cx = y + h / 2, x + w * 0.125
        elif record.category_ids[0] == 3:
            cy, cx = y + h * 0.6, x + w / 2
        else:
            cy, cx = y + h / 2, x + w / 2
        near = pixels[int(cy) - 1 : int(cy) + 2, int(cx) - 1 : int(cx) + 2].mean((0, 1))
        similar = np.abs(pixels - near).max(-1) < 30  # the noise is at most 12 either way
        around = np.zeros_like(similar)
        top, left = max(int(y) - 4, 0), max(int(x) - 4, 0)
        around[top : int(y + h) + 5, left : int(x + w) + 5] = True
        rows, columns = np.nonzero(similar & around)
        drawn = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
        # A pixel more or less at a side, and another at a corner, which covers little of its pixel.
        np.testing.assert_allclose(drawn, [x, y, x + w, y + h], atol=2, err_msg=record.file_name)


def test_synthetic_objects_stay_visible():
    for record in _shapes(size=200, max_objects=6).records:
        x, y, w, h = record.boxes_xywh_px.T
        for k in range(len(x)):
            across = (np.minimum(x + w, x[k] + w[k]) - np.maximum(x, x[k])).clip(0)
            down = (np.minimum(y + h, y[k] + h[k]) - np.maximum(y, y[k])).clip(0)
            assert (across * down)[k + 1 :].sum() <= 0.3 * w[k] * h[k] + 1e-9


@pytest.mark.parametrize("wrong", [{"seed": -1}, {"size": 0}, {"max_objects": 0}, {"height": 20}])
def test_synthetic_settings_are_checked(wrong):
    with pytest.raises(ValueError, match="expected a seed of at least 0"):
        _shapes(**wrong)


def test_synthetic_sides_and_hues():
    """Small shapes of any hue, at the same places and with the same kinds as those of the class's own hue."""
    size = {"seed": 5, "size": 40, "height": 96, "width": 128, "max_objects": 5, "sides": (0.1, 0.2)}
    by_class, any_hue = SyntheticShapes(**size), SyntheticShapes(**size, hue_by_class=False)
    hues = []
    for i, (record, other) in enumerate(zip(by_class.records, any_hue.records, strict=True)):
        np.testing.assert_array_equal(record.boxes_xywh_px, other.boxes_xywh_px)
        longer = record.boxes_xywh_px[:, 2:].max(1) / 96
        assert ((longer > 0.099) & (longer < 0.201)).all()
        for (x, y, w, h), kind in zip(other.boxes_xywh_px, other.category_ids, strict=True):
            if kind == 2:  # a square's middle is filled
                red, green, blue = any_hue.load_image(i)[int(y + h / 2), int(x + w / 2)].astype(int)
                hues.append((red > green, green > blue, blue > red))
    assert len(set(hues)) >= 5, "squares alone have all hues"
