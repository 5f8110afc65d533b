"""CAVIA: a task is told apart by context parameters, which alone adapt."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastmeta.algorithms.maml import MAML
from fastmeta.inner.rates import Rate

Condition = Callable[..., Any]


class Conditioned(nn.Module):
    """A model that reads a context beside its inputs.

    Args:
        model: the model.
        context: shape of the context.
        condition: ``condition(model, context, *inputs)``, the outputs; ``None`` appends the context, of one axis, to
            the last axis of the one input.

    Attributes:
        context: the context parameters, zero.
    """

    def __init__(self, model: nn.Module, context: tuple[int, ...], condition: Condition | None) -> None:
        super().__init__()
        like = next(model.parameters(), torch.empty(0))
        self.model = model
        self.condition = condition
        self.context = nn.Parameter(like.new_zeros(context), requires_grad=False)

    def forward(self, *inputs: Any) -> Any:
        """Outputs for inputs of one task."""
        if self.condition is not None:
            return self.condition(self.model, self.context, *inputs)
        x: Tensor = inputs[0]
        return self.model(torch.cat([x, self.context.expand(*x.shape[:-1], -1)], -1))


class CAVIA(MAML):
    """Fast context adaptation: every task starts from a context of zeros and adapts nothing else.

    ``c_0 = 0``, ``c_{k+1} = c_k - alpha_k * grad_c ls(c_k, psi)``, and the outer loop learns all parameters ``psi`` of
    the model by eq. (8') of docs/maths.md. The context's start is not learned: it could be no better than zero, as the
    paper says, for the first layer's bias would take its place. What of the model the context does not reach is
    computed once a meta-step.

    ``learner.model`` is the model together with its context: :class:`Conditioned`, whose parameters are ``context``, of
    which ``learner.adapt(...).parameters`` has one a task, and those of the given model under ``model.``.

    Args:
        model: reads ``inputs`` with the context appended to their last axis, so that its first layer is so much wider;
            or whatever ``condition`` does with it.
        loss, lr, steps: as :class:`fastmeta.MAML` has them. The paper's rate is 1 for regression.
        context: number of context parameters, or the shape of the context.
        condition: ``condition(model, context, *inputs)``, which returns the model's outputs: scales and shifts of
            channels made of the context (FiLM), for example.
        options: the other arguments of :class:`fastmeta.MAML` but ``parameters``.

    Raises:
        TypeError: ``parameters`` is given, or ``context`` is no number and no shape.
        ValueError: ``context`` is not positive, or has several axes without ``condition``.

    Source: L. Zintgraf, K. Shiarlis, V. Kurin, K. Hofmann, S. Whiteson, ICML 2019.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[..., Any],
        lr: Rate | None = None,
        steps: int = 1,
        *,
        context: int | tuple[int, ...] = 5,
        condition: Condition | None = None,
        **options: Any,
    ) -> None:
        if "parameters" in options:
            raise TypeError("CAVIA: parameters must be left out, because the context alone adapts; use MAML otherwise")
        shape = context if isinstance(context, tuple) else (context,)
        if any(isinstance(size, bool) or not isinstance(size, int) for size in shape):
            raise TypeError(f"CAVIA: context must be a number or a shape, got {context!r}")
        if not shape or min(shape) < 1 or (condition is None and len(shape) > 1):
            raise ValueError(f"CAVIA: context must be positive, and of one axis without condition=, got {context!r}")
        super().__init__(Conditioned(model, shape, condition), loss, lr, steps, parameters=["context"], **options)
