"""A machine of round numbers and a clock of even ticks, so that tests need neither measure nor wait."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch

from fastmeta.engine.floor import Peaks


class Hand(Peaks):
    """Copies have one rate whatever their size."""

    def rate(self, size: int) -> float:
        return self.bytes


def machine(device: str, dtype: torch.dtype, threads: int) -> Peaks:
    """1 GFLOP/s, and 0.1 GB/s."""
    return Hand(device, str(dtype).removeprefix("torch."), threads, 1e9, "hand", 1e8)


def clock() -> Callable[[], float]:
    """A millisecond passes at each look, so that no share of the time depends on the load of the machine."""
    return itertools.count(0.0, 1e-3).__next__
