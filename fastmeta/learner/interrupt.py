"""Ctrl-C as a request: the step in hand is finished and saved before the run stops."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any


class Interrupt:
    """While entered, the first SIGINT or SIGTERM is remembered and a second one takes its usual course.

    Signals can be caught in the main thread only; elsewhere this does nothing.

    Args:
        notice: called with the signal's name when the first one arrives.

    Attributes:
        signal: number of the signal that arrived, 0 where none did.
    """

    def __init__(self, notice: Callable[[str], None] = lambda name: None) -> None:
        self.signal = 0
        self._notice = notice
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
        self._notice(signal.Signals(number).name)

    def _restore(self) -> None:
        for number, usual in self._usual.items():
            signal.signal(number, usual)
        self._usual.clear()
