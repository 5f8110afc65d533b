"""What ``fastmeta bench steps`` runs: the comparison of ``python -m pytest benchmarks``; on a GPU benchmarks.gpu's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks.harness import Comparison, compare
from benchmarks.machine import THREADS, machine_line, use_threads
from benchmarks.report import as_json, details, remarks, summary, text_table, where_time_goes
from benchmarks.variants import VARIANTS
from benchmarks.workloads import QUICK_WORKLOADS, WORKLOADS
from fastmeta.bench.html import Bars, Section, Table
from fastmeta.bench.machine import machine_line as whole_machine_line
from fastmeta.bench.regressions import Timing
from fastmeta.bench.timing import QUICK, Effort

Say = Callable[[str], None]
Found = tuple[dict[str, Any], list[Section], str]
ABOUT = (
    "One meta-gradient in float32, everyone on the same model, weights and tasks, in turns. Ratios are other's time "
    "over that of fastmeta: above 1 fastmeta is faster. Errors are against float64 in the same run; who is beyond "
    "twice float32's own error has no time. Rows that lose are shown (docs/benchmarking.md)."
)


def run(
    workloads: list[str] | None, peers: str, device: str, threads: int | None, memory: bool, quick: bool, say: Say
) -> Found:
    """Measure; returns everything as plain data, as sections of a page, and as text for the terminal."""
    if device == "cuda":
        return _on_gpu(workloads, peers, quick, say)
    use_threads(threads or THREADS)
    usual = [name for name, workload in WORKLOADS.items() if workload.group == "usual"]
    names = workloads or (list(QUICK_WORKLOADS) if quick else usual)
    _check("--workload", names, WORKLOADS)
    variants = [VARIANTS[name] for name in chosen(peers, {n: v.kind == "ours" for n, v in VARIANTS.items()})]
    effort = QUICK if quick else Effort()
    found = [compare(WORKLOADS[name], variants, effort, memory=memory, say=say) for name in names]
    content = {"kind": "steps", "device": device, "provenance": whole_machine_line(), **as_json(found, machine_line())}
    return content, sections(found), "\n".join([*map(text, found), "", summary(found, machine_line())])


def chosen(peers: str, ours: dict[str, bool]) -> list[str]:
    """The variants of a comparison: fastmeta's, and the peers that are named, ``all`` or ``none``."""
    wanted = {"all": list(ours), "none": []}.get(peers, [name.strip() for name in peers.split(",")])
    _check("--peers", wanted, ours)
    return [name for name in ours if ours[name] or name in wanted]


def text(c: Comparison) -> str:
    """One workload for the terminal."""
    parts = [f"\n{c.title}\n{text_table(*details(c))}"]
    if c.breakdown is not None:
        parts.append(text_table(*where_time_goes(c.breakdown)))
    return "\n\n".join([*parts, *remarks([c])])


def sections(comparisons: Sequence[Comparison]) -> list[Section]:
    """A section a workload: everyone's time as bars, all that was measured, and where fastmeta's time goes."""
    made = [Section("How to read this", [ABOUT])]
    for c in comparisons:
        timed = [o for o in c.outcomes if o.median_ms]
        bars = [(o.name, o.median_ms or 0, f"{o.median_ms:.3g} ms", _kind(o.kind)) for o in timed]
        header, rows = details(c)
        marks = ["bad" if o.status in ("wrong", "failed") else "ours" * (o.kind == "ours") for o in c.outcomes]
        parts = [Bars("median of one meta-gradient, logarithmic", bars), Table(header, rows, marks)]
        if c.breakdown is not None:
            parts += ["Where fastmeta's time goes:", Table(*where_time_goes(c.breakdown))]
        made.append(Section(c.title, [*parts, *remarks([c])]))
    return made


def is_ours(name: str) -> bool:
    """Whether a thing of :func:`timings` is fastmeta's: what peers do is the machine's matter or theirs."""
    return name.split(": ", 1)[1].startswith("fastmeta")


def timings(content: dict[str, Any]) -> dict[str, Timing]:
    """What :func:`run` has stored, for :mod:`fastmeta.bench.regressions`."""
    found = {}
    for workload in content["workloads"]:
        for row in workload.get("outcomes", []):
            if row["median_ms"] is not None:
                name = f"{workload['workload']}: {row['name']}"
                found[name] = Timing(row["median_ms"], row["p20_ms"], row["p80_ms"])
        for row in workload.get("rows", []):
            found[f"{workload['workload']}: {row['variant']}"] = Timing(row["ms"], row["low"], row["high"])
    return found


def _on_gpu(workloads: list[str] | None, peers: str, quick: bool, say: Say) -> Found:
    from benchmarks.gpu import report, steps

    if not torch.cuda.is_available():
        raise RuntimeError("bench steps: device 'cuda' must be there, but no GPU is visible")
    names = workloads or (["sinusoid_k1"] if quick else list(steps.WORKLOADS))
    _check("--workload", names, steps.WORKLOADS)
    variants = chosen(peers, {name: name in steps.OURS for name in steps.VARIANTS})
    results = [steps.compare(name, variants, say) for name in names]
    machine = whole_machine_line()
    content = {"kind": "steps", "device": "cuda", "machine": machine, "workloads": results}
    made, lines = [Section("How to read this", [ABOUT])], [machine]
    for result in results:
        header, rows = report.step_table(result)
        right = [row for row in result["rows"] if row["error"] <= row["bound"]]
        ours = {name: "ours" if name in steps.OURS else "other" for name in steps.VARIANTS}
        bars = [(row["variant"], row["ms"], f"{row['ms']:.3g} ms", ours[row["variant"]]) for row in right]
        parts = [Bars("median of one meta-gradient, logarithmic", bars), Table(header, rows)]
        made.append(Section(result["title"], parts))
        lines += ["", result["title"], text_table(header, rows)]
    return content, made, "\n".join(lines)


def _kind(kind: str) -> str:
    return "ours" if kind == "ours" else "other"


def _check(option: str, names: Sequence[str], known: Any) -> None:
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"bench steps: {option} must be one of {', '.join(known)}, got {', '.join(unknown)}")
