"""Where a meta-step's time goes on a GPU: each kernel's launches and microseconds, and what lies between them."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.steps import WORKLOADS, value_and_grad
from fastmeta.bench.gpu_timing import graphed, interleaved

CALLS = 5  # that are profiled


def rows(name: str, say: Callable[[str], None]) -> dict[str, Any]:
    """Kernels of one workload's meta-step, the longest first; a step's time is that of a captured graph's replay."""
    title, build = WORKLOADS[name]
    call = graphed(value_and_grad(build().on("cuda")))
    step = 1000 * interleaved({name: call}, rounds=3)[name].median
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        for _ in range(CALLS):
            call()
        torch.cuda.synchronize()
    found: dict[str, tuple[float, float]] = {}
    for event in profiled.key_averages():
        if event.device_time_total > 0:
            count, us = found.get(short := _short(event.key), (0.0, 0.0))
            found[short] = count + event.count / CALLS, us + event.device_time_total / CALLS
    kernels = [
        {"kernel": kernel, "calls": count, "us": us, "share": us / step}
        for kernel, (count, us) in sorted(found.items(), key=lambda item: -item[1][1])
    ]
    busy = sum(us for _, us in found.values())
    say(f"kernels of {name}: {sum(k['calls'] for k in kernels):.0f} take {busy:.0f} us of {step:.0f} us")
    return {"workload": name, "title": title, "step_us": step, "busy_us": busy, "kernels": kernels}


def _short(name: str) -> str:
    """A kernel's name without its arguments and the namespaces that everything has."""
    name = re.sub(r"\(anonymous namespace\)::|^void |at::native::|at::cuda::|at::", "", name)
    return name[:90]
