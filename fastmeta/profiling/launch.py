"""Starts a command with a profile in it, and reads what its processes leave."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from fastmeta.core import files
from fastmeta.profiling.launched import Order

PYTHON = ("python", "python3")


@dataclass(frozen=True)
class Outcome:
    """How a command ended.

    Attributes:
        status: its exit status, 128 + n where signal n ended it.
        processes: what each process that imported fastmeta has collected, the one with most meta-steps first.
    """

    status: int
    processes: tuple[dict[str, Any], ...]


def resolved(command: Sequence[str]) -> list[str]:
    """The words to start: ``fastmeta``, ``python`` and a ``.py`` file by themselves mean this Python."""
    first = command[0]
    if first == "fastmeta":
        return [sys.executable, "-m", "fastmeta", *command[1:]]
    if first in PYTHON:
        return [sys.executable, *command[1:]]
    if first.endswith(".py") and not os.access(first, os.X_OK):
        return [sys.executable, *command]
    return list(command)


def launch(
    command: Sequence[str], *, operations: bool = True, trace: Path | None = None, trace_steps: int = 5
) -> Outcome:
    """Run a command to its end, with this process's input, output and folder.

    Args:
        command: its words.
        operations: as :class:`fastmeta.profile` has it.
        trace: likewise; of the process with most meta-steps.
        trace_steps: likewise.

    Raises:
        OSError: it cannot be started, or the trace cannot be written.
    """
    with tempfile.TemporaryDirectory(prefix="fastmeta-profile-") as folder:
        order = Order(folder, operations, trace is not None, trace_steps)
        words = resolved(command)
        try:
            child = subprocess.Popen(words, env={**os.environ, **order.variable()})
        except OSError as error:
            raise type(error)(error.errno, f"profile: {words[0]} cannot be started: {error.strerror}") from error
        with _signals_for(child):
            status = child.wait()
        left = [json.loads(path.read_text()) for path in Path(folder).glob("*.json") if path.stem.isdigit()]
        left.sort(key=lambda data: (-data["count"], data["process"]))
        if trace is not None and left:
            traced = Path(folder) / f"{left[0]['process']}.trace.json"
            if traced.is_file():
                files.write_bytes(trace, traced.read_bytes())
    return Outcome(128 - status if status < 0 else status, tuple(left))


@contextmanager
def _signals_for(child: subprocess.Popen[bytes]) -> Iterator[None]:
    """Ctrl-C goes to the child from the terminal, and its profile is wanted; a request to end is handed on."""

    def hand_on(number: int, _: FrameType | None) -> None:
        child.send_signal(number)

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, hand_on)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
