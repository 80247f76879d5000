"""The published training augmentation, written out once for the tests of plans and of padded shapes."""

from cdetr_jax.data.plan import Augmentation

PUBLISHED = Augmentation(
    short_sides_px=tuple(range(480, 801, 32)),
    long_side_max_px=1333,
    flip_probability=0.5,
    crop_probability=0.5,
    crop_short_sides_px=(400, 500, 600),
    crop_sides_px=(384, 600),
)
