"""Results as a table for the terminal, Markdown, JSON and a picture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.breakdown import Breakdown, Line
from benchmarks.floor import Floor
from benchmarks.harness import Comparison, Outcome
from benchmarks.variants import VARIANTS
from fastmeta.bench.texts import table as text_table
from fastmeta.core import files

Rows = list[list[str]]

ABSENT = {"not installed": "n/i", "unsupported": "-", "failed": "failed", "wrong": "wrong"}


def matrix(comparisons: Sequence[Comparison]) -> tuple[list[str], Rows]:
    """One row a workload: median ms of every peer's best form and of fastmeta, ratios, errors."""
    peers = list(dict.fromkeys(v.peer for v in VARIANTS.values() if v.kind != "ours"))
    shown = [p for p in peers if any(o.peer == p for c in comparisons for o in c.outcomes)]
    ours = [n for n, v in VARIANTS.items() if v.kind == "ours"]
    header = ["workload", *shown, *(f"{n} ms" for n in ours)]
    header += ["best eager / ours", "best peer / ours", "floor ms", "floor / ours", "error ours", "error loop"]
    rows = []
    for c in comparisons:
        row = [c.workload, *(_best_cell([o for o in c.outcomes if o.peer == p]) for p in shown)]
        row += [_best_cell([o for o in c.outcomes if o.name == n]) for n in ours]
        row += [_ratio(c.ratio("eager")), _ratio(c.ratio("eager", "compiled"))]
        row += [_ms(c.floor.ms), _ratio(c.floor_share)]
        errors = next((o.errors for o in c.outcomes if o.name == "fastmeta"), None)
        row += [_error(errors and errors.total), _error(c.loop.total)]
        rows.append(row)
    return header, rows


def details(c: Comparison) -> tuple[list[str], Rows]:
    """One row a variant of one workload; no column that none has anything in."""
    ours = next((o.median_ms for o in c.outcomes if o.name == "fastmeta"), None)
    rows = [_detail(o, ours) for o in c.outcomes]
    columns = [name for name in rows[0] if any(row[name] for row in rows)] if rows else []
    return columns, [[row[name] for name in columns] for row in rows]


def _detail(o: Outcome, ours: float | None) -> dict[str, str]:
    timed, errors = bool(o.times_ms), o.errors
    return {
        "variant": o.name,
        "median ms": _cell(o),
        "p20 - p80": f"{_ms(o.p20_ms)} - {_ms(o.p80_ms)}" if timed else "",
        "calls": str(len(o.times_ms)) if timed else "",
        "disturbed": str(o.disturbed) if timed else "",
        "/ ours": _ratio(o.median_ms / ours) if o.median_ms and ours else "",
        "error": _error(errors and errors.total),
        "worst parameter": f"{_error(errors.worst)} {errors.parameter}" if errors else "",
        "one task": _error(errors and errors.task),
        "in float64": _error(errors and errors.float64),
        "peak MiB": _mib(o.memory and o.memory.peak_mib),
        "allocated": _mib(o.memory and o.memory.allocated_mib),
        "first s": f"{o.first_s:.1f}" if o.first_s is not None else "",
    }


def where_time_goes(b: Breakdown) -> tuple[list[str], Rows]:
    """One row an operation of fastmeta, one for everything else, one for the meta-step."""
    rows = [_line(line) for line in b.lines]
    rows.append(["everything else", _ms(b.rest_ms), f"{100 * b.rest_ms / b.ms:.1f} %", "", "", ""])
    rows.append(_line(b.total))
    return ["operation", "ms", "share", "GFLOP/s", "floor ms", "floor / time"], rows


def _line(line: Line) -> list[str]:
    gflops = "" if line.gflops is None else f"{line.gflops:.3g}"
    name = f"{line.operation} {line.module}".strip()
    return [name, _ms(line.ms), f"{100 * line.share:.1f} %", gflops, _ms(line.floor_ms), _ratio(line.floor_share)]


def remarks(comparisons: Sequence[Comparison]) -> list[str]:
    """Why a cell holds no time, and what else a reader must know."""
    lines = []
    for c in comparisons:
        lines += [f"{c.workload}: {c.note}"] if c.note else []
        for o in c.outcomes:
            if o.status != "ok":
                lines.append(f"{c.workload}, {o.name}: {o.status}: {o.reason}")
            elif o.memory is not None and o.memory.peak_mib is None:
                lines.append(f"{c.workload}, {o.name}: no peak memory: {o.memory.reason}")
        if c.foreign_cores is not None and c.foreign_cores > 0.1:
            lines.append(f"{c.workload}: other processes used {c.foreign_cores:.2f} cores while this was timed")
    merged: dict[str, list[str]] = {}
    for line in lines:
        workload, separator, rest = line.partition(", ") if ", " in line.split(":", 1)[0] else line.partition(": ")
        merged.setdefault(separator + rest, []).append(workload)
    return [f"{' '.join(workloads)}{rest}" for rest, workloads in merged.items()]


def markdown_table(header: Sequence[str], rows: Rows) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def summary(comparisons: Sequence[Comparison], machine: str) -> str:
    """The final table and its remarks, for the terminal."""
    parts = [machine, "median ms of one meta-gradient, float32", "", text_table(*matrix(comparisons))]
    notes = remarks(comparisons)
    return "\n".join([*parts, *(["", *notes] if notes else [])])


def markdown(comparisons: Sequence[Comparison], machine: str, picture: str) -> str:
    parts = [
        "# Meta-gradient benchmark",
        machine,
        "Median ms of one meta-gradient, float32; ratios above 1: fastmeta is faster.",
    ]
    parts += [markdown_table(*matrix(comparisons)), f"![ratios]({picture})"]
    for c in comparisons:
        bound = (
            f"float32's own error here: total {c.float32.total:.1e}, worst {c.float32.worst:.1e} {c.float32.parameter}"
        )
        parts += [
            f"## {c.title}",
            markdown_table(*details(c)),
            f"The hand-written loop and its nudged copies: {bound}.",
            _floor(c.floor),
        ]
        if c.breakdown is not None:
            parts += ["Where fastmeta's time goes:", markdown_table(*where_time_goes(c.breakdown))]
    notes = remarks(comparisons)
    if notes:
        parts += ["## Remarks", "\n".join(f"- {n}" for n in notes)]
    return "\n\n".join(parts) + "\n"


def as_json(comparisons: Sequence[Comparison], machine: str) -> dict[str, Any]:
    """Everything that was measured, as plain data."""
    workloads = []
    for c in comparisons:
        data = asdict(c)
        for row, o in zip(data["outcomes"], c.outcomes, strict=True):
            row.update(median_ms=o.median_ms, p20_ms=o.p20_ms, p80_ms=o.p80_ms)
            row["times_ms"] = [round(t, 5) for t in o.times_ms]
        data["best_eager_over_ours"] = c.ratio("eager")
        data["best_peer_over_ours"] = c.ratio("eager", "compiled")
        data["floor_over_ours"] = c.floor_share
        if c.breakdown is not None:
            for row, line in zip(data["breakdown"]["lines"], c.breakdown.lines, strict=True):
                row.update(gflops=line.gflops, floor_over_time=line.floor_share)
        workloads.append(data)
    return {"machine": machine, "workloads": workloads}


def write(comparisons: Sequence[Comparison], machine: str, folder: Path, stem: str = "meta_step") -> list[Path]:
    """Write ``<stem>.json``, ``.md`` and ``.png`` into ``folder``, each at once or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{stem}{suffix}" for suffix in (".json", ".md", ".png")]
    files.write_text(paths[0], json.dumps(as_json(comparisons, machine), indent=1) + "\n")
    files.write_text(paths[1], markdown(comparisons, machine, paths[2].name))
    files.write_bytes(paths[2], picture(comparisons, machine))
    return paths


def picture(comparisons: Sequence[Comparison], machine: str) -> bytes:
    """PNG: for every workload, each correct variant's time over fastmeta's, as bars on a logarithmic axis."""
    import io

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 1.2 + 2.2 * len(comparisons)), layout="constrained")
    FigureCanvasAgg(figure)
    colours = {"eager": "#7a8b99", "compiled": "#c98b3c", "ours": "#2f7f5f"}
    for i, c in enumerate(comparisons):
        axes = figure.add_subplot(len(comparisons), 1, i + 1)
        unit = next((o.median_ms for o in c.outcomes if o.name == "fastmeta" and o.median_ms), None)
        timed = [o for o in c.outcomes if o.times_ms]
        values = [(o.median_ms or 0.0) / (unit or 1.0) for o in timed]
        bars = axes.barh([o.name for o in timed], values, color=[colours[o.kind] for o in timed])
        labels = [
            f" {v:.2f}x  {_ms(o.median_ms)} ms" if unit else f" {_ms(o.median_ms)} ms"
            for v, o in zip(values, timed, strict=True)
        ]
        axes.bar_label(bars, labels, fontsize=7)
        axes.set_xscale("log")
        if values:
            axes.set_xlim(min(values) / 2, max(values) * 6)
        if unit:
            axes.axvline(1.0, color="#2f7f5f", linewidth=0.8)
        axes.set_title(c.title, fontsize=9, loc="left")
        axes.tick_params(labelsize=7)
        axes.invert_yaxis()
    figure.supxlabel("time over that of fastmeta (value_and_grad); ms where fastmeta was not timed", fontsize=8)
    figure.suptitle(machine, fontsize=6)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()


def _floor(floor: Floor) -> str:
    return (
        f"Floor: {floor.flops / 1e6:.4g} MFLOP of products at {floor.peak_gflops:.0f} GFLOP/s ({floor.peak_source}), "
        f"{floor.bytes / 1e6:.3g} MB at {floor.peak_gb_s:.0f} GB/s, each measured here: {_ms(floor.ms)} ms."
    )


def _best_cell(outcomes: Sequence[Outcome]) -> str:
    timed = [o for o in outcomes if o.times_ms]
    if timed:
        return _ms(min(o.median_ms or 0.0 for o in timed))
    # Of several reasons the one that is not a mere choice of form is shown.
    return next((_cell(o) for o in sorted(outcomes, key=lambda o: o.status == "unsupported")), "")


def _cell(o: Outcome) -> str:
    return _ms(o.median_ms) if o.times_ms else ABSENT.get(o.status, "")


def _ms(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}" if value < 100 else f"{value:.0f}"


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _mib(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def _error(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}"
