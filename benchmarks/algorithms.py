"""``python -m benchmarks.algorithms``: every algorithm beside the others, by its error and by what it learns.

Errors are of the meta-gradient in float64, against an explicit loop over tasks. Accuracies are on unseen Omniglot
characters, after an equal number of meta-steps on equal tasks, and of each the weights of its best validation.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.machine import machine_line, use_threads
from fastmeta.core import files
from fastmeta.learner.config import ALGORITHMS, TrainConfig, defaults
from fastmeta.learner.problems import build
from fastmeta.learner.results import judge, load_learner
from fastmeta.learner.run import open_new
from fastmeta.learner.training import Trainer
from tests.algorithms.exactness import errors

# What differs from MAML's settings. Steps are as many for all, so that a meta-step sees as much; rates are each one's.
SETTINGS: dict[str, dict[str, Any]] = {
    "metasgd": {"inner_lr": 0.1},
    "reptile": {"inner_lr": 0.05},
    "imaml": {"inner_lr": 0.1},
    "protomaml": {"inner_lr": 0.05},
    "mamlpp": {"inner_lr": 0.1},
}


@dataclass(frozen=True)
class Row:
    """What became of one algorithm.

    Attributes:
        algorithm: its name.
        error: of its meta-gradient.
        accuracy, ci95: on test tasks after adaptation, and half the width of the 95 % confidence interval.
        before: accuracy without adaptation.
        step: the meta-step whose weights were best in validation.
        seconds: of training, validations included.
        settings: of the run.
    """

    algorithm: str
    error: float
    accuracy: float | None = None
    ci95: float | None = None
    before: float | None = None
    step: int | None = None
    seconds: float | None = None
    settings: dict[str, Any] | None = None


def settings_of(algorithm: str, options: argparse.Namespace) -> TrainConfig:
    return defaults("omniglot").changed(
        algorithm=algorithm,
        data=str(options.data),
        iterations=options.iterations,
        inner_steps=options.inner_steps,
        eval_steps=options.inner_steps,
        filters=options.filters,
        meta_batch=options.meta_batch,
        val_every=max(1, options.iterations // 10),
        seed=options.seed,
        **SETTINGS.get(algorithm, {}),
    )


def trained(config: TrainConfig, test_tasks: int, error: float) -> Row:
    with tempfile.TemporaryDirectory() as folder:
        run = open_new(Path(folder) / "run", config)
        trainer = Trainer(config, build(config), run)
        trainer.fit()
        learner, problem, _, step = load_learner(run.folder)
        found = judge(learner, problem, config, step, tasks=test_tasks)
    figures = found["after"], found["after_ci95"], found["before"], step, trainer.state.seconds
    return Row(config.algorithm, error, *figures, config.to_json() | {"data": None})


def table(rows: Sequence[Row]) -> str:
    """The rows as Markdown."""
    lines = [
        "| algorithm | error against float64 | accuracy | before adaptation | rate | best at step | training |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        cells = ["", "", "", "", ""]
        if row.accuracy is not None and row.ci95 is not None and row.before is not None and row.settings is not None:
            cells[0] = f"{100 * row.accuracy:.2f} % ± {100 * row.ci95:.2f}"
            cells[1] = f"{100 * row.before:.1f} %"
            cells[2:] = [f"{row.settings['inner_lr']:g}", f"{row.step}", f"{row.seconds:.0f} s"]
        lines.append(f"| {row.algorithm} | {row.error:.1e} | {' | '.join(cells)} |")
    return "\n".join(lines)


def write(rows: Sequence[Row], options: argparse.Namespace, folder: Path) -> list[Path]:
    said = (
        f"Omniglot, 5-way 1-shot, {options.filters} filters, {options.inner_steps} inner steps, {options.iterations} "
        f"meta-steps of {options.meta_batch} tasks, {options.test_tasks} test tasks, transductive batch norm."
    )
    files.make_folder(folder)
    text, record = folder / "algorithms.md", folder / "algorithms.json"
    files.write_text(text, f"# Algorithms\n\n{said}\n\n{machine_line()}\n\n{table(rows)}\n")
    files.write_json(record, {"about": said, "machine": machine_line(), "rows": [asdict(row) for row in rows]})
    return [text, record]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="omniglot28.npz or the folder of the original data")
    parser.add_argument("--algorithm", action="append", choices=ALGORITHMS, help="default: all")
    parser.add_argument("--iterations", type=int, default=2000, help="meta-steps of each algorithm")
    parser.add_argument("--inner-steps", type=int, default=3)
    parser.add_argument("--meta-batch", type=int, default=8)
    parser.add_argument("--filters", type=int, default=32)
    parser.add_argument("--test-tasks", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--results", type=Path, help="folder to write JSON and Markdown to, after each algorithm")
    options = parser.parse_args(arguments)
    use_threads(options.threads)
    of_gradients = errors()
    rows = []
    for algorithm in options.algorithm or ALGORITHMS:
        rows.append(trained(settings_of(algorithm, options), options.test_tasks, of_gradients[algorithm]))
        print(table(rows[-1:]).splitlines()[-1], flush=True)
        if options.results:
            write(rows, options, options.results)
    rows += [Row(name, error) for name, error in of_gradients.items() if name not in ALGORITHMS]
    print(f"\n{table(rows)}")
    if options.results:
        for path in write(rows, options, options.results):
            print(path)


if __name__ == "__main__":
    main()
