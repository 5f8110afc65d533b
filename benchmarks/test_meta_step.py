"""One pytest-benchmark entry a workload and variant, fed with what the interleaved comparison measured.

pytest-benchmark times one function at a time, one after another; the comparison must interleave. So the times are taken
by the comparison, and a clock that replays them hands them over.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

    from benchmarks.conftest import Measured


class Replay:
    """A clock that stands still but for the call it is asked to replay."""

    def __init__(self) -> None:
        self._now = 0.0
        self._durations: list[float] = []

    def load(self, seconds: list[float]) -> None:
        self._durations = list(reversed(seconds))

    def call(self) -> None:
        self._now += self._durations.pop()

    def now(self) -> float:
        return self._now


replay = Replay()


def replayed_time() -> float:
    return replay.now()


@pytest.mark.benchmark(timer=replayed_time)
def test_meta_gradient(workload: str, variant: str, measured: Measured, benchmark: BenchmarkFixture) -> None:
    comparison = measured(workload)
    outcome = comparison[variant]
    if outcome.status != "ok":
        if outcome.kind == "ours":
            pytest.fail(f"{outcome.status}: {outcome.reason}")
        pytest.skip(f"{outcome.status}: {outcome.reason}")

    benchmark.group = comparison.title
    benchmark.extra_info.update(
        error=asdict(outcome.errors),
        loop_error=asdict(comparison.loop),
        float32_error=asdict(comparison.float32),
        peak_mib=outcome.memory.peak_mib if outcome.memory else None,
        peers_ms={o.name: o.median_ms if o.times_ms else f"{o.status}: {o.reason}" for o in comparison.outcomes},
        foreign_cores=comparison.foreign_cores,
        note=comparison.note,
    )
    replay.load([t / 1e3 for t in outcome.times_ms])
    benchmark.pedantic(replay.call, rounds=len(outcome.times_ms), iterations=1)
