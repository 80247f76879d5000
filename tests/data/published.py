"""The published training augmentation, written out once for the tests of plans and of padded shapes."""

import numpy as np

from cdetr_jax.data.plan import Augmentation, PlanSettings, train_plan

PUBLISHED = Augmentation(
    short_sides_px=tuple(range(480, 801, 32)),
    long_side_max_px=1333,
    flip_probability=0.5,
    crop_probability=0.5,
    crop_short_sides_px=(400, 500, 600),
    crop_sides_px=(384, 600),
)


def plan_settings(sizes_hw, augmentation, shapes, object_counts=None, seed=0, **settings):
    """Settings of epochs' plans; pictures hold no object unless their counts are given."""
    counts = np.zeros(len(sizes_hw), int) if object_counts is None else object_counts
    return PlanSettings(np.asarray(sizes_hw), counts, augmentation, shapes, seed=seed, **settings)


def draw_plan(sizes_hw, augmentation, shapes, *, epoch, **settings):
    return train_plan(plan_settings(sizes_hw, augmentation, shapes, **settings), epoch)
