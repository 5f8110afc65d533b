"""The autodiff engine: plain autograd over tasks, one by one. Slower, exact, and able to run what cannot be traced."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

from fastmeta.core.task_op import plus
from fastmeta.engine.clipping import EPS
from fastmeta.engine.work import Work, task_of
from fastmeta.inner.rates import rates_of


@dataclass(frozen=True)
class AutodiffResult:
    """Results over all tasks; losses and outputs are attached to autograd's graph where grad mode is on.

    Attributes:
        task_losses: ``[T]``, or ``None`` without a query.
        outputs: pytree with leaves ``[T, ...]``.
        support_losses: ``[K, T]``, detached.
        phi: adapted parameters, packed ``[T, P]``.
        buffers: the buffers as the last forward left them.
        taken: how many inner steps each task took, ``[T]``, where they may stop early.
        statistics: running statistics of each task's own, ``[T, ...]``, where it has such.
    """

    task_losses: Tensor | None
    outputs: Any
    support_losses: Tensor
    phi: Tensor
    buffers: dict[str, Tensor]
    taken: Tensor | None = None
    statistics: dict[str, Tensor] = field(default_factory=dict)

    @property
    def evaluated(self) -> Tensor:
        """The task losses, where there was a query."""
        if self.task_losses is None:
            raise RuntimeError("autodiff: query must have been evaluated, got a run that only adapts")
        return self.task_losses


def run(work: Work, *, keep_buffers: bool, allow_unused: bool) -> AutodiffResult:
    """Adapt and evaluate each task by autograd, eq. (2)-(4).

    Differentiable to any order in the parameters, the rates and the tasks' tensors.

    Args:
        work: the meta-step.
        keep_buffers: let each forward see the buffers the one before left; otherwise each sees the original.
        allow_unused: treat the gradient of a parameter the loss does not use as zero.

    Raises:
        ValueError: a parameter is unused and ``allow_unused`` is false, or a loss is not finite.
    """
    with sdpa_kernel(SDPBackend.MATH):  # the fused attention kernels have no second derivative
        return _run(work, keep_buffers, allow_unused)


def _run(work: Work, keep_buffers: bool, allow_unused: bool) -> AutodiffResult:
    create_graph = torch.is_grad_enabled()
    buffers = {name: b.clone() for name, b in work.buffers.items()}
    losses, outputs, supports, phis = [], [], [], []

    each_own: list[dict[str, Tensor]] = []
    counts = []

    def passed(phi: list[Tensor], k: int, batch: Any, keep: bool, *, query: bool) -> tuple[Tensor, Any]:
        state = replace(work, buffers=_seen(buffers, keep)).fixed(k)
        seen = {name: state.pop(name) for name in buffers}
        if each_own:
            seen |= _seen(each_own[-1], keep=not query)
        parameters = {**state, **dict(zip(work.packing.names, phi, strict=True))}
        return work.seen_by(query=query)(parameters, seen, batch)

    def inner(phi: list[Tensor], k: int, t: int) -> tuple[Tensor, list[Tensor | None]]:
        """Support loss and gradients, of all micro-batches together."""
        sets = work.micro_sets()
        loss, g = phi[0].new_zeros(()), list[Tensor | None]([None] * len(phi))
        for batch in sets:
            part, _ = passed(phi, k, task_of(batch, t), keep_buffers, query=False)
            if not part.requires_grad:
                raise ValueError("MAML: the support loss depends on no adapting parameter; see parameters=")
            if create_graph and t == k == 0:
                _require_derivatives(part)
            part = part / len(sets) if len(sets) > 1 else part
            own = torch.autograd.grad(part, phi, create_graph=create_graph and not work.first_order, allow_unused=True)
            loss = loss + part.detach()
            g = [plus(total, d) for total, d in zip(g, own, strict=True)]
        if work.check_finite:
            _require_finite(loss, t, f"support loss at inner step {k}")
        return loss, g

    for t in range(work.tasks):
        if work.own_statistics:
            each_own.append({name: work.buffers[name].clone() for name in work.own_statistics})
        looked = []
        phi, task_supports = list(work.theta), list[Tensor]()
        states: list[Any] = [None] * len(phi)
        taken = 0
        for k, weight in enumerate(work.weights[: work.steps]):
            if work.query is not None and weight:
                looked.append(weight * passed(phi, k, task_of(work.query, t), False, query=True)[0])
            if taken < k:  # it has stopped
                task_supports.append(task_supports[-1])
                continue
            with torch.enable_grad():
                if not all(p.requires_grad for p in phi):
                    phi = [p if p.requires_grad else p.detach().requires_grad_() for p in phi]
                loss, g = inner(phi, k, t)
            task_supports.append(loss)
            along = [torch.zeros_like(p) if d is None else d for p, d in zip(phi, g, strict=True)]
            if work.stop is not None and bool(work.stop.reached(loss[None], [d[None] for d in along])):
                continue
            taken = k + 1
            phi, states = _step(work, phi, states, g, k, allow_unused)
            if not create_graph:
                phi = [p.detach() for p in phi]
        counts.append(taken)
        supports.append(torch.stack(task_supports) if task_supports else phi[0].new_empty(0))
        phis.append(work.packing.pack_shared(phi))
        if work.query is not None:
            loss, output = passed(phi, work.steps, task_of(work.query, t), keep_buffers, query=True)
            if t == 0:
                _require_derivatives(loss)
            if work.check_finite:
                _require_finite(loss, t, "query loss")
            losses.append(loss if work.query_weights is None else sum(looked) + loss * work.weights[-1])
            outputs.append(output)
    return AutodiffResult(
        torch.stack(losses) if losses else None,
        _stack(outputs) if outputs else None,
        torch.stack(supports, dim=1),
        torch.stack(phis),
        buffers,
        None if work.stop is None else torch.tensor(counts, device=work.alpha.device),
        {name: torch.stack([own[name] for own in each_own]) for name in work.own_statistics},
    )


def _step(
    work: Work, phi: list[Tensor], states: list[Any], g: list[Tensor | None], k: int, allow_unused: bool
) -> tuple[list[Tensor], list[Any]]:
    """The inner rule, parameter by parameter; independent of the packed kernels, which are tested against it."""
    rates = rates_of(work.alpha[k if work.alpha.shape[0] > 1 else 0], work.rate_shapes, len(phi))
    unused = [name for name, d in zip(work.packing.names, g, strict=True) if d is None]
    if unused and not allow_unused:
        raise unused_error(unused)
    along = [torch.zeros_like(p) if d is None else d for p, d in zip(phi, g, strict=True)]
    if work.clip_norm is not None:
        norm = torch.cat([d.reshape(-1) for d in along]).norm()
        along = [d * (work.clip_norm / (norm + EPS)).clamp(max=1) for d in along]
    after = []
    for place, (p, state, d, rate) in enumerate(zip(phi, states, along, rates, strict=True)):
        kind, values = work.rule.of(place, work.hyper)
        after.append(kind.explicit(p, state, d, rate, values))
    return [p for p, _ in after], [state for _, state in after]


def _seen(buffers: dict[str, Tensor], keep: bool) -> dict[str, Tensor]:
    return buffers if keep else {name: b.clone() for name, b in buffers.items()}


def _stack(outputs: list[Any]) -> Any:
    flat = [pytree.tree_flatten(o) for o in outputs]
    columns = zip(*[leaves for leaves, _ in flat], strict=True)
    stacked = [torch.stack(c) if isinstance(c[0], Tensor) else None for c in columns]
    return pytree.tree_unflatten(stacked, flat[0][1])


def _require_derivatives(loss: Tensor) -> None:
    """No call on the way from parameters to ``loss`` is one that has no derivative, which autograd takes for zero."""
    waiting = [loss.grad_fn]
    seen = set(waiting)
    while waiting:
        node = waiting.pop()
        if node is None:
            continue
        if node.name().endswith("WarnNotImplemented"):
            raise ValueError(
                "MAML: every call between a parameter that requires grad and the loss must have a derivative, got one "
                "that has none, such as a dynamically quantised layer; what comes before it must not require grad: "
                "requires_grad_(False)"
            )
        found = {before for before, _ in node.next_functions} - seen
        seen |= found
        waiting += found


def _require_finite(loss: Tensor, task: int, what: str) -> None:
    if not torch.isfinite(loss):
        raise ValueError(
            f"MAML: the {what} must be finite, got {loss.item()} for task {task}; lower lr or check the input"
        )


def unused_error(names: list[str]) -> ValueError:
    """The error for adapting parameters that get no gradient, with the mend."""
    return ValueError(
        f"MAML: the support loss does not use the adapting parameters {names}; leave them out by parameters=, or pass "
        "allow_unused=True"
    )
