"""The physical floor of a meta-gradient: its products at the machine's measured peak, its data at memory's speed."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch

from benchmarks.ours import learner
from benchmarks.workloads import Problem
from fastmeta.core import native
from fastmeta.core.peak import peak_flops

PEAKS = 8


@dataclass(frozen=True)
class Peaks:
    """What the machine does at its best, with the threads in use.

    Attributes:
        flops: float32 operations a second.
        source: by what they were reached.
        bytes: of memory, read and written a second.
    """

    flops: float
    source: str
    bytes: float


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


@cache
def peaks() -> Peaks:
    """Measured now: multiply-adds in registers or, where it is quicker, a large product; a copy far above the caches.

    A product can be quicker where the extension lacks the processor's widest vectors. Of the libraries' products no one
    is the quickest everywhere: a matrix product may not use vectors that a convolution of one pixel, the same product,
    does use.
    """
    n = 2048
    a, b, product = torch.rand(n, n), torch.rand(n, n), torch.empty(n, n)
    image, filters = torch.rand(1, n, 32, n // 32), torch.rand(n, n, 1, 1)
    source = torch.rand(32 << 20)
    copy = torch.empty_like(source)
    with torch.no_grad():
        seconds = min(_best(lambda: torch.mm(a, b, out=product)), _best(lambda: torch.conv2d(image, filters)))
        moved = 2 * source.numel() * source.element_size() / _best(lambda: copy.copy_(source))
    reached = {"a library's product": 2 * n**3 / seconds}
    if native.extension() is not None:
        # Several times: where another process holds a core, the system may leave all threads to the others for a while.
        threads = torch.get_num_threads()
        reached["multiply-adds in registers"] = max(peak_flops(torch.float32, threads) for _ in range(PEAKS))
    best = max(reached, key=lambda name: reached[name])
    return Peaks(reached[best], best, moved)


def floor_of(problem: Problem) -> Floor:
    """The floor of ``problem``; its products are counted by ``fastmeta.MAML.explain``."""
    maml, batch = learner(problem)
    flops = maml.explain(batch).flops
    tensors = [*problem.support, *problem.query, *problem.model.parameters(), *problem.model.parameters()]
    size = sum(t.numel() * t.element_size() for t in tensors)
    peak = peaks()
    ms = 1e3 * max(flops / peak.flops, size / peak.bytes)
    return Floor(flops, size, peak.flops / 1e9, peak.source, peak.bytes / 1e9, ms)


def _best(call: Callable[[], object], times: int = 12) -> float:
    call()
    seconds = []
    for _ in range(times):
        begin = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - begin)
    return min(seconds)
