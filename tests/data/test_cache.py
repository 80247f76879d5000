"""Tables that are cached beside the data: when they are read again, and what if they cannot be written."""

import logging

import numpy as np
import pytest
from PIL import Image

from cdetr_jax.data import cache
from cdetr_jax.data.cache import cached_table, fingerprint_of, in_parallel
from cdetr_jax.data.coco import CocoFolder


@pytest.fixture
def make():
    """A function that makes a table and counts its calls in `made`."""

    def make():
        make.made += 1
        return {"numbers": np.array([make.made, 2]), "texts": np.array(["a", "äß"])}

    make.made = 0
    return make


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def test_a_table_is_made_once(tmp_path, make, caplog):
    with caplog.at_level(logging.INFO, logger="absl"):
        for _ in range(2):
            table = cached_table(tmp_path / "t.npz", "x", "the sizes", make)
    np.testing.assert_array_equal(table["numbers"], [1, 2])
    assert table["texts"].tolist() == ["a", "äß"]
    assert table.keys() == {"numbers", "texts"}
    assert make.made == 1
    assert caplog.text.count("reading the sizes once, to be cached in") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["t.npz"]


def test_another_fingerprint_makes_it_anew(tmp_path, make):
    cached_table(tmp_path / "t.npz", "x", "it", make)
    assert cached_table(tmp_path / "t.npz", "y", "it", make)["numbers"][0] == 2
    assert cached_table(tmp_path / "t.npz", "y", "it", make)["numbers"][0] == 2


@pytest.mark.parametrize("damage", [b"", b"no table", "half", "flipped"])
def test_a_damaged_table_is_made_anew(tmp_path, make, damage):
    path = tmp_path / "t.npz"
    cached_table(path, "x", "it", make)
    content = bytearray(path.read_bytes())
    if damage == "half":
        content = content[: len(content) // 2]
    elif damage == "flipped":
        content[content.index(b"numbers") + 60] ^= 0xFF
    else:
        content = damage
    path.write_bytes(content)
    assert cached_table(path, "x", "it", make)["numbers"][0] == 2
    assert cached_table(path, "x", "it", make)["numbers"][0] == 2


def test_any_flipped_byte_is_found_or_harmless(tmp_path, make):
    path = tmp_path / "t.npz"
    expected = cached_table(path, "x", "it", make)
    whole = path.read_bytes()
    for place in range(0, len(whole), 7):
        content = bytearray(whole)
        content[place] ^= 0xFF
        path.write_bytes(content)
        table = cached_table(path, "x", "it", make)
        assert sorted(table) == sorted(expected)
        assert all(table[name].shape == expected[name].shape for name in expected)
        assert table["numbers"][1:].tolist() == expected["numbers"][1:].tolist()


def test_where_the_data_cannot_be_written_to(tmp_path, make, monkeypatch, own_cache, caplog):
    save = cache._save

    def refuse(file, *rest):
        if own_cache not in file.parents:
            raise PermissionError(13, "Permission denied")
        save(file, *rest)

    monkeypatch.setattr(cache, "_save", refuse)
    with caplog.at_level(logging.INFO, logger="absl"):
        for _ in range(2):
            cached_table(tmp_path / "t.npz", "x", "it", make)
    assert make.made == 1
    assert "t.npz: cannot be written (Permission denied)" in caplog.text
    assert "home/cdetr_jax/" in caplog.text
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null/none")
    cached_table(tmp_path / "t.npz", "x", "the sizes", make)
    assert make.made == 2
    assert "the sizes cannot be cached and will be read again at the next start" in caplog.text


def test_in_parallel_keeps_the_order_and_raises():
    assert in_parallel(lambda i: i * i, range(50), "squares") == [i * i for i in range(50)]
    with pytest.raises(ZeroDivisionError):
        in_parallel(lambda i: 1 // (i - 7), range(50), "quotients")


def test_fingerprints_differ():
    assert len({fingerprint_of(parts) for parts in (["a", "b"], ["a"], ["ab"], [("a", 1)], [("a", 2)])}) == 5


# ------------------------------------------------------------------------------------- sizes of a folder's pictures


@pytest.fixture
def unsized(content, write):
    """A COCO folder of which one picture has no size. Returns: the arguments of CocoFolder."""
    del content["images"][1]["height"]
    return write(content)


def opened(monkeypatch):
    """Notes what is opened as a picture from now on."""
    names, open_image = [], Image.open

    def note(file):
        names.append(getattr(file, "name", file))
        return open_image(file)

    monkeypatch.setattr(Image, "open", note)
    return names


def test_sizes_are_read_once(unsized, monkeypatch):
    names = opened(monkeypatch)
    for _ in range(2):
        assert {(r.height, r.width) for r in CocoFolder(*unsized).records} == {(30, 40)}
    assert names == ["a.png"]
    assert unsized[1].with_name("instances.json.sizes.npz").exists()


def test_sizes_are_read_again_when_a_picture_changes(unsized):
    CocoFolder(*unsized)
    Image.new("RGB", (41, 31)).save(unsized[0] / "a.png")
    assert (CocoFolder(*unsized).records[0].height, CocoFolder(*unsized).records[0].width) == (31, 41)


def test_nothing_is_cached_where_all_sizes_are_annotated(content, write, monkeypatch):
    names = opened(monkeypatch)
    _, file = write(content)
    CocoFolder(_, file)
    assert names == []
    assert not file.with_name("instances.json.sizes.npz").exists()
