"""What every way to compute a meta-gradient looks like to the harness."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from benchmarks.workloads import Problem

Kind = Literal["eager", "compiled", "ours"]


class Unavailable(Exception):
    """The peer is not installed here; the message says why."""


class Unsupported(Exception):
    """The peer cannot do this problem; the message says why."""


def _as_is(result: Any) -> dict[str, Tensor]:
    return result


@dataclass(frozen=True)
class Step:
    """A prepared meta-gradient: ``run`` is what is timed, ``gradients`` reads its result as torch tensors by name.

    ``again`` makes a step of the same program for another problem of the same shapes; without it one prepares anew.
    """

    run: Callable[[], Any]
    gradients: Callable[[Any], dict[str, Tensor]] = _as_is
    again: Callable[[Problem], Step] | None = None


@dataclass(frozen=True)
class Variant:
    """One way to compute a meta-gradient: a peer, or one of a peer's forms."""

    name: str
    peer: str
    kind: Kind
    prepare: Callable[[Problem], Step]
    about: str
    probe: bool = False  # preparing may not end: a process under a time limit tries first
    partial: bool = False  # can adapt a part of the parameters
