"""The line that stands beside every figure: where it was measured."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import torch

from fastmeta.core import environment


def machine_line() -> str:
    """Processor, GPU, clocks, threads, instruction set, versions, revision."""
    parts = [environment.machine_line(), f"triton {environment.versions()['triton'] or 'not installed'}"]
    clock = _processor_clock()
    parts += [f"clock {clock}"] if clock else []
    if torch.cuda.is_available():
        query = "driver_version,clocks.sm,clocks.mem"
        said = _said_by("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader").splitlines()
        if said:
            driver, processors, memory = said[0].split(", ")
            parts += [f"driver {driver}", f"clocks {processors}, memory {memory}"]
        parts += [f"CUDA {torch.version.cuda}", f"cuDNN {torch.backends.cudnn.version()}"]
    return ", ".join([*parts, f"revision {revision()}"])


def revision() -> str:
    """The commit that is measured: from ``FASTMETA_REVISION``, or git; ``unknown`` outside of a checkout."""
    given = os.environ.get("FASTMETA_REVISION")
    if given:
        return given
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():  # an installed package may lie in somebody else's repository
        return "unknown"
    commit = _said_by("git", "-C", str(root), "rev-parse", "--short", "HEAD").strip()
    changed = _said_by("git", "-C", str(root), "status", "--porcelain", "--untracked-files=no").strip()
    return f"{commit}{' with changes' if changed else ''}" if commit else "unknown"


def _processor_clock() -> str:
    """The first core's highest frequency where the system tells it, else its present one."""
    try:
        highest = Path("/sys/devices/system/cpu/cpu0/cpufreq/cpuinfo_max_freq").read_text()
        return f"{int(highest) / 1e6:.2f} GHz"
    except (OSError, ValueError):
        pass
    try:
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            if line.startswith("cpu MHz"):
                return f"{float(line.partition(':')[2]) / 1e3:.2f} GHz"
    except (OSError, ValueError):
        pass
    return ""


def _said_by(*command: str) -> str:
    """What a program prints; nothing where it is missing or fails."""
    try:
        ran = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return ran.stdout if ran.returncode == 0 else ""
