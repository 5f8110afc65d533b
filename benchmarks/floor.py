"""The physical floor of a meta-gradient: its products at the machine's measured peak, its data at memory's speed."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from benchmarks.ours import learner
from benchmarks.workloads import Problem
from fastmeta.engine.floor import peaks


@dataclass(frozen=True)
class Floor:
    """The least time a meta-gradient can take.

    Attributes:
        flops: of all products, convolutions counted directly (Winograd's form takes fewer and can go below this floor).
        bytes: tasks, weights and gradients, each once.
        peak_gflops, peak_source, peak_gb_s: the machine's measured peaks.
        ms: the longer of the two times.
    """

    flops: int
    bytes: int
    peak_gflops: float
    peak_source: str
    peak_gb_s: float
    ms: float


def floor_of(problem: Problem) -> Floor:
    """The floor of ``problem``; its products are counted by ``fastmeta.MAML.explain``."""
    maml, batch = learner(problem)
    flops = maml.explain(batch).flops
    tensors = [*problem.support, *problem.query, *problem.model.parameters(), *problem.model.parameters()]
    size = sum(t.numel() * t.element_size() for t in tensors)
    peak = peaks("cpu", torch.float32, torch.get_num_threads())
    ms = 1e3 * max(flops / peak.flops, size / peak.bytes)
    return Floor(flops, size, peak.flops / 1e9, peak.source, peak.bytes / 1e9, ms)
