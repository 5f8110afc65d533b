"""The one ``autograd.Function`` at the top: hooks, DDP, GradScaler and any ``torch.optim`` see ordinary gradients."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fastmeta.engine.compiler import Programs
from fastmeta.engine.evaluation import MEAN, Cotangents, MetaGradient
from fastmeta.engine.meta_step import evaluate
from fastmeta.engine.profile import Profile, collect, collecting
from fastmeta.engine.timeline import BACKWARD
from fastmeta.engine.work import Work, leaves

_NONE = torch.empty(0)


@dataclass
class Custom:
    """Whether the last objective differentiated was another than the mean loss; one a learner, across meta-steps."""

    seen: bool = False


@dataclass
class Step:
    """A meta-step on its way through autograd, and what its forward pass found beside what can be differentiated."""

    work: Work
    programs: Programs
    custom: Custom
    learned: bool  # whether the rates are, or other hyper-parameters of the inner rule
    support_losses: Tensor = _NONE
    mutations: list[dict[str, Tensor]] = field(default_factory=list)
    taken: Tensor | None = None
    profile: Profile | None = field(default_factory=collecting, init=False)
    differentiated: bool = field(default_factory=torch.is_grad_enabled, init=False)  # a Function's forward cannot ask

    def run(self) -> Sequence[Tensor]:
        """Mean loss, task losses and the query outputs."""
        work = self.work
        parameters = work.parameters.values()
        inputs = (*parameters, work.alpha, work.hyper) if self.learned else parameters
        results: Sequence[Tensor] = MetaStep.apply(self, *inputs)
        return results


class MetaStep(torch.autograd.Function):
    """Unroll and adjoint, so that no chunk's tapes outlive it.

    The forward pass already computes the gradient of the mean loss, which is what nearly everyone differentiates;
    backward scales it and gives it away. Any other objective (single task losses, the outputs), and a second backward
    through a retained graph, are known in backward only: the meta-step is then run again with their cotangents, and
    after another objective the next forward pass leaves the gradient out.

    What a second run needs is given to autograd for keeping, so ``retain_graph``, saved-tensor hooks and the errors on
    changed tensors and on a second backward work as for any other function. A third derivative raises.
    """

    @staticmethod
    def forward(ctx: Any, step: Step, *inputs: Tensor | None) -> tuple[Tensor, ...]:
        """Return mean loss, task losses and the query outputs; ``inputs`` are the parameters, and a learned rule's."""
        work, programs = step.work, step.programs
        wanted = step.differentiated and True in ctx.needs_input_grad
        cotangents = MEAN if wanted and not step.custom.seen else None
        dice = _Dice(work) if wanted and programs.random else None
        result = evaluate(work, programs, cotangents, learned=wanted and step.learned, outputs=True)
        step.support_losses, step.mutations, step.taken = result.support_losses, result.mutations, result.taken
        if wanted:
            kept = *work.parameters.values(), *leaves(work.support), *leaves(work.query)
            buffers = _read_buffers(work, programs) if work.buffers else ()
            ctx.save_for_backward(work.alpha, work.hyper, *kept, *buffers)
            ctx.step, ctx.dice, ctx.gradient = step, dice, result.gradient
        constant = [o for o in result.outputs if not o.is_floating_point()]
        if constant:
            ctx.mark_non_differentiable(*constant)
        ctx.set_materialize_grads(False)
        return result.loss, result.losses, *result.outputs

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        """Scale the meta-gradient, or compute it; see eq. (5)-(8')."""
        profile = ctx.step.profile
        if profile is None or profile.runs is None or profile.runs.ended:
            return MetaStep._backward(ctx, *cotangents)
        with profile.runs.span(BACKWARD), collect(profile):  # on a GPU autograd has a thread of its own for it
            return MetaStep._backward(ctx, *cotangents)

    @staticmethod
    def _backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        if not torch.is_grad_enabled():
            return MetaStep._gradients(ctx, *cotangents)
        with torch.no_grad():
            gradients = MetaStep._gradients(ctx, *cotangents)
        anchor = torch.empty(0, requires_grad=True)  # constants would make a third derivative silently wrong
        return tuple(g if g is None else _Last.apply(g, anchor) for g in gradients)

    @staticmethod
    def _gradients(ctx: Any, d_mean: Tensor | None, *d_others: Tensor | None) -> tuple[Tensor | None, ...]:
        step: Step = ctx.step
        saved = ctx.saved_tensors  # raises where they have changed, or are gone
        gradient: MetaGradient | None = ctx.gradient
        ctx.gradient = None
        step.custom.seen = any(d is not None for d in d_others)
        if gradient is None or d_mean is None or step.custom.seen:
            gradient = MetaStep._again(ctx, saved, d_mean, *d_others)
        else:
            gradient.scale(d_mean)
        rule = (gradient.alpha, gradient.hyper) if step.learned else ()
        if step.work.packing.names == tuple(step.work.parameters):
            return None, *gradient.adapted, *rule
        by_name: dict[str, Tensor | None] = dict(zip(step.work.packing.names, gradient.adapted, strict=True))
        by_name.update(zip(step.programs.both[1].outer, gradient.outer, strict=True))
        return None, *map(by_name.get, step.work.parameters), *rule

    @staticmethod
    def _again(
        ctx: Any, saved: Any, d_mean: Tensor | None, d_tasks: Tensor | None, *d_outputs: Tensor | None
    ) -> MetaGradient:
        step: Step = ctx.step
        work = step.work
        counts = len(work.parameters), len(leaves(work.support)), len(leaves(work.query)), len(work.buffers)
        alpha, hyper, *others = saved
        parameters, support, query, buffers = _cut(others, counts)
        again = replace(
            work,
            parameters=dict(zip(work.parameters, parameters, strict=True)),
            buffers=dict(zip(work.buffers, buffers, strict=True)),
            support=_like(work.support, support),
            query=_like(work.query, query),
            alpha=alpha,
            hyper=hyper,
        )
        d_losses = alpha.new_zeros(work.tasks) if d_tasks is None else d_tasks
        if d_mean is not None:
            d_losses = d_losses + d_mean / work.tasks
        with ctx.dice or nullcontext():
            return evaluate(again, step.programs, Cotangents(d_losses, d_outputs), learned=step.learned).meta_gradient


class _Dice:
    """Rolls again what the forward pass has rolled: dropout masks and the like."""

    def __init__(self, work: Work) -> None:
        device = work.theta[0].device
        self._devices = [device] if device.type == "cuda" else []
        self._states = [torch.get_rng_state(), *(torch.cuda.get_rng_state(d) for d in self._devices)]

    def __enter__(self) -> None:
        self._fork = torch.random.fork_rng(self._devices)
        self._fork.__enter__()
        torch.set_rng_state(self._states[0])
        for device, state in zip(self._devices, self._states[1:], strict=True):
            torch.cuda.set_rng_state(state, device)

    def __exit__(self, *error: Any) -> None:
        self._fork.__exit__(*error)


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


def _cut(tensors: list[Any], counts: Sequence[int]) -> list[list[Any]]:
    """The groups of so many tensors each, one after the other."""
    ends = list(itertools.accumulate(counts))
    return [tensors[end - count : end] for end, count in zip(ends, counts, strict=True)]


def _like(tree: Any, tensors: list[Any]) -> Any:
    """``tensors`` in the structure of ``tree``."""
    return pytree.tree_unflatten(tensors, pytree.tree_structure(tree))


def _read_buffers(work: Work, programs: Programs) -> list[Tensor]:
    """The buffers a second run reads: copies of those that a training pass over the model may write meanwhile."""
    return [b.clone() if name in programs.written else b for name, b in work.buffers.items()]
