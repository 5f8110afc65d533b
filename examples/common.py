"""What all examples share: a loop that meta-trains under a progress bar, and a table at the end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor

import fastmeta as fm

CONSOLE = Console()


def progress(steps: int, label: str, step: Callable[[int], str]) -> None:
    """Call ``step(i)`` for every i under a bar that shows what it returns."""
    columns = (TextColumn("{task.description:>22}"), BarColumn(bar_width=24), MofNCompleteColumn())
    with Progress(*columns, TextColumn("{task.fields[said]}"), TimeRemainingColumn(), console=CONSOLE) as bar:
        task = bar.add_task(label, total=steps, said="")
        for i in range(steps):
            bar.update(task, advance=1, said=step(i))


def meta_train(learner: fm.MAML, sampler: fm.tasks.TaskSampler, steps: int, lr: float, label: str) -> list[float]:
    """Adam on the meta-gradient, its rate falling to nothing along half a cosine; the loss of every step."""
    optimizer = torch.optim.Adam(learner.parameters(), lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps))
    losses: list[Tensor] = []

    def step(_: int) -> str:
        optimizer.zero_grad()
        loss = learner(sampler.sample()).loss
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.detach())
        return f"loss {loss:.3f}"

    progress(steps, label, step)
    return [float(loss) for loss in losses]


def percent(estimate: Any) -> str:
    """``98.1 % ± 0.3`` of a :class:`fastmeta.learner.evaluation.Estimate`."""
    return f"{100 * estimate.mean:.1f} % ± {100 * estimate.ci95:.1f}"


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print rows under their columns, the first of which holds names."""
    drawn = Table(title=title)
    for i, name in enumerate(columns):
        drawn.add_column(name, justify="right" if i else "left")
    for row in rows:
        drawn.add_row(*row)
    CONSOLE.print(drawn)
