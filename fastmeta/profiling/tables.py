"""A report on the terminal."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

from fastmeta.engine import timeline
from fastmeta.profiling.advice import advice, counted, percent
from fastmeta.profiling.report import KindReport, Report

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

LINES = 20  # operations that are shown; a JSON file has them all
SHOWN = 0.1  # share of all meta-steps from which on a kind's operations are
BARS = "▁▂▃▄▅▆▇█"
COLUMNS = 48  # of the memory's timeline
MEANING = {
    timeline.START: "imports, building the model, reading data: all before the first meta-step",
    timeline.PREPARATION: "checks, tracing and planning",
    timeline.META_STEP: "adaptation, query sets and meta-gradient",
    timeline.EVALUATION: "adaptation and query sets without a meta-gradient",
    timeline.BACKWARD: "from a meta-step to its outer step: backward(), clipping, reading losses",
    timeline.OUTER_STEP: "steps of torch.optim",
    timeline.DATA: "from an outer step to the next meta-step: sampling, moving tasks, logging, saving",
    timeline.BETWEEN: "between meta-steps without an outer step of torch.optim",
    timeline.END: "after the last meta-step",
    timeline.PROFILE: "this profile's own work between meta-steps",
}


def show(report: Report, console: Console) -> None:
    """Print what took how long, and what to do about it."""
    from rich.text import Text

    if not report.data["count"]:
        console.print("profile: no meta-step ran", markup=False)
        return
    console.print(Text(report.data["machine"], style="dim"))
    rates = f"{report.tasks_per_s:,.1f} tasks/s, {report.samples_per_s:,.0f} samples/s"
    count = counted(report.data["count"], "meta-step or evaluation", "meta-steps and evaluations")
    console.print(Text(f"{count}; over all the time from the first to the last {rates}"))
    console.print(_where(report))
    whole = sum(kind.whole for kind in report.kinds)
    for kind in report.kinds:
        if kind.count:
            console.print(Text(_title(kind)))
            if kind.lines and (kind is report.kinds[0] or kind.whole > SHOWN * whole):
                console.print(_kind(kind))
    for line in [*_memory(report), *_roofs(report)]:
        console.print(Text(line))
    said = advice(report)
    if said:
        console.print(Text("What to do", style="bold"))
        for number, line in enumerate(said, 1):
            console.print(Text(f"{number}. {line}"))


def _table(*columns: str) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for i, name in enumerate(columns):
        table.add_column(name, justify="left" if not i or name in ("operation", "plan", "backend", "") else "right")
    return table


def _where(report: Report) -> Table:
    table = _table("where", "s", "share", "")
    for name, seconds in report.where.items():
        if seconds >= 5e-4 * report.seconds:
            table.add_row(name, f"{seconds:.3f}", f"{100 * seconds / report.seconds:.1f} %", MEANING[name])
    return table


def _kind(kind: KindReport) -> Table:
    numbers = ("ms", "share", "calls", "MFLOP", "GFLOP/s", "GB/s", "floor")
    table = _table("layer", "operation", "plan", "backend", *numbers)
    ms = 1e3 / kind.count
    for line in kind.lines[:LINES]:
        table.add_row(
            line.module or "-",
            line.operation,
            line.plan or "-",
            line.backend,
            f"{ms * line.seconds:.3g}",
            f"{100 * line.share:.1f} %",
            f"{line.calls / kind.count:.0f}",
            f"{line.flops / kind.count / 1e6:.3g}" if line.flops else "-",
            f"{line.flops_rate / 1e9:.3g}" if line.flops else "-",
            f"{line.bytes_rate / 1e9:.3g}",
            percent(line.floor_share),
        )
    if len(kind.lines) > LINES:
        table.add_row(f"{len(kind.lines) - LINES} more")
    return table


def _title(kind: KindReport) -> str:
    ms = 1e3 / kind.count
    what = counted(kind.count, *(("meta-step", "meta-steps") if kind.gradient else ("evaluation", "evaluations")))
    sets = f"{kind.tasks / kind.count:g} tasks of {kind.samples[0]} + {kind.samples[1]} samples"
    on = f"{kind.device}, {kind.dtype}, {counted(kind.threads, 'thread', 'threads')}"
    lines = [
        f"{what} on the {kind.executor} executor ({on}): {sets}, {counted(kind.steps, 'inner step', 'inner steps')}",
        f"each {ms * kind.whole:.3g} ms, {kind.tasks_per_s:,.0f} tasks/s; {_hosts(kind)}",
    ]
    if kind.lines:
        lines.append(", ".join(f"{name} {ms * seconds:.3g} ms" for name, seconds in kind.parts.items()))
    elif kind.flops and kind.whole:
        lines.append(f"in one piece, {kind.flops / kind.whole / 1e9:.3g} GFLOP/s")
    return "\n".join(lines)


def _hosts(kind: KindReport) -> str:
    """The processor's time beside that of the device, or of the executor's own code where they are one."""
    ms = 1e3 / kind.count
    if kind.device == "cuda":
        gaps = max(kind.device_seconds - kind.busy, 0.0)
        host, device = f"host {ms * kind.seconds:.3g} ms", f"device {ms * kind.device_seconds:.3g} ms"
        return f"{host}, {device}, of which gaps {ms * gaps:.3g} ms"
    return f"executor {ms * kind.busy:.3g} ms, Python around it {ms * max(kind.seconds - kind.busy, 0.0):.3g} ms"


def _memory(report: Report) -> list[str]:
    runs = report.data["runs"]
    lines = []
    resident = [run["resident"] for run in runs]
    if any(resident):
        first = report.data["resident_at_first"]
        said = f"{first >> 20} MiB before, {max(resident) >> 20} at the most, {resident[-1] >> 20} at the end"
        lines.append(f"memory of the process: {said}  {_bars(resident)}")
    allocated = [run["allocated"] for run in runs]
    if any(allocated):
        most = max(run["peak"] for run in runs)
        said = f"{max(allocated) >> 20} MiB between meta-steps, {most >> 20} at the most"
        lines.append(f"memory of the GPU: {said}  {_bars(allocated)}")
    used = report.data["utilisation"]
    if used:
        lines.append(f"GPU in use: {sum(used) / len(used):.0f} % of the time (NVML)")
    return lines


def _bars(values: list[int]) -> str:
    """The values in their order from left to right, each column the largest of its share of them."""
    columns = min(COLUMNS, len(values))
    bounds = [len(values) * i // columns for i in range(columns + 1)]
    tops = [max(values[a:b]) for a, b in pairwise(bounds)]
    low, high = min(tops), max(tops)
    return "".join(BARS[(top - low) * (len(BARS) - 1) // max(high - low, 1)] for top in tops)


def _roofs(report: Report) -> list[str]:
    return [
        f"floors ({roof.device}, {counted(roof.threads, 'thread', 'threads')}): {roof.flops / 1e9:.4g} GFLOP/s of "
        f"{roof.dtype} by {roof.source}, {roof.bytes / 1e9:.3g} GB/s of memory"
        for roof in report.roofs
    ]
