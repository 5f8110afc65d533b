"""What an adaptive step is made of: its form, its state and its numbers (docs/maths.md, eq. 19)."""

from __future__ import annotations

import enum
from typing import NamedTuple

from torch import Tensor


class Form(enum.IntEnum):
    """Which moments a step has, and where they stand; numbered as in ``csrc/adaptive_update/form.h``."""

    SECOND = 0  # a second moment alone
    BUFFERED = 1  # and a buffer of steps, RMSprop's momentum
    CENTRED = 2  # the first moment's square is taken from the second
    CENTRED_BUFFERED = 3
    AVERAGED = 4  # the first moment is what the root divides, Adam
    LARGEST = 5  # and the largest second moment so far stands in the root, AMSGrad

    @property
    def buffer(self) -> bool:
        """Whether there is a buffer of steps."""
        return self in (Form.BUFFERED, Form.CENTRED_BUFFERED)

    @property
    def centred(self) -> bool:
        """Whether the first moment's square is taken from the second."""
        return self in (Form.CENTRED, Form.CENTRED_BUFFERED)

    @property
    def averaged(self) -> bool:
        """Whether the first moment is what the root divides."""
        return self in (Form.AVERAGED, Form.LARGEST)

    @property
    def largest(self) -> bool:
        """Whether the largest second moment stands in the root."""
        return self is Form.LARGEST

    @property
    def first(self) -> bool:
        """Whether there is a first moment."""
        return self.centred or self.averaged

    @property
    def has(self) -> tuple[bool, bool, bool, bool]:
        """Of each part of a :class:`State`, whether a step of this form has it."""
        return self.first, True, self.largest, self.buffer


class State(NamedTuple):
    """Of the step before, or cotangents of it: ``[T, P]`` each; ``None`` for zero, and for what the form has not."""

    first: Tensor | None = None
    second: Tensor | None = None
    largest: Tensor | None = None
    buffer: Tensor | None = None


class Coefficients(NamedTuple):
    """The numbers of a step, as eq. (19) names them: numbers, or tensors ``[]``; those of no effect by default."""

    decay: float | Tensor = 0.0
    keep_first: float | Tensor = 0.0
    take_first: float | Tensor = 0.0
    keep_second: float | Tensor = 1.0
    take_second: float | Tensor = 1.0
    of_first: float | Tensor = 1.0
    of_second: float | Tensor = 1.0
    eps_root: float | Tensor = 0.0
    eps: float | Tensor = 0.0
    momentum: float | Tensor = 0.0
    shrink: float | Tensor = 0.0


class Adjoint(NamedTuple):
    """What a step's adjoint gives, eq. (20) and (21).

    Attributes:
        lam: cotangent of the parameters before the step, ``[T, P]``; ``None`` where there was no ``phi``, as the step
            then is the identity in the parameters.
        u: the negative of the gradient's cotangent, ``[T, P]``.
        state: cotangents of the state before the step.
        d_alpha: gradient to alpha in its shape, summed over tasks, where it is wanted.
        d_coefficients: likewise to the coefficients in their order, float64.
    """

    lam: Tensor | None
    u: Tensor
    state: State
    d_alpha: Tensor | None
    d_coefficients: Tensor | None
