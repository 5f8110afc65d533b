"""The plan that the cost model chooses, against the times of both plans forced."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastmeta as fm
from fastmeta.core import rates
from tests.engine.cases import WAYS

# One kind of machine (AMD Zen 3, two threads, AVX2): its rates as `fastmeta doctor --calibrate` measures them, and, of
# another day, milliseconds of meta-gradients with formed weights on the native executor and with factors, as `python -m
# benchmarks.scaling` does.
RATES = rates.Rates(
    flops=8.1e10, native=1.27e11, bytes=2.4e10, near=2.88e10, cache=1 << 19, last=1 << 24, call_s=5e-5, measured=True
)
# Tasks, inner steps, samples, width, layers.
MEASURED = {
    (2, 3, 5, 256, 2): (2.18, 13.16),
    (32, 3, 5, 256, 2): (19.34, 27.37),
    (16, 1, 5, 256, 2): (5.28, 9.5),
    (16, 8, 5, 256, 2): (32.86, 70.1),
    (16, 3, 1, 256, 2): (7.06, 16.92),
    (16, 3, 40, 256, 2): (47.57, 77.72),
    (16, 3, 5, 64, 2): (0.48, 15.4),
    (16, 3, 5, 512, 2): (59.46, 31.71),
    (16, 3, 5, 1024, 2): (569.99, 98.16),
    (16, 3, 5, 256, 1): (3.13, 12.81),
    (16, 3, 5, 256, 4): (31.48, 46.73),
    (16, 3, 5, 256, 8): (101.93, 86.95),
    (16, 3, 5, 256, 16): (281.55, 179.76),
}


def perceptron(width: int, layers: int) -> nn.Sequential:
    widths = [width] * (layers + 1)
    hidden = [m for a, b in itertools.pairwise(widths) for m in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*hidden, nn.Linear(width, WAYS))


@pytest.mark.usefixtures("extension")
@pytest.mark.parametrize("point", MEASURED, ids=lambda point: ",".join(map(str, point)))
def test_the_quicker_of_both_plans_is_chosen(point: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rates, "known", lambda: RATES)
    tasks, steps, samples, width, layers = point
    maml = fm.MAML(perceptron(width, layers), F.cross_entropy, lr=0.01, steps=steps)
    sets = [(torch.randn(tasks, samples, width), torch.randint(WAYS, (tasks, samples))) for _ in range(2)]
    chosen = maml.explain(fm.TaskBatch(*sets)).executor
    formed, factors = MEASURED[point]
    assert ("take less time" in chosen) == (factors < formed), chosen
