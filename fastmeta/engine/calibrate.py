"""Measures the rates that plans are compared by."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from fastmeta.core import native
from fastmeta.core.peak import copy_rate, peak_flops
from fastmeta.core.rates import Rates
from fastmeta.core.task_op import Call, Need
from fastmeta.ops.linear.op import Linear

PRODUCT = 1024  # rows and columns of the product that is timed
COPIED = 32 << 20  # bytes, far above the caches
TRIALS, CALLS = 12, 500
NEAR = 4 << 20  # bytes, between the second-level cache and the last
# Parts of the processor's peak, and of a copy's rate, that the native executor's products reach with weights in the
# second-level cache, and beyond it: 350 of 500 GFLOP/s, 50 of 260 GB/s (AMD Zen 5, two threads).
REACHED, REACHED_NEAR = 0.65, 0.2
CACHES = Path("/sys/devices/system/cpu/cpu0/cache")


def measure() -> Rates:
    """Measure now.

    A product of 1024 x 1024 matrices; copies far above the caches, and within the last of them; calls of an operation
    on single elements; the processor's peak, of which the native executor reaches a part. Of each the quickest of many
    trials counts. Takes about a second.
    """
    with torch.no_grad():
        a, b, c = torch.rand(PRODUCT, PRODUCT), torch.rand(PRODUCT, PRODUCT), torch.empty(PRODUCT, PRODUCT)
        source = torch.rand(COPIED // 4)
        copy = torch.empty_like(source)
        product = _least(lambda: torch.mm(a, b, out=c))
        copied = _least(lambda: copy.copy_(source))
        rates = Rates(2 * PRODUCT**3 / product, bytes=2 * COPIED / copied, call_s=_call_s(), measured=True)
    threads = torch.get_num_threads()
    rates = replace(rates, cache=_cache(2, rates.cache), last=_cache(3, rates.last * threads) // threads)
    if native.extension() is None:
        return rates
    near = REACHED_NEAR * copy_rate(min(NEAR, rates.last), threads)
    return replace(rates, native=REACHED * peak_flops(torch.float32, threads), near=near)


def _call_s() -> float:
    """Of one map: the mean of the four of a linear operation whose every operand is a single element."""
    one = torch.ones(1, 1)
    op = Linear(Call.example(torch.ops.aten.linear.default, one, one, one[0]))
    x, weight, bias = torch.ones(1, 1, 1), torch.ones(1, 1, 1), torch.ones(1, 1)
    need = (Need.TASK, Need.TASK, Need.TASK)

    def sweep() -> None:
        for _ in range(CALLS):
            (y,), saved = op.forward([x, weight, bias])
            op.backward(saved, (y,), need)
            (y_dot,), saved_dot = op.tangent(saved, (x, weight, bias))
            op.tangent_backward(saved, saved_dot, (y,), (y_dot,), need)

    return _least(sweep) / CALLS / 4


def _cache(level: int, otherwise: int) -> int:
    """Bytes of a cache of the first core, where the system tells."""
    try:
        text = (CACHES / f"index{level}" / "size").read_text().strip()
    except OSError:
        return otherwise
    unit = {"K": 1 << 10, "M": 1 << 20}.get(text[-1:])
    return int(text[:-1]) * unit if unit and text[:-1].isdigit() else otherwise


def _least(call: Callable[[], object]) -> float:
    call()
    seconds = []
    for _ in range(TRIALS):
        begin = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - begin)
    return min(seconds)
