"""Several sources as one: categories by name, unique ids, each picture from its own source."""

import dataclasses

import numpy as np
import pytest

from cdetr_jax import build
from cdetr_jax.data.joined import JoinedSource
from cdetr_jax.structs import Category, Record
from configs import common


@dataclasses.dataclass
class Few:
    """Pictures that are all of one grey value, each with one object of every category."""

    value: int
    ids: list
    categories: tuple

    def __post_init__(self):
        labels = np.array([category.id for category in self.categories])
        boxes, crowds = np.ones((len(labels), 4)), np.zeros(len(labels), bool)
        self.records = tuple(Record(i, f"{i}.png", 3, 5, boxes, labels, crowds, boxes[:, 0]) for i in self.ids)

    def __len__(self):
        return len(self.ids)

    def load_image(self, i):
        return np.full((3, 5, 3), self.value + i, np.uint8)


OAK, KITE, ELM = Category(2, "oak"), Category(700, "kite"), Category(5, "elm")


def test_records_one_source_after_the_other():
    first, second = Few(10, [3, 4], (OAK, KITE)), Few(20, [8, 9, 7], (OAK, ELM))
    joined = JoinedSource([("a", first), ("b", second)])
    assert len(joined) == 5
    assert joined.categories == (OAK, ELM, KITE)
    assert [record.image_id for record in joined.records] == [3, 4, 8, 9, 7]
    assert [joined.load_image(i)[0, 0, 0] for i in range(5)] == [10, 11, 20, 21, 22]
    assert joined.records[0] is first.records[0]


def test_categories_of_one_name_are_one():
    joined = JoinedSource(
        [("a", Few(0, [1], (OAK, KITE))), ("b", Few(0, [2], (Category(1, "kite"), Category(9, "oak"))))]
    )
    assert joined.categories == (OAK, KITE)
    assert joined.records[1].category_ids.tolist() == [700, 2]


def test_ids_that_occur_twice_are_moved():
    joined = JoinedSource([(t, Few(0, ids, (OAK,))) for t, ids in (("a", [1, 12]), ("b", [12, 5]), ("c", [12, 99]))])
    ids = [record.image_id for record in joined.records]
    assert ids == [1, 12, 22, 15, 112, 199]
    assert [record.file_name for record in joined.records[:4]] == ["1.png", "12.png", "b: 12.png", "b: 5.png"]
    assert len({record.file_name for record in joined.records}) == 6


@pytest.mark.parametrize("ids", [[-3, 4], [10**12, 0], [0, 0 + 1]])
def test_moved_ids_are_unique(ids):
    joined = JoinedSource([(str(k), Few(0, ids, (OAK,))) for k in range(4)])
    assert len({record.image_id for record in joined.records}) == 8


def test_one_id_with_two_names(caplog):
    """As of coco/2017 and voc/2007: the later name gets an id that neither source has."""
    caplog.set_level("INFO", logger="absl")
    ash, yew = Category(OAK.id, "ash"), Category(OAK.id + 1, "yew")
    joined = JoinedSource([("a", Few(0, [1], (OAK,))), ("b", Few(0, [2], (ash, yew))), ("c", Few(0, [3], (ash,)))])
    assert joined.categories == (OAK, yew, Category(OAK.id + 2, "ash"))
    of_source = [set(record.category_ids.tolist()) for record in joined.records]
    assert of_source[0] <= {OAK.id}
    assert of_source[-1] == {OAK.id + 2}
    assert [record.getMessage() for record in caplog.records] == [
        f"category ash of b gets the id {OAK.id + 2}: {OAK.id} is taken"
    ]


def test_two_categories_of_one_name():
    with pytest.raises(ValueError, match=r"b has two categories 'oak', 2 and 3; .* rename one"):
        JoinedSource([("a", Few(0, [1], (KITE,))), ("b", Few(0, [2], (OAK, Category(3, "oak"))))])


# ---------------------------------------------------------------------------------------------------- the config


def data_config(**fields):
    config = common.get_config()
    config.data.update({f"eval_{name}": "" for name in ("images", "annotations")} | fields)
    return config


def test_folders_with_commas_between_them(content, write, tmp_path):
    folder, file = write(content)
    other = tmp_path / "other.json"
    other.write_text(file.read_text())
    config = data_config(eval_images=f"{folder}, {folder}", eval_annotations=f"{file},{other}")
    source = build.make_source(config, "eval")
    assert len(source) == 6
    assert len({record.image_id for record in source.records}) == 6
    assert (source.load_image(3) == 20).all()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"eval_images": "a,b", "eval_annotations": "a.json"}, "or as many of both; they are 'a,b' and 'a.json'"),
        ({"eval_images": "a", "eval_annotations": ""}, "they are 'a' and ''"),
        ({"source": "coco_folder+tfds", "eval_images": "a", "eval_annotations": ""}, "they are 'a' and ''"),
        ({"source": "tfds", "eval_split": ""}, "tfds_name and config.data.eval_split must .* 'coco/2017' and ''"),
        ({"source": "tfds", "tfds_name": ""}, "they are '' and 'validation'"),
        ({"source": "tfds", "tfds_name": "a,b,c", "eval_split": "x,y"}, "they are 'a,b,c' and 'x,y'"),
        ({"source": "coco_folder+tfds", "eval_split": ""}, "no data for 'eval'"),
    ],
)
def test_fields_that_do_not_fit(fields, message):
    with pytest.raises(ValueError, match=message):
        build.make_source(data_config(**fields), "eval")
