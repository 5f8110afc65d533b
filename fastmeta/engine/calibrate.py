"""Measures the rates that plans are compared by."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch

from fastmeta.core.rates import Rates
from fastmeta.core.task_op import Call, Need
from fastmeta.ops.linear.op import Linear

PRODUCT = 1024  # rows and columns of the product that is timed
COPIED = 32 << 20  # bytes, far above the caches
TRIALS, CALLS = 12, 500
SECOND_LEVEL = Path("/sys/devices/system/cpu/cpu0/cache/index2/size")


def measure() -> Rates:
    """Measure now: a product of 1024 x 1024 matrices, a copy of 32 MiB, and calls of an operation on single elements.

    Of each the quickest of many trials counts. Takes about a second.
    """
    with torch.no_grad():
        a, b, c = torch.rand(PRODUCT, PRODUCT), torch.rand(PRODUCT, PRODUCT), torch.empty(PRODUCT, PRODUCT)
        source = torch.rand(COPIED // 4)
        copy = torch.empty_like(source)
        product = _least(lambda: torch.mm(a, b, out=c))
        copied = _least(lambda: copy.copy_(source))
        return Rates(2 * PRODUCT**3 / product, 2 * COPIED / copied, _second_level(), _call_s(), measured=True)


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


def _second_level() -> int:
    try:
        text = SECOND_LEVEL.read_text().strip()
    except OSError:
        return Rates.cache
    unit = {"K": 1 << 10, "M": 1 << 20}.get(text[-1:])
    return int(text[:-1]) * unit if unit and text[:-1].isdigit() else Rates.cache


def _least(call: Callable[[], object]) -> float:
    call()
    seconds = []
    for _ in range(TRIALS):
        begin = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - begin)
    return min(seconds)
