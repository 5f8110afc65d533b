"""Traces and plans once per signature, and remembers."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fastmeta.core import rates
from fastmeta.engine import tables
from fastmeta.engine.capture import Captures
from fastmeta.engine.factor import choose, factored, plan_of, quicker
from fastmeta.engine.joined import joined
from fastmeta.engine.lower import NotLowered
from fastmeta.engine.native import NativeStep
from fastmeta.engine.native_passes import NativePasses
from fastmeta.engine.objective import Objective
from fastmeta.engine.plan import chunk_size, plan
from fastmeta.engine.program import Program
from fastmeta.engine.resident import ResidentStep
from fastmeta.engine.rows import Rows
from fastmeta.engine.trace import Graph, NotTraceable, trace
from fastmeta.engine.work import Work, task_of

Compiled = NativeStep | ResidentStep


@dataclass(frozen=True)
class Fit:
    """How the task-batched executor runs a meta-step.

    Attributes:
        tasks: at a time.
        recompute: whether activations are computed again on the way back.
        peak: bytes that it is predicted to hold beside parameters and tasks.
    """

    tasks: int
    recompute: bool
    peak: int


@dataclass
class Room:
    """What was found out about memory.

    Attributes:
        tasks: how many fit at a time; ``None`` while all did.
        fits: by kind of meta-step, how it keeps within a budget.
        warned: whether it was said that a budget is too small.
    """

    tasks: int | None = None
    fits: dict[Hashable, Fit] = field(default_factory=dict)
    warned: bool = False


@dataclass(frozen=True)
class Programs:
    """The programs of one meta-step: the same objective at the support's and at the query's shapes."""

    support: Program
    query: Program | None
    planned_chunk: int
    captures: Captures
    room: Room
    passes: NativePasses  # one by one, where weights adapt and nothing goes back
    native: Compiled | str = "there is no query set"  # what runs them, or why nothing does
    rows: Rows | None = None  # the tables of which tasks have rows, where the programs are on such

    @property
    def chunk_size(self) -> int:
        """How many tasks run at a time."""
        return self.planned_chunk if self.room.tasks is None else min(self.planned_chunk, self.room.tasks)

    def kind(self, fit: Fit | None, *, learned: bool, outputs: bool) -> Hashable:
        """What a graph of the meta-step depends on beside its tensors; the programs live as long as the graphs."""
        return id(self.support), id(self.query), self.chunk_size, fit, learned, outputs

    def chunks(self, tasks: int, most: int | None = None) -> list[slice]:
        """The task axis cut into runs of at most ``most`` or ``chunk_size``, as even as they can be."""
        size = self.chunk_size if most is None else min(most, self.chunk_size)
        count = -(-tasks // size)
        bounds = [tasks * i // count for i in range(count + 1)]
        return [slice(a, b) for a, b in pairwise(bounds)]

    @property
    def both(self) -> tuple[Program, Program]:
        """Both programs, where the work has a query set."""
        if self.query is None:
            raise RuntimeError("programs: query must be compiled, got a work without query set")
        return self.support, self.query

    @cached_property
    def random(self) -> bool:
        """Whether some instruction draws random numbers."""
        return any(i.op.random for program in self.both for i in program.instructions)

    @cached_property
    def written(self) -> frozenset[str]:
        """The buffers that a training pass over the model writes."""
        return frozenset(name for program in self.both for name in program.graph.mutations)


class Compiler:
    """Cache of graphs by what a trace depends on, and of programs by what a plan depends on.

    A trace depends on the shapes, dtypes and device of the batch, the parameters and the buffers, on each module's
    training flag. Anything else a forward pass branches on (a Python attribute, say) is fixed at the first trace;
    :meth:`clear` forgets it.
    """

    def __init__(self) -> None:
        self._graphs: dict[Any, Graph | NotTraceable] = {}
        self._programs: dict[Any, Program] = {}
        self._steps: dict[tuple[int, int], Compiled | str] = {}  # by the programs, which are never dropped alone
        self._factors: dict[tuple[int, frozenset[str], frozenset[str]], Program] = {}  # likewise
        self._rows: dict[tuple[int, int, tuple[tables.Table, ...]], Rows] = {}  # likewise
        self._blocks: dict[int, Program] = {}  # likewise
        self._captures = Captures()
        self._rooms: dict[tuple[int, int], Room] = {}  # likewise
        self._passes: dict[tuple[int, int], NativePasses] = {}  # likewise

    def clear(self) -> None:
        """Forget every trace."""
        self._graphs.clear()
        self._programs.clear()
        self._steps.clear()
        self._factors.clear()
        self._rows.clear()
        self._blocks.clear()
        self._captures.clear()
        self._rooms.clear()
        self._passes.clear()

    def compile(self, work: Work) -> Programs:
        """The programs of ``work``.

        Raises:
            NotTraceable: with the reason; remembered like a success.
        """
        if torch.is_autocast_enabled(work.theta[0].device.type):
            raise NotTraceable("autocast is on: the program runs in the dtype of the parameters")
        # a step of first order sends nothing but g_k on, so that other parameters' cotangents are not asked of it
        inner_outer = () if work.first_order else work.outer_names
        support = self._program(work, work.micro_sets()[0], inner_outer, work.seen_by(query=False))
        query = None
        if work.query is not None:
            query = self._program(work, work.query, work.outer_names, work.seen_by(query=True), work.own_statistics)
        native = self._native(work, support, query)
        rows = None
        if query is not None:
            excess = _excess(native, work)
            rows = self._tables(work, support, query, tight=bool(excess))
            replanned = isinstance(work.plan, str) or work.stepwise or work.own_statistics
            by_name = () if replanned else tables.possible(support, query, work)
            names = choose(support, query, work, by_name, tight=bool(excess))
            native = _settled(native, work, support, query, names, rows, excess)
            if isinstance(native, str):
                bounded = frozenset(name for name in names if plan_of(work.plan, name) == "auto")
                programs = (support, query) if rows is None else rows.programs
                support, query = (self._factored(program, names, bounded) for program in programs)
            else:
                rows = None
        if work.executor == "auto":
            support = self._joined(support, work.alpha.device)
            query = None if query is None else self._joined(query, work.alpha.device)
        formed = work.packing.size - sum(work.parameters[name].numel() for name in support.factored)
        formed -= 0 if rows is None else rows.spared
        size = work.chunk_size or min(
            chunk_size(p, formed, work.alpha.device) for p in (support, query) if p is not None
        )
        room = self._rooms.setdefault((id(support), id(query)), Room())
        passes = self._passes.setdefault((id(support), id(query)), NativePasses(support, query))
        return Programs(support, query, size, self._captures, room, passes, native, rows)

    def _tables(self, work: Work, support: Program, query: Program, *, tight: bool) -> Rows | None:
        """The programs on rows of the tables that are to be held so; ``None`` where there are none."""
        if work.stepwise or work.own_statistics:  # they are planned anew, without what changes from step to step
            return None
        device = work.alpha.device
        at_once = work.chunk_size or chunk_size(query, work.packing.size, device)
        chosen = tables.choose(support, query, work, min(work.tasks, at_once), rates.known(), tight=tight)
        if not chosen:
            return None
        key = id(support), id(query), chosen
        if key not in self._rows:
            self._rows[key] = Rows(chosen, support, query, device)
        return self._rows[key]

    def _factored(self, program: Program, names: frozenset[str], bounded: frozenset[str]) -> Program:
        if not names:
            return program
        key = id(program), names, bounded
        if key not in self._factors:
            self._factors[key] = factored(program, names, bounded)
        return self._factors[key]

    def _joined(self, program: Program, device: torch.device) -> Program:
        if id(program) not in self._blocks:
            self._blocks[id(program)] = joined(program, device)
        return self._blocks[id(program)]

    def _native(self, work: Work, support: Program, query: Program | None) -> Compiled | str:
        """The lowered meta-step for the device it is on, or why there is none; either is remembered."""
        if query is None:
            return "there is no query set"
        if work.executor == "reference":
            return "the reference executor was asked for"
        if not work.rule.plain:
            return f"it runs inner steps along the gradient alone, and the rule has {work.rule.described()}"
        if work.implicit is not None:
            return "the inner problem is a proximal one"
        if work.clip_norm is not None:
            return "inner gradients are clipped"
        if work.query_weights is not None:
            return "query losses count before the last step"
        if work.stepwise:
            return "parameters or buffers come stepwise"
        if work.own_statistics:
            return "tasks have running statistics of their own"
        if work.stop is not None:
            return "tasks may end before the last inner step"
        if work.micro_batches > 1:
            return "support sets are cut into micro-batches"
        if work.rate_shapes is not None:
            return "inner rates differ within a parameter"
        key = id(support), id(query)
        if key not in self._steps:
            try:
                kind = ResidentStep if ResidentStep.runs_on(work.alpha.device) else NativeStep
                self._steps[key] = kind(support, query)
            except NotLowered as reason:
                self._steps[key] = str(reason)
        return self._steps[key]

    def _program(
        self,
        work: Work,
        batch: Any,
        outer: tuple[str, ...],
        objective: Objective,
        statistics: frozenset[str] = frozenset(),
    ) -> Program:
        key = self._signature(work, batch, objective)
        plan_key = (key, work.packing.names, outer, work.stepwise, statistics)
        program = self._programs.get(plan_key)
        if program is None:
            graph, device = self._graph(work, batch, key, objective), work.theta[0].device
            program = plan(graph, work.packing.names, outer, device, statistics, stepwise=work.stepwise)
            self._programs[plan_key] = program
        return program

    def _graph(self, work: Work, batch: Any, key: Any, objective: Objective) -> Graph:
        graph = self._graphs.get(key)
        if graph is None:
            try:
                parameters, buffers = (
                    {name: value[0] if name in work.stepwise else value for name, value in named.items()}
                    for named in (work.parameters, work.buffers)
                )
                graph = trace(objective, parameters, buffers, task_of(batch, 0))
            except NotTraceable as reason:
                graph = reason
            self._graphs[key] = graph
        if isinstance(graph, NotTraceable):
            raise graph
        return graph

    def _signature(self, work: Work, batch: Any, objective: Objective) -> Any:
        leaves, spec = pytree.tree_flatten(batch)
        return (
            str(spec),
            tuple((leaf.shape[1:], leaf.dtype, leaf.device) for leaf in leaves),
            tuple(_kind(p) for p in work.parameters.values()),
            tuple(_kind(b) for b in work.buffers.values()),
            objective.modes(),
            work.stepwise,
        )


def _settled(
    native: Compiled | str,
    work: Work,
    support: Program,
    query: Program,
    factors: frozenset[str],
    rows: Rows | None,
    excess: str,
) -> Compiled | str:
    """What runs the meta-step, or why the task-batched executor does it, with these factors and rows."""
    auto, spared = work.executor == "auto", factors if rows is None else factors | rows.own
    if isinstance(native, NativeStep) and auto:
        native = native.objection(work, rates.known()) or native
    if isinstance(native, ResidentStep) or (isinstance(native, NativeStep) and rows is not None):
        native = native.refusal(work, outputs=False) or native
    if isinstance(native, str):
        return native
    asked = (*factors, *(() if rows is None else (table.name for table in rows.tables)))
    if any(plan_of(work.plan, name) == "factored" for name in asked):
        return "weights that no task forms are asked for"
    if isinstance(native, ResidentStep):
        return native
    if auto and quicker(support, query, work, factors, rates.known()):
        return "weights that no task forms take less time"
    if auto and rows is not None and rows.own:
        beside = native.seconds(work, rates.known())
        if tables.quicker(rows.programs, rows.tables, beside, work, rates.known()):
            return "rows of embedding tables take less time than a table of each task's own"
    return (excess if spared else "") or native


def _excess(native: Compiled | str, work: Work) -> str:
    """Why a memory budget wants weights that no task forms; empty where formed ones fit it, or native is asked for."""
    if work.memory_budget is None or work.executor == "native":
        return ""
    if isinstance(native, NativeStep):
        least = native.least_bytes(work, learned=work.alpha.requires_grad)
    else:  # of each step, and what the adjoint holds beside: lam, u, H u and their sum over tasks
        least = (work.steps + 4) * work.packing.size * work.theta[0].element_size()
    return f"with weights of its own one task takes {least} bytes" if least > work.memory_budget else ""


def _kind(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.dtype, tensor.device
