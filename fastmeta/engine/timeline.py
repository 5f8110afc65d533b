"""Where the time of a program goes between and inside meta-steps: every moment belongs to exactly one name."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

# What is measured from its begin to its end.
PREPARATION = "preparation"  # checks, tracing and planning before a meta-step
META_STEP = "meta-step"  # adapting, evaluating and the meta-gradient
EVALUATION = "evaluation"  # adapting and evaluating where no meta-gradient is wanted
BACKWARD = "backward"
OUTER_STEP = "outer step"
PROFILE = "profile"  # what the profile itself does at the end of a meta-step
# What lies between, by what came before it and what came after.
START = "start"  # before the first of these
DATA = "data"  # after an outer step or an evaluation: sampling, moving tasks, logging, saving
BETWEEN = "between meta-steps"  # the same where no outer step was seen, so that it is in there
END = "end"  # after the last
NAMES = (START, PREPARATION, META_STEP, EVALUATION, BACKWARD, OUTER_STEP, DATA, BETWEEN, END, PROFILE)

MOST = 200_000  # spans that are kept one by one


@dataclass(frozen=True)
class Span:
    """Something that was measured.

    Attributes:
        name: one of those that are.
        begin: seconds since the timeline began.
        seconds: what it took, with what ran inside.
    """

    name: str
    begin: float
    seconds: float


class Timeline:
    """Spans of the thread that makes it, and of the time between them.

    A span inside another is taken out of the outer one's total. A gap is named by its neighbours: between a meta-step,
    or its backward pass, and the outer step that follows it is :data:`BACKWARD` (``backward()`` itself, clipping,
    reading losses); after an outer step or an evaluation it is :data:`DATA`; where a meta-step is followed by another
    without an outer step of ``torch.optim`` it is :data:`BETWEEN`.

    Attributes:
        spans: the first ``MOST``.
        totals: seconds by name; they add up to ``seconds``.
        seconds: from the beginning to the end, or so far.
    """

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.totals = dict.fromkeys(NAMES, 0.0)
        self._thread = threading.get_ident()
        self._begin = self._mark = time.perf_counter()
        self._open: list[str] = []
        self._before = START
        self._prepared = False  # the latest span was a preparation
        self._end: float | None = None

    @property
    def seconds(self) -> float:
        """From the beginning to the end, or so far."""
        return (time.perf_counter() if self._end is None else self._end) - self._begin

    def now(self) -> float:
        """Seconds since the beginning."""
        return time.perf_counter() - self._begin

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Measure the block; on another thread nothing happens."""
        if threading.get_ident() != self._thread or self._end is not None:
            yield
            return
        begin = self.open(name)
        try:
            yield
        finally:
            self.close(name, begin)

    def open(self, name: str) -> float:
        """Begin a span on the timeline's own thread; returns what :meth:`close` wants."""
        now = time.perf_counter()
        self._count(now, self._open[-1] if self._open else self._gap(name))
        self._open.append(name)
        return now

    def close(self, name: str, begin: float) -> None:
        """End the span that was opened last."""
        now = time.perf_counter()
        self._count(now, self._open.pop())
        if not self._open and name != PROFILE:
            self._prepared = name == PREPARATION
            self._before = self._before if self._prepared else name
        if len(self.spans) < MOST:
            self.spans.append(Span(name, begin - self._begin, now - begin))

    @property
    def ended(self) -> bool:
        """Whether nothing is measured any more."""
        return self._end is not None

    def inside(self) -> bool:
        """Whether a span is open, or another thread asks."""
        return bool(self._open) or threading.get_ident() != self._thread

    def end(self) -> None:
        """Nothing is measured from now on."""
        if self._end is None:
            self._end = time.perf_counter()
            self._count(self._end, self._open[-1] if self._open else END)

    def _count(self, now: float, name: str) -> None:
        self.totals[name] += now - self._mark
        self._mark = now

    def _gap(self, after: str) -> str:
        if after == PROFILE:
            return PROFILE
        if self._prepared:  # on the way from there to the meta-step
            return PREPARATION
        if self._before == START:
            return START
        if self._before in (META_STEP, BACKWARD):
            return BACKWARD if after in (BACKWARD, OUTER_STEP) else BETWEEN
        return DATA
