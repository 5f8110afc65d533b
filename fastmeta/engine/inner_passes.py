"""The passes over the support sets at one step's weights, eq. (2): one, or one for each micro-batch, eq. (29)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fastmeta.core.task_op import plus
from fastmeta.engine import executor
from fastmeta.engine.evaluation import added
from fastmeta.engine.executor import Gradients, Invariants, Tape
from fastmeta.engine.fast_weights import FastWeights, Vector, Weight
from fastmeta.engine.native_passes import NativePasses
from fastmeta.engine.program import Program
from fastmeta.engine.work import Work, require_finite


@dataclass
class Passed:
    """What the passes of a step leave.

    Attributes:
        loss: support losses, ``[T]``.
        g: the gradient, each parameter's.
        tape: if it was kept.
        mutations: new values of buffers, ``[T, ...]``, of each pass in order.
    """

    loss: Tensor
    g: list[Weight]
    tape: Tape | None = None
    mutations: list[dict[str, Tensor]] = field(default_factory=list)


class InnerPasses:
    """Passes of some tasks over their support sets, and the Hessian-vector products along them.

    Micro-batches are passed over one after the other, and where there are several, again for products: no tape is kept.

    Args:
        work: the meta-step.
        support: its program at the shapes of a micro-batch.
        rule: its fast weights.
        native: what passes over the support set instead, where nothing goes back; ``None`` for the program.

    Attributes:
        support: the program; another with the same operations may take its place between passes.
    """

    def __init__(self, work: Work, support: Program, rule: FastWeights, native: NativePasses | None = None) -> None:
        self._work, self.support, self._rule, self._native = work, support, rule, native
        self._sets = [pytree.tree_leaves(batch) for batch in work.micro_sets()]
        self._invariants: list[Invariants | None] = [None] * len(self._sets)  # what is the same at every step
        self._flowing: list[dict[int, Tensor]] = [{} for _ in self._sets]  # cotangents of that

    def run(self, phi: Vector, k: int, *, keep: bool = False) -> Passed:
        """Support losses and ``g_k``, eq. (2).

        Args:
            phi: weights.
            k: after so many steps.
            keep: keep the tape, if there is but one micro-batch.
        """
        passed: Passed | None = None
        for i in range(len(self._sets)):
            tape, g = self._pass(phi, k, i)
            if passed is None:
                passed = Passed(tape.loss, g)
            else:  # all gradients are formed
                passed.loss, passed.g = passed.loss + tape.loss, added(passed.g, g)  # type: ignore[arg-type, assignment]
            passed.mutations.append(tape.mutations)
            if keep and len(self._sets) == 1:
                passed.tape = tape
            del tape, g
        if passed is None:
            raise RuntimeError("inner passes: there must be a micro-batch, got none")
        if len(self._sets) > 1:
            passed.loss = passed.loss / len(self._sets)
        if self._work.check_finite:
            require_finite(passed.loss, f"support loss at inner step {k}")
        return passed

    def product(
        self, tape: Tape | None, phi: Vector | None, k: int, direction: Sequence[Weight], *, outer: bool = True
    ) -> Gradients:
        """``H_k u`` and, for what does not adapt, ``d<g_k, u>/d psi``; see :func:`executor.hessian_vector_product`.

        Args:
            tape: of :meth:`run`; ``None`` where it was not kept.
            phi: the weights, where it was not.
            k: after so many steps.
            direction: u, each parameter's.
            outer: whether the others' term is wanted.
        """
        total: Gradients | None = None
        for i, flowing in enumerate(self._flowing):
            if tape is None and phi is None:
                raise RuntimeError("inner passes: a tape or weights must be there, got neither")
            again = tape or self._pass(phi, k, i)[0]  # type: ignore[arg-type]
            part = executor.hessian_vector_product(self.support, again, direction, outer=outer)
            del again
            for slot, d in part.invariants.items() if outer else ():
                flowing[slot] = flowing[slot].add_(d) if slot in flowing else d.clone()
            if total is None:
                total = part
            else:
                adapted = added(total.adapted, part.adapted)  # type: ignore[arg-type]  # all formed
                total = Gradients(adapted, added(total.outer, part.outer))  # type: ignore[arg-type]
        if total is None:
            raise RuntimeError("inner passes: there must be a micro-batch, got none")
        return total

    def invariant_outer(self) -> list[Tensor | None] | None:
        """Eq. (9): gradients of parameters that nothing adapting comes before, from all products together."""
        total: list[Tensor | None] | None = None
        for i, flowing in enumerate(self._flowing):
            if not flowing:
                continue
            invariants = self._invariants[i]
            if len(self._sets) > 1:
                invariants = self._forward(self._work.theta, 0, i, None).invariants
            if invariants is not None:
                part = executor.invariant_backward(self.support, invariants, flowing)
                total = part if total is None else [plus(a, b) for a, b in zip(total, part, strict=True)]
        return total

    def _pass(self, phi: Vector, k: int, i: int) -> tuple[Tape, list[Weight]]:
        """Forward and backward pass over one micro-batch, and its part of the gradient."""
        if self._native is not None:
            return self._native.over_support(self._work, self._rule.values(phi), first=k == 0)  # type: ignore[arg-type,return-value]  # all formed
        adapted: Sequence[Weight] = self._rule.values(phi) if k else self._rule.first_values(phi)
        tape = self._forward(adapted, k, i, self._invariants[i])
        if self._invariants[i] is None and tape.invariants is not None:
            kept = tape.invariants
            if len(self._sets) > 1:  # what their maps need comes again, once, when they have to
                kept = replace(kept, saved=[()] * len(kept.saved))
            self._invariants[i] = kept
        d_loss = torch.full_like(tape.loss, 1 / len(self._sets))
        return tape, executor.backward(self.support, tape, d_loss, outer=False).adapted

    def _forward(self, adapted: Sequence[Weight], k: int, i: int, invariants: Invariants | None) -> Tape:
        return executor.forward(
            self.support, adapted, self._work.fixed(k), self._sets[i], first=k == 0, invariants=invariants
        )
