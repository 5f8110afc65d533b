"""The meta-gradient of a proximal inner problem by the implicit function theorem, eq. (23)-(25) of docs/maths.md."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastmeta.engine import executor
from fastmeta.engine.evaluation import MetaGradient, added
from fastmeta.engine.fast_weights import FastWeights, Vector
from fastmeta.engine.program import Program
from fastmeta.engine.unroll import Trajectory, proximal
from fastmeta.engine.work import Implicit, Work


@dataclass(frozen=True)
class Solution:
    """What came of the linear systems of some tasks.

    Attributes:
        residual: ``|b - A v| / |b|`` of each task, ``[T]``, computed anew from the solution; 0 where ``b`` is.
        iterations: of each task, ``[T]``.
        positive: whether every direction met had positive curvature, ``[T]``: where not, the task's iterations ended
            there, and the inner problem is no minimum.
        stationarity: ``|g + lambda (phi - theta)|`` of each task after its inner steps, ``[T]``.
    """

    residual: Tensor
    iterations: Tensor
    positive: Tensor
    stationarity: Tensor


def implicit_gradient(
    work: Work,
    support: Program,
    query: Program,
    trajectory: Trajectory,
    d_loss: Tensor,
    d_outputs: Sequence[Tensor | None],
    onto: Sequence[Tensor | None],
) -> MetaGradient:
    """Meta-gradient where the inner steps have ended, whatever way they went there.

    Args:
        work: the meta-step.
        support: its program at the support shapes.
        query: its program at the query shapes.
        trajectory: of an unroll without tapes; it is used up.
        d_loss: cotangent of each task's query loss, ``[T]``.
        d_outputs: cotangents of the query outputs.
        onto: as :func:`fastmeta.engine.unroll.adjoint` has it.
    """
    settings = work.implicit
    if settings is None:
        raise RuntimeError("implicit gradient: work must have a proximal inner problem, got none")
    rule = FastWeights(work, support)
    gradients = executor.backward(query, trajectory.evaluated, d_loss, d_outputs, last=True)
    trajectory.query = None
    b, outer = rule.vector(gradients.adapted).packed, gradients.outer
    passes, phi = trajectory.inner, trajectory.phi
    passed = passes.run(phi, work.steps, keep=True)
    slope = rule.vector(proximal(work, rule.values(phi), passed.g)).packed
    scale = settings.strength + settings.damping

    def curved(p: Tensor) -> Tensor:
        product = passes.product(passed.tape, phi, work.steps, rule.values(Vector(p, {})), outer=False)
        return torch.add(rule.vector(product.adapted).packed, p, alpha=scale)

    v, iterations, positive = conjugate_gradients(curved, b, settings)
    product = passes.product(passed.tape, phi, work.steps, rule.values(Vector(v, {})))
    rest = b - torch.add(rule.vector(product.adapted).packed, v, alpha=scale)
    sizes = b.norm(dim=1)
    residual = torch.where(sizes > 0, rest.norm(dim=1) / sizes, sizes)
    settings.report.append(Solution(residual, iterations, positive, slope.norm(dim=1)))
    outer = added(outer, product.outer, -1)
    once = passes.invariant_outer()
    if once is not None:
        outer = added(outer, once, -1)
    return MetaGradient(rule.over_tasks(Vector(v * scale, {}), onto), outer, None)


def conjugate_gradients(
    product: Callable[[Tensor], Tensor], b: Tensor, settings: Implicit
) -> tuple[Tensor, Tensor, Tensor]:
    """Solve ``A v = b`` for every task at once, each until its own residual is small enough.

    Args:
        product: ``A p`` for ``p`` ``[T, P]``; symmetric, and positive definite where the solution is to be exact.
        b: ``[T, P]``.
        settings: iterations and tolerance.

    Returns:
        ``v`` ``[T, P]``, the number of iterations of each task ``[T]``, and whether all curvature met was positive.
    """
    v, r, p = torch.zeros_like(b), b, b
    square = (r * r).sum(1, keepdim=True)
    enough = square * settings.tolerance**2
    active = square > enough
    iterations = torch.zeros(len(b), dtype=torch.int64, device=b.device)
    positive = torch.ones_like(active)
    for _ in range(settings.iterations):
        if not bool(active.any()):
            break
        q = product(p)
        curvature = (p * q).sum(1, keepdim=True)
        positive &= (curvature > 0) | ~active
        active = active & (curvature > 0)
        length = torch.where(active, square / curvature, 0.0)  # tasks that have ended keep what they have
        v, r = v + length * p, r - length * q
        after = (r * r).sum(1, keepdim=True)
        p = torch.where(active, r + after / square * p, p)
        square = torch.where(active, after, square)
        iterations += active[:, 0]
        active = active & (square > enough)
    return v, iterations, positive[:, 0]
