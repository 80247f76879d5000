"""TensorBoard's event files, written without TensorFlow: records of a few protocol buffer fields, each with checksums.

Ready-made writers import TensorFlow or PyTorch, or write in a thread that stops without a word when the disk is full.
"""

import struct
import time
import uuid
from collections.abc import Mapping
from pathlib import Path

from cdetr_jax.files import writing

# Numbers of the fields, from TensorFlow's event.proto and summary.proto.
_WALL_TIME, _STEP, _FILE_VERSION, _SUMMARY, _SESSION_LOG = 1, 2, 3, 5, 7  # of an Event
_VALUE, _TAG, _SIMPLE_VALUE, _IMAGE = 1, 1, 2, 4  # of a Summary, of its Value
_HEIGHT, _WIDTH, _COLORSPACE, _ENCODED = 1, 2, 3, 4  # of an Image
_RGB = 3
_STATUS, _START = 1, 1  # of a SessionLog
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # kinds of a field


class TensorBoardFile:
    """What one start of a run tells. A disk that is full raises OSError; nothing is held back between writes."""

    def __init__(self, folder: Path):
        """Starts a new file beside those of earlier starts. TensorBoard reads them in the order of their names."""
        self._file = (folder / f"events.out.tfevents.{time.time_ns()}.{uuid.uuid4().hex}").open("xb", buffering=0)
        self._write(0, _bytes(_FILE_VERSION, b"brain.Event:2"))

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Writes scalars of one step."""
        self._write(step, _bytes(_SUMMARY, b"".join(_bytes(_VALUE, _value(*item)) for item in scalars.items())))

    def write_picture(self, step: int, name: str, content: bytes, width: int, height: int) -> None:
        """Writes an RGB picture, the content of a PNG or JPEG file."""
        sides = ((_HEIGHT, height), (_WIDTH, width), (_COLORSPACE, _RGB))
        image = b"".join(_key(field, _VARINT) + _varint(value) for field, value in sides) + _bytes(_ENCODED, content)
        value = _bytes(_TAG, name.encode()) + _bytes(_IMAGE, image)
        self._write(step, _bytes(_SUMMARY, _bytes(_VALUE, value)))

    def hide_after(self, step: int) -> None:
        """Tells TensorBoard to forget what earlier files hold of later steps than this one."""
        self._write(step + 1, _bytes(_SESSION_LOG, _key(_STATUS, _VARINT) + _varint(_START)))

    def close(self, end: str = "finished") -> None:
        """Closes the file."""
        self._file.close()

    def _write(self, step: int, content: bytes) -> None:
        event = _key(_WALL_TIME, _FIXED64) + struct.pack("<d", time.time())
        event += _key(_STEP, _VARINT) + _varint(int(step)) + content
        length = struct.pack("<Q", len(event))
        record = length + _masked_crc32c(length) + event + _masked_crc32c(event)
        with writing(self._file.name):
            while record:
                record = record[self._file.write(record) :]


def _value(name: str, value: float) -> bytes:
    number = struct.pack("<f", float(value))
    return _bytes(_TAG, name.encode()) + _key(_SIMPLE_VALUE, _FIXED32) + number


def _bytes(field: int, content: bytes) -> bytes:
    return _key(field, _BYTES) + _varint(len(content)) + content


def _key(field: int, kind: int) -> bytes:
    return _varint(field << 3 | kind)


def _varint(number: int) -> bytes:
    """Seven bits a byte, the low ones first; the eighth says that more follow."""
    low = []
    while number > 0x7F:
        low.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*low, number])


def _crc_table() -> list[int]:
    table = list(range(256))
    for _ in range(8):
        table = [crc >> 1 ^ (0x82F63B78 if crc & 1 else 0) for crc in table]
    return table


_CRC_TABLE = _crc_table()


def _masked_crc32c(content: bytes) -> bytes:
    """The Castagnoli checksum, turned and shifted as record files have it."""
    crc = 0xFFFFFFFF
    for byte in content:
        crc = crc >> 8 ^ _CRC_TABLE[(crc ^ byte) & 0xFF]
    crc ^= 0xFFFFFFFF
    return struct.pack("<I", ((crc >> 15 | crc << 17 & 0xFFFFFFFF) + 0xA282EAD8) & 0xFFFFFFFF)
