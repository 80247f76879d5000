"""What the command line's arguments may be. Each raises ArgumentTypeError with what came and what was expected."""

import argparse
import re
from collections.abc import Callable


def name(text: str) -> str:
    """A path, or the name of something."""
    if not text.strip():
        raise argparse.ArgumentTypeError(f"{text!r} is empty, expected a name")
    return text


def names(text: str) -> list[str]:
    """Names with commas between them."""
    return [name(word).strip() for word in text.split(",")]


def some_of(*choices: str) -> Callable[[str], list[str]]:
    """Some of these, with commas between them."""

    def read(text: str) -> list[str]:
        words = [word.strip() for word in text.split(",")]
        if not set(words) <= set(choices):
            raise argparse.ArgumentTypeError(f"{text!r}, expected one or more of {', '.join(choices)}")
        return words

    return read


def whole(low: int, high: int = 1_000_000) -> Callable[[str], int]:
    """A whole number in a range."""

    def read(text: str) -> int:
        if not re.fullmatch(r"[+-]?\d{1,20}", text) or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"{text!r}, expected a whole number from {low} to {high}")
        return int(text)

    return read


def host_and_port(text: str) -> str:
    """Such as node1:8476 or 10.0.0.2:8476."""
    port = text.rpartition(":")[2]
    if not re.fullmatch(r"[^\s/]+:\d{1,5}", text) or not 0 < int(port) < 65536:
        raise argparse.ArgumentTypeError(f"{text!r}, expected host:port, such as node1:8476")
    return text


def pictures_a_call(text: str) -> int | None:
    """A number of pictures; None: any."""
    try:
        return None if text == "any" else whole(1)(text)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"{error}, or any") from None


def score(text: str) -> float:
    """From 0 to 1."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r}, expected a score from 0 to 1")
    return value


def point(text: str) -> tuple[float, ...]:
    """x,y in pixels."""
    return _pixels(text, 2, "a point x,y in pixels, such as 120,80")


def query(text: str) -> str | int | tuple[float, ...]:
    """The best ones, a query's number, or a box."""
    if text == "best":
        return text
    if re.fullmatch(r"\d{1,6}", text):
        return int(text)
    return _pixels(text, 4, "best, a query's number, or a box left,top,right,bottom in pixels")


def _pixels(text: str, count: int, expected: str) -> tuple[float, ...]:
    words = text.split(",")
    if len(words) != count or not all(re.fullmatch(r"-?\d{1,6}(\.\d*)?", word) for word in words):
        raise argparse.ArgumentTypeError(f"{text!r}, expected {expected}")
    return tuple(map(float, words))


def head(text: str) -> str | int:
    """Of an attention."""
    if not re.fullmatch(r"all|mean|\d{1,4}", text):
        raise argparse.ArgumentTypeError(f"{text!r}, expected all, mean, or a head's number, from 0")
    return text if text in ("all", "mean") else int(text)


def height_x_width(text: str) -> tuple[int, int]:
    """Of a padded picture, in pixels."""
    sides = re.fullmatch(r"(\d{1,5})[xX](\d{1,5})", text)
    if not sides or not all(32 <= int(side) <= 16384 for side in sides.groups()):
        raise argparse.ArgumentTypeError(
            f"{text!r}, expected height x width in pixels, 32 to 16384 each, such as 480x640"
        )
    return int(sides[1]), int(sides[2])


def several_sizes(text: str) -> tuple[tuple[int, int], ...]:
    """Sizes with commas between them."""
    return tuple(map(height_x_width, text.split(",")))


def several_seeds(text: str) -> tuple[int, ...]:
    """Different whole numbers with commas between them."""
    seeds = tuple(whole(0)(each.strip()) for each in text.split(","))
    if len(set(seeds)) < len(seeds):
        raise argparse.ArgumentTypeError(f"{text!r}, expected each seed once")
    return seeds
