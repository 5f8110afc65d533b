"""Peak memory of one meta-gradient: the high-water mark of a process of its own.

The process builds the problem, warms up, gives freed memory back to the system, resets its high-water mark and computes
one meta-gradient. The peak is the mark less what was resident before. Eager variants and fastmeta warm up on a single
task, so that workspaces they keep are counted; compiled ones on the problem itself, so that the compiler is not.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from torch.profiler import ProfilerActivity, profile

from benchmarks.peers.base import Variant
from benchmarks.workloads import Problem, named

TIMEOUT_S = 240
STATUS = Path("/proc/self/status")
RESET = Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Memory:
    """Peak of one meta-gradient in MiB, or the reason there is none.

    ``allocated_mib`` is the peak of what PyTorch's allocator handed out: without other libraries' memory, and without
    the native executor's workspaces.
    """

    peak_mib: float | None
    reason: str = ""
    allocated_mib: float | None = None


def measure_all(workload: str, variants: Sequence[str]) -> dict[str, Memory]:
    """Peaks of the named variants, two processes at a time (time does not matter here)."""
    if not RESET.exists():
        return dict.fromkeys(variants, Memory(None, "the high-water mark can be reset on Linux only"))
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(variants, pool.map(lambda v: _in_a_process(workload, v), variants), strict=True))


def _in_a_process(workload: str, variant: str) -> Memory:
    command = [sys.executable, "-m", "benchmarks.memory", workload, variant]
    # A fixed threshold keeps every larger block a mapping of its own, which returns to the system when it is freed.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    try:
        answer = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
            env=environment,
            cwd=Path(__file__).resolve().parents[1],
        )
    except subprocess.TimeoutExpired:
        return Memory(None, f"no answer within {TIMEOUT_S} s")
    if answer.returncode:
        lines = answer.stderr.strip().splitlines()
        return Memory(None, lines[-1] if lines else f"exit status {answer.returncode}")
    # A library may print lines of its own, and even behind this one.
    found = next(line for line in reversed(answer.stdout.splitlines()) if line.startswith("{"))
    return Memory(**json.loads(found))


def peak_mib(variant: Variant, problem: Problem) -> float:
    """Peak of one meta-gradient in this process, in MiB."""
    if variant.kind == "compiled":
        step = variant.prepare(problem)
        step.run()
        before = _settle()
    else:
        variant.prepare(problem.first(1)).run()
        before = _settle()
        step = variant.prepare(problem)
    result = step.run()
    peak = _field("VmHWM")
    del result
    return (peak - before) / 1024


def allocated_mib(variant: Variant, problem: Problem) -> float | None:
    """Peak of what PyTorch's allocator hands out during one meta-gradient, in MiB; ``None`` where it is not asked."""
    if variant.peer == "jax":
        return None
    step = variant.prepare(problem)
    step.run()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        result = step.run()
    del result
    now = peak = 0
    events = recorded.profiler.kineto_results.events()
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak / 2**20


def _settle() -> int:
    """Give back what is free, reset the high-water mark and return what is resident, in KiB."""
    gc.collect()
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
    RESET.write_text("5")
    return _field("VmRSS")


def _field(name: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(name + ":"))
    return int(line.split()[1])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("workload", help="as benchmarks.workloads.named reads it")
    parser.add_argument("variant")
    options = parser.parse_args(arguments)

    from benchmarks.machine import use_threads
    from benchmarks.variants import EVERY

    use_threads()
    variant, problem = EVERY[options.variant], named(options.workload).build()
    print(json.dumps({"peak_mib": peak_mib(variant, problem), "allocated_mib": allocated_mib(variant, problem)}))


if __name__ == "__main__":
    main()
