"""Sums and activations: the kernels against the float64 reference, that against torch.func; and whole meta-steps."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastmeta as fm
from fastmeta.core import native
from fastmeta.core.curves import BENT, KINDS, Curve
from fastmeta.core.task_op import Call, Need, Unsupported
from fastmeta.engine import joined
from fastmeta.ops.sum_block import SumBlock, reference
from tests.kernels.running import device, reversed_programs
from tests.oracle import maml_loop, total_error

EPS = torch.finfo(torch.float32).eps
BOUND = 16 * EPS  # a curve rounds a few times
LAYOUTS = ("plain", "channels last", "expanded", "strided")


def drawn(layout: str) -> Tensor:
    """``[T, N, C, H, W]`` as it may lie, more than a program's elements."""
    shape = (2, 3, 5, 7, 6)
    if layout == "expanded":
        return torch.randn(1, *shape[1:]).expand(shape)
    if layout == "strided":
        return torch.randn(*shape, 2)[..., 1]
    if layout == "channels last":
        return torch.randn(2, 3, 7, 6, 5).permute(0, 1, 4, 2, 3)
    return torch.randn(shape)


def close(got: Tensor, want: Tensor) -> None:
    got = got.cpu().double()
    assert got.shape == want.shape
    assert (got - want).norm() <= BOUND * want.norm().clamp_min(1e-30)


@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_is_the_derivative(kind: str) -> None:
    curve = Curve(kind, 0.1)
    a, b, a_dot, b_dot, d_y, d_y_dot = torch.randn(6, 4, 3, dtype=torch.float64)

    def value(a: Tensor, b: Tensor) -> Tensor:
        return reference.forward(curve, a, b)[0]

    def gradient(a: Tensor, b: Tensor, d: Tensor) -> Any:
        return torch.func.vjp(value, a, b)[1](d)

    s = reference.forward(curve, a, b)[1]
    want, want_dot = torch.func.jvp(gradient, (a, b, d_y), (a_dot, b_dot, d_y_dot))
    z_dot = a_dot + b_dot
    y_dot = torch.func.jvp(value, (a, b), (a_dot, b_dot))[1]
    torch.testing.assert_close(reference.backward(curve, s, d_y), want[0])
    torch.testing.assert_close(reference.tangent(curve, s, z_dot), y_dot)
    torch.testing.assert_close(reference.tangent_backward(curve, s, z_dot, d_y, d_y_dot), want_dot[1])


def block(kind: str, summed: bool) -> SumBlock:
    aten = torch.ops.aten
    x = torch.randn(3, 5, 7, 6)
    called: dict[str, Any] = {
        "identity": None,
        "leaky_relu": Call.example(aten.leaky_relu.default, x, 0.1),
    }
    curve = called[kind] if kind in called else Call.example(getattr(aten, kind).default, x)
    return SumBlock(Call.example(aten.add.Tensor, x, x) if summed else None, curve)


@pytest.mark.parametrize("summed", [True, False], ids=["sum", "alone"])
@pytest.mark.parametrize(
    ("kind", "layouts"),
    [
        *((kind, ("plain", "plain")) for kind in KINDS),
        *(("gelu", (a, b)) for a in LAYOUTS for b in LAYOUTS if ("plain" in (a, b)) != (a == b)),
    ],
    ids=str,
)
def test_the_maps_are_the_reference(kind: str, summed: bool, layouts: tuple[str, str], nan_poison: None) -> None:
    there = device()
    if kind == "identity" and not summed:
        return
    op, curve = block(kind, summed), Curve(kind, 0.1)
    torch.manual_seed(0)
    values = [drawn(layouts[i % 2]) for i in range(6)]
    wide, given = [v.double() for v in values], [v.to(there) for v in values]
    count = 1 + summed
    b, b_dot = (wide[1], wide[3]) if summed else (None, 0)
    z_dot = wide[2] + b_dot
    y, s = reference.forward(curve, wide[0], b)
    need = [Need.TASK] * count
    with reversed_programs():
        (got,), saved = op.forward(given[:count])
        (got_dot,), saved_dot = op.tangent(saved, tuple(given[2 : 2 + count]))
        (_, alone_dot) = op.tangent(saved, (given[2], None)[:count])
        back = op.backward(saved, (given[4],), need)
        bent = op.tangent_backward(saved, saved_dot, (given[4],), (given[5],), need)
        straight = op.tangent_backward(saved, saved_dot, (None,), (given[5],), need)
        unmoved = op.tangent_backward(saved, saved_dot, (given[4],), (None,), need)
    close(got, y)
    close(got_dot, reference.tangent(curve, s, z_dot))
    assert (alone_dot[0] is not None) == (kind in BENT)
    wanted = [
        (back, reference.backward(curve, s, wide[4])),
        (bent, reference.tangent_backward(curve, s, z_dot, wide[4], wide[5])),
        (straight, reference.backward(curve, s, wide[5])),
    ]
    for results, want in wanted:
        assert len(results) == count
        for d in results:
            close(d, want)
    if kind in BENT:
        close(unmoved[0], reference.tangent_backward(curve, s, z_dot, wide[4], torch.zeros_like(y)))
    else:
        assert unmoved == (None,) * count


def test_what_nothing_asks_for_is_not_given() -> None:
    there = device()
    op = block("gelu", summed=True)
    given = [torch.randn(2, 3, 5, 7, 6, device=there) for _ in range(3)]
    _, saved = op.forward(given[:2])
    assert op.tangent(saved, (None, None)) == ((None,), (None,))
    first, second = op.backward(saved, (given[2],), [Need.NONE, Need.TASK])
    assert first is None
    assert second is not None


def test_what_has_no_kernel_is_refused() -> None:
    aten, x, row = torch.ops.aten, torch.randn(3, 4), torch.randn(4)
    for call in (
        Call.example(aten.add.Tensor, x, row),
        Call.example(aten.add.Tensor, x, x, alpha=2),
        Call.example(aten.sub.Tensor, x, x),
        Call.example(aten.add.Tensor, x, 1.0),
        Call.example(aten.add.Tensor, x.double(), x.double()),
    ):
        with pytest.raises(Unsupported):
            SumBlock(call, None)
    with pytest.raises(Unsupported, match=r"no kernels for aten\.exp"):
        SumBlock(None, Call.example(aten.exp.default, x))


class Residual(nn.Module):
    """Two paths that meet before an activation, and an activation that stands alone."""

    def __init__(self, curve: type[nn.Module]) -> None:
        super().__init__()
        self.first, self.second, self.short = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(4, 6)
        self.norm, self.head, self.curve = nn.LayerNorm(6), nn.Linear(6, 3), curve()

    def forward(self, x: Tensor) -> Tensor:
        h = self.curve(self.second(self.curve(self.first(x))) + self.short(x))
        return self.head(h + self.curve(self.norm(h)))


@pytest.mark.parametrize("curve", [nn.ReLU, nn.GELU])  # straight, and bent; the kernels are tested for all
def test_meta_steps_agree_with_float64(curve: type[nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    there = device()
    monkeypatch.setattr(joined, "IN_INTERPRETER", True)
    for missing in ("extension", "cuda_extension"):  # which would run the whole meta-step
        monkeypatch.setattr(native, missing, lambda: None)
    torch.manual_seed(2)
    model = Residual(curve).double()
    sets = [(torch.randn(2, n, 4, dtype=torch.float64), torch.randint(3, (2, n))) for n in (3, 5)]
    truth = maml_loop(model, F.cross_entropy, *sets, 0.2, 2)[3]
    batch = fm.TaskBatch(*sets).to(there, torch.float32)

    def learner(executor: Any) -> fm.MAML:
        own = copy.deepcopy(model).to(there, torch.float32)
        return fm.MAML(own, F.cross_entropy, lr=0.2, steps=2, plan="dense", executor=executor)

    def error(maml: fm.MAML) -> float:
        return total_error({n: d.cpu() for n, d in maml.value_and_grad(batch)[1].items()}, truth)

    maml = learner("auto")
    assert error(maml) <= 2 * error(learner("reference")) + 2e-6  # of a dozen small sums
    rows = maml.explain(batch).rows
    assert [row.op for row in rows].count("sum_block") == 3
    assert {row.op for row in rows}.isdisjoint({"sum", "activation"})
