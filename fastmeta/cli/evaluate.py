"""``fastmeta eval``: judge a trained learner on fresh tasks of the test classes."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Annotated

import typer


class Which(enum.StrEnum):
    """Which checkpoint of a run."""

    BEST = "best"
    LAST = "last"


def evaluate(
    run: Annotated[Path, typer.Argument(help="Output folder of fastmeta train.", show_default=False)],
    tasks: Annotated[int, typer.Option(min=2, help="Number of test tasks.")] = 600,
    checkpoint: Annotated[Which, typer.Option(help="Weights of the best validation, or the last ones.")] = Which.BEST,
    eval_steps: Annotated[int | None, typer.Option("--eval-steps", "--steps", help="Inner steps.")] = None,
    inner_lr: Annotated[float | None, typer.Option("--inner-lr", "--lr", help="Inner learning rate.")] = None,
    shots: Annotated[int | None, typer.Option(help="Support samples of a class.")] = None,
    queries: Annotated[int | None, typer.Option(help="Query samples of a class.")] = None,
    data: Annotated[str | None, typer.Option(help="Where the data are now, if they moved.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Another stream of tasks; the class split stays.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of PyTorch.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N.")] = None,
) -> None:
    """Evaluate a trained learner on new tasks.

    Options that are left out are as in the run. The figures are printed, the run folder is not changed.
    """
    import torch
    from rich.console import Console

    from fastmeta.cli.train import result_table
    from fastmeta.learner.results import judge, load_learner

    if threads is not None:
        torch.set_num_threads(threads)
    maml, problem, config, step = load_learner(
        run, checkpoint.value, eval_steps=eval_steps, inner_lr=inner_lr, shots=shots, queries=queries, data=data,
        device=device,
    )  # fmt: skip
    record = judge(maml, problem, config, step, tasks=tasks, seed=seed)
    Console().print(result_table(f"{config.problem}: {run}", record, {"checkpoint": checkpoint.value}))
