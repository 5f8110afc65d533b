"""What conjugate gradients keep of every task's system from one iteration to the next."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass
class State:
    """Of the systems ``A v = b``; an iteration replaces the tensors or writes into them.

    Attributes:
        v: solution so far, ``[T, P]``.
        r: residual ``b - A v``, ``[T, P]``.
        p: direction, ``[T, P]``.
        square: ``<r, r>``, ``[T]``.
        enough: at which a task ends, ``[T]``.
        active: whether a task goes on, ``[T]``, boolean.
        positive: whether all curvature it met was positive, ``[T]``, boolean.
        iterations: that it took, int64 ``[T]``.
    """

    v: Tensor
    r: Tensor
    p: Tensor
    square: Tensor
    enough: Tensor
    active: Tensor
    positive: Tensor
    iterations: Tensor
