"""What each class logit of a detector stands for, and what a data set calls it."""

from collections import Counter
from collections.abc import Sequence

from absl import logging

from cdetr_jax.records import Category

ClassTable = tuple[Category | None, ...]  # what each logit stands for; None: nothing


def class_table(categories: Sequence[Category], class_ids: str, num_classes: int) -> ClassTable:
    """What each class logit stands for.

    Args:
      categories: of the data set.
      class_ids: `category_id`: the logit's index is the category's id, as published; `contiguous`: its rank.
      num_classes: logits; 0: as many as needed.
    Raises: ValueError, if they do not fit.
    """
    if not categories:
        raise ValueError("the data set has no categories; add them to its annotations")
    if class_ids == "contiguous":
        table = dict(enumerate(sorted(categories, key=lambda category: category.id)))
    else:
        table = {category.id: category for category in categories}
        if min(table) < 0:
            raise ValueError(f'category id {min(table)} cannot be a logit; use --config.data.class_ids="contiguous"')
    needed = max(table) + 1
    if num_classes and needed > num_classes:
        raise ValueError(
            f"the data set needs {needed} class logits (config.data.class_ids={class_ids!r}), but "
            f"config.model.num_classes is {num_classes}; set it to {needed}, or to 0 to have it counted"
            + ("" if class_ids == "contiguous" else ", or use --config.data.class_ids=contiguous")
        )
    if needed > 10_000:
        raise ValueError(f"category ids go up to {needed - 1}; use --config.data.class_ids=contiguous")
    return tuple(table.get(i) for i in range(num_classes or needed))


def label_of(classes: ClassTable) -> dict[int, int]:
    """The logit index of each category id."""
    return {category.id: logit for logit, category in enumerate(classes) if category is not None}


def classes_in_data(classes: ClassTable, categories: Sequence[Category]) -> ClassTable:
    """What a detector's logits are called by a data set, which may use other ids: the same name counts.

    Classes without names, and names that several categories share, go by their id.
    Args:
      classes: of the detector.
      categories: of the data set.
    Returns: one entry per logit, a category of the data set; None where it has no such class.
    Raises: ValueError, if they have no class in common.
    """
    by_id = {category.id: category for category in categories}
    uses = Counter(category.name for category in categories)
    by_name = {category.name: category for category in categories if uses[category.name] == 1}

    def find(category: Category | None) -> Category | None:
        if category is None or category in categories:
            return category
        return by_id.get(category.id) if category.is_unnamed else by_name.get(category.name)

    found = tuple(map(find, classes))
    unknown = [category.name for category in categories if category not in found]
    if len(unknown) == len(categories):
        known = [category.name for category in classes if category]
        raise ValueError(
            f"the detector knows none of the data set's classes: it knows {', '.join(known[:8])}..., the data set has "
            f"{', '.join(unknown[:8])}...; evaluate on data with classes that it was trained for, or train it on these"
        )
    if unknown:
        logging.warning("the detector does not know %d classes of the data: %s", len(unknown), ", ".join(unknown))
    return found
