"""``fastmeta train``: meta-train, validate, test, and leave figures and pictures in a run folder."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from fastmeta.learner.config import TrainConfig


class ProblemName(enum.StrEnum):
    """What can be trained."""

    SINUSOID = "sinusoid"
    DIGITS = "digits"
    OMNIGLOT = "omniglot"


class AlgorithmName(enum.StrEnum):
    """What it can be trained with."""

    MAML = "maml"
    FOMAML = "fomaml"
    ANIL = "anil"
    BOIL = "boil"
    METASGD = "metasgd"
    REPTILE = "reptile"
    IMAML = "imaml"
    PROTOMAML = "protomaml"
    CAVIA = "cavia"
    MAMLPP = "mamlpp"
    METACURVATURE = "metacurvature"


def _option(*names: str, help: str, **more: Any) -> Any:
    return typer.Option(*names, help=help, show_default=False, **more)


def train(
    problem: Annotated[ProblemName, typer.Argument(help="What to learn.", show_default=False)],
    algorithm: Annotated[
        AlgorithmName | None, _option("--algorithm", help="How; maml if left out. docs/algorithms.md has them all.")
    ] = None,
    data: Annotated[
        str | None,
        _option("--data", help="omniglot: omniglot28.npz or the folder of the original data; downloaded if left out."),
    ] = None,
    ways: Annotated[int | None, _option("--ways", help="Classes of a task.")] = None,
    shots: Annotated[int | None, _option("--shots", help="Support samples of a class.")] = None,
    queries: Annotated[int | None, _option("--queries", help="Query samples of a class.")] = None,
    inner_steps: Annotated[int | None, _option("--inner-steps", "--steps", help="Inner steps in training.")] = None,
    eval_steps: Annotated[int | None, _option("--eval-steps", help="Inner steps in validation and test.")] = None,
    inner_lr: Annotated[float | None, _option("--inner-lr", "--lr", help="Inner learning rate.")] = None,
    meta_lr: Annotated[float | None, _option("--meta-lr", help="Learning rate of Adam at the start.")] = None,
    meta_lr_end: Annotated[float | None, _option("--meta-lr-end", help="The same at the end of its cosine.")] = None,
    filters: Annotated[int | None, _option("--filters", help="Channels of a convolution.")] = None,
    context: Annotated[int | None, _option("--context", help="cavia: number of context parameters.")] = None,
    meta_batch: Annotated[int | None, _option("--meta-batch", help="Tasks of a meta-step.")] = None,
    accumulate: Annotated[
        int | None, _option("--accumulate", help="Meta-batches whose gradients are added up before a meta-step.")
    ] = None,
    iterations: Annotated[int | None, _option("--iterations", help="Meta-steps in all.")] = None,
    first_order: Annotated[
        bool | None, _option("--first-order/--second-order", help="Leave out the second-order term, or keep it.")
    ] = None,
    clip_norm: Annotated[float | None, _option("--clip-norm", help="Largest norm of a meta-gradient, 0: any.")] = None,
    seed: Annotated[int | None, _option("--seed", help="Of weights, class split and tasks.")] = None,
    threads: Annotated[int | None, _option("--threads", help="Threads, 0: PyTorch's own choice.")] = None,
    device: Annotated[str | None, _option("--device", help="cpu, cuda or cuda:N; cpu if left out.")] = None,
    val_every: Annotated[int | None, _option("--val-every", help="Meta-steps between validations.")] = None,
    val_tasks: Annotated[int | None, _option("--val-tasks", help="Tasks of a validation.")] = None,
    log_every: Annotated[int | None, _option("--log-every", help="Meta-steps a training record sums up.")] = None,
    test_tasks: Annotated[int, typer.Option(min=2, help="Tasks of the test at the end.")] = 600,
    minutes: Annotated[float | None, _option("--minutes", help="Stop training after this time.", min=0)] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the run; runs/PROBLEM if left out.", show_default=False)
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in the folder, with its settings.")
    ] = False,
) -> None:
    """Meta-train a learner on a problem.

    Options that are left out take the problem's documented defaults (docs/training.md), or, with --resume, the run's
    own settings. Ctrl-C finishes the step, saves, and says how to go on.
    """
    from rich.console import Console

    from fastmeta.learner.config import defaults
    from fastmeta.learner.run import Run

    folder = out if out is not None else Path("runs") / problem.value
    base = Run(folder).read_config() if resume else defaults(problem.value)
    if base.problem != problem.value:
        raise ValueError(f"train: problem must stay {base.problem!r} when {folder} is resumed, got {problem.value!r}")
    config = base.changed(
        algorithm=None if algorithm is None else algorithm.value, data=data, ways=ways, shots=shots, queries=queries,
        inner_steps=inner_steps, eval_steps=eval_steps, inner_lr=inner_lr, meta_lr=meta_lr, meta_lr_end=meta_lr_end,
        filters=filters, meta_batch=meta_batch, iterations=iterations, first_order=first_order, clip_norm=clip_norm,
        seed=seed, threads=threads, val_every=val_every, val_tasks=val_tasks, log_every=log_every,
        accumulate=accumulate, context=context, device=device,
    )  # fmt: skip
    console = Console()
    status = run_training(config, folder, console, resume=resume, minutes=minutes, test_tasks=test_tasks)
    if status:
        raise typer.Exit(status)


def run_training(
    config: TrainConfig, folder: Path, console: Console, *, resume: bool, minutes: float | None, test_tasks: int
) -> int:
    """Train, test, and write everything; returns the exit status."""
    import torch

    from fastmeta.learner.interrupt import Interrupt
    from fastmeta.learner.problems import build
    from fastmeta.learner.progress import clock, reporter_for
    from fastmeta.learner.results import conclude
    from fastmeta.learner.run import open_existing, open_new
    from fastmeta.learner.training import Trainer

    run = open_existing(folder, config) if resume else open_new(folder, config)
    if config.threads:
        torch.set_num_threads(config.threads)
    reporter = reporter_for(console)
    trainer = Trainer(config, build(config, progress=_download_notice(console)), run, reporter)
    if resume:
        trainer.resume()
    reporter.say(f"{config.problem}: {_setting(config)}, {_where(config)}, into {folder}")
    with Interrupt() as signal:
        outcome = trainer.fit(minutes=minutes, stop=lambda: signal.requested)
        if outcome == "interrupted":
            again = f"fastmeta train {config.problem} --out {folder} --resume"
            reporter.say(f"saved at step {trainer.state.step}; go on with: {again}")
            return 128 + signal.signal
    if outcome == "out of time":
        reporter.say(f"stopped after {minutes:g} minutes at step {trainer.state.step} of {config.iterations}")
    record = conclude(run, tasks=test_tasks)
    title = f"{config.problem}, {_setting(config)}"
    rows = {"training": f"{trainer.state.step} meta-steps in {clock(trainer.state.seconds)}"}
    console.print(result_table(title, record, {**rows, "folder": str(folder)}))
    return 0


def result_table(title: str, record: dict[str, Any], more: dict[str, str]) -> Any:
    """A test record as a rich table."""
    from rich.table import Table

    from fastmeta.learner.progress import figure

    table = Table(title=title, show_header=False, title_justify="left")
    table.add_row("weights", f"of step {record['step']}")
    table.add_row("test tasks", str(record["tasks"]))
    table.add_row("before adaptation", figure(record, "before"))
    table.add_row(f"after {record['steps']} inner steps", figure(record))
    for name, value in more.items():
        table.add_row(name, value)
    return table


def _setting(config: TrainConfig) -> str:
    order = "first order" if config.first_order else "second order"
    order = order if config.algorithm == "maml" else config.algorithm
    if config.problem == "sinusoid":
        return f"{config.shots} points, {order}"
    return f"{config.ways}-way {config.shots}-shot, {order}"


def _where(config: TrainConfig) -> str:
    """What the work is done on."""
    import torch

    if config.device == "cpu":
        return f"{torch.get_num_threads()} threads"
    return f"{torch.cuda.get_device_name(config.device)} ({config.device})"


def _download_notice(console: Console) -> Any:
    told: set[tuple[int, int]] = set()

    def notice(have: int, total: int | None) -> None:
        tenth = 10 * have // total if total else 0
        if total and (total, tenth) not in told:
            told.add((total, tenth))
            console.print(f"downloading Omniglot: {10 * tenth} % of {total / 1e6:.1f} MB", highlight=False)

    return notice
