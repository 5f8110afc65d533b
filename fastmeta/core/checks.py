"""Checks of what a caller passed in. Every message reads ``op: name must be X, got Y``, then the mend if there is one.

Type and dtype raise ``TypeError``; shape, device and value raise ``ValueError``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor


def fail(kind: type[Exception], op: str, name: str, expected: str, got: object, mend: str = "") -> NoReturn:
    """Raise ``kind`` with the house's message.

    Args:
        kind: ``TypeError``, ``ValueError`` or ``RuntimeError``.
        op: what the user called.
        name: the argument at fault.
        expected: what it must be.
        got: what it is.
        mend: how to put it right, a sentence without its full stop.
    """
    message = f"{op}: {name} must be {expected}, got {got}"
    raise kind(f"{message}; {mend}" if mend else message)


def tensor(op: str, name: str, value: object) -> Tensor:
    """Return ``value`` if it is a tensor, raise ``TypeError`` otherwise."""
    if not isinstance(value, Tensor):
        fail(TypeError, op, name, "a torch.Tensor", type(value).__name__)
    return value


def floating(op: str, name: str, value: Tensor) -> None:
    """Raise ``TypeError`` unless ``value`` holds real floating-point numbers."""
    if not value.is_floating_point():
        fail(TypeError, op, name, "a floating-point tensor", dtype_name(value.dtype))


def dtype(op: str, name: str, value: Tensor, expected: torch.dtype, because: str = "") -> None:
    """Raise ``TypeError`` unless ``value`` has dtype ``expected``; ``because`` says whose dtype that is."""
    if value.dtype != expected:
        wanted = dtype_name(expected) + (f" ({because})" if because else "")
        fail(TypeError, op, name, wanted, dtype_name(value.dtype), f"convert it with .to({expected})")


def device(op: str, name: str, value: Tensor, expected: torch.device, because: str = "") -> None:
    """Raise ``ValueError`` unless ``value`` lies on ``expected``; ``because`` says whose device that is."""
    if value.device != expected:
        wanted = f"on {expected}" + (f" ({because})" if because else "")
        fail(ValueError, op, name, wanted, f"a tensor on {value.device}", f"move it with .to('{expected}')")


def shape(op: str, name: str, value: Tensor, expected: Sequence[int | str]) -> None:
    """Raise ``ValueError`` unless ``value`` has the shape ``expected``; a string in it is a free size with its name."""
    got = tuple(value.shape)
    fits = len(got) == len(expected) and all(isinstance(e, str) or e == g for e, g in zip(expected, got, strict=True))
    if not fits:
        fail(ValueError, op, name, "of shape [" + ", ".join(map(str, expected)) + "]", list(got))


def one_of(op: str, name: str, value: Any, allowed: Iterable[Any]) -> None:
    """Raise ``ValueError`` unless ``value`` is one of ``allowed``."""
    choices = list(allowed)
    if value not in choices:
        fail(ValueError, op, name, "one of " + ", ".join(map(repr, choices)), repr(value))


def at_least(op: str, name: str, value: int | float, least: int | float) -> None:
    """Raise ``ValueError`` unless ``value >= least``."""
    if not value >= least:
        fail(ValueError, op, name, f"at least {least}", value)


def finite(op: str, name: str, value: Tensor) -> None:
    """Raise ``ValueError`` naming the first place where ``value`` is not finite. Waits for the device."""
    bad = ~torch.isfinite(value)
    if bool(bad.any()):
        where = [int(i) for i in bad.nonzero()[0]]
        fail(ValueError, op, name, "finite", f"{value[tuple(where)].item()} at index {where}")


def dtype_name(value: torch.dtype) -> str:
    """``torch.float32`` as ``float32``."""
    return str(value).removeprefix("torch.")
