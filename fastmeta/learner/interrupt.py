"""Ctrl-C as a request: the step in hand is finished and saved before the run stops."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any


class Interrupt:
    """While entered, the first SIGINT or SIGTERM is remembered, and said so; a second one takes its usual course.

    Signals can be caught in the main thread only; elsewhere this does nothing.

    Attributes:
        signal: number of the signal that arrived, 0 where none did.
    """

    def __init__(self) -> None:
        self.signal = 0
        self._usual: dict[signal.Signals, Any] = {}

    @property
    def requested(self) -> bool:
        """Whether a signal arrived."""
        return self.signal != 0

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._usual[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        self._restore()
        name = signal.Signals(number).name
        # straight to the file: a handler may interrupt a write to stdout, and Python's streams do not take that
        os.write(2, f"\n{name}: finishing this step, then saving; again to stop at once\n".encode())

    def _restore(self) -> None:
        for number, usual in self._usual.items():
            signal.signal(number, usual)
        self._usual.clear()
