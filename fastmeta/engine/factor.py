"""Which weights no task forms: the linear layers whose weight stays a shared matrix and factors."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

from fastmeta.core.task_op import Need
from fastmeta.engine.cost import products
from fastmeta.engine.program import Instruction, Program, Route
from fastmeta.engine.work import Work

WEIGHT = 1  # its position among a linear operation's inputs

# Rates to compare two ways by, chosen by judgement and not measured on the machine at hand: operations and bytes of
# memory a second, a cache that holds the weights of one task, and what a call of the task-batched executor takes beside
# its work.
FLOPS, BYTES, CACHE, CALL_S = 2e11, 2e10, 1 << 20, 15e-6


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


def choose(support: Program, query: Program, work: Work) -> frozenset[str]:
    """The parameters for which factors take fewer operations than a weight of each task's own."""
    if work.segments is None and work.alpha.shape[1] > 1:
        return frozenset()  # a rate an element makes a step's matrix one of full rank
    asked = candidates(query)
    return frozenset(
        name
        for name, instruction in candidates(support).items()
        if name in asked and _Costs(instruction, asked[name], work).fewer
    )


def quicker(support: Program, query: Program, work: Work, names: frozenset[str]) -> bool:
    """Whether the task-batched executor with these factors takes less time than weights of each task's own."""
    asked = candidates(query)
    costs = [(name in names, _Costs(i, asked[name], work)) for name, i in candidates(support).items() if name in asked]
    sweeps = work.steps * (2 if work.first_order else 4) + 2
    with_factors = len(support.instructions) * sweeps * CALL_S
    with_factors += sum(c.factored_seconds() if chosen else c.formed_seconds() for chosen, c in costs)
    return bool(names) and with_factors < sum(c.formed_seconds() for _, c in costs)


class _Costs:
    """What the products of one linear operation take in a meta-step, docs/maths.md, section 3."""

    def __init__(self, support: Instruction, query: Instruction, work: Work) -> None:
        op: Any = support.op
        asked: Any = query.op
        n, m, k = op.rows, asked.rows, work.steps
        forward, backward, *tangents = products(support)
        first, later = forward + backward, sum(tangents)
        back = 1 if support.later.need[0] else 0  # whether the input wants a cotangent
        again = 0 if work.first_order else 1
        self._tasks, self._steps = work.tasks, k
        self._elements = op.fan_in * op.fan_out
        self._item = work.theta[0].element_size()
        # Rows that meet a weight: one of the task's own; or the shared one, in the sweeps and at the end.
        self._formed = k * n * (first + again * later) + m * first
        self._formed_products = k * (first + again * later) + first
        self._shared = k * n * (1 + back) * (1 + again) + m * (1 + back) + m + again * k * n * (1 + back)
        self._shared_products = k * (1 + back) * (1 + again) + 3
        pairs = (1 + 3 * again) * k * (k - 1) // 2 * n * n + (1 + again) * k * m * n  # rows that meet rows
        self._pairs = 2 * pairs * (op.fan_in + op.fan_out)

    @property
    def fewer(self) -> bool:
        """Whether factors take fewer operations."""
        return self.factored_flops < self.formed_flops

    @property
    def formed_flops(self) -> int:
        """Of one task, with a weight of its own."""
        return 2 * self._formed * self._elements

    @property
    def factored_flops(self) -> int:
        """Of one task, with factors."""
        return 2 * (self._shared * self._elements + self._pairs)

    def formed_seconds(self) -> float:
        size = self._elements * self._item
        moved = size * self._formed_products if size * (self._steps + 1) > CACHE else 0
        return self._tasks * max(self.formed_flops / FLOPS, moved / BYTES)

    def factored_seconds(self) -> float:
        moved = self._elements * self._item * self._shared_products
        return max(self._tasks * self.factored_flops / FLOPS, moved / BYTES)
