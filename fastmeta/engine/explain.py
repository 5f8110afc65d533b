"""``explain()``: what runs, on what, at what cost, and why."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fastmeta.core.task_op import Tensors
from fastmeta.engine import executor
from fastmeta.engine.compiler import Programs
from fastmeta.engine.program import Instruction
from fastmeta.engine.work import Work


@dataclass(frozen=True)
class Row:
    """One call of the support program.

    Attributes:
        module: the submodule whose parameters it reads.
        op: operation.
        call: the ATen call it stands for.
        shape: of one task's result.
        plan: how the fast weights are held: ``dense``, or ``shared`` where no task has its own.
        backend: who runs it.
        flops: of the four maps over all tasks and inner steps, and the query's two.
        saved: bytes kept for its maps, per inner step, for all tasks.
        cotangents: bytes of the cotangents kept for its tangent maps, likewise.
        keeps: what the saved bytes are.
        reason: why the generic operation stands in, or why it runs once.
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
        kept: named bytes kept per inner step, for all tasks.
    """

    engine: str
    reason: str
    tasks: int
    steps: int
    parameters: int
    rows: tuple[Row, ...] = ()
    kept: dict[str, int] = field(default_factory=dict)

    @property
    def kept_per_step(self) -> int:
        """Bytes kept per inner step for the adjoint, for all tasks."""
        return sum(self.kept.values())

    @property
    def flops(self) -> int:
        """Floating-point operations of one meta-step in the operations that count them."""
        return sum(row.flops for row in self.rows)

    def __str__(self) -> str:
        head = (
            f"{self.engine} engine: {self.tasks} tasks, {self.steps} inner steps, {self.parameters} adapting elements"
        )
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
                "why",
            )
        ]
        table.extend(row.cells() for row in self.rows)
        widths = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in table]
        kept = ", ".join(f"{name} {size / 1024:.1f} KiB" for name, size in self.kept.items())
        return "\n".join(
            [head, *lines, f"kept per inner step: {kept or 'nothing'}; total {self.kept_per_step / 1024:.1f} KiB"]
        )


def explain_autodiff(work: Work, reason: str) -> Explanation:
    """The explanation where no program runs."""
    return Explanation("autodiff", reason, work.tasks, work.steps, work.packing.size)


def explain_programs(work: Work, programs: Programs) -> Explanation:
    """The explanation of a program; runs one inner step to count what its tape really holds."""
    program = programs.support
    with torch.no_grad():
        state = {n: p for n, p in work.parameters.items() if n not in set(work.packing.names)} | work.buffers
        tape = executor.forward(program, work.theta, state, pytree.tree_leaves(work.support), first=True)
        executor.backward(program, tape, torch.ones_like(tape.loss))
    second_order = not work.first_order and work.steps > 0
    given = {t.untyped_storage().data_ptr() for t in (*work.parameters.values(), *pytree.tree_leaves(work.support))}
    seen = set(given)
    rows = []
    for i, instruction in enumerate(program.instructions):
        saved = _new_bytes(tape.saved[i], seen) if second_order else 0
        cotangents = _new_bytes(tape.d_y[i] or (), seen) if second_order else 0
        rows.append(_row(work, instruction, saved, cotangents))
    kept = {}
    if second_order:
        kept["operands"] = sum(row.saved for row in rows)
        kept["cotangents"] = sum(row.cotangents for row in rows)
        kept["fast weights"] = work.packing.size * work.tasks * tape.loss.element_size()
    if work.alpha.requires_grad:
        kept["gradients"] = work.packing.size * work.tasks * tape.loss.element_size()
    return Explanation("program", "", work.tasks, work.steps, work.packing.size, tuple(rows), kept)


def _row(work: Work, instruction: Instruction, saved: int, cotangents: int) -> Row:
    route = instruction.later
    passes = 3 * (work.steps + 1) + (0 if work.first_order else 6 * work.steps)
    times = passes if route.active else work.steps + 1
    reason = instruction.reason
    if route.single and not reason:
        reason = "no task differs: runs once"
    return Row(
        instruction.module,
        instruction.op.name,
        str(instruction.op.call.target).removeprefix("aten.").partition(".")[0],
        instruction.op.call.outputs[0].shape,
        "shared" if route.single else "dense",
        "reference",
        instruction.op.flops() * times * (1 if route.single else work.tasks),
        saved,
        cotangents,
        ", ".join(instruction.op.saved_names),
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
