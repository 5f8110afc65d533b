"""What a meta-step takes at the least: operations of its products, counted directly, and bytes of its operands."""

from __future__ import annotations

from fastmeta.engine.lower.operands import Operands
from fastmeta.engine.program import Instruction, Program
from fastmeta.engine.work import Work

MAPS = ("forward", "backward", "tangent", "tangent_backward")
ByMap = tuple[int, int, int, int]  # in the order of MAPS
NO_INSTRUCTION = (0, 0, 0, 0)


def products(instruction: Instruction) -> ByMap:
    """How often a product ``y = x w`` is computed in each of its four maps.

    Forward once, and backward once for each operand that wants a cotangent. The tangent has a term for each operand
    that varies; the tangent of a cotangent ``dx = dy w`` has one for ``dy`` and one for ``w`` if that varies.
    """
    operands = sum(bool(need) for need in instruction.later.need[:2])
    return 1, operands, operands, 4 if operands == 2 else operands


def flops_by_map(instruction: Instruction | None) -> ByMap:
    """Operations of the products in each map for one task: ``op.flops()`` times :func:`products`."""
    if instruction is None:
        return NO_INSTRUCTION
    forward, backward, tangent, tangent_backward = products(instruction)
    one = instruction.op.flops()
    return one * forward, one * backward, one * tangent, one * tangent_backward


def bytes_by_map(operands: Operands) -> ByMap:
    """Bytes that each map of a native operation reads and writes for one task, every operand and result once.

    With ``x``, ``w`` and ``y`` the bytes of inputs, parameters and result::

        forward            x + w + y
        backward           x + w + dy + dx + dw
        tangent            x + w + x_dot + w_dot + y_dot
        tangent_backward   x + w + dy + x_dot + w_dot + dy_dot + dx_dot + dw_dot

    A derivative counts where it exists: a task's data have none. What only changes a layout is linear and reads no
    ``x`` for a derivative. Steps along a gradient read and write what is counted here already.
    """
    o = operands
    primal = 0 if o.instruction is None else o.x + o.w
    dots, cotangents = o.x_varies + o.w_varies, o.x_active + o.w_active
    return (
        o.x + o.w + o.y,
        primal + o.y + cotangents,
        primal + dots + o.y,
        primal + o.y + dots + o.y + cotangents,
    )


def flops(work: Work, support: Instruction, query: Instruction | None) -> int:
    """Operations of one call of the program, at the support's and at the query's shapes, in the whole meta-step."""
    forward, backward, *tangents = products(support)
    first, later = forward + backward, sum(tangents)
    tasks = 1 if support.later.single else work.tasks
    if support.invariant:  # the same at every step: forward once, and back once for what all steps send there
        passes = (forward + (0 if work.first_order else backward)) * min(work.steps, 1)
    else:
        again = first if work.micro_batches > 1 else 0  # whose tapes are not kept
        passes = work.steps * work.micro_batches * (first + (0 if work.first_order else later + again))
    total = support.op.flops() * passes
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
