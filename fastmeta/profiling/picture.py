"""The roofline picture: how much each operation computes a byte, how fast it does, and what the machine could do."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

from fastmeta.core import files
from fastmeta.engine.floor import Peaks
from fastmeta.profiling.advice import percent
from fastmeta.profiling.report import KindReport, Line, Report

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.transforms import Bbox

ENDINGS = (".png", ".svg")
TOP = 12  # operations that are drawn
# Middle tones on a transparent ground: they stand out from white paper and from a dark page alike.
INK, ROOF, POINTS = "#7b818a", "#9a7b3c", ("#2f86c5", "#cf6a2c", "#3d9b62", "#a066c0")
CACHED = 256 << 10  # bytes a thread, of a copy in cache
RING, RINGS, DIRECTIONS = 9, 12, 16  # points between the places where a number may stand, rings of them, places on one


def check_ending(path: Path) -> None:
    """Raise ``ValueError`` where the name of a picture has another ending than ``.png`` or ``.svg``."""
    if path.suffix.lower() not in ENDINGS:
        raise ValueError(f"profile: a picture must end in .png or .svg, got {path}")


@dataclass(frozen=True)
class Point:
    """An operation in the picture: operations a byte and a second."""

    line: Line
    intensity: float
    rate: float


def points_of(kind: KindReport) -> list[Point]:
    """The operations with products that take longest."""
    drawn = [line for line in kind.lines if line.flops and line.bytes and line.seconds][:TOP]
    return [Point(line, line.flops / line.bytes, line.flops_rate) for line in drawn]


def roofline(report: Report, path: Path) -> None:
    """Draw the kind of meta-step that takes longest and has operations with products.

    Args:
        report: of a profile.
        path: the ``.png`` or ``.svg`` file to write.

    Raises:
        ValueError: another ending, or there is no such kind.
        OSError: the file cannot be written.
    """
    check_ending(path)
    buffer = io.BytesIO()
    drawn(report).savefig(buffer, format=path.suffix[1:].lower(), dpi=150)
    files.write_bytes(path, buffer.getvalue())


def drawn(report: Report) -> Figure:
    """The picture; see :func:`roofline`."""
    from matplotlib.figure import Figure  # without pyplot: no global state, no display

    kind = next((kind for kind in report.kinds if points_of(kind)), None)
    if kind is None:
        raise ValueError("profile: a roofline needs operations with products, got none that was timed")
    roof = report.roof(kind)
    points = points_of(kind)
    figure = Figure(figsize=(9.6, 5.4), layout="constrained")
    figure.patch.set_alpha(0)
    ax, beside = figure.subplots(1, 2, width_ratios=(2.1, 1))
    _names(beside, points)
    _frame(ax, kind, points, roof)
    _roofs(ax, roof)
    _points(ax, points)
    return figure


def _frame(ax: Axes, kind: KindReport, points: Sequence[Point], roof: Peaks) -> None:
    intensities = [point.intensity for point in points]
    low, high = min(*intensities, 0.5), max(*intensities, 2 * roof.flops / roof.bytes)
    bottom = min(*(point.rate for point in points), roof.flops / 100)
    ax.set(xscale="log", yscale="log", xlim=(low / 2, high * 3), ylim=(bottom / 3e9, roof.flops * 3e-9))
    ax.set_xlabel("operations a byte (FLOP/B)", color=INK)
    ax.set_ylabel("GFLOP/s", color=INK)
    what = "meta-steps" if kind.gradient else "evaluations"
    ax.set_title(f"{kind.count} {what}, {kind.executor} executor, {kind.device}, {kind.dtype}", color=INK, fontsize=10)
    ax.patch.set_alpha(0)
    ax.grid(which="major", alpha=0.35, color=INK, lw=0.6)
    ax.tick_params(which="both", colors=INK)
    for side, spine in ax.spines.items():
        spine.set(color=INK, visible=side in ("left", "bottom"))


def _roofs(ax: Axes, roof: Peaks) -> None:
    """The peak, and the slopes of memory and, on a processor, of its cache."""
    left, right = ax.get_xlim()
    rates = {"memory": roof.bytes}
    if roof.device == "cpu" and (cached := roof.rate(CACHED)) > 1.3 * roof.bytes:
        rates["cache"] = cached
    top = roof.flops / 1e9
    ax.plot([roof.flops / max(rates.values()), right], [top, top], color=ROOF, lw=1.6)
    ax.annotate(
        f"{top:.3g} GFLOP/s", (right, top), (-4, 4), textcoords="offset points", ha="right", color=ROOF, fontsize=9
    )
    for name, rate in rates.items():
        ridge = roof.flops / rate
        start = max(left, 1e9 * ax.get_ylim()[0] / rate)
        ax.plot([start, ridge], [start * rate / 1e9, top], color=ROOF, lw=1.6, ls="-" if name == "memory" else "--")
        at = (start * ridge) ** 0.5
        ax.annotate(
            f"{name} {rate / 1e9:.3g} GB/s",
            (at, at * rate / 1e9),
            (0, 5),
            textcoords="offset points",
            rotation=_slope(ax),
            rotation_mode="anchor",
            ha="center",
            color=ROOF,
            fontsize=9,
        )


def _slope(ax: Axes) -> float:
    """Degrees at which a line of slope 1 in logarithms stands in the picture."""
    ax.figure.draw_without_rendering()  # type: ignore[union-attr]  # it is the whole figure
    (x0, y0), (x1, y1) = ax.transData.transform([(1, 1), (10, 10)])
    return math.degrees(math.atan2(y1 - y0, x1 - x0))


def _points(ax: Axes, points: Sequence[Point]) -> None:
    """A disc for each, as large as its share, and its number beside it where there is room."""
    ax.figure.draw_without_rendering()  # type: ignore[union-attr]
    taken: list[Bbox] = []
    for number, point in enumerate(points):
        y = point.rate / 1e9
        size = 30 + 400 * point.line.share
        color = POINTS[number % len(POINTS)]
        ax.scatter([point.intensity], [y], s=size, color=color, alpha=0.85, edgecolors=INK, lw=0.5, zorder=3)
        x_at, y_at = ax.transData.transform((point.intensity, y))
        radius = size**0.5 / 2 * ax.figure.dpi / 72
        taken.append(_box(x_at - radius, y_at - radius, x_at + radius, y_at + radius))
    for number, point in enumerate(points):
        _label(ax, number, point, taken)


def _label(ax: Axes, number: int, point: Point, taken: list[Bbox]) -> None:
    """The number at the nearest place around its disc that nothing else has, and a line to it where that is far."""
    disc = taken[number]
    radius = (disc.x1 - disc.x0) / 2 * 72 / ax.figure.dpi
    text = ax.annotate(
        str(number + 1),
        (point.intensity, point.rate / 1e9),
        (0, 0),
        textcoords="offset points",
        ha="center",
        va="center",
        color=POINTS[number % len(POINTS)],
        fontsize=9,
        fontweight="bold",
        zorder=4,
    )
    for step, turn in product(range(RINGS), range(DIRECTIONS)):
        far, angle = radius + RING * (step + 1), 2 * math.pi * (turn / DIRECTIONS + 0.125)
        shift = far * math.cos(angle), far * math.sin(angle)
        text.set_position(shift)
        box = text.get_window_extent().padded(1)
        if not any(box.overlaps(other) for other in taken):
            break
    taken.append(text.get_window_extent().padded(1))
    if step > 1:
        at = (point.intensity, point.rate / 1e9)
        line = {"arrowstyle": "-", "color": INK, "lw": 0.6, "shrinkA": 5, "shrinkB": 0}
        ax.annotate("", at, shift, textcoords="offset points", arrowprops=line, zorder=2)


def _names(ax: Axes, points: Sequence[Point]) -> None:
    ax.set_axis_off()
    ax.set(xlim=(0, 1), ylim=(0, 1))
    for number, point in enumerate(points):
        line, y = point.line, 0.97 - 0.078 * number
        color = POINTS[number % len(POINTS)]
        ax.text(0.0, y, f"{number + 1}", color=color, fontsize=9, fontweight="bold", va="top")
        said = f"{_short(line.name)}\n{percent(line.share)} of the time, {percent(line.floor_share)} of its floor"
        ax.text(0.09, y, said, color=INK, fontsize=8, va="top", linespacing=1.15)


def _short(name: str) -> str:
    """The beginning and the end, which tell layers apart."""
    return name if len(name) <= 40 else f"{name[:17]}...{name[-20:]}"


def _box(x0: float, y0: float, x1: float, y1: float) -> Bbox:
    from matplotlib.transforms import Bbox

    return Bbox([[x0, y0], [x1, y1]])
