"""What the figures were measured on, and how many of its cores are used."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

import torch

THREADS = 2


def use_threads(threads: int = THREADS) -> int:
    """Give every library the same ``threads`` cores, before any of them starts its pool; returns how many there are.

    The process is pinned to that many physical cores, which is the one limit that torch and JAX both obey.
    """
    if hasattr(os, "sched_setaffinity"):
        cores = _physical_cores()[:threads]
        os.sched_setaffinity(0, cores)
        threads = len(cores)
    else:
        threads = min(threads, os.cpu_count() or 1)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    torch.set_num_threads(threads)
    return threads


def _physical_cores() -> list[int]:
    """The allowed cores, those that share a physical core with an earlier one last."""
    first, second, seen = [], [], set()
    for core in sorted(os.sched_getaffinity(0)):
        try:
            siblings = Path(f"/sys/devices/system/cpu/cpu{core}/topology/thread_siblings_list").read_text().strip()
        except OSError:
            siblings = str(core)
        (second if siblings in seen else first).append(core)
        seen.add(siblings)
    return first + second


def machine_line() -> str:
    """One line: processor, threads, system, versions."""
    versions = []
    for package in ("torch", "jax", "higher", "torchopt", "learn2learn"):
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            versions.append(f"{package} not installed")
    return ", ".join(
        [
            f"{_processor()}, {torch.get_num_threads()} threads of {os.cpu_count()} cores",
            torch.backends.cpu.get_cpu_capability(),
            f"{platform.system()} {platform.machine()}",
            f"Python {platform.python_version()}",
            *versions,
        ]
    )


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    if platform.system() == "Darwin":
        answer = subprocess.run(
            ["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True, check=False
        )
        return answer.stdout.strip() or platform.machine()
    return platform.processor() or platform.machine()
