"""The least time of a call on one device: its products at the peak, its bytes at the rate of a copy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from fastmeta.bench import gpu_peaks
from fastmeta.core import triton_support
from fastmeta.engine.floor import peaks


@dataclass(frozen=True)
class Ceilings:
    """What a device does at its best, measured in this run.

    Attributes:
        flops: operations a second of products.
        rate: bytes a second, read and written, of copies of so many bytes.
        about: how they were measured.
    """

    flops: float
    rate: Callable[[int], float]
    about: str

    def floor_us(self, flops: int, size: int) -> float:
        """Microseconds that so many operations and bytes take at the least."""
        return 1e6 * max(flops / self.flops, size / self.rate(size))


def ceilings(device: str) -> Ceilings:
    """Those of the processor with the threads in use, or of the GPU."""
    if device == "cuda":
        found, precision = gpu_peaks.measure(), triton_support.precision()
        about = f"{found.of(precision) / 1e12:.1f} TFLOP/s of a large product in {precision}, "
        return Ceilings(
            found.of(precision), lambda size: found.bytes, f"{about}{found.bytes / 1e12:.2f} TB/s of a copy"
        )
    threads = torch.get_num_threads()
    at_best = peaks("cpu", torch.float32, threads)
    about = f"{at_best.flops / 1e9:.0f} GFLOP/s ({at_best.source}), {at_best.bytes / 1e9:.0f} GB/s of a large copy; "
    about += "bytes count at the rate of a copy of their size, which caches have room for"
    return Ceilings(at_best.flops, lambda size: at_best.rate(size // threads), about)
