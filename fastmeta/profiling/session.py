"""``with fastmeta.profile() as prof:`` profiles what runs inside."""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from fastmeta.core import files
from fastmeta.engine.profile import Profile, collect, collect_everywhere
from fastmeta.engine.runs import Runs, resident_bytes
from fastmeta.engine.timeline import OUTER_STEP
from fastmeta.profiling.gather import gather
from fastmeta.profiling.report import Report, report_of

UTILISATION_S = 0.25  # the device is asked no more often


class profile:  # noqa: N801  a context manager that reads as one
    """Profile the meta-steps inside a ``with`` block.

    Of every meta-step: what the inner loop, the query set and the adjoint took, operation by operation, beside the
    least that each could take on this machine; and where the time in between went. docs/profiling.md says what exactly
    is counted as what, and what a profile costs.

    Meta-steps that this thread runs are seen, whichever executor runs them. Nothing of it changes a result.

    Args:
        operations: time the task-batched executor's operations one by one. On a GPU meta-steps are then not captured in
            a CUDA graph: each operation's time is the device's, the whole takes longer. ``False`` profiles them as they
            are replayed.
        trace: a file for a Chrome trace by ``torch.profiler``, of ``trace_steps`` meta-steps after the first.
        trace_steps: how many, at least 1.

    Raises:
        ValueError: ``trace_steps`` is less than 1.

    Example::

        with fastmeta.profile() as prof:
            for tasks in sampler:
                maml(tasks).loss.backward()
                optimizer.step()
        prof.print()
    """

    def __init__(
        self, *, operations: bool = True, trace: str | os.PathLike[str] | None = None, trace_steps: int = 5
    ) -> None:
        if trace_steps < 1:
            raise ValueError(f"profile: trace_steps must be at least 1, got {trace_steps}")
        self._operations = operations
        self._trace = None if trace is None else Path(trace)
        self._trace_steps = trace_steps
        self._profile = Profile()
        self._left = ExitStack()
        self._tracer: Any = None
        self._traced = False
        self._outer: float | None = None
        self._utilisation: list[tuple[float, float]] = []
        self._report: Report | None = None
        self._data: dict[str, Any] | None = None

    def __enter__(self) -> profile:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def start(self, *, everywhere: bool = False) -> None:
        """Begin; with ``everywhere`` the meta-steps of all threads are collected until the process ends."""
        if self._profile.runs is not None:
            raise RuntimeError("profile: a profile can be used once, make another one")
        runs = Runs(
            lambda: self._profile.seconds, operations=self._operations, ranges=self._ranges(), watch=self._watch
        )
        self._profile.watch(runs)
        self._resident = resident_bytes()
        before = register_optimizer_step_pre_hook(self._before_outer_step)
        after = register_optimizer_step_post_hook(self._after_outer_step)
        self._left.callback(before.remove)
        self._left.callback(after.remove)
        if everywhere:
            collect_everywhere(self._profile)
        else:
            self._left.enter_context(collect(self._profile))

    def stop(self) -> None:
        """End: what was collected can be read from now on."""
        runs = self._runs()
        self._left.close()
        runs.end()
        self._end_trace()

    @property
    def data(self) -> dict[str, Any]:
        """What was collected, as JSON can hold it; docs/profiling.md names the fields.

        Raises:
            RuntimeError: the block has not ended.
        """
        if not self._runs().ended:
            raise RuntimeError("profile: the block must have ended before it is read")
        if self._data is None:
            self._data = gather(self._profile, resident=self._resident, utilisation=self._utilisation)
        return self._data

    @property
    def report(self) -> Report:
        """The same beside what the machine can do, which is measured the first time: it takes a few seconds.

        Raises:
            RuntimeError: the block has not ended.
        """
        if self._report is None:
            self._report = report_of(self.data)
        return self._report

    def print(self) -> None:
        """Print the tables, and what to do about their top entries."""
        from rich.console import Console

        from fastmeta.profiling.tables import show

        show(self.report, Console())

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything to a JSON file.

        Raises:
            OSError: it cannot be written.
        """
        files.write_json(path, self.report.to_json())

    def picture(self, path: str | os.PathLike[str]) -> None:
        """Draw the roofline picture, a ``.png`` or ``.svg`` file.

        Raises:
            ValueError: another ending, or no operation with products ran.
            OSError: it cannot be written.
        """
        from fastmeta.profiling.picture import roofline

        roofline(self.report, Path(path))

    def _runs(self) -> Runs:
        if self._profile.runs is None:
            raise RuntimeError("profile: it must have begun, use it as: with fastmeta.profile() as prof")
        return self._profile.runs

    def _ranges(self) -> Any:
        """Names the spans for whoever listens: torch.profiler, and Nsight where there is a GPU."""
        tracing, cuda = self._trace is not None, torch.cuda.is_available()
        if not (tracing or cuda):
            return None

        @contextmanager
        def named(name: str) -> Iterator[None]:
            with ExitStack() as ranges:
                if tracing:
                    ranges.enter_context(torch.profiler.record_function(f"fastmeta: {name}"))
                if cuda:
                    ranges.enter_context(_nvtx(name))
                yield

        return named

    def _watch(self, count: int) -> None:
        if self._trace is not None and not self._traced:
            if self._tracer is None:
                self._tracer = torch.profiler.profile()
                self._tracer.start()
            elif count > self._trace_steps:
                self._end_trace()
        if torch.cuda.is_available():
            now = time.perf_counter()
            if not self._utilisation or now - self._utilisation[-1][0] > UTILISATION_S:
                with contextlib.suppress(Exception):  # there is no pynvml, or the driver does not tell
                    self._utilisation.append((now, float(torch.cuda.utilization())))

    def _end_trace(self) -> None:
        if self._tracer is None or self._traced or self._trace is None:
            return
        self._traced = True
        self._tracer.stop()
        folder = files.make_folder(self._trace.parent)
        temporary = folder / f".{self._trace.name}.{secrets.token_hex(8)}.json"  # gz where the name ends so
        try:
            self._tracer.export_chrome_trace(str(temporary))
            temporary.replace(self._trace)
        finally:
            temporary.unlink(missing_ok=True)
            self._tracer = None

    def _before_outer_step(self, *_: Any) -> None:
        timeline = self._runs().timeline
        if self._outer is not None:  # the one before has raised
            self._after_outer_step()
        if not timeline.inside():
            self._outer = timeline.open(OUTER_STEP)

    def _after_outer_step(self, *_: Any) -> None:
        if self._outer is not None:
            begin, self._outer = self._outer, None
            self._runs().timeline.close(OUTER_STEP, begin)


@contextmanager
def _nvtx(name: str) -> Iterator[None]:
    torch.cuda.nvtx.range_push(name)
    try:
        yield
    finally:
        torch.cuda.nvtx.range_pop()
