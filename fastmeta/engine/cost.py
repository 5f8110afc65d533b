"""How many floating-point operations a meta-step takes at the least: those of its products, counted directly."""

from __future__ import annotations

from fastmeta.engine.program import Instruction, Program
from fastmeta.engine.work import Work


def products(instruction: Instruction) -> tuple[int, int]:
    """How often a product ``y = x w`` is computed in its four maps, as ``(forward and backward, both tangents)``.

    Forward once, and once for each operand that wants a cotangent. The tangent has a term for each operand that varies;
    the tangent of a cotangent ``dx = dy w`` has one for ``dy`` and one for ``w`` if that varies.
    """
    operands = sum(bool(need) for need in instruction.later.need[:2])
    return 1 + operands, 2 * operands + (2 if operands == 2 else 0)


def flops(work: Work, support: Instruction, query: Instruction | None) -> int:
    """Operations of one call of the program, at the support's and at the query's shapes, in the whole meta-step."""
    first, later = products(support)
    tasks = 1 if support.later.single else work.tasks
    total = support.op.flops() * work.steps * (first + (0 if work.first_order else later))
    if query is not None:
        total += query.op.flops() * first
    return total * tasks


def paired(support: Program, query: Program | None) -> list[tuple[Instruction, Instruction | None]]:
    """The support program's calls with the query program's, which is the same model's at other shapes.

    Where a model makes other calls at the query's shapes, the query is counted at the support's.
    """
    if query is None:
        return [(call, None) for call in support.instructions]
    if len(support.instructions) != len(query.instructions):
        return [(call, call) for call in support.instructions]
    return list(zip(support.instructions, query.instructions, strict=True))
