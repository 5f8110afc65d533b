"""What an operation's maps are called with in a meta-step: recorded, so that shapes and operands are the data's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fastmeta.engine import cost
from fastmeta.engine.lower.operands import Operands
from fastmeta.engine.program import Instruction, Program

Call = tuple[Any, ...]  # arguments of a map
Calls = list[dict[str, list[Call]]]  # of each instruction, by map
KEPT = 2  # calls of each map: those of the first inner step, where tasks share their weights, and those of the second


@dataclass(frozen=True)
class Piece:
    """Consecutive calls of a program that one operation of some backend stands for.

    Attributes:
        op: that operation's name.
        module: the submodule whose parameters it reads.
        operands: what it takes and gives.
        flops: of one task, by map.
        calls: by map, the operations and the arguments that they were called with, in order.
        tasks: that the calls are of.
    """

    op: str
    module: str
    operands: Operands
    flops: cost.ByMap
    calls: dict[str, list[tuple[Instruction, Call]]]
    tasks: int

    @property
    def bytes(self) -> cost.ByMap:
        """Of one task, by map."""
        return cost.bytes_by_map(self.operands)

    def run(self, name: str) -> Callable[[], list[Any]]:
        """A map of all its calls, on the recorded operands."""
        bound = [(getattr(instruction.op, name), arguments) for instruction, arguments in self.calls[name]]
        return lambda: [call(*arguments) for call, arguments in bound]


@contextmanager
def recorded(program: Program) -> Iterator[Calls]:
    """Within it, the maps of every instruction of ``program`` keep their first arguments."""
    calls: Calls = [{name: [] for name in cost.MAPS} for _ in program.instructions]
    for instruction, found in zip(program.instructions, calls, strict=True):
        for name in cost.MAPS:
            setattr(instruction.op, name, _keeping(getattr(instruction.op, name), found[name]))
    try:
        yield calls
    finally:
        for instruction in program.instructions:
            for name in cost.MAPS:
                delattr(instruction.op, name)


def _keeping(call: Callable[..., Any], kept: list[Call]) -> Callable[..., Any]:
    def run(*arguments: Any) -> Any:
        if len(kept) < KEPT:
            kept.append(arguments)
        return call(*arguments)

    return run


def pieces(program: Program, calls: Calls, starts: Sequence[tuple[int, str]]) -> list[Piece]:
    """Cut a recorded program.

    Args:
        program: the program.
        calls: of each instruction, by map.
        starts: of each piece the position of its first instruction, and its operation's name; the first is at 0.
    """
    ends = [start for start, _ in starts[1:]] + [len(program.instructions)]
    return [_piece(program, calls, range(start, end), op) for (start, op), end in zip(starts, ends, strict=True)]


def _piece(program: Program, calls: Calls, span: range, op: str) -> Piece:
    run = [program.instructions[i] for i in span]
    by_map: dict[str, list[tuple[Instruction, Call]]] = {}
    for name in cost.MAPS:
        # Of forward and backward the second inner step's, of the tangents the first that ran, which are the last one's.
        second = name in cost.MAPS[:2]
        kept = [(i, calls[n][name]) for i, n in zip(run, span, strict=True) if calls[n][name]]
        kept = kept if name in ("forward", "tangent") else kept[::-1]
        if kept:
            by_map[name] = [(i, each[min(1, len(each) - 1) if second else 0]) for i, each in kept]
    flops = [cost.flops_by_map(instruction) for instruction in run]
    total: Any = tuple(sum(each) for each in zip(*flops, strict=True))
    module = next((i.module for i in run if i.module), "")
    first = by_map["forward"][0][1][0]
    tasks = first[0].shape[0]
    return Piece(op, module, cost.operands_of(program, run), total, by_map, tasks)


def as_double(value: Any) -> Any:
    """The same arguments with every floating tensor in float64."""

    def one(leaf: Any) -> Any:
        return leaf.double() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf

    return pytree.tree_map(one, value)


def error(found: Any, truth: Any) -> float:
    """Relative distance of all floating results together from those in float64."""
    pairs = [
        (a.double(), b)
        for a, b in zip(pytree.tree_leaves(found), pytree.tree_leaves(truth), strict=True)
        if isinstance(a, Tensor) and a.is_floating_point()
    ]
    if not pairs:
        return 0.0
    gap = torch.stack([(a - b).norm() for a, b in pairs]).norm()
    size = torch.stack([b.norm() for _, b in pairs]).norm()
    return float(gap / size) if size else float(gap)
