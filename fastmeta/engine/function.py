"""The one ``autograd.Function`` at the top: hooks, DDP, GradScaler and any ``torch.optim`` see ordinary gradients."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fastmeta.engine.compiler import Programs
from fastmeta.engine.executor import Tape
from fastmeta.engine.unroll import Trajectory, adjoint, joined_mutations, unroll
from fastmeta.engine.work import Work


@dataclass
class Step:
    """A meta-step on its way through autograd, and the buffer values its forward pass found."""

    work: Work
    programs: Programs
    mutations: list[dict[str, Tensor]] = field(default_factory=list)


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
        trajectories = [
            unroll(
                work.part(chunk),
                *step.programs.both,
                keep_tapes=wanted and not work.first_order,
                keep_gradients=ctx.needs_input_grad[1],
            )
            for chunk in step.programs.chunks(work.tasks)
        ]
        step.mutations = joined_mutations([trajectory.mutations for trajectory in trajectories])
        queries = [trajectory.evaluated for trajectory in trajectories]
        losses = torch.cat([query.loss for query in queries])
        support_losses = torch.cat([trajectory.support_losses for trajectory in trajectories], 1)
        outputs = [torch.cat(pieces) for pieces in zip(*[query.outputs for query in queries], strict=True)]
        if wanted:
            leaves, ctx.spec = pytree.tree_flatten([_kept(trajectory) for trajectory in trajectories])
            ctx.tensors = [isinstance(leaf, Tensor) for leaf in leaves]
            ctx.save_for_backward(*parameters, *(leaf for leaf in leaves if isinstance(leaf, Tensor)))
            ctx.step, ctx.count = step, len(parameters)
        ctx.mark_non_differentiable(support_losses, *(o for o in outputs if not o.is_floating_point()))
        ctx.set_materialize_grads(False)
        return losses.mean(), losses, support_losses, *outputs

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
        work, programs = step.work, step.programs
        kept = iter(ctx.saved_tensors[ctx.count :])
        states = pytree.tree_unflatten([next(kept) if is_tensor else None for is_tensor in ctx.tensors], ctx.spec)
        d_mean, d_tasks, _, *d_outputs = cotangents
        total = None
        for chunk, state in zip(programs.chunks(work.tasks), states, strict=True):
            trajectory = _trajectory(state, work.steps)
            d_loss = torch.zeros_like(trajectory.evaluated.loss) if d_tasks is None else d_tasks[chunk]
            if d_mean is not None:
                d_loss = d_loss + d_mean / work.tasks
            d_outputs_here = [d if d is None else d[chunk] for d in d_outputs]
            part = adjoint(work.part(chunk), *programs.both, trajectory, d_loss, d_outputs_here)
            total = part if total is None else total + part
        if total is None:
            raise RuntimeError("MAML: a meta-step must have at least one task")
        adapted = zip(work.packing.names, work.packing.unpack_shared(total.theta), strict=True)
        by_name: dict[str, Tensor | None] = dict(adapted)
        by_name.update(zip(programs.both[1].outer, total.outer, strict=True))
        return None, total.alpha, *(by_name.get(name) for name in work.parameters)


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


def _kept(trajectory: Trajectory) -> Any:
    """What the adjoint needs of a trajectory, as a pytree."""
    tapes = [(tape.saved, tape.d_y) for tape in (*trajectory.tapes, trajectory.evaluated)]
    return tapes, trajectory.gradients, trajectory.evaluated.loss


def _trajectory(kept: Any, steps: int) -> Trajectory:
    """The trajectory :func:`_kept` came from, as far as the adjoint reads it."""
    states, gradients, loss = kept
    tapes = [Tape(k == 0, loss, (), {}, saved, d_y) for k, (saved, d_y) in enumerate(states[:-1])]
    saved, d_y = states[-1]
    return Trajectory(loss, loss, tapes, gradients, Tape(steps == 0, loss, (), {}, saved, d_y))
