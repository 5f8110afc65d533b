"""What a meta-step takes of a process's memory: the high-water mark of one of its own."""

from __future__ import annotations

import ctypes
import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

RESET = Path("/proc/self/clear_refs")
needs_a_mark = pytest.mark.skipif(not RESET.exists(), reason="the high-water mark can be reset on Linux only")


def in_a_process(script: str, *arguments: object) -> Any:
    """What a script prints last, as JSON."""
    # A fixed threshold keeps every larger block a mapping of its own, which returns to the system when it is freed.
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).resolve().parents[1],
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def settle() -> int:
    """Give freed memory back and reset the mark; bytes that are resident then."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    RESET.write_text("5")
    return _field("VmRSS")


def high_water() -> int:
    """The most bytes that were resident since."""
    return _field("VmHWM")


def _field(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))
