"""Which weights no task forms: the linear layers whose weight stays a shared matrix and factors."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

from fastmeta.core.task_op import Need
from fastmeta.engine.program import Instruction, Program, Route

WEIGHT = 1  # its position among a linear operation's inputs


def candidates(program: Program) -> dict[str, Instruction]:
    """The adapting parameters that can stay factors, with the linear operation that alone reads each."""
    readers = Counter(slot for instruction in program.instructions for slot in set(instruction.inputs))
    slots = {program.graph.parameters[name]: name for name in program.adapted}
    found = {}
    for instruction in program.instructions:
        if instruction.op.name != "linear" or instruction.first.single:
            continue
        slot = instruction.inputs[WEIGHT]
        if slot in slots and readers[slot] == 1 and slot not in instruction.inputs[:WEIGHT]:
            found[slots[slot]] = instruction
    return found


def factored(program: Program, names: frozenset[str]) -> Program:
    """``program`` with these parameters' weights as factors."""
    chosen = {id(instruction) for name, instruction in candidates(program).items() if name in names}

    def rerouted(route: Route) -> Route:
        need = tuple(Need.FACTORS if i == WEIGHT else n for i, n in enumerate(route.need))
        return replace(route, need=need)

    instructions = tuple(
        replace(i, first=rerouted(i.first), later=rerouted(i.later)) if id(i) in chosen else i
        for i in program.instructions
    )
    return replace(program, instructions=instructions, factored=names)


def pays(instruction: Instruction, query: Instruction, steps: int, *, second_order: bool) -> bool:
    """Whether the factored form takes fewer operations for one task than a weight of its own; docs/maths.md, section 3.

    Args:
        instruction: the linear operation at the support's shapes.
        query: at the query's.
        steps: K.
        second_order: whether Hessian-vector products are taken.
    """
    op: Any = instruction.op
    asked: Any = query.op
    n, m, whole, both = op.rows, asked.rows, op.fan_in * op.fan_out, op.fan_in + op.fan_out
    back = 1 if instruction.later.need[0] else 0  # whether the input wants a cotangent
    first = steps * n * (2 + back) + m * (2 + back)
    later = steps * n * (2 + 4 * back) if second_order else 0
    formed = (first + later) * whole
    # Products with the shared matrix, and the one over all rows at the end; then products of rows with rows.
    shared = (steps * n * (1 + back) + m * (1 + back) + (steps * n * 2 * back if second_order else 0)) * whole
    end = (m + (steps * n * (1 + back) if second_order else 0)) * whole
    pairs = steps * (steps - 1) // 2 * n * n + steps * m * n
    if second_order:
        pairs += steps * (steps - 1) // 2 * n * n * 3 + steps * n * m
    return shared + end + 2 * pairs * both < formed
