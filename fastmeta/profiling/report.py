"""A profile beside what the machine can do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from fastmeta.engine import timeline
from fastmeta.engine.floor import Peaks, peaks
from fastmeta.engine.timed import ADJOINT, INNER_LOOP, QUERY

PARTS = (INNER_LOOP, QUERY, ADJOINT)
REST = "steps, sums, Python"  # of a meta-step, beside its operations


@dataclass(frozen=True)
class Line:
    """All maps of one operation, in all meta-steps of a kind.

    Attributes:
        module, operation: the submodule whose parameters it reads, if any, and its name.
        plan: ``resident``, ``dense``, ``factored``, ``shared`` or ``generic``; empty for a change of layout.
        backend: who runs it.
        reason: what ``explain()`` says of it.
        calls: of its maps.
        seconds: by the clock if all threads were as busy, or by the GPU's.
        share: of the meta-steps.
        flops: of the products, convolutions counted directly.
        bytes: of operands and results, each once a call.
        floor_seconds: for each map its products at the peak, or its bytes at the speed of a copy if that takes longer.
        parts: seconds by part of the meta-step.
    """

    module: str
    operation: str
    plan: str
    backend: str
    reason: str
    calls: int
    seconds: float
    share: float
    flops: int
    bytes: int
    floor_seconds: float
    parts: dict[str, float]

    @property
    def name(self) -> str:
        """The layer and the operation."""
        return f"{self.module} ({self.operation})" if self.module else self.operation

    @property
    def flops_rate(self) -> float:
        """Operations a second."""
        return self.flops / self.seconds if self.seconds else 0.0

    @property
    def bytes_rate(self) -> float:
        """Bytes a second."""
        return self.bytes / self.seconds if self.seconds else 0.0

    @property
    def floor_share(self) -> float:
        """The floor over the time: 1 were the physical limit."""
        return self.floor_seconds / self.seconds if self.seconds else 0.0


@dataclass(frozen=True)
class KindReport:
    """Meta-steps that one executor ran alike.

    Attributes:
        executor, why: who, and why where another one was a choice.
        gradient: whether the meta-gradient was wanted.
        device, dtype, threads: it ran on.
        steps: K.
        samples: of support and query of one task.
        count, tasks: how many, and of all.
        seconds: by the processor's clock.
        busy: of these, in the executor's operations.
        device_seconds: by the GPU's clock.
        flops: of all products where ``explain()`` counts them.
        lines: the longest first; none where an executor is one piece.
    """

    executor: str
    why: str
    gradient: bool
    device: str
    dtype: str
    threads: int
    steps: int
    samples: tuple[int, int]
    count: int
    tasks: int
    seconds: float
    busy: float
    device_seconds: float
    flops: int
    lines: tuple[Line, ...]

    @property
    def whole(self) -> float:
        """Seconds that shares are of: on a GPU the device's, where nothing waits for it."""
        return max(self.seconds, self.device_seconds)

    @property
    def parts(self) -> dict[str, float]:
        """Seconds of each part; the rest is in none of its operations."""
        found = {part: sum(line.parts.get(part, 0.0) for line in self.lines) for part in PARTS}
        return {**found, REST: max(self.whole - sum(found.values()), 0.0)}

    @property
    def tasks_per_s(self) -> float:
        """In the meta-step alone."""
        return self.tasks / self.whole if self.whole else 0.0


@dataclass(frozen=True)
class Report:
    """What a profile says.

    Attributes:
        data: what was collected.
        kinds: of meta-steps, the longest first.
        roofs: what the machine does at its best, for each device, dtype and number of threads that ran.
    """

    data: dict[str, Any]
    kinds: tuple[KindReport, ...]
    roofs: tuple[Peaks, ...]

    def roof(self, kind: KindReport) -> Peaks:
        """What the machine does at its best where a kind of meta-step ran."""
        key = kind.device, kind.dtype, kind.threads
        return next(roof for roof in self.roofs if (roof.device, roof.dtype, roof.threads) == key)

    @property
    def seconds(self) -> float:
        """From the beginning to the end of the profile."""
        return float(self.data["seconds"])

    @property
    def where(self) -> dict[str, float]:
        """Seconds by name, which add up to :attr:`seconds`; names as ``fastmeta.engine.timeline`` has them."""
        return dict(self.data["where"])

    @property
    def working(self) -> float:
        """Seconds from the first meta-step's preparation to the end of the last."""
        return self.seconds - self.where[timeline.START] - self.where[timeline.END]

    @property
    def tasks_per_s(self) -> float:
        """All tasks over all the time between the first meta-step and the last."""
        return sum(kind.tasks for kind in self.kinds) / self.working if self.working else 0.0

    @property
    def samples_per_s(self) -> float:
        """Likewise, support and query samples."""
        every = sum(kind.tasks * sum(kind.samples) for kind in self.kinds)
        return every / self.working if self.working else 0.0

    def to_json(self) -> dict[str, Any]:
        """Everything, as JSON can hold it."""
        kinds = [
            {
                **asdict(kind),
                "parts": kind.parts,
                "tasks_per_s": kind.tasks_per_s,
                "lines": [{**asdict(line), "floor_share": line.floor_share} for line in kind.lines],
            }
            for kind in self.kinds
        ]
        whole = {"tasks_per_s": self.tasks_per_s, "samples_per_s": self.samples_per_s}
        return {**self.data, **whole, "kinds": kinds, "roofs": [asdict(roof) for roof in self.roofs]}


def report_of(data: dict[str, Any], measure: Callable[[str, torch.dtype, int], Peaks] | None = None) -> Report:
    """The report of what :func:`fastmeta.profiling.gather.gather` gave.

    Args:
        data: of this machine.
        measure: gives what it does at its best, by device, dtype and threads; :func:`peaks` if left out.
    """
    roofs: dict[tuple[str, str, int], Peaks] = {}
    kinds = []
    for kind in data["kinds"]:
        key = kind["device"], kind["dtype"], kind["threads"]
        if kind["operations"] and key not in roofs:
            roofs[key] = (measure or peaks)(kind["device"], getattr(torch, kind["dtype"]), kind["threads"])
        kinds.append(_kind(kind, roofs.get(key)))
    kinds.sort(key=lambda kind: -kind.whole)
    return Report(data, tuple(kinds), tuple(roofs.values()))


def _kind(kind: dict[str, Any], roof: Peaks | None) -> KindReport:
    whole = max(kind["seconds"], kind["device_seconds"])
    lines = [] if roof is None else [_line(operation, roof, whole) for operation in kind["operations"]]
    return KindReport(
        kind["executor"],
        kind["why"],
        kind["gradient"],
        kind["device"],
        kind["dtype"],
        kind["threads"],
        kind["steps"],
        (kind["samples"][0], kind["samples"][1]),
        kind["count"],
        kind["tasks"],
        kind["seconds"],
        kind["busy"],
        kind["device_seconds"],
        kind["flops"],
        tuple(sorted(lines, key=lambda line: -line.seconds)),
    )


def _line(operation: dict[str, Any], roof: Peaks, whole: float) -> Line:
    maps, parts = operation["maps"], dict.fromkeys(PARTS, 0.0)
    for one in maps:
        parts[one["part"]] += one["seconds"]
    seconds = sum(parts.values())
    return Line(
        operation["module"],
        operation["operation"],
        operation["plan"],
        operation["backend"],
        operation["reason"],
        sum(one["calls"] for one in maps),
        seconds,
        seconds / whole if whole else 0.0,
        sum(one["flops"] for one in maps),
        sum(one["bytes"] for one in maps),
        sum(roof.seconds(one["calls"], one["flops"], one["bytes"], one["sharing"]) for one in maps),
        parts,
    )
