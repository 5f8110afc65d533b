"""``fastmeta demo``: exact gradients, a learner trained on embedded data, and the time of a meta-step."""

from __future__ import annotations

import copy
import functools
import statistics
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import torch
import torch.nn.functional as F
import typer
from torch import nn

from fastmeta.cli import peers
from fastmeta.core import files
from fastmeta.core.rounding import nudged
from fastmeta.learner.config import TrainConfig, defaults
from fastmeta.learner.problems import Problem, build
from fastmeta.tasks import TaskBatch

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from fastmeta.algorithms.maml import MAML
    from fastmeta.learner.evaluation import Evaluation

EXACT = 1e-9  # float64: rounding accumulates to about 1e-13 here, any wrong term shows above 1e-3
NUDGES = 4  # copies of the weights, moved in their last place, by which the loop's own float32 error is judged
FACTOR = 2.0  # float32: at most twice the largest of these errors
WRONG = "WRONG"
NOTES = """
Errors are the largest relative error of a parameter, against the loop in float64.
K: inner steps, T: tasks. Random weights adapt at the inner rate that suits them
best. In float32 the bound is twice the loop's largest error over copies of the
weights moved in their last place: rounding flips a ReLU or a maximum, and that
moves a gradient. A peer marked (off) is over the bound.
"""
PEERS = ("fastmeta", "PyTorch loop", "torch.func.vmap")
RATES = (0.05, 0.1, 0.2, 0.4)  # random weights are shown at the inner rate that suits them best


@dataclass(frozen=True)
class Workload:
    """A meta-step that is checked and timed."""

    name: str
    model: nn.Module
    loss: peers.Loss
    tasks: TaskBatch
    lr: float
    steps: int

    def double(self) -> Workload:
        """The same in float64."""
        model = copy.deepcopy(self.model).double()
        return replace(self, model=model, tasks=self.tasks.to(dtype=torch.float64))

    @functools.cached_property
    def maml(self) -> MAML:
        """The learner; it is traced once, by the first meta-step."""
        from fastmeta.algorithms.maml import MAML

        return MAML(self.model, self.loss, lr=self.lr, steps=self.steps, engine="program")

    def nudged(self, seed: int) -> Workload:
        """The same with every weight moved by up to one unit in its last place."""
        return replace(self, model=nudged(self.model, seed, ulps=1))

    def fused(self) -> peers.Gradients:
        """The meta-gradient as a user of fastmeta asks for it: forward, then ``backward()``."""
        self.model.zero_grad(set_to_none=True)
        self.maml(self.tasks).loss.backward()
        return {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}

    def loop(self) -> peers.Gradients:
        """The same by a hand-written loop."""
        return peers.loop(self.model, self.loss, self.tasks, self.lr, self.steps)[1]

    def vmapped(self) -> peers.Gradients:
        """The same by ``torch.func.vmap``."""
        return peers.vmapped(self.model, self.loss, self.tasks, self.lr, self.steps)[1]


@dataclass(frozen=True)
class Section:
    """A part of the table: its heading and its rows, four cells each."""

    heading: tuple[str, str, str, str]
    rows: list[tuple[str, str, str, str]]


def demo(
    out: Annotated[Path, typer.Option(help="Folder for the pictures.")] = Path("runs/demo"),
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of PyTorch.", show_default=False)] = None,
    iterations: Annotated[int, typer.Option(min=1, help="Meta-steps on the digits.")] = 400,
    waves: Annotated[int, typer.Option(min=1, help="Meta-steps on the sine waves.")] = 3000,
    tasks: Annotated[int, typer.Option(min=2, help="Tasks of each test.")] = 100,
    seconds: Annotated[float, typer.Option(min=0, help="Time for timing each workload.")] = 6.0,
) -> None:
    """Check the meta-gradient, train on embedded data, time a meta-step; print one table and write three pictures.

    The status is 1 if the meta-gradient is not that of hand-written PyTorch.
    """
    from rich.console import Console

    started = time.monotonic()
    files.make_folder(out)
    if threads is not None:
        torch.set_num_threads(threads)
    console = Console()
    loads = workloads()
    console.print("comparing the meta-gradient with hand-written PyTorch ...")
    checked = [row for load in loads for row in check(load)]
    sections = [Section(("meta-gradient error", *PEERS), checked)]
    with tempfile.TemporaryDirectory(prefix="fastmeta-demo-") as scratch:
        sections.append(train_digits(console, iterations, tasks, out, Path(scratch) / "digits"))
        sections.append(train_waves(console, waves, 2 * tasks, out, Path(scratch) / "waves"))
    console.print("timing the meta-step ...")
    sections.append(Section(("time of a meta-step", *PEERS), [measure(load, seconds) for load in loads]))
    console.print(tabulate(sections))
    console.print(NOTES.strip(), highlight=False, soft_wrap=True)
    names = ", ".join(sorted(p.name for p in out.glob("*.png")))
    console.print(f"pictures in {out}: {names}", highlight=False, soft_wrap=True)
    console.print(f"{time.monotonic() - started:.0f} s on {torch.get_num_threads()} threads", highlight=False)
    if any(WRONG in row[1] for row in checked):
        raise RuntimeError(f"demo: the meta-gradient must be that of hand-written PyTorch; see the rows marked {WRONG}")


def workloads() -> list[Workload]:
    """A convolutional net with batch norm on the digits, and the paper's network on sine waves.

    The images get a little noise. On even paper, pixels in a row are equal, and max pooling has no gradient where two
    values tie: which one it takes would be decided by the last bit of a convolution.
    """
    digits, sinusoid = build(defaults("digits")), build(defaults("sinusoid"))
    plain = digits.sampler("train", 16).sample()
    (xs, ys), (xq, yq) = plain.support, plain.query
    generator = torch.Generator().manual_seed(0)
    xs, xq = (x + 0.05 * torch.randn(x.shape, generator=generator) for x in (xs, xq))
    episodes, waves = TaskBatch((xs, ys), (xq, yq)), sinusoid.sampler("train", 25).sample()
    return [
        Workload("conv net K=1", digits.model, F.cross_entropy, episodes, 0.4, 1),
        Workload("conv net K=3", digits.model, F.cross_entropy, episodes, 0.2, 3),
        Workload("sine K=5", sinusoid.model, F.mse_loss, waves, 0.01, 5),
    ]


def check(load: Workload) -> list[tuple[str, str, str, str]]:
    """Error of the meta-gradient against float64 autograd, in float64 and in float32."""
    exact = load.double()
    truth = exact.loop()
    copies = [peers.relative_error(load.nudged(seed).loop(), truth) for seed in range(NUDGES)]
    rows = []
    for variant, kind in ((exact, "float64"), (load, "float32")):
        own, hand, func = (
            peers.relative_error(gradients(), truth) for gradients in (variant.fused, variant.loop, variant.vmapped)
        )
        bound = EXACT if kind == "float64" else FACTOR * max(hand, *copies)
        reference = "(the truth)" if kind == "float64" else f"{hand:.1e}"
        mark, off = "" if own <= bound else f" {WRONG}", "" if func <= bound else " (off)"
        rows.append((f"{load.name} {kind}", f"{own:.1e}{mark}", reference, f"{func:.1e}{off}"))
    return rows


def measure(load: Workload, seconds: float) -> tuple[str, str, str, str]:
    """Median times of the three, interleaved so that all meet the same moods of the machine."""
    contestants = (load.fused, load.loop, load.vmapped)
    for contestant in contestants:
        contestant()
    times: list[list[float]] = [[], [], []]
    end = time.monotonic() + seconds
    while len(times[0]) < 3 or time.monotonic() < end:
        for contestant, record in zip(contestants, times, strict=True):
            before = time.perf_counter()
            contestant()
            record.append(time.perf_counter() - before)
    own, hand, func = (1e3 * statistics.median(record) for record in times)
    return (
        f"{load.name} T={load.tasks.size}",
        f"{_short(own)} ms",
        f"{_short(hand)} ms ({_short(hand / own)}x)",
        f"{_short(func)} ms ({_short(func / own)}x)",
    )


def _short(value: float) -> str:
    """Three digits: a longer figure would widen its column and break the others' lines."""
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def train_digits(console: Console, iterations: int, tasks: int, out: Path, scratch: Path) -> Section:
    """Meta-train on some digits, test on others; compare with random weights."""
    from fastmeta.algorithms.maml import MAML
    from fastmeta.learner import plots
    from fastmeta.learner.evaluation import evaluate
    from fastmeta.learner.log import read_metrics
    from fastmeta.learner.run import Run

    config = defaults("digits").changed(iterations=iterations, val_every=max(1, iterations // 4))
    console.print(f"meta-training on the digits 1, 2, 3, 5, 7: {config.ways}-way {config.shots}-shot ...")
    untrained, trained = build(config), build(config)
    maml = fit(console, config, trained, scratch)
    plots.learning_curve(read_metrics(Run(scratch).metrics), out / "digits_learning_curve.png")

    def curve(learner: MAML, problem: Problem) -> list[Evaluation]:
        return [
            evaluate(learner, problem.sampler("test", 1), "accuracy", tasks=tasks, steps=steps, batch=50)
            for steps in range(config.eval_steps + 3)
        ]

    ours = curve(maml, trained)
    rate = torch.zeros(())
    plain = MAML(untrained.model, untrained.loss, lr=rate)
    attempts = []
    for value in RATES:
        rate.fill_(value)
        attempts.append(curve(plain, untrained))
    random = max(attempts, key=lambda found: found[config.eval_steps].after.mean)
    curves = {"meta-trained": ours, "random weights, best inner rate": random}
    points = {label: [(e.after.mean, e.after.ci95) for e in found] for label, found in curves.items()}
    plots.accuracy_by_step(points, 1 / config.ways, out / "digits_adaptation.png")
    heading = ("accuracy, new digits", "before", f"after {config.eval_steps} steps", "")
    rows = [
        (label, _percent(found[0]), _percent(found[config.eval_steps]), "")
        for label, found in (("meta-trained", ours), ("from random weights", random))
    ]
    return Section(heading, rows)


def train_waves(console: Console, iterations: int, tasks: int, out: Path, scratch: Path) -> Section:
    """Meta-train on sine waves and draw the adaptation."""
    from fastmeta.learner.results import draw_waves, judge

    config = defaults("sinusoid").changed(iterations=iterations, val_every=iterations, val_tasks=100)
    console.print(f"meta-training on sine waves: {config.shots} points a wave ...")
    problem = build(config)
    maml = fit(console, config, problem, scratch)
    record = judge(maml, problem, config, iterations, tasks=tasks)
    draw_waves(maml, config, out / "sinusoid_adaptation.png")
    heading = ("error, new waves", "before", f"after {record['steps']} steps", "")
    before, after = (f"{record[which]:.2f} ± {record[which + '_ci95']:.2f}" for which in ("before", "after"))
    return Section(heading, [("meta-trained", before, after, "")])


def fit(console: Console, config: TrainConfig, problem: Problem, folder: Path) -> MAML:
    """Train as ``fastmeta train`` does, with ``folder`` as the run's."""
    from fastmeta.learner.progress import Live, Silent
    from fastmeta.learner.run import open_new
    from fastmeta.learner.training import Trainer

    trainer = Trainer(config, problem, open_new(folder, config), Live(console) if console.is_terminal else Silent())
    trainer.fit()
    return trainer.maml


def tabulate(sections: list[Section]) -> Table:
    """The one table."""
    from rich.table import Table

    table = Table(show_header=False, title="fastmeta demo")
    for section in sections:
        table.add_row(*section.heading, style="bold")
        for row in section.rows:
            table.add_row(*row, style="red" if WRONG in row[1] else None)
        table.add_section()
    return table


def _percent(found: Evaluation) -> str:
    return f"{100 * found.after.mean:.1f} % ± {100 * found.after.ci95:.1f} %"
