"""What a meta-step gives its caller."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fastmeta.engine.evaluation import MetaGradient
from fastmeta.engine.program import Program
from fastmeta.engine.work import Work


class MetaOutput(NamedTuple):
    """Result of a meta-step.

    Attributes:
        loss: mean query loss, ``[]``, eq. (4).
        task_losses: query loss of each task, ``[T]``.
        logits: the adapted model's outputs on the query set, ``[T, Nq, ...]``, or the pytree the model returns.
        support_losses: support loss before each inner step, ``[K, T]``; never differentiable. Of a task that
            has stopped early, the one at which it did.
        steps_taken: how many inner steps each task took, ``[T]``; ``None`` where ``stop`` is, and all took K.

    ``loss``, ``task_losses`` and ``logits`` may all be differentiated.
    """

    loss: Tensor
    task_losses: Tensor
    logits: Any
    support_losses: Tensor
    steps_taken: Tensor | None = None


def outputs_of(query: Program, leaves: list[Tensor]) -> Any:
    """The model's outputs on the query set, from their tensors."""
    graph = query.graph
    if graph.outputs_spec is None and leaves:
        return leaves[0]
    given = iter(leaves)
    every = [next(given) if kept else None for kept in graph.outputs_kept]
    return every[0] if graph.outputs_spec is None else pytree.tree_unflatten(every, graph.outputs_spec)


def gradients_of(work: Work, query: Program, gradient: MetaGradient) -> dict[str, Tensor]:
    """A meta-gradient by the names of ``work.parameters`` that require grad, zero where a parameter is not used."""
    adapted: dict[str, Tensor] = dict(zip(work.packing.names, gradient.adapted, strict=True))
    if work.packing.names == tuple(work.parameters):
        return adapted
    known = dict(zip(query.outer, gradient.outer, strict=True)) | adapted
    gradients = {}
    for name, parameter in work.parameters.items():
        if parameter.requires_grad:
            g = known.get(name)
            gradients[name] = torch.zeros_like(parameter) if g is None else g
    return gradients
