"""What a profile has collected, as plain data that JSON can hold and another process can read."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from fastmeta.core import environment
from fastmeta.engine.callback import JOINS
from fastmeta.engine.explain import Row, rows_of
from fastmeta.engine.profile import Profile, Record
from fastmeta.engine.runs import Kind

VERSION = 1  # of the layout


def gather(profile: Profile, *, resident: int, utilisation: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """Everything of a profile that has ended.

    Args:
        profile: with whole meta-steps.
        resident: bytes of the process in memory at the beginning.
        utilisation: of the GPU in percent, at times.
    """
    runs = profile.runs
    if runs is None:
        raise RuntimeError("profile: whole meta-steps must have been collected, got operations alone")
    return {
        "version": VERSION,
        "machine": environment.machine_line(),
        "cores": environment.cores(),
        "process": os.getpid(),
        "seconds": runs.timeline.seconds,
        "where": dict(runs.timeline.totals),
        "count": runs.count,
        "kinds": [_kind(profile, kind) for kind in runs.kinds],
        "resident_at_first": resident,
        "runs": [vars(run) for run in runs.every],
        "spans": [vars(span) for span in runs.timeline.spans],
        "utilisation": [value for _, value in utilisation],
    }


def _kind(profile: Profile, kind: Kind) -> dict[str, Any]:
    work = kind.work
    rows = {} if kind.programs is None else _rows(kind)
    flops = sum({id(row): row.flops for row in rows.values()}.values())
    return {
        "executor": kind.executor,
        "why": kind.why,
        "gradient": kind.gradient,
        "device": work.alpha.device.type,
        "dtype": str(work.alpha.dtype).removeprefix("torch."),
        "steps": work.steps,
        "first_order": work.first_order,
        "samples": list(kind.samples),
        "threads": kind.threads,
        "count": kind.runs,
        "tasks": kind.tasks,
        "seconds": kind.seconds,
        "busy": kind.busy,
        "device_seconds": kind.device.seconds,
        "flops": flops * kind.runs if kind.gradient else 0,
        "operations": _operations(profile.records_of(kind), rows, kind),
    }


def _rows(kind: Kind) -> dict[int, Row]:
    """What ``explain()`` says of each instruction of support and query, by its ``id``."""
    programs = kind.programs
    if programs is None:
        return {}
    rows = composed(rows_of(kind.work, programs, kind.executor))
    found = dict(zip(map(id, programs.support.instructions), rows, strict=True))
    if programs.query is not None and len(programs.query.instructions) == len(rows):
        found.update(zip(map(id, programs.query.instructions), rows, strict=True))
    return found


def composed(rows: Sequence[Row]) -> list[Row]:
    """Calls that are called back for as one are known by the last: let it name them all, and the first's reason."""
    found: list[Row] = []
    for row in rows:
        before = found[-1] if found else None
        if before is not None and row.backend == "callback" == before.backend and row.reason.endswith(JOINS):
            row = replace(row, call=f"{before.call}, {row.call}", reason=before.reason)
        found.append(row)
    return found


def _operations(records: Sequence[Record], rows: dict[int, Row], kind: Kind) -> list[dict[str, Any]]:
    """One entry for all maps of an operation that ``explain()`` says the same of; seconds are the clock's."""
    found: dict[tuple[str, ...], dict[str, Any]] = {}
    for record in records:
        row = rows.get(id(record.instruction))
        generic = row is not None and row.op == "generic"
        said = {
            "operation": record.operation,
            "module": record.module,
            "call": "" if row is None else row.call,
            "plan": "" if row is None else "generic" if generic else row.plan,
            "backend": kind.executor if row is None else row.backend,
            "reason": "" if row is None else row.reason,
        }
        if row is not None and (generic or row.backend == "callback"):
            said["operation"] = f"{record.operation} {row.call}"
        seconds = record.seconds / (kind.threads if kind.executor == "native" else 1)  # from threads' to the clock's
        entry = found.setdefault(tuple(said.values()), {**said, "maps": []})
        entry["maps"].append(
            {
                "part": record.part,
                "map": record.map,
                "calls": record.calls,
                "seconds": seconds,
                "flops": record.flops,
                "bytes": record.bytes,
                "sharing": record.threads,
            }
        )
    return list(found.values())
