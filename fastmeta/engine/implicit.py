"""The meta-gradient of a proximal inner problem by the implicit function theorem, eq. (23)-(25) of docs/maths.md."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastmeta.engine import executor
from fastmeta.engine.evaluation import MetaGradient, Solution, added
from fastmeta.engine.fast_weights import FastWeights, Vector
from fastmeta.engine.program import Program
from fastmeta.engine.unroll import Trajectory, proximal
from fastmeta.engine.work import Implicit, Work
from fastmeta.ops import conjugate_gradients as cg


def implicit_gradient(
    work: Work,
    support: Program,
    query: Program,
    trajectory: Trajectory,
    d_loss: Tensor,
    d_outputs: Sequence[Tensor | None],
    onto: Sequence[Tensor | None],
) -> MetaGradient:
    """Meta-gradient where the inner steps have ended, whatever way they went there; with it how well it was solved for.

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
        return rule.vector(product.adapted).packed

    v, iterations, positive = conjugate_gradients(curved, b, settings, scale)
    product = passes.product(passed.tape, phi, work.steps, rule.values(Vector(v, {})))
    rest = b - torch.add(rule.vector(product.adapted).packed, v, alpha=scale)
    sizes = b.norm(dim=1)
    residual = torch.where(sizes > 0, rest.norm(dim=1) / sizes, sizes)
    solution = Solution(residual, iterations, positive, slope.norm(dim=1))
    outer = added(outer, product.outer, -1)
    once = passes.invariant_outer()
    if once is not None:
        outer = added(outer, once, -1)
    return MetaGradient(rule.over_tasks(Vector(v * scale, {}), onto), outer, None, solution=solution)


def conjugate_gradients(
    product: Callable[[Tensor], Tensor], b: Tensor, settings: Implicit, shift: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Solve ``(B + shift) v = b`` for every task at once, each until its own residual is small enough.

    A GPU takes all iterations, in which tasks that have ended keep what they have: nothing waits for it, and a CUDA
    graph can capture them.

    Args:
        product: ``B p`` for ``p`` ``[T, P]``; symmetric, and with the shift positive definite where the solution is to
            be exact.
        b: ``[T, P]``.
        settings: iterations and tolerance.
        shift: added to B's diagonal.

    Returns:
        ``v`` ``[T, P]``, the number of iterations of each task ``[T]``, and whether all curvature met was positive.
    """
    state = cg.start(b, settings.tolerance)
    for _ in range(settings.iterations):
        if not b.is_cuda and not bool(state.active.any()):
            break
        cg.advance(state, product(state.p), shift)
    return state.v, state.iterations, state.positive
