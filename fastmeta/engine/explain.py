"""``explain()``: what runs, on what, at what cost, and why."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastmeta.core import rates
from fastmeta.core.task_op import Need, TaskOp, Tensors
from fastmeta.engine import cost, executor, tables
from fastmeta.engine.capture import objection
from fastmeta.engine.compiler import Fit, Programs
from fastmeta.engine.evaluation import MEAN
from fastmeta.engine.factor import compared, formed_after
from fastmeta.engine.meta_step import fitted, predicted
from fastmeta.engine.native import NativeStep
from fastmeta.engine.program import Instruction
from fastmeta.engine.resident import ResidentStep
from fastmeta.engine.tables import Held
from fastmeta.engine.work import Work, leaves

LIBRARIES = {"linear": "cublas", "matmul": "cublas", "conv2d": "cudnn", "view": "view"}  # of PyTorch's, on a GPU
Plans = dict[int, tuple[float, float] | Held | str]  # of factor.compared and tables.compared


@dataclass(frozen=True)
class Row:
    """One call of the support program.

    Attributes:
        module: the submodule whose parameters it reads.
        op: operation.
        call: the ATen call it stands for.
        shape: of one task's result.
        plan: how the fast weights are held: ``resident`` in the workspace of a task at work, ``dense`` for all tasks,
            or ``shared`` where no task has its own.
        backend: who runs it: ``native``, ``cuda``, ``triton``, ``reference``, or ``callback`` for what the native
            executor has the operation's own maps for. On a GPU the reference's kernels are ``cublas``, ``cudnn`` and
            PyTorch's own, ``torch``; a ``view`` has none.
        flops: of the products in the four maps over all tasks and inner steps, and in the query's two.
        saved: bytes kept for its maps, per inner step, for all tasks; once for all steps where it runs once.
        cotangents: bytes of the cotangents kept for its tangent maps, likewise.
        keeps: what the saved bytes are.
        dense_ms: what the products of a linear layer are predicted to take in the meta-step, with a weight of each
            task's own; by the native executor on a CPU. ``None`` where there is no choice.
        factored_ms: the same with factors, by the task-batched executor.
        dense_bytes: of an embedding's table of each task's own, for all tasks, or of its gradient where it does not
            adapt. ``None`` where there is no choice.
        factored_bytes: of the rows alone that the tasks touch.
        reason: why the generic operation stands in, or why it runs once, or why its weight is held as it is.
    """

    module: str
    op: str
    call: str
    shape: tuple[int, ...]
    plan: str
    backend: str
    flops: int
    saved: int
    cotangents: int
    keeps: str
    dense_ms: float | None
    factored_ms: float | None
    dense_bytes: int | None
    factored_bytes: int | None
    reason: str

    def cells(self) -> tuple[str, ...]:
        """The row as the table shows it."""
        return (
            self.module,
            self.op,
            self.call,
            "x".join(map(str, self.shape)),
            self.plan,
            self.backend,
            f"{self.flops / 1e6:.1f}",
            f"{self.saved / 1024:.1f}",
            f"{self.cotangents / 1024:.1f}",
            self.keeps,
            *("" if ms is None else f"{ms:.3g}" for ms in (self.dense_ms, self.factored_ms)),
            *("" if size is None else f"{size / 1024:.1f}" for size in (self.dense_bytes, self.factored_bytes)),
            self.reason,
        )


@dataclass(frozen=True)
class Explanation:
    """The rows, and what holds for the whole meta-step.

    Attributes:
        engine: ``program`` or ``autodiff``.
        reason: why autodiff runs, if it does.
        rows: one a call.
        tasks, steps, parameters: T, K, P.
        executor: who runs the program, and why not the native executor where it does not.
        kept: named bytes kept per inner step, by the reference executor for all tasks of a chunk at once, by the native
            one for each task at work.
        kept_once: bytes kept likewise for all inner steps together: operands of what is the same at every step.
        peak: bytes that the meta-step is predicted to hold beside parameters and tasks; 0 where nothing predicts it.
        tasks_at_once: how many tasks run at a time.
        recomputes: whether activations are computed again on the way back instead of being kept.
        rule: what the inner steps have beside descent along the gradient, and where, if parameters have their own.
    """

    engine: str
    reason: str
    tasks: int
    steps: int
    parameters: int
    executor: str = ""
    rows: tuple[Row, ...] = ()
    kept: dict[str, int] = field(default_factory=dict)
    kept_once: int = 0
    peak: int = 0
    tasks_at_once: int = 0
    recomputes: bool = False
    rule: str = ""

    @property
    def kept_per_step(self) -> int:
        """Bytes kept per inner step for the adjoint; see ``kept``."""
        return sum(self.kept.values())

    @property
    def flops(self) -> int:
        """Floating-point operations of one meta-step in the operations that count them."""
        return sum(row.flops for row in self.rows)

    def __str__(self) -> str:
        head = (
            f"{self.engine} engine: {self.tasks} tasks, {self.steps} inner steps, {self.parameters} adapting elements"
        ) + (f"\ninner steps have {self.rule}" if self.rule else "")
        if self.engine == "autodiff":
            return f"{head}\nwhy not the program: {self.reason}\nkept: autograd's graph of the whole loop"
        table: list[tuple[str, ...]] = [
            (
                "module",
                "op",
                "call",
                "one task's result",
                "plan",
                "backend",
                "MFLOP",
                "saved KiB",
                "cotangents KiB",
                "keeps",
                "dense ms",
                "factored ms",
                "dense KiB",
                "factored KiB",
                "why",
            )
        ]
        table.extend(row.cells() for row in self.rows)
        widths = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in table]
        kept = ", ".join(f"{name} {size / 1024:.1f} KiB" for name, size in self.kept.items())
        return "\n".join(
            [
                head,
                f"executor: {self.executor}",
                *lines,
                f"kept per inner step: {kept or 'nothing'}; total {self.kept_per_step / 1024:.1f} KiB"
                + (f"; once: {self.kept_once / 1024:.1f} KiB" if self.kept_once else ""),
                *([self._memory()] if self.peak else []),
            ]
        )

    def _memory(self) -> str:
        how = "computed again" if self.recomputes else "kept"
        return f"predicted peak: {self.peak / 2**20:.1f} MiB, tasks at a time: {self.tasks_at_once}, activations {how}"


def explain_autodiff(work: Work, reason: str) -> Explanation:
    """The explanation where no program runs."""
    rule = work.rule.described()
    return Explanation("autodiff", reason, work.tasks, work.steps, work.packing.size, rule=rule)


def rows_of(work: Work, programs: Programs, executor: str) -> list[Row]:
    """One row a call of the support program, as an executor runs it, without what its tape holds: nothing runs.

    Args:
        work: the meta-step, of whose tasks the shapes alone are looked at.
        programs: its programs, with a query or without.
        executor: ``native``, ``resident``, or anything else for the task-batched one.
    """
    calls, plans = cost.paired(programs.support, programs.query), _plans(work, programs)
    native = programs.native
    if executor == "native" and isinstance(native, NativeStep):
        return _natively(work, programs, native, plans)
    if executor == "resident":
        return [_row(call, "cuda", cost.flops(work, call, query), 0, 0, plans) for call, query in calls]
    switches, cuda = formed_after(programs.support, work.steps), work.alpha.is_cuda
    return [
        _row(
            call,
            backend_of(call.op, cuda=cuda),
            cost.flops(work, call, query),
            0,
            0,
            plans,
            formed_after=switches.get(id(call), 0),
        )
        for call, query in calls
    ]


def backend_of(op: TaskOp, *, cuda: bool) -> str:
    """Who runs an operation's maps on the task-batched executor, on a GPU or not."""
    return LIBRARIES.get(op.name, "torch") if cuda and op.backend == "reference" else op.backend


def _plans(work: Work, programs: Programs) -> Plans:
    if programs.query is None:
        return {}
    taken = () if programs.rows is None else programs.rows.tables
    of_tables = tables.compared(*programs.both, work, taken)
    return {**compared(*programs.both, work, rates.known()), **of_tables}


def _natively(work: Work, programs: Programs, native: NativeStep, plans: Plans) -> list[Row]:
    collected = {id(call) for call in native.collected(work, learned=work.learned)}
    apart = {id(call): ("callback", f"called back: {reason}") for call, reason in native.cuts[0]}
    reads = "reads the tasks' data alone, for all tasks at once:"
    apart |= {id(call): ("reference", f"{reads} {reason}") for call, reason in native.preludes[0]}
    rows = []
    for call, query in cost.paired(programs.support, programs.query):
        backend, reason = apart.get(id(call), ("native", ""))
        rows.append(
            _row(call, backend, cost.flops(work, call, query), 0, 0, plans, reason, collected=id(call) in collected)
        )
    return rows


def explain_programs(work: Work, programs: Programs) -> Explanation:
    """The explanation of a program. For the reference executor one inner step runs, to count what its tape holds."""
    native = programs.native
    peak, at_once, recomputes = 0, work.tasks, False
    learned = work.learned
    refusal = native if isinstance(native, str) else native.refusal(work, outputs=False)
    fit = fitted(work, programs, MEAN, native=not refusal, learned=learned, outputs=False)
    if fit is not None and not refusal:
        refusal = "one task alone would take more than the memory budget on the native one"
    if isinstance(native, str) or refusal:
        rows, kept, once = _by_reference(work, programs, _plans(work, programs))
        captured = _captured(work, programs, fit)
        fit = fit or predicted(work, programs, MEAN, learned=learned, outputs=False)
        peak, at_once, recomputes = fit.peak, fit.tasks, fit.recompute or work.micro_batches > 1
        executor = f"reference{captured}, because {refusal}"
    elif isinstance(native, ResidentStep):
        rows = rows_of(work, programs, "resident")
        kept, once = {}, 0
        executor = f"resident, {native.describe(work)}"
    else:
        rows = rows_of(work, programs, "native")
        kept = native.kept(work, learned=learned)
        once = native.kept_once(work, learned=learned)
        room = native.workspace_bytes(work, learned=learned)
        at_once, threads = native.sharing(work, learned=learned)
        peak = native.peak_bytes(work, learned=learned)
        sharing = f"tasks at once: {at_once}, each in {room / 2**20:.1f} MiB on {threads} thread{'s' * (threads > 1)}"
        executor = f"native, instruction set {native.instruction_set}, {sharing}"
        if native.cuts[0]:
            executor += f", cut at operations without kernels: {len(native.cuts[0])}"
        shares = native.row_shares(work)
        if shares is not None:
            of_support, of_query = (f"{1 - share:.0%}" for share in shares)
            executor += f", rows of padding left out: {of_support} of the support's and {of_query} of the query's"
    return Explanation(
        "program",
        "",
        work.tasks,
        work.steps,
        work.packing.size,
        executor,
        tuple(rows),
        kept,
        once,
        peak,
        at_once,
        recomputes,
        work.rule.described(),
    )


def _captured(work: Work, programs: Programs, fit: Fit | None) -> str:
    """Whether the meta-step's gradient is replayed from a CUDA graph, or why not; nothing where there is no GPU."""
    if not work.alpha.is_cuda:
        return ""
    kind = programs.kind(fit, learned=work.learned, outputs=False)
    reason = objection(work) or programs.captures.reason(kind, work, MEAN)
    return f", not captured in a CUDA graph ({reason})" if reason else ", captured in a CUDA graph"


def _by_reference(work: Work, programs: Programs, plans: Plans) -> tuple[list[Row], dict[str, int], int]:
    program = programs.support
    with torch.no_grad():
        if programs.rows is not None:
            work = programs.rows.take(work).work
        data = leaves(work.micro_sets()[0])
        tape = executor.forward(program, work.theta, work.fixed(0), data, first=True)
        executor.backward(program, tape, torch.ones_like(tape.loss), outer=False)
    second_order = not work.first_order and work.steps > 0
    kept_tapes = second_order and work.micro_batches == 1
    seen = {t.untyped_storage().data_ptr() for t in (*work.parameters.values(), *leaves(work.support))}
    rows, switches = [], formed_after(program, work.steps)
    for i, (call, query) in enumerate(cost.paired(program, programs.query)):
        saved = _new_bytes(tape.saved[i], seen) if kept_tapes else 0
        cotangents = _new_bytes(tape.d_y[i] or (), seen) if kept_tapes else 0
        flops, after = cost.flops(work, call, query), switches.get(id(call), 0)
        backend = backend_of(call.op, cuda=work.alpha.is_cuda)
        rows.append(_row(call, backend, flops, saved, cotangents, plans, formed_after=after))
    kept = {}
    once = sum(row.saved for row, i in zip(rows, program.instructions, strict=True) if i.invariant)
    if second_order:
        kept["operands"] = sum(row.saved for row in rows) - once
        kept["cotangents"] = sum(row.cotangents for row in rows)
        formed = work.packing.size - sum(work.parameters[name].numel() for name in program.factored)
        kept["fast weights"] = formed * work.tasks * tape.loss.element_size()
    if work.learned or work.rule.entrywise:
        each = [work.rule.of(place)[0].records for place in range(len(work.packing.names))]
        already = {"phi"} if second_order else set()
        vectors = sum(len(own - already) * size for own, size in zip(each, work.packing.sizes, strict=True))
        size = vectors * work.tasks * tape.loss.element_size()
        kept["gradients" if work.rule.plain else "vectors of the inner rule"] = size
    return rows, kept, once


def _row(
    instruction: Instruction,
    backend: str,
    flops: int,
    saved: int,
    cotangents: int,
    plans: Plans,
    reason: str = "",
    *,
    collected: bool = False,
    formed_after: int = 0,
) -> Row:
    route = instruction.later
    reason = reason or instruction.reason
    if route.single and not reason:
        reason = "no task differs: runs once"
    elif instruction.invariant and not reason:
        reason = "nothing that adapts comes before it: runs once, not at every step"
    if collected:
        reason = "reads the task's data: its weight changes by products with them and is formed for no task"
    factored = Need.FACTORS in route.need
    if factored and not reason:
        reason = "each task's weight is the shared one and products of few rows"
        reason += f", formed after {formed_after} steps" if formed_after else ""
    choice = plans.get(id(instruction))
    if isinstance(choice, str) and not reason:
        reason = choice
    dense_ms, factored_ms = (1e3 * s for s in choice) if isinstance(choice, tuple) else (None, None)
    held = choice if isinstance(choice, Held) else None
    on_rows = held is not None and held.on_rows
    if on_rows and not reason:
        reason = "each task has the rows that its data name, and shares the others"
    formed = "resident" if backend in ("native", "callback", "cuda") else "shared" if route.single else "dense"
    return Row(
        instruction.module,
        instruction.op.name,
        str(instruction.op.call.target).removeprefix("aten.").partition(".")[0],
        instruction.op.call.outputs[0].shape,
        "factored" if collected or factored or on_rows else formed,
        backend,
        flops,
        saved,
        cotangents,
        ", ".join(instruction.op.saved_names),
        dense_ms,
        factored_ms,
        None if held is None else held.dense,
        None if held is None else held.rows,
        reason,
    )


def _new_bytes(tensors: Tensors, seen: set[int]) -> int:
    """Bytes of storages not seen before: what two operations share is counted once."""
    total = 0
    for tensor in tensors:
        if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in seen:
            seen.add(tensor.untyped_storage().data_ptr())
            total += tensor.untyped_storage().nbytes()
    return total
