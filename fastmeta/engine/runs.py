"""What a profile knows of whole meta-steps, whoever executes them, and of the reference executor's operations."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.utils import _pytree as pytree

from fastmeta.engine.program import Program
from fastmeta.engine.timed import Clock, Ranges, Tally, TimedProgram
from fastmeta.engine.timeline import EVALUATION, META_STEP, PROFILE, Timeline
from fastmeta.engine.work import Work, leaves

if TYPE_CHECKING:
    from fastmeta.engine.compiler import Programs

MOST = 100_000  # meta-steps that are kept one by one
MEMORY_S = 0.01
STATM = Path("/proc/self/statm")


@dataclass(frozen=True)
class Run:
    """One meta-step, or one evaluation.

    Attributes:
        kind: number of its kind.
        begin: seconds since the profile began.
        seconds: by the processor's clock, from the call of the engine until it returned.
        busy: as :attr:`Kind.busy` has it; on a GPU 0, for nothing waits for the device in between.
        resident: bytes of the process in memory afterwards, asked at most every ``MEMORY_S``; 0 where the system does
            not tell.
        allocated: bytes of tensors on the GPU afterwards.
        peak: the most of them so far.
    """

    kind: int
    begin: float
    seconds: float
    busy: float
    resident: int
    allocated: int
    peak: int


@dataclass
class Kind:
    """Meta-steps that one executor runs alike.

    Attributes:
        number: in the order in which they came.
        executor: ``native``, ``resident``, ``reference``, ``captured`` or ``autodiff``.
        why: it does, where another one was a choice.
        gradient: whether the meta-gradient is wanted.
        work: one of them, its tasks without their values.
        programs: that run; ``None`` by autodiff.
        samples: of support and query of one task.
        threads: PyTorch's, at the latest.
        runs: how many.
        tasks: of all.
        seconds: of all, by the processor's clock.
        busy: seconds in which the executor computed: inside the native executor; in the maps of the reference one, or
            in the whole call where no part of it is timed; on a GPU by the device's clock.
        device: seconds by a GPU's clock, from begin to end; 0 on a processor.
    """

    number: int
    executor: str
    why: str
    gradient: bool
    work: Work
    programs: Programs | None
    samples: tuple[int, int]
    threads: int = 1
    runs: int = 0
    tasks: int = 0
    seconds: float = 0.0
    busy: float = 0.0
    device: Tally = field(default_factory=Tally)
    timed: dict[str, TimedProgram] = field(default_factory=dict)


class Running:
    """A meta-step under way, told by whoever executes it."""

    def __init__(self, runs: Runs, work: Work, programs: Programs | None, gradient: bool) -> None:
        self._runs, self._work, self._programs, self._gradient = runs, work, programs, gradient
        self.kind: Kind | None = None

    @property
    def operations(self) -> bool:
        """Whether operations are wanted one by one, which no graph replays."""
        return self._runs.operations

    def by(self, executor: str, why: str = "") -> Kind:
        """Say who executes it, and why not a quicker one."""
        self.kind = self._runs.kind(self._work, self._programs, executor, why, self._gradient)
        return self.kind

    def timed(self, program: Program, part: str, tasks: int) -> Program:
        """The program with clocks, if they are wanted, for the next ``tasks`` tasks in a part of the meta-step."""
        kind, clock = self.kind, self._runs.clock
        if kind is None or not self.operations:
            return program
        clock.own.tasks = tasks
        with self._runs.lock:
            if part not in kind.timed:
                kind.timed[part] = TimedProgram(program, part, clock, cuda=self._work.alpha.is_cuda)
        return kind.timed[part].program


class _Own(threading.local):
    """What each thread has for itself."""

    def __init__(self) -> None:
        self.current: Kind | None = None


class Runs:
    """Meta-steps of one profile.

    Args:
        native_seconds: what the native executor has taken so far.
        operations: whether the reference executor's operations are timed one by one. On a GPU such meta-steps are not
            captured: each operation's time on the device is right, the whole takes longer.
        ranges: names work for tracers.
        watch: called after each meta-step.

    Attributes:
        timeline: of the thread that made this.
        kinds: of meta-steps, by number.
        every: the first ``MOST`` meta-steps.
        count: how many there were.
    """

    def __init__(
        self,
        native_seconds: Callable[[], float],
        *,
        operations: bool = True,
        ranges: Ranges | None = None,
        watch: Callable[[int], None] | None = None,
    ) -> None:
        self.operations = operations
        self.clock = Clock(ranges)
        self.timeline = Timeline()
        self.kinds: list[Kind] = []
        self.every: list[Run] = []
        self.lock = threading.Lock()  # while what all threads share is made
        self._own = _Own()
        self.count = 0
        self._native_seconds = native_seconds
        self._asked, self._resident = -MEMORY_S, 0
        self._watch = watch
        self._by_key: dict[tuple[object, ...], Kind] = {}

    @property
    def current(self) -> Kind | None:
        """The kind of the meta-step under way on this thread."""
        return self._own.current

    @property
    def ended(self) -> bool:
        """Whether nothing is measured any more."""
        return self.timeline.ended

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Measure a part of the program; see :class:`Timeline`."""
        with self.timeline.span(name), self.clock.ranges(name):
            yield

    @contextmanager
    def meta_step(self, work: Work, programs: Programs | None, *, gradient: bool) -> Iterator[Running]:
        """Measure a meta-step; one that fails is on the timeline alone."""
        running, cuda = Running(self, work, programs, gradient), work.alpha.is_cuda
        mapped, native = self.clock.own.busy.seconds, self._native_seconds()
        own = self.timeline.totals[PROFILE]
        outer, self._own.current = self._own.current, None
        whole, at = Tally(), self.timeline.now()
        try:
            with self.span(META_STEP if gradient else EVALUATION):
                device = self.clock.begin(True) if cuda else None
                begin = time.perf_counter()
                yield running
                seconds = time.perf_counter() - begin - (self.timeline.totals[PROFILE] - own)
                kind = running.kind
                if kind is not None and cuda:
                    kind.device.calls += 1
                    self.clock.end(device, kind.device, whole)
        finally:
            self._own.current = outer
        if kind is None:
            return
        with self.timeline.span(PROFILE):
            inside = self.clock.own.busy.seconds - mapped + self._native_seconds() - native
            busy = 0.0 if cuda else min(inside, seconds) if kind.timed or kind.executor == "native" else seconds
            kind.runs += 1
            kind.tasks += work.tasks
            kind.seconds += seconds
            kind.busy += busy
            kind.threads = torch.get_num_threads()
            self.count += 1
            if len(self.every) < MOST:
                now = at + seconds
                if now - self._asked >= MEMORY_S:
                    self._asked, self._resident = now, resident_bytes()
                self.every.append(Run(kind.number, at, seconds, busy, self._resident, *_on_gpu(cuda)))
            if self._watch is not None:
                self._watch(self.count)

    def kind(self, work: Work, programs: Programs | None, executor: str, why: str, gradient: bool) -> Kind:
        """The kind of a meta-step, which is the current one from now on."""
        with self.timeline.span(PROFILE), self.lock:
            kind = self._own.current = self._kind(work, programs, executor, why, gradient)
        return kind

    def _kind(self, work: Work, programs: Programs | None, executor: str, why: str, gradient: bool) -> Kind:
        compiled = (id(work.objective),) if programs is None else (id(programs.support), id(programs.query))
        sizes = tuple(leaf.shape[1:2] for leaf in _first(work))
        key = (executor, gradient, *compiled, work.steps, work.first_order, sizes)
        kind = self._by_key.get(key)
        if kind is None:
            kind = Kind(len(self.kinds), executor, why, gradient, _without_values(work), programs, samples_of(work))
            self._by_key[key] = kind
            self.kinds.append(kind)
        return kind

    def end(self) -> None:
        """Wait for what is under way, and measure no more."""
        self.timeline.end()
        self.clock.settle()
        for kind in self.kinds:
            if kind.work.alpha.is_cuda:
                timed = [tally.seconds for program in kind.timed.values() for *_, tally in program.counted()]
                kind.busy = sum(timed) if timed else kind.device.seconds


def samples_of(work: Work) -> tuple[int, int]:
    """Of one task, in the support set and in the query set."""
    counts = [int(leaf.shape[1]) if leaf.dim() > 1 else 1 for leaf in _first(work)]
    return (counts[0], counts[1] if len(counts) > 1 else 0)


def _first(work: Work) -> list[torch.Tensor]:
    """The first tensor of each set."""
    return [leaves(batch)[0] for batch in (work.support, work.query) if batch is not None]


def _without_values(work: Work) -> Work:
    """The same with tasks that have a shape and take no memory, and without autograd's graph."""

    def empty(leaf: object) -> object:
        return torch.empty_like(leaf, device="meta") if isinstance(leaf, torch.Tensor) else leaf

    other = work.on(pytree.tree_map(empty, work.support), pytree.tree_map(empty, work.query))
    other.parameters = {name: p.detach().requires_grad_(p.requires_grad) for name, p in work.parameters.items()}
    other.alpha = work.alpha.detach().requires_grad_(work.alpha.requires_grad)
    return other


def resident_bytes() -> int:
    """Bytes of this process in memory; 0 where the system does not tell."""
    try:
        return int(STATM.read_bytes().split()[1]) * _page()
    except (OSError, IndexError, ValueError):
        return 0


def _page() -> int:
    import resource  # where there is /proc, there is this

    return resource.getpagesize()


def _on_gpu(cuda: bool) -> tuple[int, int]:
    if not cuda:
        return 0, 0
    return torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
