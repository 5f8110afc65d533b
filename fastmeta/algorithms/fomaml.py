"""First-order MAML."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from fastmeta.algorithms.maml import MAML
from fastmeta.inner.rates import Rate


class FOMAML(MAML):
    """First-order MAML: the gradient at the adapted weights, handed to the initial ones.

    ``d_theta = mean_t grad lq(phi_K)``: :class:`fastmeta.MAML` with every Hessian dropped, eq. (6) of docs/maths.md
    with ``H_k = 0``. Exact for that definition: gradients to learned rates are ``-g_k * lam`` with the same ``lam``.

    Args:
        model, loss, lr, steps: as :class:`fastmeta.MAML` has them.
        options: its other arguments but ``first_order``.

    Raises:
        TypeError: ``first_order`` is given.
        TypeError, ValueError: as :class:`fastmeta.MAML`.

    Source: C. Finn, P. Abbeel, S. Levine, ICML 2017, section 5.2; A. Nichol, J. Achiam, J. Schulman, 2018.
    """

    def __init__(
        self, model: nn.Module, loss: Callable[..., Any], lr: Rate | None = None, steps: int = 1, **options: Any
    ) -> None:
        if "first_order" in options:
            raise TypeError("FOMAML: first_order must be left out, because it is always true; use MAML to choose it")
        super().__init__(model, loss, lr, steps, first_order=True, **options)
