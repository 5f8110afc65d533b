"""Timing on a GPU: events around calls made one after another, everyone in turn, round after round."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

ROUNDS = 7
SLOT_MS = 40.0  # a turn repeats a call for this long
MOST = 2000  # calls in a turn


@dataclass(frozen=True)
class Timed:
    """Milliseconds of one call: median and the 20th and 80th percentile over the turns."""

    median: float
    low: float
    high: float


def interleaved(
    calls: Mapping[str, Callable[[], Any]], rounds: int = ROUNDS, slot_ms: float = SLOT_MS
) -> dict[str, Timed]:
    """Time everyone in turns; the order is drawn anew for each round.

    A turn is a run of calls between two events, so that a call whose kernels are launched in time for the device costs
    what the device takes, and any other what its launches take. Caches are warm: a meta-step's own data stay there.
    """
    counts = {name: _calls_in(call, slot_ms) for name, call in calls.items()}
    turns: dict[str, list[float]] = {name: [] for name in calls}
    order, dice = list(calls), random.Random(0)
    for _ in range(rounds):
        dice.shuffle(order)
        for name in order:
            turns[name].append(_turn(calls[name], counts[name]))
    return {name: _summed_up(times) for name, times in turns.items()}


def once(call: Callable[[], Any]) -> Timed:
    """One call, for what takes seconds."""
    time = _turn(call, 1)
    return Timed(time, time, time)


def graphed(call: Callable[[], Any]) -> Callable[[], Any]:
    """Replays of ``call``, captured once; raises what capturing raises."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = call()

    def replay() -> Any:
        graph.replay()
        return kept

    replay.reads = call  # type: ignore[attr-defined]  # the graph does not keep what it reads alive
    return replay


def _turn(call: Callable[[], Any], count: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(count):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / count


def _calls_in(call: Callable[[], Any], slot_ms: float) -> int:
    for _ in range(2):
        call()
    once = _turn(call, 1)
    return max(1, min(MOST, round(slot_ms / max(once, 1e-3))))


def _summed_up(times: list[float]) -> Timed:
    if len(times) < 3:
        return Timed(statistics.median(times), min(times), max(times))
    cuts = statistics.quantiles(times, n=5)
    return Timed(statistics.median(times), cuts[0], cuts[3])
