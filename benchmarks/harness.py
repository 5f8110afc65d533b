"""Compare all variants on one workload: same inputs, error gate, interleaved times, peak memory."""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from benchmarks import probe
from benchmarks.breakdown import Breakdown, break_down
from benchmarks.floor import Floor, floor_of
from benchmarks.gate import Errors, Gate, open_gate
from benchmarks.memory import Memory, measure_all
from benchmarks.peers.base import Kind, Step, Unavailable, Unsupported, Variant
from benchmarks.workloads import Problem, Workload
from fastmeta.bench.timing import Effort, Foreign, interleave, percentile

Status = Literal["ok", "not installed", "unsupported", "failed", "wrong"]


@dataclass
class Outcome:
    """What became of one variant on one workload. It has times only where ``status`` is ``ok``."""

    name: str
    peer: str
    kind: Kind
    about: str
    status: Status = "ok"
    reason: str = ""
    first_s: float | None = None  # preparing and the first call, compilation included
    times_ms: list[float] = field(default_factory=list)
    disturbed: int = 0  # turns during which other processes took part of the machine
    errors: Errors | None = None
    memory: Memory | None = None

    @property
    def median_ms(self) -> float | None:
        return percentile(self.times_ms, 0.5) if self.times_ms else None

    @property
    def p20_ms(self) -> float | None:
        return percentile(self.times_ms, 0.2) if self.times_ms else None

    @property
    def p80_ms(self) -> float | None:
        return percentile(self.times_ms, 0.8) if self.times_ms else None


@dataclass
class Comparison:
    """All variants on one workload."""

    workload: str
    title: str
    note: str
    outcomes: list[Outcome]
    loop: Errors  # the hand-written loop's error in float32
    float32: Errors  # the largest of the loop's and of its nudged copies'
    floor: Floor
    breakdown: Breakdown | None  # of fastmeta's time, where it was timed and the native executor runs
    foreign_cores: float | None  # what other processes took of the machine meanwhile
    wall_s: float

    def __getitem__(self, name: str) -> Outcome:
        return next(o for o in self.outcomes if o.name == name)

    @property
    def floor_share(self) -> float | None:
        """The floor over fastmeta's median: 1 were the physical limit."""
        ours = next((o for o in self.outcomes if o.name == "fastmeta"), None)
        return self.floor.ms / ours.median_ms if ours is not None and ours.median_ms else None

    def best(self, *kinds: Kind) -> Outcome | None:
        """The fastest correct variant of these kinds."""
        timed = [o for o in self.outcomes if o.kind in kinds and o.times_ms]
        return min(timed, key=lambda o: o.median_ms or 0.0, default=None)

    def ratio(self, *kinds: Kind) -> float | None:
        """Median of the best variant of these kinds over that of ``fastmeta``: above 1 fastmeta is faster."""
        best = self.best(*kinds)
        ours = next((o for o in self.outcomes if o.name == "fastmeta"), None)
        if best is None or ours is None or not best.median_ms or not ours.median_ms:
            return None
        return best.median_ms / ours.median_ms


def compare(
    workload: Workload,
    variants: Sequence[Variant],
    effort: Effort | None = None,
    *,
    memory: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> Comparison:
    """Prepare, judge and time ``variants`` on ``workload``; ``say`` is told how it goes."""
    begin = time.perf_counter()

    def tell(what: str) -> None:
        say(f"{workload.name} {time.perf_counter() - begin:6.1f} s  {what}")

    problem = workload.build()
    gate = open_gate(problem, workload.nudges)
    tell("truth and float32's own error")
    outcomes, steps = [], {}
    for variant in variants:
        outcome, step = _admit(variant, workload, problem, gate)
        outcomes.append(outcome)
        tell(f"{outcome.name}: {outcome.status} {outcome.reason}")
        if step is not None:
            steps[variant.name] = step

    floor = floor_of(problem)
    tell(f"floor {floor.ms:.3g} ms")
    foreign = Foreign()
    times = interleave({name: step.run for name, step in steps.items()}, effort or Effort())
    cores = foreign.cores()
    tell("timed")
    for outcome in outcomes:
        if outcome.name in times:
            outcome.times_ms = [1e3 * s for s in times[outcome.name].seconds]
            outcome.disturbed = times[outcome.name].disturbed
    breakdown = break_down(problem) if any(o.kind == "ours" and o.times_ms for o in outcomes) else None
    tell("where the time goes")
    if memory:
        peaks = measure_all(workload.name, list(steps))
        tell("peak memory")
        for outcome in outcomes:
            outcome.memory = peaks.get(outcome.name)
    return Comparison(
        workload.name,
        workload.title,
        problem.note,
        outcomes,
        gate.loop,
        gate.float32,
        floor,
        breakdown,
        cores,
        time.perf_counter() - begin,
    )


def _admit(variant: Variant, workload: Workload, problem: Problem, gate: Gate) -> tuple[Outcome, Step | None]:
    """Prepare a variant on its own copy of the model and let it through only with the right gradient."""
    outcome = Outcome(variant.name, variant.peer, variant.kind, variant.about)
    own = dataclasses.replace(problem, model=copy.deepcopy(problem.model))
    if problem.adapted is not None and not variant.partial:
        outcome.status, outcome.reason = "unsupported", "adapts every parameter"
        return outcome, None
    if variant.probe:
        outcome.reason = probe.refusal(workload.name, variant.name, workload.compile_s)
        if outcome.reason:
            outcome.status = "unsupported"
            return outcome, None
    begin = time.perf_counter()
    try:
        step = variant.prepare(own)
        step.run()
        outcome.first_s = time.perf_counter() - begin
        outcome.errors, refusal = gate.judge(variant, own, step)
    except Unavailable as error:
        outcome.status, outcome.reason = "not installed", str(error)
        return outcome, None
    except Unsupported as error:
        outcome.status, outcome.reason = "unsupported", str(error)
        return outcome, None
    except Exception as error:
        if variant.kind == "ours":
            raise
        # A peer that breaks must not take the whole comparison with it; its row says what happened.
        outcome.status, outcome.reason = "failed", _first_line(error)
        return outcome, None
    if refusal:
        outcome.status, outcome.reason = "wrong", refusal
        return outcome, None
    return outcome, step


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200] if text else ''}"
