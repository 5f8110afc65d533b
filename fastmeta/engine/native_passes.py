"""Passes over sets by the native executor, one task after the other, where weights adapt and nothing goes back.

A task's pass is a native meta-step of no inner step, at that task's weights: what it calls the meta-gradient is the
pass's own. So any inner rule can take its steps in between.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor

from fastmeta.core import rates
from fastmeta.engine.cut import passes_pay
from fastmeta.engine.evaluation import MEAN, Cotangents, Evaluation
from fastmeta.engine.executor import Tape
from fastmeta.engine.lower import ONCE, NotLowered
from fastmeta.engine.native import NativeStep
from fastmeta.engine.program import Program
from fastmeta.engine.work import Work, leaves
from fastmeta.inner.sgd_rule import PLAIN


class NativePasses:
    """Passes of one support program and, where there is one, of one query program. Lowered when they are first wanted.

    Args:
        support: the program on the support sets.
        query: that on the query sets.
    """

    def __init__(self, support: Program, query: Program | None) -> None:
        self._both = support, query

    def objection(self, work: Work) -> str:
        """Why passes over ``work``'s support sets do not run here; empty where they do."""
        if work.executor == "reference":
            return "the reference executor was asked for"
        if not work.alpha.is_cpu:
            return f"the parameters are on {work.alpha.device}"
        if work.micro_batches > 1:
            return "support sets are cut into micro-batches"
        if self._both[0].factored:
            return "weights that no task forms are asked for"
        if work.stepwise:
            return "parameters or buffers come stepwise"
        if work.own_statistics:
            return "tasks have running statistics of their own"
        if isinstance(self._support, str):
            return self._support
        if not passes_pay(self._both[0], work, rates.known(), torch.get_num_threads()):
            return "all tasks' passes together take less time"
        return ""

    def answers(self, work: Work) -> bool:
        """Whether passes over query sets run here, where those over support sets do."""
        return isinstance(self._query, NativeStep) and not self._query.refusal(_alone(work), outputs=True)

    def over_support(self, work: Work, weights: Sequence[Tensor], *, first: bool) -> tuple[Tape, list[Tensor]]:
        """Support losses, and each parameter's gradient.

        Args:
            work: the meta-step.
            weights: of the adapting parameters in the packing's order, ``[T, *shape]``.
            first: whether tasks still share them.

        Returns:
            What a pass leaves, its losses alone, and the gradients ``[T, *shape]``.
        """
        found = list(self._run(self._support, work, work.support, weights, MEAN))
        gradients = zip(*(each.meta_gradient.adapted for each in found), strict=True)
        loss = torch.stack([each.loss for each in found])
        return Tape(first, loss, (), {}, None), [torch.stack(own) for own in gradients]

    def over_query(self, work: Work, weights: Sequence[Tensor], *, first: bool) -> Tape:
        """Query losses and outputs."""
        found = list(self._run(self._query, work, work.query, weights, None))
        outputs = zip(*(each.outputs for each in found), strict=True)
        loss = torch.stack([each.loss for each in found])
        return Tape(first, loss, tuple(torch.cat(own) for own in outputs), {}, None)

    @cached_property
    def _support(self) -> NativeStep | str:
        return _lowered(self._both[0])

    @cached_property
    def _query(self) -> NativeStep | str:
        return "there is no query set" if self._both[1] is None else _lowered(self._both[1])

    @staticmethod
    def _run(
        step: NativeStep | str, work: Work, batch: object, weights: Sequence[Tensor], cotangents: Cotangents | None
    ) -> Iterator[Evaluation]:
        """Each task's pass."""
        alone = _alone(work)
        call = step if isinstance(step, str) else step.call(alone, cotangents, learned=False, outputs=not cotangents)
        if isinstance(call, str):
            raise RuntimeError(f"native passes: there must be no objection, got: {call}")
        call = replace(call, phase="support" if cotangents else "query")
        others = call.parameters[len(weights) :]
        tasks = zip(*(leaf.split(1) for leaf in leaves(batch)), strict=True)
        for data, own in zip(tasks, zip(*weights, strict=True), strict=True):
            call.parameters = [*own, *others]
            yield call.run(alone.on(data, data), cotangents)


def _lowered(program: Program) -> NativeStep | str:
    """Its passes, or why there are none."""
    try:
        step = NativeStep(program, program)
    except NotLowered as reason:
        return str(reason)
    cuts = [reason for _, reason in (*step.cuts[1], *step.preludes[1]) if reason != ONCE]
    return cuts[0] if cuts else step


def _alone(work: Work) -> Work:
    """A meta-step of no inner step, in which a pass is all there is."""
    return replace(
        work,
        query=work.support,
        steps=0,
        alpha=work.alpha.new_zeros(1, 1),
        segments=None,
        rate_shapes=None,
        rule=PLAIN,
        hyper=None,
        first_order=True,
        check_finite=False,
        keep_mutations=False,
        memory_budget=None,
    )
