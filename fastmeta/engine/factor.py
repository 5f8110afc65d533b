"""Which weights no task forms: the linear layers whose weight stays a shared matrix and factors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

import torch

from fastmeta.core.low_rank import rank_limit
from fastmeta.core.rates import GPU, Rates
from fastmeta.core.task_op import Need
from fastmeta.engine.cost import products
from fastmeta.engine.program import Instruction, Program, Route
from fastmeta.engine.work import Plan, Work

LINEAR = ("linear", "gram_block")  # the operations that can keep it as factors
WEIGHT = 1  # its position among a linear operation's inputs
# Part of a copy's rate that products reach whose weights come from memory, and of the last-level cache that weights
# find: perceptrons of 1 to 16 layers, 64 to 2048 wide, take 0.8 to 2 times what is predicted (AMD Zen 3, two threads).
REACHED_FAR, FOUND = 0.25, 0.5
# Times of a call, ``Rates.call_s``, of the task-batched executor: a map of an operation, and a pair of factors in each
# map that it takes part in. Fitted to perceptrons of 1 to 8 layers and 1 to 5 steps, so small that nothing else counts.
MAP, PAIR = 3.4, 2.8


def candidates(program: Program) -> dict[str, Instruction]:
    """The adapting parameters that can stay factors, with the linear operation that alone reads each."""
    readers = Counter(slot for instruction in program.instructions for slot in set(instruction.inputs))
    slots = {program.graph.parameters[name]: name for name in program.adapted}
    found = {}
    for instruction in program.instructions:
        if instruction.op.name not in LINEAR or instruction.first.single:
            continue
        slot = instruction.inputs[WEIGHT]
        if slot in slots and readers[slot] == 1 and slot not in instruction.inputs[:WEIGHT]:
            found[slots[slot]] = instruction
    return found


def factored(program: Program, names: frozenset[str], bounded: frozenset[str]) -> Program:
    """``program`` with these parameters' weights as factors.

    Args:
        program: with a weight of each task's own.
        names: the parameters.
        bounded: those of them that are formed beyond the rank where that takes fewer operations.
    """
    readers = {name: i for name, i in candidates(program).items() if name in names}
    chosen = {id(i) for name, i in readers.items() if name not in bounded or _linear(i).rows <= _limit(i)}

    def rerouted(route: Route) -> Route:
        need, inner = (
            tuple(Need.FACTORS if i == WEIGHT else n for i, n in enumerate(wanted))
            for wanted in (route.need, route.inner)
        )
        return replace(route, need=need, inner=inner)

    instructions = tuple(
        replace(i, first=rerouted(i.first), later=rerouted(i.later)) if id(i) in chosen else i
        for i in program.instructions
    )
    met = frozenset(name for name, i in readers.items() if not i.later.need[0])
    return replace(program, instructions=instructions, factored=names, bounded=bounded, met=met)


def _linear(instruction: Instruction) -> Any:
    return instruction.op


def _limit(instruction: Instruction) -> int:
    """The rank beyond which the weight of a linear operation is formed."""
    op = _linear(instruction)
    return rank_limit(op.fan_out, op.fan_in)


def formed_after(program: Program, steps: int) -> dict[int, int]:
    """By ``id`` of the operation, after how many of the steps a weight that begins as factors is formed."""
    found = {}
    for name, instruction in candidates(program).items():
        grows = bool(instruction.later.need[0])  # else all steps' products are of the same rows
        after = _limit(instruction) // _linear(instruction).rows + 1
        if name in program.bounded and (grows or after == 1) and after <= steps:
            found[id(instruction)] = after
    return found


def choose(
    support: Program, query: Program, work: Work, tables: Collection[str] = (), *, tight: bool = False
) -> frozenset[str]:
    """The parameters for which factors are asked for, or take fewer operations than a weight of each task's own.

    Args:
        support: program at the support shapes.
        query: program at the query shapes.
        work: the meta-step.
        tables: names of the tables of which rows can be taken, which is asked for in the same way.
        tight: memory is dear: factors are taken wherever they are smaller.

    Raises:
        ValueError: factors, or rows, are asked for by name where they cannot be.
    """
    possible = _costs(support, query, work)
    if not isinstance(work.plan, str):
        names = [*possible, *tables]
        patterns = [pattern for pattern, form in work.plan if form == "factored"]
        impossible = [pattern for pattern in patterns if not any(fnmatchcase(name, pattern) for name in names)]
        if impossible:
            raise ValueError(
                f"MAML: plan 'factored' must be for linear layers' weights that one call reads, with one rate, or "
                f"one a row or a column, and an inner rule that adds up gradients, or for tables that embeddings alone "
                f"read, with one rate, or one a column; got {impossible}, possible: {names}"
            )
    return frozenset(
        name
        for name, costs in possible.items()
        if (plan := plan_of(work.plan, name)) == "factored"
        or (plan == "auto" and (costs.pays(work.alpha.device) or (tight and costs.smaller)))
    )


def plan_of(plan: Plan, name: str) -> str:
    """What is asked for the parameter ``name``: ``dense``, ``factored`` or ``auto``."""
    if isinstance(plan, str):
        return plan
    return next((form for pattern, form in plan if fnmatchcase(name, pattern)), "auto")


def quicker(support: Program, query: Program, work: Work, names: frozenset[str], rates: Rates) -> bool:
    """Whether the task-batched executor with these factors takes less time than weights of each task's own."""
    costs = _costs(support, query, work)
    left = [c for name, c in costs.items() if name not in names]
    sweeps = work.steps * (2 if work.first_order else 4) + 2
    with_factors = MAP * len(support.instructions) * sweeps * rates.call_s + _formed_seconds(left, rates)
    with_factors += sum(c.factored_seconds(rates) for name, c in costs.items() if name in names)
    return bool(names) and with_factors < _formed_seconds(costs.values(), rates)


def _formed_seconds(costs: Collection[_Costs], rates: Rates) -> float:
    """Of the native executor, with these weights formed."""
    held = sum(c.held for c in costs)
    return sum(c.formed_seconds(rates, held) for c in costs)


def compared(support: Program, query: Program, work: Work, rates: Rates) -> dict[int, tuple[float, float] | str]:
    """What the two plans of each linear operation's adapting weight are predicted to take.

    Args:
        support: program at the support shapes.
        query: program at the query shapes.
        work: the meta-step.
        rates: of the machine.

    Returns:
        By ``id`` of the support's instruction, seconds of its products in the whole meta-step, with a weight of each
        task's own and with factors; or why there is no choice.
    """
    slots = {support.graph.parameters[name]: name for name in support.adapted}
    linear = [i for i in support.instructions if i.op.name == "linear" and i.inputs[WEIGHT] in slots]
    found: dict[int, tuple[float, float] | str] = dict.fromkeys(
        map(id, linear), "several calls read its weight, so it is formed"
    )
    for instruction in linear:
        name = slots[instruction.inputs[WEIGHT]]
        rule = work.rule_of(name)
        if rule.entrywise:
            why = f"the inner rule has {rule.described()}: its steps are of full rank, so it is formed"
            found[id(instruction)] = why
        elif work.has_rate_an_element(name):
            found[id(instruction)] = "one rate an element: its steps are of full rank, so it is formed"
    readers = candidates(support)
    costs = _costs(support, query, work)
    formed = sum(c.held for name, c in costs.items() if name not in support.factored)
    for name, own in costs.items():
        held = formed + (own.held if name in support.factored else 0)
        found[id(readers[name])] = own.seconds(work.alpha.device, rates, held)
    return found


def _costs(support: Program, query: Program, work: Work) -> dict[str, _Costs]:
    """Of the parameters that can stay factors on support and query alike."""
    asked = candidates(query)
    return {
        name: _Costs(i, asked[name], work)
        for name, i in candidates(support).items()
        if name in asked and not work.has_rate_an_element(name) and not work.rule_of(name).entrywise
    }


class _Costs:
    """What the products of one linear operation take in a meta-step, docs/maths.md, section 3."""

    def __init__(self, support: Instruction, query: Instruction, work: Work) -> None:
        op, limit = _linear(support), _limit(support)
        n, m, k = op.rows, _linear(query).rows, work.steps
        self.smaller = n < limit  # a step's factors than a weight
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
        below = min(k, -(-limit // max(n, 1)))  # steps before which factors have fewer rows than the limit
        ranks = n * below * (below - 1) // 2 + (k - below) * limit  # beyond, a matrix takes as much as rows up to there
        pairs = (1 + 3 * again) * ranks * n + (1 + again) * k * n * min(m, limit)  # rows that meet rows
        self._pair_products = (1 + 3 * again) * k * (k - 1) // 2 + (1 + again) * k
        self._pairs = 2 * pairs * (op.fan_in + op.fan_out)
        if not back:  # rows of an input that is the same at every step meet those of the others once
            self._joined_products = (1 + 3 * again) * max(k - 1, 0) + min(k, 1) + again * k
        else:
            self._joined_products = self._pair_products

    def pays(self, device: torch.device) -> bool:
        """Whether factors take fewer operations; on a GPU, where calls are what is dear, less time."""
        if device.type == "cpu":
            return self.factored_flops < self.formed_flops
        formed, factored = self.seconds(device, GPU, self.held)
        return factored < formed

    def seconds(self, device: torch.device, rates: Rates, held: int) -> tuple[float, float]:
        """With a weight of each task's own, and with factors; on a GPU by the rates of one."""
        if device.type == "cpu":
            return self.formed_seconds(rates, held), self.factored_seconds(rates)
        passes = self._formed_products + 8 * self._steps  # eq. (3), (5) and (6) read five and write three of a size
        moved = self._tasks * self._elements * self._item * passes
        formed = max(self._tasks * self.formed_flops / GPU.flops, moved / GPU.bytes)
        formed += self._formed_products / 2 * GPU.call_s  # two products at a time
        moved = self._elements * self._item * self._shared_products
        factored = max(self._tasks * self.factored_flops / GPU.flops, moved / GPU.bytes)
        factored += (3 * self._joined_products + 2 * self._shared_products) * GPU.call_s  # scaled and added
        return formed, factored

    @property
    def formed_flops(self) -> int:
        """Of one task, with a weight of its own."""
        return 2 * self._formed * self._elements

    @property
    def factored_flops(self) -> int:
        """Of one task, with factors."""
        return 2 * (self._shared * self._elements + self._pairs)

    @property
    def held(self) -> int:
        """Bytes of one task's weights at all steps, each as it is and transposed."""
        return 2 * (self._steps + 1) * self._elements * self._item

    def formed_seconds(self, rates: Rates, held: int) -> float:
        """By the native executor, a task a thread.

        A sweep meets the weights of all layers, ``held`` bytes of them, before one of them comes again. The next goes
        the other way, so that it finds in a cache what the one before met last.
        """
        bound, moved = self.formed_flops / rates.native, self._elements * self._item * self._formed_products
        if held > rates.cache:
            far = max(0.0, 1 - FOUND * rates.last / held)
            bound = max(bound, moved * (far / (REACHED_FAR * rates.bytes) + (1 - far) / rates.near))
        return self._tasks * bound

    def factored_seconds(self, rates: Rates) -> float:
        """By the task-batched executor, beside its maps' calls."""
        moved = self._elements * self._item * self._shared_products
        calls = PAIR * self._pair_products * rates.call_s
        return calls + max(self._tasks * self.factored_flops / rates.flops, moved / rates.bytes)
