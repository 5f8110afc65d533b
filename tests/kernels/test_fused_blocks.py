"""Fusing: networks of convolution blocks give the meta-gradient that their parts give, and ``explain()`` says what ran.

On a CPU kernels run in Triton's interpreter, which a planner only asks for here.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastmeta as fm
from fastmeta.core import triton_support
from fastmeta.core.task_op import TaskOp
from fastmeta.engine import fuse
from fastmeta.learner.models import conv_net
from fastmeta.ops.conv2d import Conv2d
from fastmeta.ops.conv_block import ConvBlock
from tests.kernels.running import device
from tests.oracle import maml_loop, relative_errors

WAYS, LR = 3, 0.1
SLACK = 2e-6  # rounding of float32 through a few sums of some hundred terms


@pytest.fixture(autouse=True)
def _float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """The parts multiply float32 as such on a GPU too."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def network(**options: Any) -> nn.Sequential:
    return conv_net(2, WAYS, filters=6, image_size=8, blocks=2, **options)


def tracked(momentum: float = 0.3) -> nn.Sequential:
    """Blocks with a bias, running statistics, and an activation of another slope."""
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1),
        nn.BatchNorm2d(6, momentum=momentum),
        nn.LeakyReLU(0.1),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 5, 3),
        nn.BatchNorm2d(5, momentum=momentum),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(20, WAYS),
    )


def tasks(count: int = 2) -> fm.TaskBatch:
    torch.manual_seed(1)
    sets = [(torch.randn(count, n, 2, 8, 8), torch.randint(WAYS, (count, n))) for n in (3, 4)]
    return fm.TaskBatch(*sets).to(device())


def noted(patch: pytest.MonkeyPatch) -> set[str]:
    """The convolutions that run from now on, by the name of their operation."""
    ran = set()

    def note(kind: type[TaskOp]) -> Any:
        forward = kind.forward

        def run(self: TaskOp, *given: Any) -> Any:
            ran.add(self.name)
            return forward(self, *given)

        return run

    for kind in (ConvBlock, Conv2d):
        patch.setattr(kind, "forward", note(kind))
    return ran


def gradients(
    model: nn.Module, fused: bool, monkeypatch: pytest.MonkeyPatch, steps: int = 1, **options: Any
) -> dict[str, Tensor]:
    """Of a meta-step, with the new buffers; whether blocks were fused is checked too."""
    model = copy.deepcopy(model).to(device())
    with monkeypatch.context() as patch:
        patch.setattr(fuse, "IN_INTERPRETER", fused)
        if not fused:
            patch.setattr(triton_support, "missing_reason", lambda device, dtype: "not asked for")
        maml = fm.MAML(model, F.cross_entropy, lr=LR, steps=steps, executor="reference", **options)
        ran = noted(patch)
        found = maml.value_and_grad(tasks())[1]
    assert ran == {"conv_block" if fused else "conv2d"}
    buffers = {name: b for name, b in model.named_buffers() if b.is_floating_point()}
    return {name: value.cpu() for name, value in (found | buffers).items()}


def compare(model: nn.Module, monkeypatch: pytest.MonkeyPatch, steps: int = 1, **options: Any) -> dict[str, Tensor]:
    """The fused meta-step is as near to float64's as the other, within twice; it is returned."""
    first_order = options.get("first_order", False)
    exact = tasks().to("cpu", torch.float64)
    wide = copy.deepcopy(model).double()
    right = maml_loop(wide, F.cross_entropy, exact.support, exact.query, LR, steps, first_order)[3]
    ours, theirs = (gradients(model, fused, monkeypatch, steps, **options) for fused in (True, False))
    errors = [relative_errors({name: found[name] for name in right}, right) for found in (ours, theirs)]
    for name, error in errors[0].items():
        assert error <= 2 * errors[1][name] + SLACK, (name, error, errors[1][name])
    for name in ours.keys() - right.keys():
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-5, atol=1e-6)
    return ours


@pytest.mark.slow
@pytest.mark.parametrize("first_order", [False, True], ids=["second order", "first order"])
@pytest.mark.parametrize("pool", ["max", "stride"])
def test_meta_gradients(pool: str, first_order: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    compare(network(pool=pool), monkeypatch, steps=1 if first_order else 2, first_order=first_order)


def test_running_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    moved = compare(tracked(), monkeypatch, update_running_stats=True)["1.running_mean"]
    assert not torch.equal(moved, torch.zeros(6))


def test_a_head_that_adapts_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks' parameters are shared by all tasks throughout, and their cotangents are sums over tasks."""
    torch.manual_seed(0)
    model = tracked()
    options: dict[str, Any] = {"parameters": ["8.*"]}
    exact = tasks().to("cpu", torch.float64)
    wide = copy.deepcopy(model).double()
    names = ["8.weight", "8.bias"]
    right = maml_loop(wide, F.cross_entropy, exact.support, exact.query, LR, 1, adapted_names=names)[3]
    errors = []
    for fused in (True, False):
        found = gradients(model, fused, monkeypatch, **options)
        errors.append(relative_errors({name: found[name] for name in right}, right))
    for name, error in errors[0].items():
        assert error <= 2 * errors[1][name] + SLACK, (name, error, errors[1][name])


def explained(model: nn.Module, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    monkeypatch.setattr(fuse, "IN_INTERPRETER", True)
    maml = fm.MAML(model.to(device(), dtype), F.cross_entropy, lr=LR, steps=1, executor="reference")
    return list(maml.explain(tasks().to(dtype=dtype)).rows)


def test_explain_names_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = explained(network(), torch.float32, monkeypatch)
    assert [row.backend for row in rows if row.op == "conv_block"] == ["triton"] * 2
    assert {"batch_norm", "activation", "max_pool"}.isdisjoint(row.op for row in rows)
    assert [row.shape for row in rows[:2]] == [(3, 6, 4, 4), (3, 6, 2, 2)]
    assert rows[0].flops > 0
    assert rows[0].saved > 0


def test_explain_says_why_a_convolution_is_not_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = explained(network(), torch.float64, monkeypatch)
    assert [row.op for row in rows].count("conv2d") == 2
    assert all("float64" in row.reason for row in rows if row.op == "conv2d")
    grouped = nn.Sequential(nn.Conv2d(2, 6, 3, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(216, WAYS))
    rows = explained(grouped, torch.float32, monkeypatch)
    assert [row.reason for row in rows if row.op == "conv2d"] == ["conv_block: a convolution with groups or dilation"]


class Branches(nn.Module):
    """A convolution whose result is read twice, and a normalisation by running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(2, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.norm, self.head = nn.BatchNorm2d(6), nn.Linear(6, WAYS)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return self.head((F.relu(h) + F.relu(self.norm(self.second(h)))).mean((2, 3)))


@pytest.mark.slow
def test_what_others_read_is_not_fused_away(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = Branches().eval()
    with monkeypatch.context() as patch:
        rows = explained(copy.deepcopy(model), torch.float32, patch)
    assert [row.op for row in rows].count("conv_block") == 2
    assert [row.op for row in rows].count("activation") == 2
    assert [row.reason for row in rows if row.op == "batch_norm"] == ["conv_block: batch norm by running statistics"]
    compare(model, monkeypatch)


def test_a_gpu_alone_fuses_by_itself() -> None:
    model = network().to(device())
    maml = fm.MAML(model, F.cross_entropy, lr=LR, steps=1, executor="reference")
    fused = "conv_block" in [row.op for row in maml.explain(tasks()).rows]
    assert fused == torch.cuda.is_available()
