"""Algorithms of which one part of the model adapts: the head alone, or all but the head."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from fastmeta.algorithms.head import head_parameters
from fastmeta.algorithms.maml import MAML
from fastmeta.inner.rates import Rate


class ANIL(MAML):
    """Almost no inner loop: the head alone adapts; the body is shared, and learned by the outer loop.

    ``phi_{k+1} = phi_k - alpha_k * grad_head ls(phi_k, psi)`` with the body ``psi``, whose meta-gradient is eq. (8') of
    docs/maths.md. The body's features of a support set are the same at every step: they are computed once a meta-step,
    forward and back (eq. 9), in either executor.

    Args:
        model, loss, lr, steps: as :class:`fastmeta.MAML` has them.
        head: names of submodules, or names or ``fnmatch`` patterns of parameters, that adapt; ``None`` for the last
            submodule that has parameters of its own.
        options: the other arguments of :class:`fastmeta.MAML` but ``parameters``.

    Raises:
        TypeError: ``parameters`` is given.
        ValueError: ``head`` fits no parameter, or all of them.

    Source: A. Raghu, M. Raghu, S. Bengio, O. Vinyals, ICLR 2020.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[..., Any],
        lr: Rate | None = None,
        steps: int = 1,
        *,
        head: str | Iterable[str] | None = None,
        **options: Any,
    ) -> None:
        _refuse_parameters("ANIL", options)
        names = sorted(head_parameters(model, head, "ANIL"))
        super().__init__(model, loss, lr, steps, parameters=names, **options)


class BOIL(MAML):
    """Body only update in the inner loop: all parameters adapt but the head, which the outer loop alone learns.

    ``phi_{k+1} = phi_k - alpha_k * grad_body ls(phi_k, psi)`` with the head ``psi``.

    Args:
        model, loss, lr, steps: as :class:`fastmeta.MAML` has them.
        head: what does not adapt, as :class:`ANIL` has it.
        options: the other arguments of :class:`fastmeta.MAML` but ``parameters``.

    Raises:
        TypeError: ``parameters`` is given.
        ValueError: ``head`` fits no parameter, or all of them.

    Source: J. Oh, H. Yoo, C. Kim, S.-Y. Yun, ICLR 2021.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[..., Any],
        lr: Rate | None = None,
        steps: int = 1,
        *,
        head: str | Iterable[str] | None = None,
        **options: Any,
    ) -> None:
        _refuse_parameters("BOIL", options)
        fixed = head_parameters(model, head, "BOIL")
        names = [name for name, p in model.named_parameters() if name not in fixed and p.requires_grad]
        super().__init__(model, loss, lr, steps, parameters=names, **options)


def _refuse_parameters(algorithm: str, options: dict[str, Any]) -> None:
    if "parameters" in options:
        raise TypeError(f"{algorithm}: parameters must be left out, because head= says what adapts; use MAML otherwise")
