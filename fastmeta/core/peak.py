"""What the processor does at its best, measured: the two rates that bound every kernel from below."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from fastmeta.core import native

# The quickest trial counts: whatever else the machine does makes one slower, never quicker. Many short trials find a
# moment when all threads run; pauses let the threads sleep, so that the system finds each a core anew.
TRIAL_S = 5e-4
BLOCKS = 8
BLOCK_S = 0.015  # of trials, or LEAST of them
LEAST = 6
PAUSE_S = 2e-3


def peak_flops(dtype: torch.dtype = torch.float32, threads: int = 1) -> float:
    """Floating-point operations a second of ``threads`` threads at once.

    Each thread runs ``x <- x * a + b`` on vectors that stay in registers, enough of them to fill the multiply-add
    units; the rate is ``2 * elements * rounds * threads / seconds``, the quickest of many trials. It is that of the
    instruction set in use (``FASTMETA_ISA``).

    Args:
        dtype: float32 or float64.
        threads: at work at once.

    Returns:
        Operations a second, a multiplication and an addition being two.

    Raises:
        TypeError: another dtype.
        ValueError: ``threads`` is less than 1.
        RuntimeError: the extension is missing.
    """
    if dtype not in (torch.float32, torch.float64):
        raise TypeError(f"peak_flops: dtype must be torch.float32 or torch.float64, got {dtype}")
    run = native.require("peak_flops").multiply_add_seconds
    _check_threads("peak_flops", threads)
    double = dtype == torch.float64
    return _rate(lambda rounds, trials: run(double, rounds, trials, threads))


def copy_rate(size: int, threads: int = 1) -> float:
    """Bytes a second that ``threads`` threads at once read and write.

    Each thread copies half of ``size`` bytes to the other half, and back, over and over: so the rate is that of the
    cache in which ``size`` bytes have room, or of memory where none has. It is ``size * copies * threads / seconds``,
    the quickest of many trials.

    Args:
        size: bytes that each thread touches, source and destination together; at least 128.
        threads: at work at once.

    Returns:
        Bytes a second, those read and those written.

    Raises:
        ValueError: ``size`` is less than 128 or ``threads`` less than 1.
        RuntimeError: the extension is missing.
    """
    run = native.require("copy_rate").copy_seconds
    if size < 128:
        raise ValueError(f"copy_rate: size must be at least 128 bytes, got {size}")
    _check_threads("copy_rate", threads)
    half = size // 2
    return _rate(lambda times, trials: (run(half, times, trials, threads), 2 * half * times * threads))


def _check_threads(function: str, threads: int) -> None:
    if threads < 1:
        raise ValueError(f"{function}: threads must be at least 1, got {threads}")


def _rate(measure: Callable[[int, int], tuple[float, int]]) -> float:
    """The rate of ``measure(repeats, trials) -> (least seconds of a trial, amount)``, repeated to take ``TRIAL_S``."""
    repeats, seconds = 1, 0.0
    while seconds < TRIAL_S:
        repeats *= 2
        seconds, _ = measure(repeats, LEAST)
    rate = 0.0
    for _ in range(BLOCKS):
        time.sleep(PAUSE_S)
        seconds, amount = measure(repeats, max(LEAST, round(BLOCK_S / seconds)))
        rate = max(rate, amount / seconds)
    return rate
