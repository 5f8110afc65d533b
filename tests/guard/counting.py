"""Counts that no clock is needed for: instructions of the compiled kernels, and what a meta-step does in Python."""

from __future__ import annotations

import gc
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

DRIVER = Path(__file__).with_name("driver.py")
COST = re.compile(r"[-+*\d]")


def instructions(extension: Path, case: Path, times: int) -> int:
    """Those of the extension in ``times`` meta-steps of a recorded case, loading and lowering included.

    Those of the libraries that it calls do not count: memcpy has a form for every processor.
    """
    out = case.with_suffix(".callgrind")
    command = ["valgrind", "--tool=callgrind", f"--callgrind-out-file={out}", sys.executable, "-I", "-S", str(DRIVER)]
    # The plain kernels: valgrind knows no AVX-512, and not every processor has AVX2.
    environment = os.environ | {"FASTMETA_ISA": "plain", "PYTHONHASHSEED": "0"}
    ran = subprocess.run(
        [*command, str(extension), str(case), str(times)],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    if ran.returncode:
        raise RuntimeError(f"valgrind must run {case.name}, got status {ran.returncode}: {ran.stderr[-2000:]}")
    return of_object(out.read_text(errors="replace").splitlines(), extension.name)


def of_object(lines: Iterable[str], name: str) -> int:
    """Sum of the own costs of an object's functions in callgrind's output.

    ``ob=(number) name`` begins an object, the name at its first mention alone; a line of numbers has a place and its
    cost; behind ``calls=`` stands what the callee took, which is the callee's own.
    """
    numbers: dict[str, bool] = {}
    inside, callee, total = False, False, 0
    for line in lines:
        if line.startswith("ob="):
            number, _, path = line[3:].partition(" ")
            if path:
                numbers[number] = path.endswith(name)
            inside = numbers[number]
        elif line.startswith("cob=") and " " in line:  # the first mention may be a callee's
            number, _, path = line[4:].partition(" ")
            numbers[number] = path.endswith(name)
        elif line.startswith("calls="):
            callee = True
        elif COST.match(line):
            total += 0 if callee or not inside else int(line.split()[1])
            callee = False
    return total


def compiler_of(extension: Path) -> str:
    """The compiler that built it, as it says itself; empty where it does not."""
    found = re.search(rb"GCC: \([^)]*\) ([\d.]+)", extension.read_bytes())
    return f"gcc {found[1].decode().split('.')[0]}" if found else ""


class _Dispatched(TorchDispatchMode):
    """Counts the calls that reach PyTorch's kernels, and the tensors that these make."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.allocations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        self.calls += 1
        self.allocations += not func.is_view and "out" not in (kwargs or {})
        return made


def of_python(step: Callable[[], Any]) -> dict[str, int]:
    """What one call does: Python functions and built-in ones called, PyTorch's kernels launched, tensors made.

    The step must have run before, so that nothing is traced or imported.
    """
    counted: Counter[str] = Counter()

    def note(frame: Any, event: str, argument: Any) -> None:
        counted[event] += 1

    gc.disable()
    try:
        sys.setprofile(note)
        try:
            step()
        finally:
            sys.setprofile(None)
        with _Dispatched() as dispatched:
            step()
    finally:
        gc.enable()
    found = {"python calls": counted["call"], "built-in calls": counted["c_call"]}
    return found | {"kernels": dispatched.calls, "tensors": dispatched.allocations}
