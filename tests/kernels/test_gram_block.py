"""Layers that read the data and keep their weight as factors: the kernels against float64, and whole meta-steps."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastmeta as fm
from fastmeta.core import curves, native
from fastmeta.core.curves import BENT, KINDS, Curve
from fastmeta.engine import joined
from fastmeta.ops.linear_block import GramBlock
from tests.kernels.running import device, reversed_programs
from tests.kernels.test_linear_block import close
from tests.oracle import maml_loop, total_error

SHAPES = [(1, 1, 1, 1), (2, 5, 7, 20), (3, 33, 34, 40)]  # tasks, rows, rows of a factor, out


def drawn(seed: int = 0) -> Any:
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator).to(device())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_base_and_pairs(kind: str, shape: tuple[int, ...], nan_poison: None) -> None:
    from fastmeta.ops.linear_block import triton_gram as kernels

    tasks, count, rank, wide = shape
    draw, curve = drawn(), Curve(kind, 0.1)
    base, bias, s = draw(tasks, count, wide), draw(tasks, wide), draw(tasks, count, wide)
    scale = torch.tensor(-0.3, device=device())
    pairs = [
        kernels.Pair(draw(tasks, count, rank), draw(tasks, rank, wide), factor) for factor in (scale, 1.0, scale, 0.5)
    ]

    def summed(base: Tensor | None, pairs: list[Any], bias: Tensor | None) -> Tensor:
        total = torch.zeros(tasks, count, wide, dtype=torch.float64, device=device())
        total += 0 if base is None else base
        for pair in pairs:
            total += pair.scale * (pair.met.double() @ pair.left.double())
        return total + (0 if bias is None else bias.unsqueeze(1) if bias.dim() == 2 else bias)

    for base_, pairs_, bias_ in [
        (base, pairs[:1], bias),
        (None, pairs[1:3], bias[0]),
        (base, [], None),
        (None, pairs[3:], None),
    ]:
        z = summed(base_, pairs_, bias_)
        with reversed_programs():
            y, kept = kernels.rows(curve, base_, tuple(pairs_), bias_, keep=True)
            dot, kept_dot = kernels.rows(curve, base_, tuple(pairs_), bias_, s, keep=kind in BENT)
        close(kept, z, 2 * rank)
        close(y, curves.value(curve, kept.double()), 2 * rank)
        close(dot, curves.slope(curve, s.double()) * z, 2 * rank)
        assert (kept_dot is None) == (kind not in BENT)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_cotangents_and_their_sum(kind: str, shape: tuple[int, ...], nan_poison: None) -> None:
    from fastmeta.ops.linear_block import triton_gram as kernels

    tasks, count, _, wide = shape
    draw, curve = drawn(1), Curve(kind, 0.1)
    s, d, d_dot, z_dot = (draw(tasks, count, wide) for _ in range(4))
    slope, bend = curves.slope(curve, s.double()), curves.bend(curve, s.double())
    with reversed_programs():
        d_z, total = kernels.summed(curve, s, d, bias=True)
        both, both_total = kernels.summed(curve, s, d, d_dot, z_dot, tangent=True, bias=True)
        straight, none = kernels.summed(curve, s, None, d_dot, tangent=True)
    close(d_z, slope * d, 1)
    close(total, (slope * d).sum(1), count)
    close(both, slope * d_dot + bend * z_dot * d, 1)
    close(both_total, both.double().sum(1), 4 * count)
    close(straight, slope * d_dot, 1)
    assert none is None


NETWORKS = {
    "relu": lambda: nn.Sequential(nn.Linear(40, 9), nn.ReLU(), nn.Linear(9, 3)),
    "gelu": lambda: nn.Sequential(nn.Linear(40, 9, bias=False), nn.GELU(), nn.Linear(9, 3)),
    "alone": lambda: nn.Sequential(nn.Linear(40, 3)),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "learned rates": {"lr": "rates"},
    "a rate each": {"lr": "each"},
    "first order": {"first_order": True},
    "frozen bias": {"parameters": ["0.weight", "*2.*"]},
    "momentum": {"lr": "momentum"},
}


@pytest.mark.parametrize(
    ("network", "options"), [("gelu", "plain"), ("alone", "plain"), *(("relu", o) for o in OPTIONS)], ids=str
)
def test_meta_steps_agree_with_float64(network: str, options: str, monkeypatch: pytest.MonkeyPatch) -> None:
    device()
    monkeypatch.setattr(joined, "IN_INTERPRETER", True)
    for missing in ("extension", "cuda_extension"):  # which would run the whole meta-step
        monkeypatch.setattr(native, missing, lambda: None)
    ran = []
    forward = GramBlock.forward
    monkeypatch.setattr(GramBlock, "forward", lambda self, x: ran.append(self.name) or forward(self, x))
    torch.manual_seed(3)
    model = NETWORKS[network]().double()
    tasks = fm.TaskBatch(
        support=(torch.randn(2, 4, 40, dtype=torch.float64), torch.randint(3, (2, 4))),
        query=(torch.randn(2, 5, 40, dtype=torch.float64), torch.randint(3, (2, 5))),
    )

    def learner(dtype: torch.dtype, **more: Any) -> fm.MAML:
        settings = dict(OPTIONS[options])
        own = copy.deepcopy(model).to(device(), dtype)
        if settings.get("lr") == "rates":
            settings["lr"] = nn.Parameter(torch.tensor([0.2, 0.1, 0.3], dtype=dtype, device=device()))
        elif settings.get("lr") == "each":
            settings["lr"] = {name: 0.1 + 0.05 * i for i, (name, _) in enumerate(own.named_parameters())}
        elif settings.pop("lr", None) == "momentum":
            settings |= {"lr": None, "inner": fm.inner.SGD(0.2, momentum=0.5)}
        settings = {"lr": 0.2, "steps": 3} | settings | more
        return fm.MAML(own, F.cross_entropy, **settings)

    plan = {"0.weight": "factored", "*": "dense"}
    maml = learner(torch.float32, plan=plan)
    batch = tasks.to(device(), torch.float32)
    loss, found = maml.value_and_grad(batch)
    assert ran == ["gram_block"] * 4  # three steps and the query set
    assert "gram_block" in str(maml.explain(batch))
    exact_loss, exact = learner(torch.float64, plan="dense", executor="reference").value_and_grad(tasks.to(device()))
    assert float(loss) == pytest.approx(float(exact_loss), rel=1e-5)
    assert total_error(found, exact) <= 2e-6  # of a dozen small sums
    if options == "plain":
        truth = maml_loop(model, F.cross_entropy, tasks.support, tasks.query, 0.2, 3)[3]
        assert total_error({name: g.cpu() for name, g in found.items()}, truth) <= 2e-6


def test_a_weight_that_a_step_adds_up_is_no_formed_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is factors until then, which blocks for formed weights cannot read."""
    device()
    monkeypatch.setattr(joined, "IN_INTERPRETER", True)
    for missing in ("extension", "cuda_extension"):
        monkeypatch.setattr(native, missing, lambda: None)
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    sets = [(torch.randn(2, n, 1, dtype=torch.float64), torch.randn(2, n, 1, dtype=torch.float64)) for n in (3, 4)]
    maml = fm.MAML(copy.deepcopy(model).to(device(), torch.float32), F.mse_loss, lr=0.1, steps=2)
    tasks = fm.TaskBatch(*sets).to(device(), torch.float32)
    _, programs = maml.prepare(tasks)
    assert programs is not None
    if not torch.cuda.is_available():  # which may find another plan the better one
        assert programs.support.factored == programs.support.bounded == {"0.weight", "4.weight"}
    truth = maml_loop(model, F.mse_loss, *sets, 0.1, 2)[3]
    found = {name: d.cpu() for name, d in maml.value_and_grad(tasks)[1].items()}
    assert total_error(found, truth) <= 2e-6
