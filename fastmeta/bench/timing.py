"""Interleaved timing: everyone in turn, round after round, so that what disturbs the machine disturbs all alike."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LEAST = 3  # turns of a variant, however slow
DISTURBED = 0.3  # cores that other processes take during a turn, from which on it is not counted
TICKS = 8  # of the system's clock: over fewer, its coarse accounts cannot tell DISTURBED from a rounding


@dataclass(frozen=True)
class Effort:
    """How long to measure."""

    rounds: int = 12
    slot_s: float = 0.1  # a turn repeats a fast call for this long, after one call that is not counted
    budget_s: float = 60.0  # of one workload, shared equally; who has used its share only keeps its least turns


QUICK = Effort(rounds=3, slot_s=0.02, budget_s=4.0)


@dataclass
class Times:
    """Seconds of every counted call of one variant, and how many turns others disturbed."""

    seconds: list[float] = field(default_factory=list)
    disturbed: int = 0


def interleave(calls: Mapping[str, Callable[[], Any]], effort: Effort) -> dict[str, Times]:
    """Time everyone in round-robin turns; the order rotates from round to round.

    A turn during which other processes took part of the machine counts only for a variant that has no other; up to the
    budget over again is spent on getting everyone ``LEAST`` undisturbed turns.
    """
    gc.collect()
    gc.freeze()  # each turn collects garbage, and should not look at all that was there before each time
    try:
        return _interleave(calls, effort)
    finally:
        gc.unfreeze()


def _interleave(calls: Mapping[str, Callable[[], Any]], effort: Effort) -> dict[str, Times]:
    names = list(calls)
    turns: dict[str, list[_Turn]] = {name: [] for name in names}
    share = effort.budget_s / max(1, len(names))
    least = min(LEAST, effort.rounds)
    end = time.perf_counter() + 2 * effort.budget_s
    turn = 0
    while True:
        start = turn % max(1, len(names))
        late = turn >= effort.rounds
        if late and time.perf_counter() > end:
            break
        waiting = [n for n in names[start:] + names[:start] if _wants(turns[n], least, share, late)]
        if not waiting:
            break
        for name in waiting:
            turns[name].append(_turn(calls[name], effort.slot_s, turns[name]))
        turn += 1
    return {name: _counted(turns[name]) for name in names}


@dataclass(frozen=True)
class _Turn:
    seconds: list[float]
    disturbed: bool


def _wants(turns: list[_Turn], least: int, share: float, late: bool) -> bool:
    clean = [t for t in turns if not t.disturbed]
    return len(clean) < least if late else len(turns) < least or sum(sum(t.seconds) for t in turns) < share


def _counted(turns: list[_Turn]) -> Times:
    clean = [t for t in turns if not t.disturbed]
    return Times([s for t in clean or turns for s in t.seconds], len(turns) - len(clean))


def _turn(call: Callable[[], Any], slot_s: float, before: list[_Turn]) -> _Turn:
    gc.collect()
    if not before or min(before[-1].seconds) < slot_s:
        call()  # brings code and data back into the caches that the others have filled
    foreign = Foreign()
    times: list[float] = []
    begin = time.perf_counter()
    while not times or time.perf_counter() - begin < slot_s:
        t = time.perf_counter()
        call()
        times.append(time.perf_counter() - t)
    return _Turn(times, (foreign.cores() or 0.0) > DISTURBED)


def percentile(values: list[float], share: float) -> float:
    """The value below which ``share`` of the values lie, by the nearest rank."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


class Foreign:
    """How many cores other processes used since it was made; ``None`` where it cannot be told.

    The system accounts for whole ticks only (10 ms on most), so nothing is said about less than ``TICKS`` of them.
    """

    def __init__(self) -> None:
        self._begin = self._read()

    def cores(self) -> float | None:
        """Cores of others, on average since then."""
        end = self._read()
        if self._begin is None or end is None:
            return None
        busy, own, wall = (b - a for a, b in zip(self._begin, end, strict=True))
        return max(0.0, (busy - own) / wall) if wall * os.sysconf("SC_CLK_TCK") >= TICKS else None

    @staticmethod
    def _read() -> tuple[float, float, float] | None:
        try:
            fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
        except OSError:
            return None
        user, nice, system, _, _, irq, softirq, steal = (int(f) for f in fields)
        busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
        return busy, sum(os.times()[:4]), time.perf_counter()
