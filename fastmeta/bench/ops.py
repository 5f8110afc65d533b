"""Every operation's maps on every backend, on the operands that a meta-step has for them."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from fastmeta.bench import updates
from fastmeta.bench.backends import Run, backends
from fastmeta.bench.ceilings import Ceilings, ceilings
from fastmeta.bench.networks import Network, built
from fastmeta.bench.regressions import Timing
from fastmeta.bench.timing import Effort, percentile
from fastmeta.engine import cost

EFFORT = Effort(rounds=7, slot_s=0.05, budget_s=60.0)
QUICK = Effort(rounds=2, slot_s=0.0, budget_s=2.0)


@dataclass(frozen=True)
class Row:
    """One map of one operation on one backend, for one task of one inner step.

    Attributes:
        network, op, module, map, backend: which.
        us, p20, p80: microseconds; median and percentiles.
        flops, bytes: by the one formula for all backends (:mod:`fastmeta.engine.cost`).
        floor_us: the least that these take on this machine.
        error: relative, against float64: ``of`` the map on the same operands or, where a backend fuses maps into a
            whole meta-step, of the meta-gradient that all of them make.
        bound: what the error may be.
        of: ``map`` or ``meta-gradient``.
        allocated: bytes that PyTorch allocates at the most; ``None`` where it does not allocate.
        gain: time of the reference's same calls over this one; ``None`` for the reference itself, or where either is
            wrong.
    """

    network: str
    op: str
    module: str
    map: str
    backend: str
    us: float
    p20: float
    p80: float
    flops: int
    bytes: int
    floor_us: float
    error: float
    bound: float
    of: str
    allocated: float | None = None
    gain: float | None = None

    @property
    def place(self) -> tuple[str, str, str, str]:
        """All but the backend."""
        return self.network, self.op, self.module, self.map

    @property
    def right(self) -> bool:
        """Whether the error is within its bound."""
        return self.error <= self.bound

    @property
    def gflops(self) -> float | None:
        """Operations a nanosecond, where there are any."""
        return self.flops / self.us / 1e3 if self.flops else None

    @property
    def gbytes(self) -> float:
        """Bytes a nanosecond."""
        return self.bytes / self.us / 1e3

    @property
    def share(self) -> float:
        """The floor over the time: 1 were the physical limit."""
        return self.floor_us / self.us


def measure(
    network: Network, effort: Effort = EFFORT, device: str = "cpu", say: Callable[[str], None] = lambda line: None
) -> list[Row]:
    """Rows of one network's operations, and of the inner rules' kernels on its packed parameters.

    Args:
        network: whose operations.
        effort: how long to measure.
        device: ``cpu`` or ``cuda``.
        say: is told how it goes.

    Raises:
        RuntimeError: the device is not there.
    """
    model, _, tasks = built(network)
    runs = backends(network, effort, device)
    say(f"{network.name}: {len(runs[0].pieces)} operations on {', '.join(run.name for run in runs)}")
    limits = ceilings(device)
    rows = [row for run in runs for row in _rows(network.name, run, limits)]
    size = sum(p.numel() for p in model.parameters())
    rows += [_row(network.name, "", limits, **made) for made in updates.measure(tasks.size, size, effort, device)]
    gc.collect()
    return compared(rows)


def _rows(network: str, run: Run, limits: Ceilings) -> list[Row]:
    rows = []
    for number, piece in enumerate(run.pieces):
        for place, name in enumerate(cost.MAPS):
            times = run.times.get((number, name))
            if not times:
                continue
            error, of = run.error_of(number, name)
            made: dict[str, Any] = {"op": piece.op, "map": name, "backend": run.name_of(number), "times": times}
            made |= {"error": error, "bound": run.bound_of(of), "of": of}
            made |= {"flops": piece.flops[place], "bytes": piece.bytes[place]}
            made["allocated"] = run.allocated.get((number, name))
            rows.append(_row(network, piece.module, limits, **made))
    return rows


def _row(network: str, module: str, limits: Ceilings, *, times: list[float], **made: Any) -> Row:
    """A row from microseconds of calls."""
    us, p20, p80 = (percentile(times, share) for share in (0.5, 0.2, 0.8))
    floor = limits.floor_us(made["flops"], made["bytes"])
    return Row(network=network, module=module, us=us, p20=p20, p80=p80, floor_us=floor, **made)


def compared(rows: Sequence[Row]) -> list[Row]:
    """The rows with their gains over the reference, where both are right."""
    base = {row.place: row for row in rows if row.backend == "reference"}
    found = []
    for row in rows:
        other = base.get(row.place)
        both = other is not None and row is not other and row.right and other.right
        found.append(replace(row, gain=other.us / row.us) if both and other is not None else row)
    return sorted(found, key=lambda row: list(dict.fromkeys(r.place for r in rows)).index(row.place))


HEADER = ["network", "operation", "map", "backend", "us a task", "p20 - p80", "GFLOP/s", "GB/s", "of floor"]
HEADER += ["error", "reference / this", "KiB"]


def cells(row: Row) -> list[str]:
    """The row as a table shows it."""
    gflops = "" if row.gflops is None else _number(row.gflops)
    wrong = "" if row.right else f" over {row.bound:.0e}: wrong"
    return [
        row.network,
        f"{row.op} {row.module}".strip(),
        row.map,
        row.backend,
        _number(row.us),
        f"{_number(row.p20)} - {_number(row.p80)}",
        gflops,
        _number(row.gbytes),
        f"{row.share:.2f}",
        f"{row.error:.1e}{wrong}" + ("" if row.of == "map" else " (whole)"),
        "" if row.gain is None else f"{row.gain:.2f}",
        "" if row.allocated is None else _number(row.allocated / 1024),
    ]


def as_json(rows: Sequence[Row], machine: str, about: str) -> dict[str, Any]:
    """Everything as plain data."""
    return {"kind": "ops", "machine": machine, "ceilings": about, "rows": [asdict(row) for row in rows]}


def timings(content: dict[str, Any]) -> dict[str, Timing]:
    """What :func:`as_json` has stored, for :mod:`fastmeta.bench.regressions`."""
    parts = ("network", "op", "module", "map", "backend")
    return {
        " ".join(row[part] for part in parts if row[part]): Timing(row["us"], row["p20"], row["p80"], "us")
        for row in content["rows"]
    }


def _number(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"
