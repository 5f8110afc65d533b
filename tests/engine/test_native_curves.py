"""Activations of the native executor point by point: value, slope and bend in float32, on each instruction set."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastmeta as fm
from tests.oracle import maml_loop

# The middle, the ends, and both sides of where an implementation goes from one formula to another.
POINTS = torch.cat([torch.linspace(-9, 9, 3001), torch.linspace(-1.51, -1.49, 40), torch.linspace(1.49, 1.51, 41)])


def curve(activation: nn.Module) -> nn.Module:
    """An activation of weights alone: one sample of one, so that each weight is a point."""
    line = nn.Linear(1, len(POINTS), bias=False)
    with torch.no_grad():
        line.weight.copy_(POINTS[:, None])
    return nn.Sequential(line, activation)


def half_squares(y: Tensor, target: Tensor) -> Tensor:
    return F.mse_loss(y, target) * len(POINTS) / 2


@pytest.mark.parametrize("activation", [nn.Tanh(), nn.Sigmoid(), nn.SiLU(), nn.GELU()], ids=lambda a: type(a).__name__)
@pytest.mark.usefixtures("instruction_set")
def test_points_of_a_curve(activation: nn.Module) -> None:
    """``dJ/dz = (f(p) - t) f'(p) (1 - lr (f'(z)^2 + (f(z) - t) f''(z)))`` with ``p = z - lr (f(z) - t) f'(z)``."""
    model = curve(activation)
    with torch.no_grad():
        x, target = torch.ones(1, 1, 1), activation(POINTS)[None, None] - 1
    tasks = fm.TaskBatch((x, target), (x, target))
    ours = fm.MAML(model, half_squares, lr=0.5, executor="native")
    double = tasks.to(dtype=torch.float64)
    right = maml_loop(copy.deepcopy(model).double(), half_squares, double.support, double.query, 0.5, 1)
    torchs = maml_loop(model, half_squares, tasks.support, tasks.query, 0.5, 1)

    def error(found: Tensor, wanted: Tensor) -> float:
        return float((found.double() - wanted).abs().max())

    # 1e-6: a few units in the last place of numbers up to 9, where torch may have none
    assert error(ours(tasks).logits, right[2]) <= 2 * error(torchs[2], right[2]) + 1e-6
    found, wanted, theirs = (grads["0.weight"] for grads in (ours.value_and_grad(tasks)[1], right[3], torchs[3]))
    assert error(found, wanted) <= 2 * error(theirs, wanted) + 1e-6
