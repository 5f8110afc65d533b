"""``python -m benchmarks.scaling``: time and memory of one meta-gradient against T, K, N, width and P.

A perceptron of which one number at a time is varied. fastmeta runs with the plan that it chooses, with
every weight formed for each task, and with none formed; of the peers the quickest at each point is shown.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.machine import THREADS, machine_line, use_threads
from benchmarks.memory import measure_all
from benchmarks.peers.base import Step
from benchmarks.variants import EVERY
from benchmarks.workloads import Problem, square
from fastmeta.bench.timing import Effort, interleave
from fastmeta.core import files
from tests.oracle import total_error

ROOT = Path(__file__).resolve().parents[1]
RESULTS, DOCUMENT = ROOT / "benchmarks" / "results", ROOT / "docs" / "performance.md"
OURS = ("fastmeta", "fastmeta.dense", "fastmeta.factored")
UNROLLED = ("loop", "torch.func")  # hold the unrolled graph of one task, and of all of them
PEERS = ("loop", "torch.func", "jax.vmap", "jax.map")  # torch.compile takes minutes a point
EFFORT = Effort(rounds=5, slot_s=0.05, budget_s=8.0)
ALIKE = 1e-3  # of the loop's gradient, as far as another may be from it; a wrong one is at 1
ROOM = 1 << 30  # bytes of all tasks' weights at all steps, up to which compiled peers take part
LOOKS = {
    "fastmeta": ("chosen plan", "#2f7f5f", "o"),
    "fastmeta.dense": ("weights formed", "#4a90c2", "s"),
    "fastmeta.factored": ("weights as factors", "#8a5fb0", "^"),
    "peer": ("best peer", "#c98b3c", "x"),
}


@dataclass(frozen=True)
class Point:
    """T tasks of N support and N query samples, K steps, a perceptron of square layers and one to 10 classes."""

    tasks: int = 16
    steps: int = 3
    samples: int = 5
    width: int = 256
    layers: int = 2

    @property
    def name(self) -> str:
        """As :func:`benchmarks.workloads.named` reads it."""
        more = "" if self.layers == 2 else f",{self.layers}"
        return f"square:{self.tasks},{self.steps},{self.samples},{self.width}{more}"

    def problem(self) -> Problem:
        """The meta-gradient to compute."""
        return square(self.tasks, self.steps, self.samples, self.width, self.layers)

    @property
    def weight_bytes(self) -> int:
        """Of the weights of every task at every step."""
        return 4 * self.tasks * (self.steps + 1) * (self.layers * self.width**2 + 10 * self.width)


AXES: dict[str, tuple[str, tuple[int, ...]]] = {
    "tasks": ("tasks T", (2, 4, 8, 16, 32, 64)),
    "steps": ("inner steps K", (1, 2, 3, 5, 8)),
    "samples": ("samples N", (1, 2, 5, 10, 20, 40)),
    "width": ("width", (64, 128, 256, 512, 1024, 2048)),
    "layers": ("layers (P / 65,536)", (1, 2, 4, 8, 16)),
}


def measure(point: Point, effort: Effort, *, memory: bool) -> dict[str, dict[str, float | None]]:
    """Median milliseconds and peak MiB by variant.

    Raises:
        RuntimeError: a gradient is not the loop's.
    """
    wanted = [n for n in (*PEERS, *OURS) if not n.startswith("jax") or point.weight_bytes <= ROOM]
    steps: dict[str, Step] = {name: EVERY[name].prepare(point.problem()) for name in wanted}
    truth = steps["loop"].gradients(steps["loop"].run())
    for name, step in steps.items():
        error = total_error(step.gradients(step.run()), truth)
        if not error <= ALIKE:
            raise RuntimeError(f"{point.name}: the gradient of {name} must be the loop's, got an error of {error:.1e}")
    times = interleave({name: step.run for name, step in steps.items()}, effort)
    del steps
    found: dict[str, dict[str, float | None]] = {
        name: {"ms": 1e3 * median(times[name].seconds), "mib": None} for name in wanted
    }
    if memory:
        best = min(PEERS, key=lambda name: found[name]["ms"] if name in found else math.inf)
        for name, peak in measure_all(point.name, list(dict.fromkeys([*OURS, *UNROLLED, best]))).items():
            found[name]["mib"] = peak.peak_mib
    return found


def run(axes: Collection[str], effort: Effort, *, memory: bool = True, path: Path | None = None) -> dict[str, Any]:
    """Measure every point of these axes, each once; with ``path`` what is done is kept there and not done again."""
    data: dict[str, Any] = {"machine": machine_line(), "base": asdict(Point()), "axes": list(axes), "points": {}}
    if path is not None and path.is_file():
        earlier = json.loads(path.read_text())
        if (earlier["machine"], Point(**earlier["base"])) == (data["machine"], Point()):
            data["points"] = earlier["points"]
            complete = {a for a in earlier["axes"] if all(p.name in data["points"] for _, p in points_of(a))}
            data["axes"] = [axis for axis in AXES if axis in {*axes, *complete}]
    for axis in axes:
        for _, point in points_of(axis):
            if point.name in data["points"]:
                continue
            found = data["points"][point.name] = measure(point, effort, memory=memory)
            print(point.name, {name: round(each["ms"] or 0, 2) for name, each in found.items()}, file=sys.stderr)
            if path is not None:
                files.write_json(path, data)
    return data


def points_of(axis: str) -> list[tuple[int, Point]]:
    """The values of an axis and their points."""
    return [(value, replace(Point(), **{axis: value})) for value in AXES[axis][1]]


def rows_of(data: dict[str, Any], axis: str) -> list[dict[str, Any]]:
    """What was found along an axis."""
    return [{"value": value, "found": data["points"][point.name]} for value, point in points_of(axis)]


def curve(rows: Sequence[dict[str, Any]], variant: str, what: str) -> list[float]:
    """``ms`` or ``mib`` of a variant along an axis, NaN where there is none; of ``peer`` the quickest at each point."""
    values = []
    for row in rows:
        found = row["found"]
        name = variant
        if variant == "peer":
            name = min((n for n in PEERS if n in found), key=lambda n: found[n]["ms"])
        value = found.get(name, {}).get(what)
        values.append(math.nan if value is None else value)
    return values


def exponent(xs: Sequence[float], ys: Sequence[float]) -> float:
    """Slope of ``log y`` by ``log x``, least squares over the upper half of the axis, where constants weigh least."""
    pairs = [(math.log(x), math.log(y)) for x, y in zip(xs, ys, strict=True) if y > 0]
    pairs = pairs[len(pairs) // 2 - 1 :]
    if len(pairs) < 2:
        return math.nan
    x, y = (torch.tensor(column, dtype=torch.float64) for column in zip(*pairs, strict=True))
    x, y = x - x.mean(), y - y.mean()
    return float((x * y).sum() / (x * x).sum())


def document(data: dict[str, Any]) -> str:
    """docs/performance.md."""
    base = Point(**data["base"])
    about = (
        f"A perceptron width-width-width-10 with ReLU and cross-entropy. Where nothing else is said T = {base.tasks}, "
        f"K = {base.steps}, N = {base.samples} support and as many query samples, width {base.width}. *Formed* is "
        '`plan="dense"`, *factors* `plan="factored"`, *chosen* `plan="auto"`. The best peer is the quickest of '
        f"{', '.join(f'`{name}`' for name in PEERS)} at each point; jitted JAX takes part up to {ROOM >> 20} MiB of "
        "weights of all tasks and steps. Memory is the peak above what was resident before. *Chosen / best "
        "forced* is at most 1.1 where the planner chooses well."
    )
    lines = [
        "# Performance",
        "",
        "How time and memory of one meta-gradient grow. Written by `python -m benchmarks.scaling` from",
        "[scaling.json](../benchmarks/results/scaling.json).",
        "",
        f"Measured on: {data['machine']}",
        "",
        about,
        "",
        "![time and memory](../benchmarks/results/scaling.png)",
    ]
    exponents = []
    for axis in data["axes"]:
        title, rows = AXES[axis][0], rows_of(data, axis)
        xs = [row["value"] for row in rows]
        lines += ["", f"## {title[0].upper()}{title[1:]}", ""]
        heads = [title, *(f"{LOOKS[v][0]}, {unit}" for unit in ("ms", "MiB") for v in LOOKS)]
        heads += ["best peer / chosen", "chosen / best forced"]
        lines += ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
        columns = [curve(rows, v, what) for what in ("ms", "mib") for v in LOOKS]
        ours = curve(rows, "fastmeta", "ms")
        ratio = [p / o for p, o in zip(curve(rows, "peer", "ms"), ours, strict=True)]
        forced = zip(curve(rows, "fastmeta.dense", "ms"), curve(rows, "fastmeta.factored", "ms"), strict=True)
        behind = [o / min(both) for o, both in zip(ours, forced, strict=True)]
        for i, x in enumerate(xs):
            cells = [str(x), *(_number(column[i]) for column in columns), f"{ratio[i]:.1f}", f"{behind[i]:.2f}"]
            lines.append("| " + " | ".join(cells) + " |")
        slopes = [_number(exponent(xs, column)) for column in columns]
        exponents.append("| " + " | ".join([title, *slopes]) + " |")
        lines += _per_task(rows) if axis == "tasks" else _beside_the_graph(rows) if axis == "steps" else []
    heads = ["by", *(f"{LOOKS[v][0]}, {what}" for what in ("time", "memory") for v in LOOKS)]
    lines += ["", "## Exponents", "", "Of a power law fitted to the upper half of each axis.", ""]
    lines += ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads), *exponents, ""]
    return "\n".join(lines)


def _per_task(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What one task more costs: time over T."""
    heads = ["tasks T", *(f"{LOOKS[v][0]}, us a task" for v in LOOKS)]
    columns = [curve(rows, v, "ms") for v in LOOKS]
    lines = ["", "Time over the number of tasks:", "", "| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for i, row in enumerate(rows):
        cells = [str(row["value"]), *(_number(1e3 * column[i] / row["value"]) for column in columns)]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _beside_the_graph(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Peak memory by K beside that of autograd's graph of the loop; nothing where a run did not measure that."""
    variants = {"fastmeta": LOOKS["fastmeta"][0], "fastmeta.factored": LOOKS["fastmeta.factored"][0]}
    variants |= dict(zip(UNROLLED, ("graph of one task", "graph of all tasks"), strict=True))
    columns = [curve(rows, v, "mib") for v in variants]
    if any(math.isnan(value) for column in columns[2:] for value in column):
        return []
    heads = ["inner steps K", *(f"{title}, MiB" for title in variants.values())]
    lines = ["", "Peak memory beside that of the unrolled loop's graph, of one task after another (`loop`) and of all"]
    lines += ["at once (`torch.func`):", "", "| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for i, row in enumerate(rows):
        cells = [str(row["value"]), *(_number(column[i]) for column in columns)]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def picture(data: dict[str, Any]) -> bytes:
    """PNG: time above, memory below, one column an axis."""
    import io

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    axes = data["axes"]
    figure = Figure(figsize=(4 * len(axes), 7), layout="constrained")
    FigureCanvasAgg(figure)
    for column, axis in enumerate(axes):
        rows = rows_of(data, axis)
        for line, (what, unit) in enumerate((("ms", "time, ms"), ("mib", "peak memory, MiB"))):
            plot = figure.add_subplot(2, len(axes), line * len(axes) + column + 1)
            drawn: list[float] = []
            for variant, (label, colour, marker) in LOOKS.items():
                xs, ys = [row["value"] for row in rows], curve(rows, variant, what)
                drawn += ys
                plot.plot(xs, ys, marker=marker, color=colour, label=label, markersize=5, linewidth=1.4)
            plot.set_xscale("log", base=2)
            if any(y > 0 for y in drawn):
                plot.set_yscale("log")
            plot.set_xlabel(AXES[axis][0])
            plot.grid(alpha=0.25)
            if column == 0:
                plot.set_ylabel(unit)
            if column == 0 and line == 0:
                plot.legend(fontsize=8)
    figure.suptitle(data["machine"], fontsize=6)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


def _number(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and write scaling.json, scaling.png and docs/performance.md; or write the last two anew.

    What an interrupted run has measured on the same machine is not measured again.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--axis", action="append", choices=list(AXES), help="default: all")
    parser.add_argument("--threads", type=int, default=THREADS)
    parser.add_argument("--render", action="store_true", help="measure nothing; write picture and document anew")
    parser.add_argument("--again", action="store_true", help="forget what an earlier run has measured")
    options = parser.parse_args(arguments)
    path = RESULTS / "scaling.json"
    if not options.render:
        use_threads(options.threads)
        if options.again:
            path.unlink(missing_ok=True)
        files.write_json(path, run(options.axis or AXES, EFFORT, path=path))
    data = json.loads(path.read_text())
    files.write_bytes(RESULTS / "scaling.png", picture(data))
    files.write_text(DOCUMENT, document(data))


if __name__ == "__main__":
    main()
