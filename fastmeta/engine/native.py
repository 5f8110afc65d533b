"""The native executor: a whole meta-step in one call, tasks over threads or threads within tasks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastmeta.core import native
from fastmeta.core.rates import Rates
from fastmeta.engine.callback import Callbacks, Failures, Prelude
from fastmeta.engine.cut import native_seconds, pays
from fastmeta.engine.evaluation import Cotangents, Evaluation, MetaGradient
from fastmeta.engine.factor import WEIGHT, plan_of
from fastmeta.engine.kept_rows import KeptRows
from fastmeta.engine.lower import NotLowered, alike, in_gram_form, lower, with_gram, with_tables_apart
from fastmeta.engine.lower.operands import Operands
from fastmeta.engine.profile import collecting
from fastmeta.engine.program import Instruction, Program
from fastmeta.engine.trace import Output
from fastmeta.engine.work import Plan, Work, leaves, require_finite

_NONE = torch.empty(0)
ROOM = 1 << 30  # bytes that the tasks at work may hold where the reference executor is a choice


class NativeStep:
    """A meta-step that csrc/executor runs.

    Attributes:
        cuts: of support and query, the instructions without kernels, which it calls back for, and why.
        preludes: likewise those that read the tasks' data alone, and run before.
        kept_rows: which rows of padded sequences its operations go through, where that is said.

    Raises:
        NotLowered: the programs have an operation without native kernels, or the extension is missing.
    """

    def __init__(self, support: Program, query: Program) -> None:
        extension = native.extension()
        if extension is None:
            raise NotLowered(native.missing_reason())
        graph = query.graph
        if graph.values[graph.loss].dtype not in (torch.float32, torch.float64):
            raise NotLowered(f"the loss is of {graph.values[graph.loss].dtype}")
        self._both, self._failures = (support, query), Failures()
        lowered = [lower(program, query.outer, self._failures) for program in (support, query)]
        kept = [one.kept for one in lowered if one.kept is not None]
        if len(kept) == 2 and alike(*kept):
            lowered = kept
        self.kept_rows = [one.rows for one in lowered]
        self._lowered = lowered[1]
        self.cuts = [one.cuts for one in lowered]
        self.preludes = [one.prelude for one in lowered]
        preludes = [Prelude(p, one.prelude_slots) for p, one in zip(self._both, lowered, strict=True)]
        self._further = Further(preludes, self.kept_rows)
        if lowered[0].buffers != lowered[1].buffers:
            raise NotLowered("support and query do not read the same buffers")
        double = graph.values[graph.loss].dtype == torch.float64
        self._type = extension.MetaGradient64 if double else extension.MetaGradient32
        self._programs = with_tables_apart(lowered[0].program, lowered[1].program)
        called = [o["call"] for p in self._programs for o in p["operations"] if o["operation"] == "callback"]
        self._callbacks = Callbacks(called, self._failures) if called else None
        self._operands = [one.operands for one in lowered]
        self._weights = [_weight_of(one.instruction, support) for one in self._operands[0]]
        self._isa = extension.instruction_set
        self._steps: dict[Any, Any] = {}  # by the operations in Gram form, and the instruction set
        self._forms: dict[tuple[int, bool, Plan], tuple[bool, ...]] = {}
        try:
            self._step_of(self._dense())
        except ValueError as error:
            raise NotLowered(str(error)) from error
        self._wanted = len(query.adapted), len(query.adapted) + len(query.outer)
        self._outputs = [graph.values[slot] for slot in graph.outputs]
        slots = [(*p.graph.data, *one.prelude_slots) for p, one in zip(self._both, lowered, strict=True)]
        sets = [[p.graph.values[slot] for slot in of_set] for p, of_set in zip(self._both, slots, strict=True)]
        self._bytes = [[math.prod(v.shape) * v.dtype.itemsize for v in values] for values in sets]
        for sizes, rows in zip(self._bytes, self.kept_rows, strict=True):
            if rows is not None:
                sizes.append(8 * rows.numbers)
        self._mutates = bool(graph.mutations)

    @property
    def operands(self) -> tuple[Operands, ...]:
        """Of the operations on a support set, in execution order."""
        return self._operands[0]

    def row_shares(self, work: Work) -> tuple[float, ...] | None:
        """Of support and query, the part of padded sequences' rows that is gone through; ``None`` where all are."""
        return tuple(share for _, share in self._further.of(work)) if any(self.kept_rows) else None

    @property
    def instruction_set(self) -> str:
        """The one its kernels are compiled for."""
        return self._isa()

    def objection(self, work: Work, rates: Rates) -> str:
        """Why the reference executor is the better one for a program that is cut; empty where it is not."""
        if self._callbacks is None:
            return ""
        reason = next(reason for cuts in self.cuts for _, reason in cuts)
        learned = work.alpha.requires_grad
        room = self.peak_bytes(work, learned=learned)
        if room > ROOM:
            return f"cut at operations without native kernels it would hold {room >> 20} MiB: {reason}"
        if not pays(self._both, self._positions(), work, rates):
            return f"cut at operations without native kernels it would take longer: {reason}"
        return ""

    def seconds(self, work: Work, rates: Rates) -> float:
        """What products and calls back are predicted to take; everything else is done in cache."""
        return native_seconds(self._both, self._positions(), work, rates)

    def _positions(self) -> tuple[set[int], ...]:
        """Of support and query, those of the instructions that are called back for."""
        return tuple(
            {i for i, instruction in enumerate(p.instructions) if any(instruction is cut for cut, _ in cuts)}
            for p, cuts in zip(self._both, self.cuts, strict=True)
        )

    def least_bytes(self, work: Work, *, learned: bool) -> int:
        """Bytes that a meta-step holds where one task is at work, on one thread."""
        workspace = self._step(work, learned).workspace_bytes(*self._kind(work, learned), 1)
        return int(workspace + self._common_bytes(work, learned))

    def peak_bytes(self, work: Work, *, learned: bool) -> int:
        """Bytes that a meta-step holds at the most, beside its parameters and tasks."""
        at_once, _ = self.sharing(work, learned=learned)
        return at_once * self.workspace_bytes(work, learned=learned) + self._common_bytes(work, learned)

    def _common_bytes(self, work: Work, learned: bool) -> int:
        """What is held beside the tasks at work: packed weights, sums over tasks, the meta-gradient."""
        results = [work.parameters[name] for name in self._lowered.parameters[: self._wanted[1]]]
        held = self._step(work, learned).common_bytes(work.tasks, *self._kind(work, learned))
        return int(held) + sum(p.numel() * p.element_size() for p in results)

    def _threads(self, work: Work, learned: bool) -> int:
        """Those that work: as many as there are, or as the memory budget allows."""
        threads, step, kind = torch.get_num_threads(), self._step(work, learned), self._kind(work, learned)
        if work.memory_budget is None:
            return threads
        room = work.memory_budget - self._common_bytes(work, learned)
        while threads > 1:
            at_once, each = step.sharing(work.tasks, *kind, threads)
            if at_once * step.workspace_bytes(*kind, each) <= room:
                break
            threads -= 1
        return threads

    def kept(self, work: Work, *, learned: bool) -> dict[str, int]:
        """Named bytes kept per inner step for the adjoint of each task at work."""
        return self._step(work, learned).kept_bytes(not work.first_order and work.steps > 0, learned)

    def kept_once(self, work: Work, *, learned: bool) -> int:
        """Bytes kept for the adjoint of each task at work, for all inner steps together."""
        kept = not work.first_order and work.steps > 0
        return int(self._step(work, learned).kept_once_bytes()) if kept else 0

    def sharing(self, work: Work, *, learned: bool) -> tuple[int, int]:
        """How many tasks are at work at once, and how many threads on each."""
        threads = self._threads(work, learned)
        shared: tuple[int, int] = self._step(work, learned).sharing(work.tasks, *self._kind(work, learned), threads)
        return shared

    def workspace_bytes(self, work: Work, *, learned: bool) -> int:
        """Bytes each of the tasks at work holds."""
        _, threads = self.sharing(work, learned=learned)
        return self._step(work, learned).workspace_bytes(*self._kind(work, learned), threads)

    def gram(self, work: Work, *, learned: bool) -> tuple[bool, ...]:
        """For each operation, whether its weight is held as products with the task's data and formed for no task."""
        if learned or work.alpha.shape[1] > 1:
            return self._dense()
        key = work.steps, work.first_order, work.plan
        form = self._forms.get(key)
        if form is None:
            form = with_gram(*self._programs, work.steps, second_order=not work.first_order)
            if work.plan != "auto":
                dense = [plan_of(work.plan, weight) == "dense" for weight in self._weights]
                form = tuple(gram and not formed for gram, formed in zip(form, dense, strict=True))
            self._forms[key] = form
        return form

    def collected(self, work: Work, *, learned: bool) -> list[Instruction]:
        """The support program's instructions whose weight is in that form."""
        operands = self._operands[0]
        form = self.gram(work, learned=learned)
        return [o.instruction for o, gram in zip(operands, form, strict=True) if gram and o.instruction is not None]

    def _dense(self) -> tuple[bool, ...]:
        return (False,) * len(self._programs[0]["operations"])

    def _step(self, work: Work, learned: bool) -> Any:
        return self._step_of(self.gram(work, learned=learned))

    def _step_of(self, form: tuple[bool, ...]) -> Any:
        key = form, self._isa()  # another instruction set may be asked for at any time
        step = self._steps.get(key)
        if step is None:
            step = self._steps[key] = self._type(*in_gram_form(*self._programs, form))
        return step

    @staticmethod
    def _kind(work: Work, learned: bool) -> tuple[int, bool, bool, bool]:
        return work.steps, not work.first_order, learned, work.alpha.shape[1] > 1

    def refusal(self, work: Work, *, outputs: bool) -> str:
        """Why no work of this kind can run here; empty where it can."""
        if not work.alpha.is_cpu:
            return f"the parameters are on {work.alpha.device}"
        if outputs and self._outputs and self._lowered.output is None:
            return "the query outputs are not one value of the program"
        if self._mutates and work.keep_mutations:
            return "running statistics are wanted"
        return ""

    def call(self, work: Work, cotangents: Cotangents | None, *, learned: bool, outputs: bool) -> NativeCall | str:
        """What runs meta-steps of this kind, or why nothing does.

        It is found out once for a prepared ``work`` and all that differ in tasks.
        """
        if cotangents is not None and cotangents.outputs and any(d is not None for d in cotangents.outputs):
            return "an objective on the query outputs is differentiated"
        gradient = cotangents is not None
        limit = None if work.memory_budget is None else self._threads(work, learned and gradient)
        key = NativeCall, gradient, learned, outputs, limit, self._isa()
        call: NativeCall | str | None = work.memory.get(key)
        if call is None and (refusal := self.refusal(work, outputs=outputs)):
            call = work.memory[key] = refusal
        if call is None:
            lowered = self._lowered
            parameters = [work.parameters[name] for name in lowered.parameters]
            parameters += [work.buffers[name] for name in lowered.buffers]
            step = self._step(work, learned)
            rates = work.alpha.shape
            same = step.call(
                work.steps,
                work.first_order,
                rates[0] > 1,
                rates[1] > 1,
                *self._bytes,
                self._wanted[1] if gradient else None,
                *(lowered.output or (0, 0)),
            )
            call = work.memory[key] = NativeCall(
                step,
                same.run,
                parameters,
                self._wanted[0] if gradient else None,
                learned and gradient,
                work.alpha.new_empty(()),
                self._outputs if outputs else None,
                self._operands,
                self._callbacks,
                self._further if any(self.preludes) or any(self.kept_rows) else None,
                limit,
            )
        return call


@dataclass(frozen=True)
class Further:
    """What follows the data of support and query, as they are known from these alone.

    Attributes:
        preludes: to support and query.
        rows: which of their rows are gone through; ``None`` where all are.
    """

    preludes: Sequence[Prelude]
    rows: Sequence[KeptRows | None]

    def of(self, work: Work) -> list[tuple[list[Tensor], float]]:
        """Of support and query the data and what follows, and the part of padded sequences' rows that is kept."""
        found = []
        for prelude, rows, batch in zip(self.preludes, self.rows, (work.support, work.query), strict=True):
            with torch.no_grad():
                data = prelude.run(leaves(batch), work.buffers)
                lists = None if rows is None else rows.list_of(data)
            found.append((data, 1.0) if rows is None or lists is None else ([*data, lists], rows.share(lists)))
        return found


@dataclass
class NativeCall:
    """Runs meta-steps of one kind; see :meth:`NativeStep.call`.

    Attributes:
        step: ``MetaGradient32`` or ``MetaGradient64`` of the extension.
        native: runs it; csrc/executor/call.h.
        parameters: parameters and buffers in the program's order.
        adapted: how many of them adapt, which come first; ``None`` where no gradient is wanted.
        learned: whether the rates get a gradient.
        loss: what a loss looks like.
        outputs: where the losses of each task and the query outputs are wanted, the outputs of a task.
        operands: of the operations on support and query.
        callbacks: what the program calls back to, if it does.
        further: what follows the tasks' data, if anything does.
        threads: at most so many; ``None`` for all.
        phase: what a profile calls the passes over query sets.
    """

    step: Any
    native: Any
    parameters: list[Tensor]
    adapted: int | None
    learned: bool
    loss: Tensor
    outputs: list[Output] | None
    operands: list[tuple[Operands, ...]]
    callbacks: Callbacks | None
    further: Further | None
    threads: int | None
    phase: str = "query"

    def run(self, work: Work, cotangents: Cotangents | None) -> Evaluation:
        """Run the meta-step; see :func:`fastmeta.engine.meta_step.evaluate`.

        Inside :func:`fastmeta.engine.profile.collect` it is profiled.
        """
        alpha = work.alpha
        support, query = leaves(work.support), leaves(work.query)
        tasks = support[0].shape[0]
        shares = (1.0, 1.0)
        if self.further is not None:
            (support, of_support), (query, of_query) = self.further.of(work)
            shares = of_support, of_query
        losses, support_losses, results = _NONE, _NONE, []  # no elements: not wanted
        if self.outputs is not None or work.check_finite:
            losses, support_losses = alpha.new_empty(tasks), alpha.new_empty((work.steps, tasks))
        if self.outputs:
            results = [alpha.new_empty((tasks, *value.shape)) for value in self.outputs]
        loss = torch.empty_like(self.loss)
        d_alpha = alpha.new_zeros(alpha.shape) if self.learned else None  # in rows, however alpha lies
        profile = collecting()
        operands = self.operands[0], self.operands[1]
        with nullcontext() if self.callbacks is None else self.callbacks.of_one_meta_step():
            gradients = self.native(
                tasks,
                alpha,
                self.parameters,
                support,
                query,
                None if cotangents is None else cotangents.losses,
                d_alpha,
                loss,
                losses,
                support_losses,
                results[0] if results else None,
                self.threads or torch.get_num_threads(),
                None if profile is None else profile.part(self.step, *operands, self.phase, shares),
            )
        if work.check_finite:
            for k in range(work.steps):
                require_finite(support_losses[k], f"support loss at inner step {k}")
            require_finite(losses, "query loss")
        gradient = None
        if self.adapted is not None:
            gradient = MetaGradient(gradients[: self.adapted], gradients[self.adapted :], d_alpha)
        return Evaluation(loss, losses, support_losses, results, gradient, [])


def _weight_of(instruction: Instruction | None, program: Program) -> str:
    """Name of the parameter that an instruction has for its weight; empty where there is none."""
    if instruction is None or len(instruction.inputs) <= WEIGHT:
        return ""
    slot = instruction.inputs[WEIGHT]
    return next((name for name, own in program.graph.parameters.items() if own == slot), "")
