"""Whether something has become slower since an earlier run, by more than either run's own noise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

SLOWER = 1.05  # times the median, from which on a difference beyond the noise counts


@dataclass(frozen=True)
class Timing:
    """What was measured of one thing: median, 20th and 80th percentile, and their unit."""

    median: float
    p20: float
    p80: float
    unit: str = "ms"


@dataclass(frozen=True)
class Change:
    """One thing in two runs.

    Attributes:
        name: of it.
        before, after: the runs.
    """

    name: str
    before: Timing
    after: Timing

    @property
    def ratio(self) -> float:
        """New median over old."""
        return self.after.median / self.before.median

    @property
    def verdict(self) -> str:
        """``slower`` or ``quicker`` where the runs' middle parts, p20 to p80, do not meet and medians differ enough."""
        if self.after.p20 > self.before.p80 and self.ratio > SLOWER:
            return "slower"
        if self.after.p80 < self.before.p20 and self.ratio < 1 / SLOWER:
            return "quicker"
        return "same within noise"


def changes(before: Mapping[str, Timing], after: Mapping[str, Timing]) -> list[Change]:
    """Everything that both runs have, the worst first.

    Raises:
        ValueError: they have nothing in common.
    """
    common = [name for name in after if name in before]
    if not common:
        raise ValueError("compare: the earlier run must have something that was measured now, got nothing in common")
    found = [Change(name, before[name], after[name]) for name in common]
    return sorted(found, key=lambda change: -change.ratio)


HEADER = ["what", "before", "p20 - p80", "now", "p20 - p80", "now / before", "verdict"]


def cells(change: Change) -> list[str]:
    """A change as a table shows it."""
    shown = [change.name]
    for timing in (change.before, change.after):
        shown += [f"{timing.median:.3g} {timing.unit}", f"{timing.p20:.3g} - {timing.p80:.3g}"]
    return [*shown, f"{change.ratio:.2f}", change.verdict]
