"""Where fastmeta's time goes: each operation's part of a meta-step, beside the least that it could take."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from benchmarks.ours import learner
from benchmarks.workloads import Problem
from fastmeta.engine.floor import peaks
from fastmeta.engine.profile import Profile, Record, collect

# The quickest block is shown: the others are those that the machine disturbed more.
BLOCKS = 10
BLOCK_S = 0.05


@dataclass(frozen=True)
class Line:
    """All maps of one operation, on support and query.

    Attributes:
        operation, module: its name, and the submodule whose parameters it reads.
        ms: of one meta-step, by the clock if all threads were as busy: the threads' time over their number.
        share: of the meta-step.
        flops: of one meta-step, of products, convolutions counted directly.
        bytes: of one meta-step, of operands and results, each once a call.
        floor_ms: the least time: for each map the products at the peak, or the bytes at the rate of a copy between
            buffers of a call's size if that takes longer.
    """

    operation: str
    module: str
    ms: float
    share: float
    flops: int
    bytes: int
    floor_ms: float

    @property
    def gflops(self) -> float | None:
        """Operations a nanosecond, where there are any."""
        return self.flops / (1e6 * self.ms) if self.flops and self.ms else None

    @property
    def floor_share(self) -> float | None:
        """The floor over the time: 1 were the physical limit."""
        return self.floor_ms / self.ms if self.ms else None


@dataclass(frozen=True)
class Breakdown:
    """One profiled meta-step.

    Attributes:
        ms: of the meta-step, with the clock read at each map.
        executor_ms: the part of it in the native executor; the rest is Python.
        lines: one an operation, in execution order.
        rest_ms: everything else: Python, packing of weights, sums over tasks, threads that wait.
    """

    ms: float
    executor_ms: float
    lines: list[Line]
    rest_ms: float

    @property
    def total(self) -> Line:
        """The whole meta-step as a line."""
        flops, size = sum(line.flops for line in self.lines), sum(line.bytes for line in self.lines)
        return Line("meta-step", "", self.ms, 1.0, flops, size, sum(line.floor_ms for line in self.lines))


def break_down(problem: Problem) -> Breakdown | None:
    """Profile some meta-steps of ``problem``; ``None`` where the native executor does not run them."""
    maml, tasks = learner(problem)
    maml.value_and_grad(tasks)
    blocks = []
    for _ in range(BLOCKS):
        times: list[float] = []
        begin = time.perf_counter()
        with collect() as profile:
            while not times or time.perf_counter() - begin < BLOCK_S:
                start = time.perf_counter()
                maml.value_and_grad(tasks)
                times.append(time.perf_counter() - start)
        if not profile.meta_steps:
            return None
        blocks.append((sum(times) / len(times), profile))
    return _breakdown(*min(blocks, key=lambda block: block[0]))


def _breakdown(seconds: float, profile: Profile) -> Breakdown:
    threads, count = torch.get_num_threads(), profile.meta_steps
    grouped: dict[tuple[str, str], list[Record]] = {}
    for record in profile.records:
        grouped.setdefault((record.operation, record.module), []).append(record)
    lines = []
    for (operation, module), records in grouped.items():
        taken = sum(r.seconds for r in records) / threads / count
        flops, size = sum(r.flops for r in records) // count, sum(r.bytes for r in records) // count
        least = 1e3 * _floor_s(records, threads) / count
        lines.append(Line(operation, module, 1e3 * taken, taken / seconds, flops, size, least))
    rest = 1e3 * seconds - sum(line.ms for line in lines)
    return Breakdown(1e3 * seconds, 1e3 * profile.seconds / count, lines, rest)


def _floor_s(records: Sequence[Record], threads: int) -> float:
    """The least seconds of ``records`` with all threads busy."""
    at_best = peaks("cpu", torch.float32, threads)
    return sum(at_best.seconds(r.calls, r.flops, r.bytes, r.threads) for r in records)
