"""Gradients of a loss to a list of parameters; a parameter that has none is named."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NoReturn

import torch
from torch import Tensor

from fastmeta.compat import descent
from fastmeta.core.checks import fail

Names = Callable[[], Sequence[str]]


def gradients(
    op: str,
    loss: Tensor,
    parameters: Iterable[Tensor],
    *,
    create_graph: bool,
    retain_graph: bool = False,
    allow_unused: bool = False,
    allow_nograd: bool = False,
    names: Names | None = None,
) -> list[Tensor | None]:
    """``torch.autograd.grad`` with ``None`` for each parameter that may be without a gradient.

    Args:
        op: what the user called, for messages.
        loss: what is differentiated.
        parameters: with respect to what.
        create_graph: let the gradients be differentiated. The loss's graph is kept then, which they need.
        retain_graph: keep the loss's graph in any case.
        allow_unused: let parameters be unused by the loss.
        allow_nograd: let parameters not require grad.
        names: the parameters' names, for messages; their places and shapes by default.

    Raises:
        RuntimeError: a parameter has no gradient and may not be without one, or none of them has.
    """
    parameters = list(parameters)

    def named(places: Sequence[int]) -> str:
        known = [f"number {i} of shape {list(p.shape)}" for i, p in enumerate(parameters)] if names is None else names()
        return ", ".join(known[i] for i in places)

    wanted = [i for i, p in enumerate(parameters) if p.requires_grad]
    frozen = [i for i, p in enumerate(parameters) if not p.requires_grad]
    if frozen and not allow_nograd:
        refuse_frozen(op, named(frozen))
    if not wanted:
        fail(RuntimeError, op, "parameters", "such that one at least requires grad", "none that does")
    if isinstance(loss, Tensor) and not loss.requires_grad:
        mend = "compute it by a forward pass of this learner, with gradients enabled"
        fail(RuntimeError, op, "loss", "a tensor that depends on the parameters", "one that requires no grad", mend)
    differentiated = [parameters[i] for i in wanted]
    if create_graph:
        found = descent.gradients(loss, differentiated)
    else:
        found = torch.autograd.grad(loss, differentiated, retain_graph=retain_graph, allow_unused=True)
    unused = [i for i, g in zip(wanted, found, strict=True) if g is None]
    if unused and not allow_unused:
        mend = "pass allow_unused=True to leave unused ones as they are"
        fail(RuntimeError, op, "loss", "a function of every parameter", f"one that does not use {named(unused)}", mend)
    by_place = dict(zip(wanted, found, strict=True))
    return [by_place.get(i) for i in range(len(parameters))]


def refuse_frozen(op: str, names: str) -> NoReturn:
    """Raise for parameters that do not require grad where that is not allowed."""
    mend = "pass allow_nograd=True to leave them as they are, or let them require grad"
    fail(RuntimeError, op, "parameters", "such that each requires grad", f"some that do not: {names}", mend)
