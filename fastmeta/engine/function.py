"""The one ``autograd.Function`` at the top: hooks, DDP, GradScaler and any ``torch.optim`` see ordinary gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fastmeta.engine.executor import Tape
from fastmeta.engine.program import Program
from fastmeta.engine.unroll import Trajectory, adjoint, unroll
from fastmeta.engine.work import Work


@dataclass
class Step:
    """A meta-step on its way through autograd; ``trajectory`` holds results only once the forward has run."""

    work: Work
    support: Program
    query: Program
    mutations: list[dict[str, Tensor]]


class MetaStep(torch.autograd.Function):
    """Unroll in the forward, adjoint in the backward.

    What the adjoint needs is given to autograd for keeping, so ``retain_graph``, saved-tensor hooks and the error on
    a second backward work as for any other function. A third derivative raises.
    """

    @staticmethod
    def forward(ctx: Any, step: Step, alpha: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        """Return mean loss, task losses, support losses and the query outputs."""
        work = step.work
        wanted = any(ctx.needs_input_grad)
        trajectory = unroll(
            work,
            step.support,
            step.query,
            keep_tapes=wanted and not work.first_order,
            keep_gradients=ctx.needs_input_grad[1],
        )
        query = trajectory.evaluated
        step.mutations = trajectory.mutations
        outputs = query.outputs
        if wanted:
            kept = [_tape_state(tape) for tape in (*trajectory.tapes, query)]
            leaves, ctx.spec = pytree.tree_flatten((kept, trajectory.gradients, [query.loss]))
            ctx.tensors = [isinstance(leaf, Tensor) for leaf in leaves]
            ctx.save_for_backward(*parameters, *(leaf for leaf in leaves if isinstance(leaf, Tensor)))
            ctx.step, ctx.count = step, len(parameters)
        ctx.mark_non_differentiable(trajectory.support_losses, *(o for o in outputs if not o.is_floating_point()))
        ctx.set_materialize_grads(False)
        outputs = tuple(o.view_as(o) for o in outputs)
        return query.loss.mean(), query.loss.clone(), trajectory.support_losses, *outputs

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        """Run the adjoint; see eq. (5)-(8')."""
        with torch.no_grad():
            gradients = MetaStep._adjoint(ctx, *cotangents)
        if torch.is_grad_enabled():  # create_graph: constants would make a third derivative silently wrong
            anchor = torch.empty(0, requires_grad=True)
            gradients = tuple(g if g is None else _Last.apply(g, anchor) for g in gradients)
        return gradients

    @staticmethod
    def _adjoint(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        step: Step = ctx.step
        work = step.work
        kept = iter(ctx.saved_tensors[ctx.count :])
        leaves = [next(kept) if is_tensor else None for is_tensor in ctx.tensors]
        states, gradients, (loss,) = pytree.tree_unflatten(leaves, ctx.spec)
        tapes = [_tape(state, first=k == 0, loss=loss) for k, state in enumerate(states[:-1])]
        trajectory = Trajectory(loss, loss, tapes, gradients, _tape(states[-1], first=work.steps == 0, loss=loss))
        d_mean, d_tasks, _, *d_outputs = cotangents
        d_loss = torch.zeros_like(loss) if d_tasks is None else d_tasks
        if d_mean is not None:
            d_loss = d_loss + d_mean / loss.shape[0]
        result = adjoint(work, step.support, step.query, trajectory, d_loss, d_outputs)
        by_name: dict[str, Tensor | None] = dict(
            zip(work.packing.names, work.packing.unpack_shared(result.theta), strict=True)
        )
        by_name.update(zip(step.query.outer, result.outer, strict=True))
        d_parameters = [by_name.get(name) for name in work.parameters]
        return None, result.alpha, *d_parameters


class _Last(torch.autograd.Function):
    """A meta-gradient under ``create_graph``: usable as a value, an error where its derivative is asked for."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, anchor: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        raise RuntimeError(
            "MAML: the meta-gradient can be differentiated no further by the program; use engine='autodiff' for "
            "third derivatives"
        )


def _tape_state(tape: Tape) -> tuple[Any, Any]:
    return tape.saved, tape.d_y


def _tape(state: tuple[Any, Any], *, first: bool, loss: Tensor) -> Tape:
    saved, d_y = state
    return Tape(first, loss, (), {}, saved, d_y)
