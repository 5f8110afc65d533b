"""When a task takes no further inner steps."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastmeta.core import checks


@dataclass(frozen=True)
class EarlyStop:
    """A task takes no further inner steps once its support loss, or its gradient's norm, is small enough.

    Before step k a task that still goes on looks at ``ls(phi_k)`` and ``g_k``. Where ``ls(phi_k) < loss`` or
    ``|g_k| < gradient_norm`` it keeps ``phi_k`` for good. Steps that are not taken are identities in the meta-gradient,
    which is exact for the number of steps that each task took; that number itself, a step function of the
    meta-parameters, is not differentiated.

    Args:
        loss: a support loss below this one ends the task's inner loop; ``None`` for no such limit.
        gradient_norm: so does a 2-norm of the gradient below this one, over all adapting parameters of the task, before
            it is clipped; ``None`` for no such limit.

    Raises:
        TypeError: a limit is neither a number nor ``None``.
        ValueError: a limit is not finite, a norm not positive, or there is no limit.
    """

    loss: float | None = None
    gradient_norm: float | None = None

    def __post_init__(self) -> None:
        """Check both limits."""
        for name in ("loss", "gradient_norm"):
            value = getattr(self, name)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                checks.fail(TypeError, "EarlyStop", name, "a number or None", type(value).__name__)
            if not math.isfinite(value) or (name == "gradient_norm" and value <= 0):
                which = "positive and finite" if name == "gradient_norm" else "finite"
                checks.fail(ValueError, "EarlyStop", name, which, value)
        if self.loss is None and self.gradient_norm is None:
            raise ValueError("EarlyStop: loss or gradient_norm must be given, got None for both")

    def reached(self, loss: Tensor, g: Sequence[Tensor]) -> Tensor:
        """Which tasks stop here, ``[T]``, by their losses ``[T]`` and gradients ``[T, *shape]``; not differentiable."""
        loss = loss.detach()
        ends = torch.zeros_like(loss, dtype=torch.bool) if self.loss is None else loss < self.loss
        if self.gradient_norm is not None:
            squares = torch.stack([d.detach().flatten(1).square().sum(1) for d in g]).sum(0)
            ends = ends | (squares.sqrt() < self.gradient_norm)
        return ends


NEVER = EarlyStop(loss=-sys.float_info.max)  # which no loss is below
