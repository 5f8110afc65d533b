"""Which implementations an operation has, which of them can run here, and which one a call gets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Backend:
    """One implementation of an operation, as ``explain()`` and ``fastmeta doctor`` show it.

    Attributes:
        name: ``"reference"``, ``"native"``, ``"triton"``, ...
        available: whether it can run what was asked about.
        reason: why it cannot, or where it can: what it runs on.
    """

    name: str
    available: bool
    reason: str


def select(op: str, table: Sequence[Backend], requested: str | None = None) -> str:
    """Choose one backend of ``table``, whose order is the order of preference.

    Args:
        op: name of the operation, for the message.
        table: the operation's backends for the call at hand, best first.
        requested: what the caller asked for, ``None`` to leave the choice.

    Returns:
        The name of the backend to run.

    Raises:
        ValueError: no backend has the requested name.
        RuntimeError: the requested backend, or every backend, is unavailable; the message carries the reasons.
    """
    if requested is None:
        for backend in table:
            if backend.available:
                return backend.name
        reasons = "; ".join(f"{b.name}: {b.reason}" for b in table)
        raise RuntimeError(f"{op}: no backend can run this call ({reasons})")
    for backend in table:
        if backend.name == requested:
            if backend.available:
                return requested
            raise RuntimeError(f"{op}: backend {requested!r} is not available here: {backend.reason}")
    known = ", ".join(repr(b.name) for b in table)
    raise ValueError(f"{op}: backend must be one of {known}, got {requested!r}")
