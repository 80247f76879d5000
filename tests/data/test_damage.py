"""Mutated pictures and annotations: never a hang, a wrong box or boundless memory, and every error names its file."""

import io
import json
import logging
import math
import resource
import signal
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from cdetr_jax.data.coco import CocoFolder
from cdetr_jax.data.pipeline import sizes_hw, train_batches
from cdetr_jax.data.plan import Augmentation, PlanSettings
from cdetr_jax.data.reader import ReadSettings
from cdetr_jax.data.sources import BadPictureError
from cdetr_jax.data.transforms import count_training_objects

# Pillow's word about a damaged EXIF part, which is no reason not to read the picture.
pytestmark = pytest.mark.filterwarnings("ignore:Corrupt EXIF data")

HEIGHT, WIDTH = 96, 128
TIME_LIMIT_S = 10  # a sound picture or JSON takes milliseconds
MEMORY_LIMIT_MIB = 100  # although headers claim pictures of up to 16 GiB


@pytest.fixture
def clock():
    """Returns a function that gives the next thing so many seconds, or ends it."""

    def ring(*_):
        raise AssertionError(f"not done after {TIME_LIMIT_S} s")

    before = signal.signal(signal.SIGALRM, ring)
    yield lambda seconds: signal.setitimer(signal.ITIMER_REAL, seconds)
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


# ---------------------------------------------------------------------------------------------------- mutations


def _truncate(data, rng):
    return data[: rng.integers(len(data))]


def _flip_bytes(data, rng):
    data = bytearray(data)
    for i in rng.integers(len(data), size=rng.integers(1, 21)):
        data[i] ^= rng.integers(1, 256)
    return bytes(data)


def _flip_in_header(data, rng):
    return _flip_bytes(data[:700], rng) + data[700:]


def _zero_a_part(data, rng):
    start = rng.integers(len(data))
    length = rng.integers(1, 500)
    return data[:start] + b"\0" * len(data[start : start + length]) + data[start + length :]


def _repeat_a_part(data, rng):
    start, length = rng.integers(len(data)), rng.integers(1, 500)
    return data[: start + length] + data[start:]


def _other_type(data, rng):
    bmp = io.BytesIO()
    Image.new("L", (WIDTH, HEIGHT)).save(bmp, "BMP")
    others = (
        b"",
        b"\0" * 1000,
        b'{"images": []}',
        b"GIF89a" + data[6:],
        b"\xff\xd8" + data,
        data[::-1],
        bmp.getvalue(),
    )
    return others[rng.integers(len(others))]


def _absurd_picture_size(data, rng):
    """Other sizes in the header of a PNG, with the checksum that belongs to them, or of a JPEG."""
    most = 2**31 - 1 if data[:4] == b"\x89PNG" else 65535
    sizes = (0, 1, 2, WIDTH, HEIGHT, 9000, 20000, 65535, 2**24, most)
    width, height = (min(int(sizes[i]), most) for i in rng.integers(len(sizes), size=2))
    if data[:4] == b"\x89PNG":
        header = b"IHDR" + struct.pack(">II", width, height) + data[24:29]
        return data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:]
    start = next(i for i in range(len(data)) if data[i] == 0xFF and data[i + 1] in (0xC0, 0xC2))
    return data[: start + 5] + struct.pack(">HH", height, width) + data[start + 9 :]


def _pictures():
    """Sound files of all the ways in which data sets store pictures."""
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (HEIGHT // 8, WIDTH // 8, 3), np.uint8)
    rgb = Image.fromarray(noise).resize((WIDTH, HEIGHT))
    exif = Image.Exif()
    exif[0x0112] = 6
    forms = {
        "baseline.jpg": (rgb, {"quality": 90}),
        "progressive.jpg": (rgb, {"progressive": True, "exif": exif}),
        "gray.jpg": (rgb.convert("L"), {}),
        "cmyk.jpg": (rgb.convert("CMYK"), {}),
        "restarts.jpg": (rgb, {"restart_marker_rows": 1}),
        "rgb.png": (rgb, {}),
        "alpha.png": (rgb.convert("RGBA"), {}),
        "palette.png": (rgb.convert("P"), {"transparency": 3}),
        "sixteen.png": (Image.fromarray(np.asarray(rgb.convert("L")).astype(np.uint16) * 257), {}),
        "bits.png": (rgb.convert("1"), {}),
    }
    files = {}
    for name, (image, settings) in forms.items():
        stream = io.BytesIO()
        image.save(stream, "JPEG" if name.endswith("jpg") else "PNG", **settings)
        files[name] = stream.getvalue()
    return files


PICTURES = _pictures()
PICTURE_MUTATIONS = (
    _truncate,
    _flip_bytes,
    _flip_in_header,
    _zero_a_part,
    _repeat_a_part,
    _absurd_picture_size,
    _other_type,
)

WRONG_VALUES = (
    *(None, True, "", "a", "\x00", "\ud800", "../x", [], [1], {}, {"id": 1}, 0, -1, 1.5, 10**9, 2**63, 10**400),
    *(math.nan, math.inf, -math.inf, 1e308, [1, 2, 3], [1, 2, 3, "4"], [0, 0, -5, -5], [1e20] * 4, [math.nan] * 4),
)


def _wrong_value(content, rng):
    """Another value, of another type or size, somewhere; or a field less."""
    container = content
    while True:
        keys = list(container) if isinstance(container, dict) else range(len(container))
        if not keys:
            break
        key = keys[rng.integers(len(keys))]
        if isinstance(container[key], dict | list) and container[key] and rng.random() < 0.9:
            container = container[key]
            continue
        if rng.random() < 0.15:
            del container[key]
        elif rng.random() < 0.3 and type(container[key]) in (int, float):
            container[key] += rng.choice([-1, 1, 0.5, 1000]).item()  # perhaps still right
        else:
            container[key] = WRONG_VALUES[rng.integers(len(WRONG_VALUES))]
        break
    return json.dumps(content).encode()


def _deep(data, rng):
    depth = 10 ** int(rng.integers(2, 6))
    return data[:-1] + b', "info": ' + b"[" * depth + b"]" * depth + b"}"


def _content(rng):
    images = [
        {"id": int(i), "file_name": f"{i}.jpg", "height": HEIGHT, "width": WIDTH} for i in rng.permutation(12) + 100
    ]
    annotations = [
        {
            "id": k,
            "image_id": int(rng.integers(100, 112)),
            "category_id": int(rng.choice([2, 7])),
            "bbox": np.round(rng.uniform(-4, 60, 4), 2).tolist(),
            "iscrowd": int(rng.random() < 0.1),
            "area": 10.5,
        }
        for k in range(30)
    ]
    categories = [{"id": 2, "name": "oak"}, {"id": 7, "name": "kite"}]
    return {"images": images, "annotations": annotations, "categories": categories}


# --------------------------------------------------------------------------------------------------------- tests


class _Trial:
    """Runs one mutation after the other against the clock and notes what must not be."""

    def __init__(self, clock):
        self._clock = clock
        self._peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        self.faults = []

    def run(self, label, names, function, *arguments):
        """Returns the result, or None after an error, which must name one of the files."""
        self._clock(TIME_LIMIT_S)
        try:
            return function(*arguments)
        except (ValueError, OSError) as error:
            self.note(label, any(name in str(error) for name in names), f"names no file: {error}")
        except Exception as error:
            self.note(label, False, f"{type(error).__name__}: {error}")
        finally:
            self._clock(0)
        return None

    def note(self, label, is_right, what):
        if not is_right:
            self.faults.append(f"{label}: {what}")

    def end(self):
        growth = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - self._peak_kib) / 1024
        self.note("memory", growth < MEMORY_LIMIT_MIB, f"{growth:.0f} MiB")
        assert not self.faults, "\n".join(self.faults)


def _check_pictures(folder, count, clock):
    """Reads `count` mutations. Returns how many were read all the same."""
    annotations = folder / "instances.json"
    names = list(PICTURES)
    images = [{"id": i, "file_name": name, "height": HEIGHT, "width": WIDTH} for i, name in enumerate(names)]
    annotations.write_text(json.dumps({"images": images, "annotations": [], "categories": [{"id": 1, "name": "a"}]}))
    for name, data in PICTURES.items():
        (folder / name).write_bytes(data)
    source = CocoFolder(folder, annotations)
    sound = [source.load_image(i) for i in range(len(names))]
    trial = _Trial(clock)
    read = 0
    for seed in range(count):
        rng = np.random.default_rng([1, seed])
        index = seed % len(names)
        mutate = PICTURE_MUTATIONS[rng.integers(len(PICTURE_MUTATIONS))]
        path = folder / names[index]
        path.write_bytes(mutate(PICTURES[names[index]], rng))
        label = f"{seed}, {mutate.__name__} of {names[index]}"
        image = trial.run(label, [str(path)], source.load_image, index)
        path.write_bytes(PICTURES[names[index]])
        if image is not None:  # pixels may have changed, but the boxes still belong to a picture of this size
            trial.note(label, image.shape == (HEIGHT, WIDTH, 3) and image.dtype == np.uint8, "wrong size")
            read += 1
    for i, image in enumerate(sound):
        np.testing.assert_array_equal(source.load_image(i), image)
    trial.end()
    return read


def _naive_objects(content, image_id):
    """Boxes, categories and crowds of one picture, read one object at a time."""
    return [
        ([float(v) for v in a["bbox"]], a["category_id"], bool(a.get("iscrowd", 0)))
        for a in content["annotations"]
        if a["image_id"] == image_id
    ]


def _check_annotations(folder, count, clock):
    """Reads `count` mutations. Returns how many were read all the same."""
    pixels = io.BytesIO()
    Image.new("RGB", (WIDTH, HEIGHT)).save(pixels, "JPEG")
    for i in range(100, 112):
        (folder / f"{i}.jpg").write_bytes(pixels.getvalue())
    byte_mutations = (_truncate, _flip_bytes, _zero_a_part, _repeat_a_part, _deep)
    trial = _Trial(clock)
    read = 0
    for seed in range(count):
        rng = np.random.default_rng([2, seed])
        if rng.random() < 0.65:
            data = _wrong_value(_content(rng), rng)
        else:
            data = byte_mutations[rng.integers(len(byte_mutations))](json.dumps(_content(rng)).encode(), rng)
        path = folder / f"instances-{seed}.json"
        path.write_bytes(data)
        source = trial.run(seed, [path.name], CocoFolder, folder, path)
        if source is None:
            continue
        read += 1
        content = json.loads(data)
        trial.note(seed, [r.image_id for r in source.records] == sorted(i["id"] for i in content["images"]), "images")
        for record in source.records:
            objects = record.boxes_xywh_px.tolist(), record.category_ids.tolist(), record.is_crowd.tolist()
            found = list(zip(*objects, strict=True))
            trial.note(seed, found == _naive_objects(content, record.image_id), f"objects of {record.file_name}")
        names = [record.file_name for record in source.records] + [path.name, "the data hold no picture"]
        trial.run(seed, names, _read_all, source)
    trial.end()
    return read


def _batches(source, label_of, batch_size, read_settings, crop_probability=0.5):
    augmentation = Augmentation((48,), 80, 0.5, crop_probability, (40,), (30, 40))
    sizes, counts = sizes_hw(source), count_training_objects(source.records)
    settings = PlanSettings(sizes, counts, augmentation, [(80, 80)], batch_size, seed=0)
    return train_batches(source, label_of, settings, read_settings)


def _read_all(source):
    """What training does with the source, for the first epoch."""
    label_of = {c.id: k for k, c in enumerate(source.categories)}
    batches = _batches(source, label_of, 2, ReadSettings(workers=0, threads=1, on_error="raise", max_bad_fraction=0.0))
    try:
        for _ in range(batches.batches_per_epoch):
            batch = next(batches)
            boxes = batch.targets.boxes_cxcywh[batch.targets.valid]
            assert np.isfinite(boxes).all()
            assert (boxes[:, 2:] > 0).all()
            assert (boxes >= 0).all()
            assert (boxes <= 1).all()
    finally:
        batches.close()


def test_mutated_pictures(tmp_path, clock):
    assert _check_pictures(tmp_path, 100, clock) > 0


def test_mutated_annotations(tmp_path, clock):
    assert _check_annotations(tmp_path, 60, clock) > 0


@pytest.mark.slow
def test_a_thousand_mutations(tmp_path, clock):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "annotations").mkdir()
    read = _check_pictures(tmp_path / "pictures", 700, clock), _check_annotations(tmp_path / "annotations", 300, clock)
    logging.info("read all the same: %d of 700 pictures, %d of 300 annotations", *read)


def test_mutated_pictures_are_skipped_in_a_run(tmp_path):
    content = _content(np.random.default_rng(0))
    damaged = set()
    for k, image in enumerate(content["images"]):
        data = PICTURES["baseline.jpg"]
        if k % 3 == 0:
            data = data[: 100 * k]
            damaged.add(image["file_name"])
        elif k == 1:  # the height in its header is another one
            place = data.index(b"\xff\xc0") + 6
            data = data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]
            damaged.add(image["file_name"])
        (tmp_path / image["file_name"]).write_bytes(data)
    (tmp_path / "instances.json").write_text(json.dumps(content))
    source = CocoFolder(tmp_path, tmp_path / "instances.json")
    for name in damaged:
        with pytest.raises(BadPictureError, match=name):
            source.load_image([record.file_name for record in source.records].index(name))
    read_settings = ReadSettings(workers=0, threads=2, on_error="skip", max_bad_fraction=0.5)
    batches = _batches(source, {2: 0, 7: 1}, 3, read_settings, crop_probability=0.0)
    seen = np.concatenate([next(batches).index for _ in range(4)])
    batches.close()
    assert batches.bad_files == damaged
    assert {source.records[i].file_name for i in seen}.isdisjoint(damaged)
