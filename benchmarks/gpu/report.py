"""What was measured on a GPU as a table and a picture; ``python -m benchmarks.gpu.report FOLDER`` makes them anew."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.gpu.steps import OURS
from fastmeta.core import files

MAIN = OURS[0]
BOUNDS = [
    "So an error may be twice the largest of the float32 loop's and of copies of it with weights nudged in their last",
    "places (in brackets), and the median error of single tasks, most of which have no such decision, twice theirs.",
]


def write(found: dict[str, Any], folder: Path) -> None:
    """``gpu.json``, ``gpu.md`` and ``gpu.png``."""
    files.write_json(folder / "gpu.json", found)
    files.write_text(folder / "gpu.md", table(found))
    picture(found, folder / "gpu.png")


def steps_of(found: dict[str, Any], prefix: str = "step ") -> list[dict[str, Any]]:
    """The comparisons of whole meta-steps, with JAX's row where it was measured."""
    results = []
    for key, result in found.items():
        if not key.startswith(prefix):
            continue
        row = found.get(f"jax {result['workload']}") if prefix == "step " else None
        rows = [*result["rows"], row] if row is not None and "ms" in row else result["rows"]
        reasons = result["reasons"] | ({"jax": row["reason"]} if row is not None and "reason" in row else {})
        results.append({**result, "rows": rows, "reasons": reasons})
    return results


def best_peer(result: dict[str, Any]) -> dict[str, Any] | None:
    """The quickest row that is not fastmeta's and whose error the law allows.

    Rows of JAX, and of runs that did not measure what float32 gives, may have ten times fastmeta's error, or 1e-5.
    """
    ours = next((row for row in result["rows"] if row["variant"] == MAIN), None)
    if ours is None:
        return None
    bound = max(1e-5, 10 * ours["error"])
    peers = [row for row in result["rows"] if row["variant"] not in OURS and row["error"] <= row.get("bound", bound)]
    return min(peers, key=lambda row: row["ms"], default=None)


def table(found: dict[str, Any]) -> str:
    """Everything as Markdown."""
    peaks = found["peaks"]
    lines = [
        "# On a GPU",
        "",
        f"{found['machine']}.",
        "",
        f"Measured ceilings: copy {peaks['bytes'] / 1e12:.2f} TB/s; products "
        + ", ".join(f"{name} {rate / 1e12:.0f} TFLOP/s" for name, rate in peaks["flops"].items())
        + f"; {peaks['node_s'] * 1e6:.2f} us a node of a graph.",
        "",
        "Milliseconds of one meta-gradient, by events around calls made one after another: median, 20th and 80th",
        "percentile of turns taken in a random order; caches are warm. The error is that of all gradients together",
        "against float64 autodiff. *graph* is a CUDA graph that the caller captures, of fixed inputs, for fastmeta as",
        "for its peers; fastmeta by itself copies new tasks in and results out. Memory is what a call allocates at the",
        "most; a replayed graph holds its own before. Rounding can turn over decisions of ReLU and max-pooling, which",
        "moves a task's gradient by 1e-3 and more.",
    ]
    judged = any("bound" in row for prefix in ("step ", "tf32 ") for r in steps_of(found, prefix) for row in r["rows"])
    lines += BOUNDS if judged else ["What float32 may be off by was not measured in this run (docs/gpu.md, Precision)."]
    for prefix in ("step ", "tf32 "):
        for result in steps_of(found, prefix):
            lines += ["", f"## {result['title']}, {result['precision']}", "", *_step_rows(result)]
    for key, result in found.items():
        if key.startswith("kernels "):
            lines += ["", f"## Kernels: {result['title']}", "", *_kernel_rows(result)]
    for key, title in (("vectors", "Vectors"), ("conv", "Convolution blocks"), ("attention", "Attention")):
        if found.get(key):
            lines += ["", f"## {title}", "", *_rows(found[key])]
    lines += [f"\n{key} failed: {reason}." for key, reason in found.get("failed", {}).items()]
    left = found.get("left_out")
    if left:
        lines += ["", f"Not measured in this run: {', '.join(left)}."]
    return "\n".join(lines) + "\n"


def step_table(result: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of one comparison, the quickest first, and behind them who could not take part."""
    ours = next((row for row in result["rows"] if row["variant"] == MAIN), {"ms": float("nan")})
    header = ["variant", "ms", "20 %", "80 %", "/ fastmeta", "error", "of a task", "MiB"]
    rows = []
    for row in sorted(result["rows"], key=lambda row: row["ms"]):
        cells = [row["variant"], *(f"{row[key]:.4g}" for key in ("ms", "low", "high")), f"{row['ms'] / ours['ms']:.2f}"]
        cells += [_error(row, ""), _error(row, "task_"), f"{row['mib']:.1f}" if "mib" in row else ""]
        rows.append(cells)
    rows += [[variant, reason, *[""] * 6] for variant, reason in result["reasons"].items()]
    return header, rows


def _step_rows(result: dict[str, Any]) -> list[str]:
    header, rows = step_table(result)
    lines = [f"| {' | '.join(header)} |", "|---|---:|---:|---:|---:|---:|---:|---:|"]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    peer = best_peer(result)
    if peer is not None:
        ours = next(row for row in result["rows"] if row["variant"] == MAIN)
        lines += ["", f"Best peer / fastmeta: {peer['ms'] / ours['ms']:.2f} ({peer['variant']})."]
    return lines


def _kernel_rows(result: dict[str, Any]) -> list[str]:
    """The kernels that take one per cent of a step and more."""
    first = f"{result['busy_us']:.0f} us of kernels in {result['step_us']:.0f} us of a captured step."
    lines = [first, "", "| kernel | launches | us | share |", "|---|---:|---:|---:|"]
    return lines + [
        f"| `{k['kernel']}` | {k['calls']:.4g} | {k['us']:.1f} | {100 * k['share']:.0f} % |"
        for k in result["kernels"]
        if k["share"] >= 0.01
    ]


def _error(row: dict[str, Any], which: str) -> str:
    """An error, and in brackets what it may be."""
    if f"{which}error" not in row:
        return ""
    bound = f" ({row[f'{which}bound']:.1e})" if f"{which}bound" in row else ""
    return f"{row[f'{which}error']:.1e}{bound}"


def _rows(rows: list[dict[str, Any]]) -> list[str]:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return lines + ["| " + " | ".join(_cell(row.get(column, "")) for column in columns) + " |" for row in rows]


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def picture(found: dict[str, Any], path: Path) -> None:
    """How many times as long the others take, workload by workload."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    results = steps_of(found)
    if not results:
        return
    figure, axes = pyplot.subplots(len(results), 1, figsize=(8, 1.6 * len(results)), squeeze=False)
    for axis, result in zip(axes[:, 0], results, strict=True):
        rows = sorted((r for r in result["rows"] if r["variant"] not in OURS[1:]), key=lambda r: -r["ms"])
        bars = axis.barh([r["variant"] for r in rows], [r["ms"] for r in rows])
        for bar, row in zip(bars, rows, strict=True):
            bar.set_color("tab:orange" if row["variant"] == MAIN else "tab:gray")
        axis.bar_label(bars, [f" {r['ms']:.3g} ms" for r in rows], fontsize=7)
        axis.set_xscale("log")
        axis.margins(x=0.2)
        axis.set_title(result["title"], fontsize=8, loc="left")
        axis.tick_params(labelsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


if __name__ == "__main__":
    place = Path(sys.argv[1])
    write(json.loads((place / "gpu.json").read_text()), place)
