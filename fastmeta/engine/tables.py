"""Which embedding tables no task forms: a task takes the rows that its data name, and the others stay shared."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fastmeta.core.rates import GPU, Rates
from fastmeta.engine.cut import reference_seconds
from fastmeta.engine.factor import plan_of
from fastmeta.engine.program import Instruction, Program
from fastmeta.engine.work import Work

TABLE, INDICES = 0, 1  # positions among an embedding's inputs
# How often the table of each task's own is read or written at an inner step (its gradient zeroed, packed, stepped
# along; the same back, eq. 5 and 6) and around the loop; how often the gradient of one that does not adapt is, a chunk.
PASSES_A_STEP, PASSES_FIRST_ORDER, PASSES_AROUND, PASSES_SHARED = 10, 6, 4, 5
CALLS = 20  # to number rows, take them, and add them up: for each table and chunk


@dataclass(frozen=True)
class Held:
    """What tasks hold of a table.

    Attributes:
        dense: bytes of every task's table, or of one gradient where it does not adapt.
        rows: bytes of every task's rows.
        on_rows: whether they hold the rows.
    """

    dense: int
    rows: int
    on_rows: bool


@dataclass(frozen=True)
class Table:
    """A table that embeddings alone read, by indices that the tasks' data tell.

    Attributes:
        name: of the parameter.
        adapts: whether the inner loop updates it.
        size, width: V rows of so many elements.
        item: bytes of an element.
        slots: of the indices, in the support's and in the query's program.
        count: of the indices of both.
        paddings: rows that get no gradient from some call.
    """

    name: str
    adapts: bool
    size: int
    width: int
    item: int
    slots: tuple[tuple[int, ...], tuple[int, ...]]
    count: int
    paddings: tuple[int, ...]

    @property
    def rows(self) -> int:
        """R: how many rows each task takes."""
        return min(self.size, self.count) + len(self.paddings)

    def held(self, tasks: int, *, on_rows: bool) -> Held:
        """What so many tasks hold, where the table is held so."""
        row = self.width * self.item
        return Held((tasks if self.adapts else 1) * self.size * row, tasks * self.rows * row, on_rows)

    def smaller(self, tasks: int) -> bool:
        """Whether the rows of so many tasks take less memory than their tables."""
        held = self.held(tasks, on_rows=True)
        return held.rows < held.dense

    def pays(self, work: Work, at_once: int, rates: Rates) -> bool:
        """Whether rows take less time than tables, on the task-batched executor with so many tasks at a time."""
        rates = GPU if work.alpha.is_cuda else rates
        chunks = math.ceil(work.tasks / max(1, at_once))
        passes = _passes(work) if self.adapts else PASSES_SHARED
        held = self.held(work.tasks, on_rows=True)
        saved = passes * (held.dense * (1 if self.adapts else chunks) - held.rows) / rates.bytes
        return saved > chunks * CALLS * rates.call_s

    def native_seconds(self, work: Work, rates: Rates) -> float:
        """What the native executor takes to form and to update it, in a cache or in memory."""
        if not self.adapts:
            return 0.0
        one = self.size * self.width * self.item
        return work.tasks * _passes(work) * one / (rates.near if one * (work.steps + 1) <= rates.last else rates.bytes)


def candidates(support: Program, query: Program, work: Work) -> dict[str, Table | str]:
    """The tables that embeddings read, adapting or to get a gradient; or why each task must form it."""
    both = support, query
    looked_up = {i.inputs[TABLE] for p in both for i in p.instructions if i.op.name == "embedding"}
    names = [n for n in (*query.adapted, *query.outer) if any(p.graph.parameters[n] in looked_up for p in both)]
    given = [_given(program) for program in both] if names else []
    found: dict[str, Table | str] = {}
    for name in names:
        readers = [_readers(program, name) for program in both]
        calls = [i for of_one in readers for i in of_one]
        if any(i.op.name != "embedding" for i in calls) or any(_shown(program, name) for program in both):
            found[name] = "other calls read its table too, so it is formed"
            continue
        if name in query.adapted and work.has_rates_by_row(name):
            found[name] = "its rows have rates of their own, so its table is formed"
            continue
        slots = [tuple(dict.fromkeys(i.inputs[INDICES] for i in of_one)) for of_one in readers]
        if any(not known.issuperset(of_one) for known, of_one in zip(given, slots, strict=True)):
            found[name] = "its indices depend on more than the tasks' data, so its table is formed"
            continue
        value = query.graph.values[query.graph.parameters[name]]
        shapes = [p.graph.values[slot].shape for p, of_one in zip(both, slots, strict=True) for slot in of_one]
        paddings = {int(i.op.padding) for i in calls}  # type: ignore[attr-defined]
        found[name] = Table(
            name,
            name in query.adapted,
            value.shape[0],
            value.shape[1],
            value.dtype.itemsize,
            (slots[0], slots[1]),
            sum(map(math.prod, shapes)),
            tuple(sorted(row for row in paddings if row >= 0)),
        )
    return found


def possible(support: Program, query: Program, work: Work) -> list[str]:
    """Names of the tables of which rows can be taken."""
    return [name for name, table in candidates(support, query, work).items() if isinstance(table, Table)]


def choose(
    support: Program, query: Program, work: Work, at_once: int, rates: Rates, *, tight: bool
) -> tuple[Table, ...]:
    """The tables for which rows are asked for, or take less time with so many tasks at a time.

    Where memory is ``tight``, also those for which they take less of it.
    """

    def takes_rows(table: Table) -> bool:
        plan = plan_of(work.plan, table.name)
        pays = table.pays(work, at_once, rates) or (tight and table.smaller(at_once))
        return plan == "factored" or (plan == "auto" and pays)

    choices = candidates(support, query, work).values()
    return tuple(table for table in choices if isinstance(table, Table) and takes_rows(table))


def compared(support: Program, query: Program, work: Work, taken: Sequence[Table]) -> dict[int, Held | str]:
    """What tasks hold of each table by either plan, or why there is no choice; by ``id`` of the support's instruction.

    Args:
        support: program at the support shapes, on rows of the tables that are ``taken``.
        query: likewise.
        work: the meta-step.
        taken: the tables that are on rows.
    """
    choices = candidates(support, query, work)
    found: dict[int, Table | str] = {support.graph.parameters[name]: choice for name, choice in choices.items()}
    found.update((support.graph.parameters[table.name], table) for table in taken)
    calls = [i for i in support.instructions if i.op.name == "embedding" and i.inputs[TABLE] in found]
    return {
        id(i): choice if isinstance(choice, str) else choice.held(work.tasks, on_rows=choice in taken)
        for i in calls
        for choice in (found[i.inputs[TABLE]],)
    }


def quicker(
    programs: tuple[Program, Program], tables: Sequence[Table], native: float, work: Work, rates: Rates
) -> bool:
    """Whether the task-batched executor takes less time on rows than the native one, which forms the tables.

    Args:
        programs: of support and query, on rows.
        tables: which.
        native: seconds that the native executor takes beside the tables.
        work: the meta-step.
        rates: of the machine.
    """
    formed = native + sum(table.native_seconds(work, rates) for table in tables)
    return reference_seconds(programs, work, rates) < formed


def _passes(work: Work) -> int:
    return work.steps * (PASSES_FIRST_ORDER if work.first_order else PASSES_A_STEP) + PASSES_AROUND


def _readers(program: Program, name: str) -> list[Instruction]:
    slot = program.graph.parameters[name]
    return [i for i in program.instructions if slot in i.inputs]


def _shown(program: Program, name: str) -> bool:
    """Whether the parameter itself is a result."""
    graph = program.graph
    return graph.parameters[name] in (*graph.outputs, graph.loss, *graph.mutations.values())


def _given(program: Program) -> set[int]:
    """Slots that the tasks' data and buffers alone tell."""
    graph = program.graph
    known = {*graph.data, *graph.buffers.values(), *program.constants}
    for instruction in program.instructions:
        if not instruction.op.random and known.issuperset(instruction.inputs):
            known.update(instruction.outputs)
    return known
