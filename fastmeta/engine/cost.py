"""What a meta-step takes at the least: operations of its products, counted directly, and bytes of its operands."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import prod

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


def operands_of(program: Program, run: Sequence[Instruction]) -> Operands:
    """Operands of consecutive calls of a program as those of one operation, for whatever implementation of it.

    What they read of others goes in, what others read of theirs comes out; what lies between is nobody's operand. A
    weight that no task forms counts as the shared one, which has no derivative in memory.
    """
    varying = {program.graph.parameters[name] for name in program.adapted}
    for instruction in program.instructions:
        if varying.intersection(instruction.inputs):
            varying.update(instruction.outputs)
    own = {slot for instruction in run for slot in instruction.outputs}
    inside = {id(instruction) for instruction in run}
    wanted = {program.graph.loss, *program.graph.outputs}
    wanted.update(slot for i in program.instructions if id(i) not in inside for slot in i.inputs)
    pairs = [pair for i in run for pair in zip(i.inputs, i.later.need, strict=True) if pair[0] not in own]
    read = {slot for slot, _ in pairs} - program.constants.keys()
    active = {slot for slot, need in pairs if need}
    weights = read & set(program.graph.parameters.values())
    formed = weights - {program.graph.parameters[name] for name in program.factored}

    def size(slots: Iterable[int]) -> int:
        values = [program.graph.values[slot] for slot in slots]
        return sum(prod(value.shape) * value.dtype.itemsize for value in values)

    data = read - weights
    return Operands(
        run[0].op.name,
        run[0],
        x=size(data),
        w=size(weights),
        y=size(own & wanted),
        x_varies=size(data & varying),
        w_varies=size(formed & varying),
        x_active=size(data & active),
        w_active=size(formed & active),
    )


# How often a packed parameter moves in an inner rule's kernels, which multiply no matrices. The step of descent reads
# theta and g and writes phi; its adjoint reads lambda and g and writes u. Adam's step reads phi, g and two moments and
# writes all but g; its adjoint reads g, the moments and the cotangents of what the step wrote, and writes three.
UPDATES = {"inner_update": {"step": 3, "adjoint": 3}, "adaptive_update": {"step": 7, "adjoint": 9}}


def operands_by_call(program: Program) -> list[Operands]:
    """One task's operands of each instruction, for :func:`bytes_by_map`."""
    return [operands_of(program, [instruction]) for instruction in program.instructions]


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
