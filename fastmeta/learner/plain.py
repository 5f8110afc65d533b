"""Values that JSON has no form for, in JSON: tuples, sets of keys that are no strings, infinities."""

from __future__ import annotations

import math
from typing import Any

TUPLE, DICT, FLOAT = "tuple", "dict", "float"


class NotPlain(TypeError):
    """A value is, or holds, something else than numbers, strings, lists, tuples and mappings."""


def to_plain(value: Any) -> Any:
    """``value`` in JSON, so that :func:`from_plain` gives it back as it is.

    Raises:
        NotPlain: it cannot be.
    """
    if value is None or type(value) in (bool, int, str):
        return value
    if type(value) is float:
        return value if math.isfinite(value) else {FLOAT: str(value)}
    if type(value) is list:
        return [to_plain(v) for v in value]
    if type(value) is tuple:
        return {TUPLE: [to_plain(v) for v in value]}
    if isinstance(value, dict):
        return {DICT: [[to_plain(k), to_plain(v)] for k, v in value.items()]}
    raise NotPlain(type(value).__name__)


def from_plain(value: Any) -> Any:
    """What :func:`to_plain` was given.

    Raises:
        ValueError: it gave no such thing.
    """
    if isinstance(value, list):
        return [from_plain(v) for v in value]
    if not isinstance(value, dict):
        return value
    if len(value) != 1:
        raise ValueError(f"one of {TUPLE!r}, {DICT!r} and {FLOAT!r} was expected, got {sorted(value)}")
    (kind, held), *_ = value.items()
    if kind == FLOAT and held in ("inf", "-inf", "nan"):
        return float(held)
    if kind == TUPLE and isinstance(held, list):
        return tuple(from_plain(v) for v in held)
    if kind == DICT and isinstance(held, list):
        try:
            return {from_plain(k): from_plain(v) for k, v in held}
        except TypeError as error:
            raise ValueError(f"pairs of a mapping were expected, got {held!r}") from error
    raise ValueError(f"one of {TUPLE!r}, {DICT!r} and {FLOAT!r} was expected, got {kind!r}")
