"""Regression on sine waves from ten points: MAML of second order beside first order, and a picture of each.

The problem of C. Finn, P. Abbeel, S. Levine, ICML 2017, section 5.1.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F

import fastmeta as fm
from examples.common import meta_train, table
from fastmeta.learner.evaluation import evaluate
from fastmeta.learner.plots import sinusoid_adaptation
from fastmeta.tasks.sinusoid import Sinusoid, grid, wave

STEPS = (1, 5, 10)  # inner steps that the table compares


def draw(learner: fm.MAML, seed: int, path: Path) -> None:
    """Three test waves, their ten points, and the network's curve before and after adaptation to them."""
    sampler = Sinusoid(3, seed=seed)
    amplitude, phase = sampler.draw()
    points = sampler.points(amplitude, phase, 10)
    x = grid()
    inputs = x.float().expand(3, -1, -1)
    curves = {k: learner.adapt(fm.TaskBatch(points), steps=k)(inputs).detach() for k in (0, 1, 10)}
    sinusoid_adaptation(x, wave(x, amplitude, phase), points, curves, path)


def main(arguments: Sequence[str] | None = None) -> dict[str, dict[int, float]]:
    """Train both, draw both; the mean squared error by order and number of inner steps."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--iterations", type=int, default=10000, help="meta-steps of each")
    parser.add_argument("--tasks", type=int, default=25, help="waves a meta-step")
    parser.add_argument("--test-waves", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/sinusoid"), help="folder of the pictures")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    errors: dict[str, dict[int, float]] = {}
    for order, kind in (("second", fm.MAML), ("first", fm.FOMAML)):
        torch.manual_seed(options.seed)  # both start from the same network and see the same waves
        learner = kind(fm.models.sinusoid_mlp(), F.mse_loss, lr=0.01, steps=1)
        sampler = Sinusoid(options.tasks, shots=10, seed=options.seed)
        meta_train(learner, sampler, options.iterations, 3e-3, f"{order} order")
        errors[order] = {}
        for steps in STEPS:
            waves = Sinusoid(shots=10, queries=100, seed=options.seed + 1)
            found = evaluate(learner, waves, "mse", tasks=options.test_waves, steps=steps)
            errors[order] |= {0: found.before.mean, steps: found.after.mean}
        draw(learner, options.seed + 2, options.out / f"{order}_order.png")
    rows = [[order, *(f"{errors[order][k]:.3f}" for k in (0, *STEPS))] for order in errors]
    table(
        "mean squared error of unseen waves after adaptation to ten points",
        ["order of the meta-gradient", "before", *(f"{k} step" + "s" * (k > 1) for k in STEPS)],
        rows,
    )
    print(f"pictures: {options.out}/second_order.png, {options.out}/first_order.png")
    return errors


if __name__ == "__main__":
    main()
