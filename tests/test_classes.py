"""What each class logit stands for, and finding a detector's classes in a data set."""

import logging

import pytest
from absl import logging as absl_logging

from cdetr_jax.classes import class_table, classes_in_data, label_of
from cdetr_jax.structs import Category

# ------------------------------------------------------------------------------------------------ class_table

KITE, OAK, NEWT = Category(5, "kite"), Category(2, "oak"), Category(90_000, "newt")


def test_contiguous_classes_are_ranks_of_the_ids():
    classes = class_table([NEWT, KITE, OAK], "contiguous", 0)
    assert classes == (OAK, KITE, NEWT)
    assert label_of(classes) == {2: 0, 5: 1, 90_000: 2}
    assert class_table([Category(-3, "below"), KITE], "contiguous", 0) == (Category(-3, "below"), KITE)


def test_published_classes_are_the_ids():
    classes = class_table([KITE, OAK], "category_id", 0)
    assert classes == (None, None, OAK, None, None, KITE)
    assert label_of(classes) == {2: 2, 5: 5}


@pytest.mark.parametrize(("class_ids", "expected"), [("contiguous", (OAK, KITE)), ("category_id", (None, None, OAK))])
def test_logits_to_spare_stand_for_nothing(class_ids, expected):
    classes = class_table([KITE, OAK], class_ids, 7)
    assert len(classes) == 7
    assert classes[: len(expected)] == expected
    assert classes[6] is None


@pytest.mark.parametrize(
    ("categories", "class_ids", "num_classes", "message"),
    [
        ([KITE, OAK], "category_id", 5, r"needs 6 class logits .*num_classes is 5; set it to 6, .*=contiguous$"),
        (
            [KITE, OAK, NEWT],
            "contiguous",
            2,
            r"needs 3 class logits .*num_classes is 2; set it to 3, .*have it counted$",
        ),
        ([NEWT], "category_id", 0, "category ids go up to 90000; use --config.data.class_ids=contiguous"),
        ([Category(-3, "below"), KITE], "category_id", 0, "category id -3 cannot be a logit; use .*contiguous"),
    ],
)
def test_classes_that_do_not_fit(categories, class_ids, num_classes, message):
    with pytest.raises(ValueError, match=message):
        class_table(categories, class_ids, num_classes)


def test_a_data_set_without_classes():
    with pytest.raises(ValueError, match="the data set has no categories; add them"):
        class_table([], "contiguous", 0)


# -------------------------------------------------------------------------------------------- classes_in_data


def data(**ids):
    return [Category(i, name) for name, i in ids.items()]


def test_the_same_names_count_and_not_the_ids():
    classes = (Category(1, "disc"), None, Category(2, "ring"))
    found = classes_in_data(classes, data(ring=1, disc=20))
    assert found == (Category(20, "disc"), None, Category(1, "ring"))


def test_equal_ids_and_names_stay():
    classes = (None, Category(1, "disc"), Category(2, "ring"))
    assert classes_in_data(classes, data(disc=1, ring=2)) == classes


def test_classes_without_names_go_by_their_id():
    classes = tuple(Category(i, f"class {i}") for i in range(4))
    assert classes_in_data(classes, data(disc=1, ring=3)) == (
        None, Category(1, "disc"), None, Category(3, "ring"),
    )  # fmt: skip


def test_a_name_that_several_categories_share_goes_by_its_id():
    categories = [Category(3, "same"), Category(5, "same"), Category(7, "other")]
    classes = (Category(5, "same"), Category(3, "same"), Category(9, "other"))
    assert classes_in_data(classes, categories) == (categories[1], categories[0], categories[2])


def test_a_class_that_the_data_do_not_have_stands_for_nothing(monkeypatch):
    warnings = []
    monkeypatch.setattr(absl_logging, "warning", lambda *values: warnings.append(values))
    found = classes_in_data((Category(1, "disc"), Category(2, "newt")), data(disc=1))
    assert found == (Category(1, "disc"), None)
    assert warnings == []


def test_no_class_in_common():
    classes = (None, *(Category(i, f"thing {i}") for i in range(1, 11)))
    with pytest.raises(ValueError, match="the detector knows none of the data set's classes") as error:
        classes_in_data(classes, data(disc=1, ring=2))
    assert "it knows thing 1, thing 2, thing 3, thing 4, thing 5, thing 6, thing 7, thing 8..., the" in str(error.value)
    assert "the data set has disc, ring...; evaluate on data with classes that it was trained for" in str(error.value)


def test_classes_of_the_data_that_the_detector_does_not_know(caplog):
    with caplog.at_level(logging.WARNING, logger="absl"):
        found = classes_in_data((Category(1, "disc"),), data(disc=1, ring=2, kite=3))
    assert found == (Category(1, "disc"),)
    assert caplog.messages == ["the detector does not know 2 classes of the data: ring, kite"]
