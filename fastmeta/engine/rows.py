"""Programs and meta-steps on the rows of embedding tables that each task's data name, renumbered: eq. (12'')."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from fastmeta.core.packing import Packing
from fastmeta.core.task_op import Call, Output, plus
from fastmeta.core.touched_rows import add_rows, numbered
from fastmeta.engine.callback import Prelude
from fastmeta.engine.evaluation import MetaGradient, added
from fastmeta.engine.plan import plan
from fastmeta.engine.program import Program
from fastmeta.engine.tables import INDICES, TABLE, Table
from fastmeta.engine.trace import Node, drop_unread
from fastmeta.engine.work import Work


class Rows:
    """Two programs whose tasks come with rows of tables instead of forming them.

    A task's rows are those that its support or query set names. In the programs such a table is a parameter ``[R, D]``
    that differs between tasks from the start, read by further data: the numbers of the rows. Nothing else changes, so
    every operation and inner rule does to rows what it does to tables, with rates that do not differ between rows.

    Args:
        tables: which.
        support, query: programs that form them.
        device: where they run.

    Attributes:
        tables: which.
        own: names of those that adapt.
    """

    def __init__(self, tables: tuple[Table, ...], support: Program, query: Program, device: torch.device) -> None:
        self.tables = tables
        self._both, self._device = (support, query), device
        self.own = frozenset(table.name for table in tables if table.adapts)
        self._slots = [list(dict.fromkeys(s for table in tables for s in table.slots[which])) for which in (0, 1)]
        self._preludes = [Prelude(p, slots) for p, slots in zip(self._both, self._slots, strict=True)]

    @cached_property
    def programs(self) -> tuple[Program, Program]:
        """Of support and query, on rows."""
        support, query = (self._on_rows(which) for which in (0, 1))
        return support, query

    @property
    def spared(self) -> int:
        """Elements of a task that need not adapt because nothing reads them."""
        return sum((table.size - table.rows) * table.width for table in self.tables if table.adapts)

    def take(self, work: Work) -> Taken:
        """The meta-step on the rows that its tasks touch.

        Raises:
            IndexError: an index is not in its table.
        """
        indices = self._named(work)
        parameters, touched = dict(work.parameters), {}
        more: list[list[Tensor]] = [[], []]  # data of support and query
        for table in self.tables:
            named = [indices[which][slot] for which in (0, 1) for slot in table.slots[which]]
            every = torch.cat([i.flatten(1) for i in named], 1).long()
            numbers, touched[table.name] = numbered(every, table.size, table.paddings)
            pieces = numbers.split([i.shape[1:].numel() for i in named], 1)
            shaped = [piece.reshape(i.shape) for piece, i in zip(pieces, named, strict=True)]
            more[0] += shaped[: len(table.slots[0])]
            more[1] += shaped[len(table.slots[0]) :]
            parameters[table.name] = F.embedding(touched[table.name], work.parameters[table.name])
        shapes = [
            tuple(parameters[name].shape[1:]) if name in touched else shape
            for name, shape in zip(work.packing.names, work.packing.shapes, strict=True)
        ]
        packing = Packing(work.packing.names, tuple(shapes))
        taken = replace(
            work,
            support=(work.support, more[0]),
            query=(work.query, more[1]),
            parameters=parameters,
            packing=packing,
            segments=None if work.segments is None else packing.segments(work.alpha.device),
            own=self.own,
        )
        return Taken(taken, work, touched, self._both[1].outer)

    def _named(self, work: Work) -> list[dict[int, Tensor]]:
        """The indices of support and query by their slots, ``[T, ...]``."""
        named = []
        for prelude, slots, of_set in zip(self._preludes, self._slots, (work.support, work.query), strict=True):
            data = pytree.tree_leaves(of_set)
            named.append(dict(zip(slots, prelude.run(data, work.buffers)[len(data) :], strict=True)))
        return named

    def _on_rows(self, which: int) -> Program:
        """The program of the support or of the query, on rows."""
        program = self._both[which]
        graph = replace(program.graph, values=list(program.graph.values))
        numbers: dict[tuple[int, int], int] = {}  # by the slots of the table and of the indices
        tables: dict[int, Table] = {}
        for table in self.tables:
            slot = graph.parameters[table.name]
            tables[slot] = table
            graph.values[slot] = Output((table.rows, table.width), graph.values[slot].dtype)
            for indices in table.slots[which]:
                graph.values.append(Output(graph.values[indices].shape, torch.int64))
                numbers[slot, indices] = len(graph.values) - 1
        graph.data = (*graph.data, *numbers.values())
        graph.nodes = [_renumbered(node, tables, numbers) for node in graph.nodes]
        drop_unread(graph)
        names = [table.name for table in self.tables]
        return plan(graph, program.adapted, program.outer, self._device, names)


@dataclass(frozen=True)
class Taken:
    """A meta-step on rows.

    Attributes:
        work: the same with the rows instead of the tables.
        whole: as it was.
        touched: by table, which rows each task has, ``[T, R]``.
        outer: names of the parameters that do not adapt and get a gradient.
    """

    work: Work
    whole: Work
    touched: dict[str, Tensor]
    outer: tuple[str, ...]

    def as_it_is(self, adapted: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Of one each for the adapting parameters, those that are no tables on rows."""
        pairs = zip(self.whole.packing.names, adapted, strict=False)
        return [None if name in self.touched else d for name, d in pairs]

    def added(self, total: MetaGradient | None, gradient: MetaGradient) -> MetaGradient:
        """``gradient`` by rows added to ``total`` by whole parameters, which is overwritten.

        Where ``gradient`` has whole parameters that adapt, ``total`` is in it already.
        """
        names = self.whole.packing.names
        adapted: Sequence[Tensor | None] = [None] * len(names) if total is None else total.adapted
        outer: Sequence[Tensor | None] = [None] * len(self.outer) if total is None else total.outer
        return MetaGradient(
            [self._by_rows(n, old, new) for n, old, new in zip(names, adapted, gradient.adapted, strict=True)],
            self._outer(outer, gradient.outer),
            plus(None if total is None else total.alpha, gradient.alpha),
            plus(None if total is None else total.hyper, gradient.hyper),
        )

    def _by_rows(self, name: str, total: Tensor | None, d: Tensor) -> Tensor:
        """A table's rows added to its total; anything else as it is."""
        if name not in self.touched:
            return d
        whole = torch.zeros_like(self.whole.parameters[name]) if total is None else total
        return add_rows(whole, self.touched[name], d)

    def _outer(self, totals: Sequence[Tensor | None], parts: Sequence[Tensor | None]) -> list[Tensor | None]:
        totals, rest = list(totals), list(parts)
        for i, (name, d) in enumerate(zip(self.outer, parts, strict=True)):
            if name in self.touched and d is not None:
                totals[i], rest[i] = self._by_rows(name, totals[i], d), None
        return added(totals, rest)


def _renumbered(node: Node, tables: dict[int, Table], numbers: dict[tuple[int, int], int]) -> Node:
    """A lookup in one of ``tables``, by slot, as one of its rows by their numbers; other calls as they are."""
    table = tables.get(node.inputs[TABLE]) if node.inputs else None
    if table is None:
        return node
    call = node.call
    weight, indices = call["weight"], call["indices"]
    inputs = (
        replace(weight, shape=(table.rows, table.width)),
        replace(indices, dtype=torch.int64),
    )
    padding = int(call["padding_idx"])
    if padding >= 0:  # their numbers are the last ones
        padding = table.rows - len(table.paddings) + table.paddings.index(padding)
    arguments = call.arguments | {"weight": inputs[TABLE], "indices": inputs[INDICES], "padding_idx": padding}
    slots = node.inputs[TABLE], numbers[node.inputs[TABLE], node.inputs[INDICES]]
    return replace(node, call=Call(call.target, arguments, inputs, call.outputs), inputs=slots)
