"""How an error lists the arrays that do not fit a model."""

from collections.abc import Collection, Mapping


def compare(given: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]) -> str:
    """The missing, unused and mis-shaped names of `given`, both name to shape; empty if there are none."""
    return describe(
        missing=sorted(expected.keys() - given.keys()),
        unused=sorted(given.keys() - expected.keys()),
        misshapen=[
            f"{name} {tuple(given[name])}, expected {tuple(expected[name])}"
            for name in sorted(expected.keys() & given.keys())
            if tuple(given[name]) != tuple(expected[name])
        ],
    )


def describe(missing: Collection[str], unused: Collection[str], misshapen: Collection[str]) -> str:
    """The three lists; empty if there is nothing in them."""
    if not (missing or unused or misshapen):
        return ""
    return f"missing {some(missing)}; unused {some(unused)}; mis-shaped {some(misshapen)}"


def some(names: Collection[str], limit: int = 12) -> str:
    """The names, or the first of them and how many more there are."""
    rest = len(names) - limit
    return (", ".join(list(names)[:limit]) or "none") + (f" and {rest} more" if rest > 0 else "")
