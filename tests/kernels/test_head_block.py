"""A linear layer with the loss of its results: its Triton kernels against torch.func in float64, and in meta-steps."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastmeta as fm
from fastmeta.core import native
from fastmeta.core.task_op import Call, Need, Unsupported
from fastmeta.engine import joined
from fastmeta.ops.linear_block import HeadBlock
from tests.kernels.running import device, reversed_programs
from tests.kernels.test_linear_block import close
from tests.oracle import maml_loop, total_error

aten: Any = torch.ops.aten
MEAN, SUM = 1, 2
TASKS = 2
# rows, in, out; the last in two tiles of rows, of which one has a tail
SIZES = {"one": (1, 1, 1), "small": (5, 20, 7), "tiles": (70, 33, 34)}
LOSSES: dict[str, Callable[..., Tensor]] = {
    "classes": lambda z, y: F.cross_entropy(z, y),
    "summed classes": lambda z, y: F.cross_entropy(z, y, reduction="sum"),
    "ignored and smoothed": lambda z, y: F.cross_entropy(z, y, ignore_index=0, label_smoothing=0.1),
    "squares": lambda z, y: F.mse_loss(z, y),
    "summed squares": lambda z, y: F.mse_loss(z, y, reduction="sum"),
}
CALLS = {
    "classes": (MEAN, -100, 0.0),
    "summed classes": (SUM, -100, 0.0),
    "ignored and smoothed": (MEAN, 0, 0.1),
    "squares": (MEAN,),
    "summed squares": (SUM,),
}


def block(loss: str, size: str, *, bias: bool = True) -> HeadBlock:
    """The operation, of one task's calls."""
    rows, wide, out = SIZES[size]
    x, weight, b = torch.zeros(rows, wide), torch.zeros(out, wide), torch.zeros(out)
    linear = Call.example(aten.linear.default, x, weight, b if bias else None)
    z = torch.zeros(rows, out)
    reduction, *labels = CALLS[loss]
    if labels:
        y = torch.zeros(rows, dtype=torch.int64)
        return HeadBlock(linear, Call.example(aten.cross_entropy_loss.default, z, y, None, reduction, *labels))
    return HeadBlock(linear, Call.example(aten.mse_loss.default, z, z, reduction))


def operands(loss: str, size: str, *, shared: bool) -> dict[str, Tensor]:
    """Float32 numbers where kernels run."""
    rows, wide, out = SIZES[size]
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device())

    lead = () if shared else (TASKS,)
    labels = torch.randint(out, (TASKS, rows), generator=generator)
    labels[:, 0] = out - 1  # one that counts
    return {
        "x": draw(TASKS, rows, wide),
        "weight": draw(*lead, out, wide) / wide**0.5,
        "bias": draw(*lead, out),
        "target": labels.to(device()) if "classes" in loss or "ignored" in loss else draw(TASKS, rows, out),
        "x_dot": draw(TASKS, rows, wide),
        "weight_dot": draw(TASKS, out, wide) / wide**0.5,
        "bias_dot": draw(TASKS, out),
        "d_l": draw(TASKS),
        "d_l_dot": draw(TASKS),
        "d_z": draw(TASKS, rows, out),
        "d_z_dot": draw(TASKS, rows, out),
    }


class Truth:
    """All four maps of loss and results by torch.func, in float64; ``None`` is zero."""

    def __init__(self, loss: str, given: dict[str, Tensor]) -> None:
        self.given = {n: v.double().cpu() if v.is_floating_point() else v.cpu() for n, v in given.items()}
        self.of = torch.func.vmap(lambda x, w, b, y: self._one(loss, x, w, b, y))
        self.primal = tuple(self._tasked(n) for n in ("x", "weight", "bias"))

    @staticmethod
    def _one(loss: str, x: Tensor, w: Tensor, b: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        z = F.linear(x, w, b)
        return LOSSES[loss](z, y), z

    def _tasked(self, name: str) -> Tensor:
        value = self.given[name]
        shared = value.dim() == (1 if name == "bias" else 2)
        return torch.stack([value] * TASKS) if shared else value

    def forward(self, *primal: Tensor) -> tuple[Tensor, Tensor]:
        return self.of(*primal, self.given["target"])

    def dots(self, present: Sequence[str]) -> tuple[Tensor, ...]:
        names = ("x_dot", "weight_dot", "bias_dot")
        return tuple(self.given[n] if n in present else torch.zeros_like(self.given[n]) for n in names)

    def cotangents(self, *names: str) -> tuple[Tensor, ...]:
        return tuple(self.given[n] if n in names else torch.zeros_like(self.given[n]) for n in ("d_l", "d_z"))

    def backward(self, d: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return torch.func.vjp(self.forward, *self.primal)[1](d)

    def tangent(self, dots: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        return torch.func.jvp(self.forward, self.primal, dots)[1]

    def tangent_backward(self, dots: tuple[Tensor, ...], d: tuple[Any, Any], d_dot: tuple[Any, Any]) -> Any:
        def gradient(*primal_and_cotangents: Tensor) -> Any:
            return torch.func.vjp(self.forward, *primal_and_cotangents[:3])[1](primal_and_cotangents[3:])

        return torch.func.jvp(gradient, (*self.primal, *d), (*dots, *d_dot))[1]


EVERY = (Need.TASK,) * 3 + (Need.NONE,)
CASES = [(loss, size, shared) for loss in LOSSES for size, shared in (("small", False), ("tiles", True))]


@pytest.mark.parametrize(("loss", "size", "shared"), [*CASES, ("squares", "one", False), ("classes", "one", True)])
def test_the_maps_are_the_derivatives(loss: str, size: str, shared: bool, nan_poison: None) -> None:
    given = operands(loss, size, shared=shared)
    rows, wide, out = SIZES[size]
    truth, op = Truth(loss, given), block(loss, size)
    longest = 2 * max(wide, rows) * out
    with reversed_programs():
        results, saved = op.forward([given[n] for n in ("x", "weight", "bias", "target")])
        for got, want in zip(results, truth.forward(*truth.primal), strict=True):
            close(got, want, longest)
        d_x = op.backward(saved, (given["d_l"], None), EVERY)
        for got, want in zip(d_x, truth.backward(truth.cotangents("d_l")), strict=False):
            close(got, want, longest)
        names = "x_dot", "weight_dot", "bias_dot"
        y_dot, saved_dot = op.tangent(saved, (*(given[n] for n in names), None))
        for got, want in zip(y_dot, truth.tangent(truth.dots(names)), strict=True):
            close(got, want, longest)
        d_x_dot = op.tangent_backward(saved, saved_dot, (given["d_l"], None), (given["d_l_dot"], None), EVERY)
        there = truth.given["d_l_dot"], torch.zeros_like(truth.given["d_z_dot"])
        wanted = truth.tangent_backward(truth.dots(names), truth.cotangents("d_l"), there)
        for got, want in zip(d_x_dot, wanted, strict=False):
            close(got, want, longest)
        assert d_x[3] is None
        assert d_x_dot[3] is None


@pytest.mark.parametrize("present", [("x_dot",), ("weight_dot",), ("bias_dot",), ("x_dot", "bias_dot")], ids=str)
@pytest.mark.parametrize("loss", ["classes", "squares"])
def test_what_is_missing_is_zero(loss: str, present: tuple[str, ...]) -> None:
    given = operands(loss, "small", shared=False)
    truth, op = Truth(loss, given), block(loss, "small")
    _, saved = op.forward([given[n] for n in ("x", "weight", "bias", "target")])
    dots = [given[n] if n in present else None for n in ("x_dot", "weight_dot", "bias_dot")]
    y_dot, saved_dot = op.tangent(saved, (*dots, None))
    exact = truth.dots(present)
    for got, want in zip(y_dot, truth.tangent(exact), strict=True):
        close(got, want, 80)
    zero = truth.cotangents()
    straight = truth.given["d_l_dot"], zero[1]
    for d_l, d_l_dot in ((given["d_l"], None), (None, given["d_l_dot"]), (given["d_l"], given["d_l_dot"])):
        got = op.tangent_backward(saved, saved_dot, (d_l, None), (d_l_dot, None), EVERY)
        want = truth.tangent_backward(
            exact, truth.cotangents(*(() if d_l is None else ("d_l",))), zero if d_l_dot is None else straight
        )
        for a, b in zip(got, want, strict=False):
            if b.any():
                close(a, b, 80)
            else:
                assert a is None or not a.any()
    assert op.tangent(saved, (None,) * 4) == ((None, None), (None, None, None))


NEEDS = [(2, 0, 0, 0), (0, 2, 0, 0), (0, 0, 2, 0), (0, 1, 1, 0), (2, 1, 2, 0), (0, 0, 0, 0)]


@pytest.mark.parametrize("need", NEEDS, ids=str)
def test_what_is_wanted_with_cotangents_of_the_results(need: tuple[int, ...]) -> None:
    """What tasks share is summed over them, and a row's results may be read by another objective."""
    needs = tuple(Need(n) for n in need)
    given = operands("classes", "small", shared=True)
    truth, op = Truth("classes", given), block("classes", "small")
    _, saved = op.forward([given[n] for n in ("x", "weight", "bias", "target")])
    names = "x_dot", "weight_dot", "bias_dot"
    _, saved_dot = op.tangent(saved, (*(given[n] for n in names), None))
    dot = truth.given["d_l_dot"], truth.given["d_z_dot"]
    for results in (False, True):
        own = ("d_l", "d_z") if results else ("d_l",)
        d = given["d_l"], given["d_z"] if results else None
        d_dot = given["d_l_dot"], given["d_z_dot"] if results else None
        exact = truth.cotangents(*own), (dot if results else (dot[0], torch.zeros_like(dot[1])))
        for got, want in (
            (op.backward(saved, d, needs), truth.backward(exact[0])),
            (op.tangent_backward(saved, saved_dot, d, d_dot, needs), truth.tangent_backward(truth.dots(names), *exact)),
        ):
            for one, value, wanted in zip(got, want, needs, strict=False):
                assert (one is None) == (wanted is Need.NONE)
                if one is not None:
                    close(one, value.sum(0) if wanted is Need.SHARED else value, 80 * TASKS)


def test_without_a_bias_and_a_label_out_of_range() -> None:
    given = operands("classes", "small", shared=False)
    given["bias"] = torch.zeros_like(given["bias"])
    truth, op = Truth("classes", given), block("classes", "small", bias=False)
    (loss, z), saved = op.forward([given["x"], given["weight"], given["target"]])
    close(loss, truth.forward(*truth.primal)[0], 80)
    got = op.backward(saved, (given["d_l"], None), (Need.TASK, Need.TASK, Need.NONE))
    for one, want in zip(got[:2], truth.backward(truth.cotangents("d_l")), strict=False):
        close(one, want, 80)
    given["target"][1, 2] = 7
    (loss, z), _ = op.forward([given["x"], given["weight"], given["target"]])
    assert loss.isnan().tolist() == [False, True]
    assert z.isfinite().all()


def test_what_it_is_not_for() -> None:
    x, weight, z = torch.zeros(5, 20), torch.zeros(7, 20), torch.zeros(5, 7)
    y = torch.zeros(5, dtype=torch.int64)
    linear = Call.example(aten.linear.default, x, weight)
    losses = aten.cross_entropy_loss.default, aten.mse_loss.default
    for call, reason in (
        (Call.example(losses[0], z, y, torch.ones(7)), "must be a mean or sum"),
        (Call.example(losses[0], z, y, None, 0), "must be a mean or sum"),
        (Call.example(losses[0], z, torch.rand(5, 7)), "a target must be torch.int64"),
        (Call.example(losses[1], z, z.double()), "a target must be torch.float32"),
        (Call.example(aten.l1_loss.default, z, z), "must be a mean or sum"),
    ):
        with pytest.raises(Unsupported, match=reason):
            HeadBlock(linear, call)
    wide = Call.example(aten.linear.default, x, torch.zeros(65, 20))
    with pytest.raises(Unsupported, match="1 to 64 results"):
        HeadBlock(wide, Call.example(losses[0], torch.zeros(5, 65), y))


class TwoReaders(nn.Module):
    """Its results are read by the loss, and within it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        z = self.last(torch.tanh(self.first(x)))
        return z + 0.1 * z.square()


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "plain": lambda: nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)),
    "activated": lambda: nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3), nn.Sigmoid()),
    "two readers": TwoReaders,
}


@pytest.mark.parametrize(
    ("network", "loss", "options", "heads"),
    [
        ("plain", F.cross_entropy, {}, 1),
        ("plain", F.mse_loss, {"first_order": True}, 1),
        ("plain", F.cross_entropy, {"parameters": ["0.*"]}, 1),  # the head itself gets a gradient alone
        ("activated", F.mse_loss, {}, 0),
        ("two readers", F.mse_loss, {}, 0),
    ],
)
def test_meta_steps_agree_with_float64(
    network: str, loss: Any, options: dict[str, Any], heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    device()
    monkeypatch.setattr(joined, "IN_INTERPRETER", True)
    for missing in ("extension", "cuda_extension"):  # which would run the whole meta-step
        monkeypatch.setattr(native, missing, lambda: None)
    torch.manual_seed(3)
    model = NETWORKS[network]().double()

    def batch(n: int) -> tuple[Tensor, Tensor]:
        y = torch.randint(3, (TASKS, n)) if loss is F.cross_entropy else torch.randn(TASKS, n, 3, dtype=torch.float64)
        return torch.randn(TASKS, n, 6, dtype=torch.float64), y

    tasks = fm.TaskBatch(support=batch(4), query=batch(5))
    own = copy.deepcopy(model).to(device(), torch.float32)
    maml = fm.MAML(own, loss, lr=0.2, steps=2, plan="dense", **options)
    there = tasks.to(device(), torch.float32)
    assert [row.op for row in maml.explain(there).rows].count("head_block") == heads
    adapted = ["0.weight", "0.bias"] if "parameters" in options else None
    exact_loss, _, logits, exact = maml_loop(
        model, loss, tasks.support, tasks.query, 0.2, 2, "first_order" in options, adapted
    )
    value, found = maml.value_and_grad(there)
    assert float(value) == pytest.approx(float(exact_loss), rel=1e-5)
    assert total_error({n: g.cpu() for n, g in found.items()}, exact) <= 2e-6  # of a dozen small sums
    out = maml(there)  # with another objective on the results
    close(out.logits.detach(), logits, 8)
    (out.loss + out.logits.square().mean()).backward()
    theirs = fm.MAML(model, loss, lr=0.2, steps=2, plan="dense", executor="reference", **options)(tasks)
    (theirs.loss + theirs.logits.square().mean()).backward()
    exact = {n: p.grad for n, p in model.named_parameters()}
    assert total_error({n: p.grad.cpu() for n, p in own.named_parameters()}, exact) <= 2e-6
