"""MAML with a learned rate for every adapting element."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fastmeta.algorithms.inputs import select_parameters
from fastmeta.algorithms.maml import MAML
from fastmeta.core import checks


class MetaSGD(MAML):
    """Meta-SGD: initial weights and, for every adapting element, the rate it takes are learned together.

    ``phi_{k+1} = phi_k - alpha * grad ls(phi_k)``, elementwise, with ``d_alpha = -sum_t sum_k g_k * lam_{k+1}`` (eq. 7
    of docs/maths.md). A rate may become negative, as in the paper. The rates are parameters of this module, named
    ``lr.<name>`` with ``/`` for every dot; :meth:`value_and_grad` has their gradients under ``lr.<parameter's name>``.

    Args:
        model, loss: as :class:`fastmeta.MAML` has them.
        lr: what every rate is at first, a finite number. (The paper draws one number from [0.005, 0.1].)
        steps: K.
        parameters: which parameters adapt, as :class:`fastmeta.MAML` has it.
        options: the other arguments of :class:`fastmeta.MAML` but ``inner``.

    Raises:
        TypeError: ``lr`` is no number, or ``inner`` is given.
        ValueError: ``lr`` is not finite.

    Source: Z. Li, F. Zhou, F. Chen, H. Li, 2017 (arXiv:1707.09835).
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[..., Any],
        lr: float = 0.01,
        steps: int = 1,
        *,
        parameters: Iterable[str] | Callable[[str, nn.Parameter], bool] | None = None,
        **options: Any,
    ) -> None:
        if "inner" in options:
            raise TypeError("MetaSGD: inner must be left out, because its rates are this algorithm's own; use MAML")
        if isinstance(lr, bool) or not isinstance(lr, (int, float)):
            checks.fail(TypeError, "MetaSGD", "lr", "a number", type(lr).__name__)
        if not abs(lr) < float("inf"):
            checks.fail(ValueError, "MetaSGD", "lr", "finite", lr)
        known = dict(model.named_parameters())
        if isinstance(loss, nn.Module):
            known |= {f"loss.{name}": p for name, p in loss.named_parameters()}
        chosen = parameters if parameters is None or callable(parameters) else _patterns(parameters)
        names = select_parameters(known, chosen)
        rates: dict[str, float | Tensor] = {
            name: nn.Parameter(torch.full_like(known[name], lr, requires_grad=False)) for name in names
        }
        super().__init__(model, loss, rates, steps, parameters=chosen, **options)


def _patterns(selection: Iterable[str]) -> list[str]:
    return [selection] if isinstance(selection, str) else list(selection)
