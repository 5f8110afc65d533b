"""The ceilings of the processor, measured once a process: what it multiplies and adds, what it copies."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch

from fastmeta.core import native
from fastmeta.core.peak import copy_rate, peak_flops

PEAKS = 8
TRIALS, LEAST, ENOUGH_S = 12, 3, 0.5  # of a trial: at most, at least, and seconds after which the least will do
SMALLEST = 128  # bytes that a copy is timed of


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


def rate_of_copies(size: int, threads: int) -> float:
    """Bytes a second of copies between buffers of ``size`` bytes together, rounded down to a power of two.

    Rounded down, for a smaller copy is not slower. Without the extension it is that of memory.
    """
    if native.extension() is None:
        return peaks().bytes
    return _rounded_rate(1 << (max(size, SMALLEST).bit_length() - 1), threads)


@cache
def _rounded_rate(size: int, threads: int) -> float:
    return copy_rate(size, threads)


def _best(call: Callable[[], object]) -> float:
    call()
    seconds: list[float] = []
    while len(seconds) < TRIALS and (len(seconds) < LEAST or sum(seconds) < ENOUGH_S):
        begin = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - begin)
    return min(seconds)
