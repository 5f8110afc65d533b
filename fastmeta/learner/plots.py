"""Pictures of a run. They are drawn without a display; matplotlib is loaded when the first one is."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastmeta.core import files

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from torch import Tensor

BLUE, ORANGE, GREY, GREEN = "#3366aa", "#cc6622", "#888888", "#338855"


def learning_curve(records: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw loss and metric against the meta-step.

    Args:
        records: of ``metrics.jsonl``.
        path: the PNG file to write.
    """
    train = [r for r in records if r["kind"] == "train"]
    checks = [r for r in records if r["kind"] == "validation"]
    figure, (left, right) = _figure(2, (10, 4))
    left.plot([r["step"] for r in train], [r["loss"] for r in train], color=BLUE, lw=1, label="training")
    left.plot([r["step"] for r in checks], [r["loss"] for r in checks], "o-", color=ORANGE, ms=3, label="validation")
    left.set(xlabel="meta-step", ylabel="query loss after adaptation", yscale="log")
    metric = checks[0]["metric"] if checks else "accuracy"
    if metric in (train[0] if train else {}):
        values = [r[metric] for r in train]
        right.plot([r["step"] for r in train], values, color=BLUE, lw=1, alpha=0.5, label="training")
    steps = [r["step"] for r in checks]
    for which, color in (("after", ORANGE), ("before", GREY)):
        means = [r[which] for r in checks]
        low = [r[which] - r[f"{which}_ci95"] for r in checks]
        high = [r[which] + r[f"{which}_ci95"] for r in checks]
        right.plot(steps, means, "o-", color=color, ms=3, label=f"validation, {which} adaptation")
        right.fill_between(steps, low, high, color=color, alpha=0.2, lw=0)
    for r in (r for r in records if r["kind"] == "test"):
        right.axhline(r["after"], color=GREEN, ls="--", lw=1, label="test, after adaptation")
    right.set(xlabel="meta-step", ylabel={"accuracy": "query accuracy", "mse": "mean squared error"}[metric])
    if metric == "mse":
        right.set_yscale("log")
    _finish(figure, (left, right), path)


def sinusoid_adaptation(
    x: Tensor, true: Tensor, points: tuple[Tensor, Tensor], predictions: Mapping[int, Tensor], path: Path
) -> None:
    """Draw waves, the support points given of them, and the network's curve after some numbers of inner steps.

    Args:
        x: inputs to draw at, ``[n, 1]``.
        true: the waves, ``[T, n, 1]``.
        points: inputs and targets of the support set, ``[T, K, 1]`` each.
        predictions: outputs ``[T, n, 1]`` by number of inner steps; 0 is the initialisation.
        path: the PNG file to write.
    """
    tasks = true.shape[0]
    figure, axes = _figure(tasks, (5 * tasks, 4))
    for t, ax in enumerate(axes):
        ax.plot(x[:, 0], true[t, :, 0], color=GREY, lw=2, label="true wave")
        for steps, outputs in sorted(predictions.items()):
            dashes = {0: ":", 1: "--"}.get(steps, "-")
            label = "before adaptation" if steps == 0 else f"after {steps} step" + "s" * (steps > 1)
            ax.plot(x[:, 0], outputs[t, :, 0], lw=1.5, ls=dashes, color=ORANGE if steps else BLUE, label=label)
        ax.plot(points[0][t, :, 0], points[1][t, :, 0], "^", color=GREEN, ms=7, label="support points")
        ax.set(xlabel="x", ylabel="y")
    _finish(figure, axes, path)


def accuracy_by_step(curves: Mapping[str, Sequence[tuple[float, float]]], chance: float, path: Path) -> None:
    """Draw accuracy against the number of inner steps.

    Args:
        curves: for every label the mean and half interval after 0, 1, 2, ... steps.
        chance: accuracy of guessing.
        path: the PNG file to write.
    """
    figure, (ax,) = _figure(1, (6, 4))
    for (label, curve), color in zip(curves.items(), (ORANGE, BLUE, GREEN), strict=False):
        steps = range(len(curve))
        ax.errorbar(steps, [m for m, _ in curve], [c for _, c in curve], fmt="o-", color=color, capsize=3, label=label)
    ax.axhline(chance, color=GREY, ls=":", label="chance")
    ax.set(xlabel="inner steps on the support set", ylabel="query accuracy", ylim=(0, 1))
    _finish(figure, (ax,), path)


def _figure(columns: int, size: tuple[float, float]) -> tuple[Figure, Sequence[Axes]]:
    from matplotlib.figure import Figure  # without pyplot: no global state, no display

    figure = Figure(figsize=size, layout="constrained")
    return figure, list(figure.subplots(1, columns, squeeze=False)[0])


def _finish(figure: Figure, axes: Sequence[Axes], path: Path) -> None:
    for ax in axes:
        ax.grid(alpha=0.3)
        if ax.get_legend_handles_labels()[0]:
            ax.legend(fontsize=8)
        ax.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    files.write_bytes(path, buffer.getvalue())
