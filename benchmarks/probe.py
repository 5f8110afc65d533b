"""Whether a compiler comes to an end: a process of its own tries first, under a time limit.

Compiling an unrolled loop can take longer than everything else together, and cannot be stopped from within.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path


def refusal(workload: str, variant: str, limit_s: float) -> str:
    """Why ``variant`` cannot be prepared for ``workload``; empty where it can."""
    command = [sys.executable, "-m", "benchmarks.probe", workload, variant]
    root = Path(__file__).resolve().parents[1]
    # A session of its own, so that the compiler's helper processes end with it.
    process = subprocess.Popen(
        command, cwd=root, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        _, said = process.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return f"compiling did not finish within {limit_s:g} s"
    lines = said.strip().splitlines()
    return "" if process.returncode == 0 else (lines[-1][:200] if lines else f"exit status {process.returncode}")


def main(workload: str, variant: str) -> None:
    """Prepare and run once."""
    from benchmarks.machine import use_threads
    from benchmarks.peers.base import Unavailable, Unsupported
    from benchmarks.variants import VARIANTS
    from benchmarks.workloads import WORKLOADS

    use_threads()
    # What the peer says it cannot do, it says again, and better, to the one who asked.
    with contextlib.suppress(Unavailable, Unsupported):
        VARIANTS[variant].prepare(WORKLOADS[workload].build()).run()


if __name__ == "__main__":
    main(*sys.argv[1:])
