"""The least time that work can take on this machine: its products at the peak, or its bytes at the speed of a copy."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch

from fastmeta.core import native
from fastmeta.core.peak import copy_rate, peak_flops

SMALLEST = 128  # bytes that a copy is timed of
LARGE = 64 << 20  # bytes of a copy far above the caches
PRODUCT = {"cpu": 2048, "cuda": 4096}  # rows and columns of the product that is timed
TRIALS, LEAST, ENOUGH_S = 12, 3, 0.5  # of a trial: at most, at least, and seconds after which the least will do


@dataclass(frozen=True)
class Peaks:
    """What a device does at its best, with the threads in use.

    Attributes:
        device: ``cpu`` or ``cuda``.
        dtype: ``float32`` or ``float64``.
        threads: at work.
        flops: operations a second.
        source: by what they were reached.
        bytes: of memory, read and written a second.
    """

    device: str
    dtype: str
    threads: int
    flops: float
    source: str
    bytes: float

    def rate(self, size: int) -> float:
        """Bytes a second of all threads at once, each of which touches ``size`` bytes; on a GPU that of memory."""
        if self.device != "cpu" or native.extension() is None:
            return self.bytes
        return copy_rate_of(size, self.threads)

    def seconds(self, calls: int, flops: int, size: int, sharing: int) -> float:
        """The least that ``calls`` calls with so many operations and bytes in all can take with all threads busy.

        Of the bytes of a call each of the ``sharing`` threads that work on it touches its part.
        """
        return max(flops / self.flops, size / self.rate(size // calls // sharing))


def copy_rate_of(size: int, threads: int) -> float:
    """Of buffers of ``size`` bytes a thread, rounded down to a power of two: a smaller copy is not slower."""
    return _rounded_copy_rate(1 << (max(size, SMALLEST).bit_length() - 1), threads)


@cache
def _rounded_copy_rate(size: int, threads: int) -> float:
    return copy_rate(size, threads)


@cache
def peaks(device: str = "cpu", dtype: torch.dtype = torch.float32, threads: int = 1) -> Peaks:
    """Measured now, once a process: multiply-adds in registers or, where it is quicker, a large product; a large copy.

    A product can be quicker where the extension lacks the processor's widest vectors. Of the libraries' products no one
    is the quickest everywhere: a matrix product may not use vectors that a convolution of one pixel, the same product,
    does use. On a GPU the product is one of matrices, in the precision that PyTorch is set to, and times are the
    device's.
    """
    n = PRODUCT[device]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.no_grad():
            a, b = (torch.rand(n, n, device=device, dtype=dtype) for _ in range(2))
            product = torch.empty_like(a)
            source = torch.rand(LARGE // 4, device=device)
            copy = torch.empty_like(source)
            seconds = _least(lambda: torch.mm(a, b, out=product), device)
            if device == "cpu":
                image, filters = a.view(1, n, 32, n // 32), b.view(n, n, 1, 1)
                seconds = min(seconds, _least(lambda: torch.conv2d(image, filters), device))
            reached = {"a library's product": 2 * n**3 / seconds}
            moved = 2 * LARGE / _least(lambda: copy.copy_(source), device)
    finally:
        torch.set_num_threads(before)
    if device == "cpu" and native.extension() is not None:
        # Several times: where another process holds a core, the system may leave all threads to the others for a while.
        reached["multiply-adds in registers"] = max(peak_flops(dtype, threads) for _ in range(TRIALS))
    best = max(reached, key=lambda name: reached[name])
    return Peaks(device, str(dtype).removeprefix("torch."), threads, reached[best], best, moved)


def _least(call: Callable[[], object], device: str) -> float:
    call()
    seconds: list[float] = []
    while len(seconds) < TRIALS and (len(seconds) < LEAST or sum(seconds) < ENOUGH_S):
        if device == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            call()
            end.record()
            end.synchronize()
            seconds.append(begin.elapsed_time(end) / 1e3)
        else:
            start = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - start)
    return min(seconds)
