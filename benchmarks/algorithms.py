"""``python -m benchmarks.algorithms``: every algorithm beside the others: its error, what it learns, its speed.

Errors are of the meta-gradient in float64, against an explicit loop over tasks. Accuracies are on unseen Omniglot
characters, after an equal number of meta-steps on equal tasks, and of each the weights of its best validation. With
``--speed`` nothing is trained: a meta-step is timed beside the loop that one writes by hand (``algorithm_loops.py``).
Runs into one folder of results make one table.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.algorithm_loops import loop_of
from benchmarks.machine import machine_line, use_threads
from fastmeta.bench.timing import Effort, interleave
from fastmeta.core import files
from fastmeta.learner.algorithms import learner_of
from fastmeta.learner.config import ALGORITHMS, TrainConfig, defaults
from fastmeta.learner.problems import build
from fastmeta.learner.results import judge, load_learner
from fastmeta.learner.run import open_new
from fastmeta.learner.training import Trainer
from tests.algorithms.exactness import errors
from tests.oracle import total_error

# What differs from MAML's settings. Steps are as many for all, so that a meta-step sees as much; rates are each one's.
SETTINGS: dict[str, dict[str, Any]] = {
    "metasgd": {"inner_lr": 0.1},
    "reptile": {"inner_lr": 0.05},
    "imaml": {"inner_lr": 0.1},
    "protomaml": {"inner_lr": 0.05},
    "cavia": {"inner_lr": 20.0},
    "mamlpp": {"inner_lr": 0.1},
}
EXACT = 1e-9  # in float64; what is timed has to be the same gradient


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
        machine: where it was trained.
        loop_ms, fastmeta_ms: medians of a meta-gradient in float32, by the loop and by fastmeta.
        timed_on: where these were measured.
    """

    algorithm: str
    error: float
    accuracy: float | None = None
    ci95: float | None = None
    before: float | None = None
    step: int | None = None
    seconds: float | None = None
    settings: dict[str, Any] | None = None
    machine: str | None = None
    loop_ms: float | None = None
    fastmeta_ms: float | None = None
    timed_on: str | None = None


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


def trained(row: Row, config: TrainConfig, test_tasks: int) -> Row:
    """The row with what the algorithm has learned."""
    with tempfile.TemporaryDirectory() as folder:
        run = open_new(Path(folder) / "run", config)
        trainer = Trainer(config, build(config), run)
        trainer.fit()
        learner, problem, _, step = load_learner(run.folder)
        found = judge(learner, problem, config, step, tasks=test_tasks)
    return replace(
        row,
        accuracy=found["after"],
        ci95=found["after_ci95"],
        before=found["before"],
        step=step,
        seconds=trainer.state.seconds,
        settings=config.to_json() | {"data": None},
        machine=machine_line(),
    )


def timed(row: Row, config: TrainConfig, effort: Effort) -> Row:
    """The row with the time of a meta-step, and of the loop's, in turns.

    Raises:
        RuntimeError: the two do not agree in float64.
    """
    calls = {}
    for dtype in (torch.float64, torch.float32):
        problem = build(config)
        tasks = problem.sampler("train", config.meta_batch).sample().to(dtype=dtype)
        learner = learner_of(config, dataclasses.replace(problem, model=problem.model.to(dtype)))
        loop, ours = loop_of(row.algorithm, learner, tasks), lambda: learner.value_and_grad(tasks)[1]  # noqa: B023
        if dtype is torch.float64:
            error = total_error(ours(), loop())
            if not error <= EXACT:
                raise RuntimeError(f"{row.algorithm}: loop and fastmeta must agree to {EXACT} in float64, got {error}")
        calls = {"loop": loop, "fastmeta": ours}
    times = interleave(calls, effort)
    medians = {name: 1e3 * statistics.median(found.seconds) for name, found in times.items()}
    return replace(row, loop_ms=medians["loop"], fastmeta_ms=medians["fastmeta"], timed_on=machine_line())


def table(rows: Iterable[Row]) -> str:
    """The rows as Markdown."""
    columns = ["error against float64", "accuracy", "before adaptation", "rate", "best at step"]
    columns += ["meta-step", "loop / fastmeta"]
    lines = [f"| algorithm | {' | '.join(columns)} |", f"|---|{'---:|' * len(columns)}"]
    for row in rows:
        cells = [""] * 6
        if row.accuracy is not None and row.ci95 is not None and row.before is not None and row.settings is not None:
            cells[0] = f"{100 * row.accuracy:.2f} % ± {100 * row.ci95:.2f}"
            cells[1] = f"{100 * row.before:.1f} %"
            cells[2:4] = [f"{row.settings['inner_lr']:g}", f"{row.step}"]
        if row.loop_ms is not None and row.fastmeta_ms is not None:
            cells[4:] = [f"{row.fastmeta_ms:.3g} ms", f"{row.loop_ms / row.fastmeta_ms:.2f}"]
        lines.append(f"| {row.algorithm} | {row.error:.1e} | {' | '.join(cells)} |")
    return "\n".join(lines)


def about(options: argparse.Namespace) -> str:
    """The setting, which all rows of a table share."""
    return (
        f"Omniglot, 5-way 1-shot, {options.filters} filters, {options.inner_steps} inner steps, {options.iterations} "
        f"meta-steps of {options.meta_batch} tasks, {options.test_tasks} test tasks, transductive batch norm."
    )


def read(folder: Path, said: str) -> dict[str, Row]:
    """The rows of earlier runs into a folder, by algorithm.

    Raises:
        ValueError: the folder has results of another setting, or something else.
    """
    path = folder / "algorithms.json"
    if not path.is_file():
        return {}
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        found, rows = record["about"], [Row(**row) for row in record["rows"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} must be a table of algorithms, got {error!r}; choose another folder") from error
    if found != said:
        raise ValueError(f"{path} must be of this setting, {said!r}, got {found!r}; choose another folder")
    return {row.algorithm: row for row in rows}


def write(rows: Sequence[Row], said: str, folder: Path) -> list[Path]:
    """Markdown and JSON into the folder."""
    files.make_folder(folder)
    text, record = folder / "algorithms.md", folder / "algorithms.json"
    places = [f"Trained: {line}" for line in sorted({row.machine for row in rows if row.machine})]
    places += [f"Timed: {line}" for line in sorted({row.timed_on for row in rows if row.timed_on})]
    if any(row.loop_ms for row in rows):
        places.append(
            "A meta-step is `value_and_grad` of one meta-batch in float32, the loop its hand-written form in plain "
            "PyTorch (`benchmarks/algorithm_loops.py`), which gives the same gradient: medians of interleaved turns."
        )
    files.write_text(text, "\n\n".join(["# Algorithms", said, *places, table(rows)]) + "\n")
    files.write_json(record, {"about": said, "rows": [asdict(row) for row in rows]})
    return [text, record]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="omniglot28.npz or the folder of the original data")
    parser.add_argument("--algorithm", action="append", choices=ALGORITHMS, help="default: all")
    parser.add_argument("--speed", action="store_true", help="time a meta-step beside a loop, instead of training")
    parser.add_argument("--budget", type=float, default=15.0, help="with --speed: seconds of timing an algorithm")
    parser.add_argument("--iterations", type=int, default=2000, help="meta-steps of each algorithm")
    parser.add_argument("--inner-steps", type=int, default=3)
    parser.add_argument("--meta-batch", type=int, default=8)
    parser.add_argument("--filters", type=int, default=32)
    parser.add_argument("--test-tasks", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--results", type=Path, help="folder of JSON and Markdown, whose rows of the same setting are kept or replaced"
    )
    options = parser.parse_args(arguments)
    use_threads(options.threads)
    earlier = read(options.results, about(options)) if options.results else {}
    found = errors()
    rows = {name: replace(earlier.get(name, Row(name, 0.0)), error=found[name]) for name in ALGORITHMS}
    for name in options.algorithm or ALGORITHMS:
        config = settings_of(name, options)
        if options.speed:
            rows[name] = timed(rows[name], config, Effort(budget_s=options.budget))
        else:
            rows[name] = trained(rows[name], config, options.test_tasks)
        print(table([rows[name]]).splitlines()[-1], flush=True)
        if options.results:
            write([*rows.values()], about(options), options.results)
    print(f"\n{table(rows.values())}")


if __name__ == "__main__":
    main()
