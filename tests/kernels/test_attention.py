"""Attention's Triton kernels: every map in float32 against the float64 reference, in the interpreter or on a GPU."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastmeta as fm
from fastmeta.core.dispatch import Backend
from fastmeta.engine import trace
from fastmeta.ops.attention import op, reference
from fastmeta.ops.attention.reference import Setting
from tests.kernels import running
from tests.ops.four_maps import SUMMATION_FACTOR
from tests.oracle import maml_loop, relative_error

pytestmark = pytest.mark.usefixtures("nan_poison")

ALL = (True, True, True)


@dataclass(frozen=True)
class Shape:
    """A call of attention as data; ``mask`` is the shape of one that broadcasts, or empty."""

    queries: int = 37
    keys: int = 37
    width: int = 32
    tasks: int = 2
    batch: int = 1
    heads: int = 2
    causal: bool = False
    mask: tuple[int, ...] = ()
    boolean: bool = False
    dropout: float = 0.0

    def __str__(self) -> str:
        kind = "causal" if self.causal else "" if not self.mask else "boolean" if self.boolean else "added"
        mask = "x".join(map(str, self.mask))
        return f"{self.tasks}x{self.batch}x{self.heads}-{self.queries}x{self.keys}x{self.width}{kind}{mask}"


@dataclass
class Operands:
    """Float64 operands, tangents and cotangents on a CPU; ``x_dot`` and ``d_o_dot`` may be missing."""

    setting: Setting
    x: list[Tensor]  # q, k, v
    mask: Tensor | None
    x_dot: list[Tensor | None]
    d_o: Tensor
    d_o_dot: Tensor | None


def draw(shape: Shape, layout: str = "packed") -> Operands:
    generator = torch.Generator().manual_seed(0)
    leading = shape.tasks, shape.batch

    def heads(rows: int) -> Tensor:
        if layout == "heads first":
            return torch.randn(*leading, shape.heads, rows, shape.width, dtype=torch.float64, generator=generator)
        columns = (2 if layout == "packed" else 1) * shape.heads * shape.width
        wide = torch.randn(*leading, rows, columns, dtype=torch.float64, generator=generator)
        return wide[..., -shape.heads * shape.width :].unflatten(-1, (shape.heads, shape.width)).transpose(2, 3)

    mask = None
    if shape.mask:
        drawn = torch.randn(shape.mask, dtype=torch.float64, generator=generator)
        mask = (drawn > -0.3 if shape.boolean else drawn).expand(*leading, shape.heads, shape.queries, shape.keys)
    x, x_dot = ([heads(shape.queries), heads(shape.keys), heads(shape.keys)] for _ in range(2))
    setting = Setting(shape.width**-0.5, shape.causal, shape.dropout)
    return Operands(setting, x, mask, list(x_dot), heads(shape.queries), heads(shape.queries))


def cast(value: Tensor | None, dtype: torch.dtype, device: torch.device) -> Tensor | None:
    """The same on ``device``, in its layout."""
    if value is None:
        return None
    moved = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)
    moved = value.to(device) if 0 in value.stride() else moved.copy_(value)
    return moved.to(dtype) if value.is_floating_point() else moved


def run(maps, operands: Operands, dtype: torch.dtype, device: torch.device, need=ALL) -> dict[str, Tensor]:
    """Every result of the four maps by name, on a CPU."""
    q, k, v, mask, *dots, d_o, d_o_dot = (
        cast(value, dtype, device)
        for value in (*operands.x, operands.mask, *operands.x_dot, operands.d_o, operands.d_o_dot)
    )
    setting = operands.setting
    torch.manual_seed(1)  # what dropout draws
    saved = maps.forward(q, k, v, mask, setting)
    dot = maps.tangent(saved, *dots, setting)
    d = maps.backward(saved, d_o, setting, need)
    d_dot = maps.tangent_backward(saved, dot, d_o, d_o_dot, setting, need)
    found = {"o": saved.o, "peak": saved.peak, "log_sum": saved.log_sum, "o_dot": dot.o, "lse_dot": dot.lse}
    found |= dict(zip(("d_q", "d_k", "d_v", "d_q_dot", "d_k_dot", "d_v_dot"), d + d_dot, strict=True))
    return {name: value.cpu() for name, value in found.items() if value is not None}


def kernels(operands: Operands, need=ALL) -> dict[str, Tensor]:
    device = running.device()
    from fastmeta.ops.attention import triton

    return run(triton, operands, torch.float32, device, need)


def check(operands: Operands, need=ALL) -> None:
    """The law of CONTRIBUTING.md; sums run over the keys, the queries and a head's width."""
    got = kernels(operands, need)
    truth = run(reference, operands, torch.float64, torch.device("cpu"), need)
    own = run(reference, operands, torch.float32, torch.device("cpu"), need)
    longest = max(operands.x[0].shape[-2], *operands.x[1].shape[-2:])
    slack = SUMMATION_FACTOR * torch.finfo(torch.float32).eps * math.sqrt(longest)
    assert got.keys() == truth.keys()
    for name, true in truth.items():
        finite = true.isfinite()
        assert torch.equal(got[name].isfinite(), finite), name
        # where everything cancels, as with a single key, what counts is the size of the terms, which are about 1
        scale = true[finite].norm().clamp_min(0.25 * math.sqrt(true.numel()))
        gap, plain = (((value[name].double() - true)[finite].norm() / scale).item() for value in (got, own))
        assert gap <= 2 * plain + slack, f"{name}: off by {gap:.2e}, allowed {2 * plain + slack:.2e}"


SHAPES = [
    Shape(),
    Shape(width=16),
    Shape(width=24, queries=70, keys=33),
    Shape(width=20, queries=5, keys=66),
    Shape(queries=1, keys=1, heads=1),
    Shape(queries=1, keys=40),
    Shape(queries=40, keys=1),
    Shape(queries=64, keys=64, tasks=1, heads=1),
    Shape(queries=9, keys=9, batch=3, heads=4),
    Shape(causal=True),
    Shape(causal=True, queries=80, keys=33, heads=1),
    Shape(causal=True, queries=33, keys=80, heads=1),
    Shape(mask=(2, 1, 1, 1, 37)),
    Shape(mask=(1, 1, 2, 37, 37)),
    Shape(mask=(37, 1)),
    Shape(mask=(2, 1, 1, 1, 37), boolean=True),
    Shape(mask=(2, 1, 2, 5, 3), boolean=True, queries=5, keys=3),  # some attend to nothing
    Shape(width=64, queries=40, keys=40, tasks=1, heads=1),
    Shape(width=128, queries=33, keys=35, tasks=1, heads=1),
    Shape(width=128, queries=1, keys=1),
    Shape(width=96, queries=70, keys=35, tasks=1, causal=True),
    Shape(width=100, queries=9, keys=70, mask=(2, 1, 1, 1, 70)),
    Shape(width=74, queries=5, keys=3, mask=(2, 1, 2, 5, 3), boolean=True),  # some attend to nothing
    Shape(width=7, queries=5, keys=6),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_map(shape: Shape) -> None:
    check(draw(shape))


@pytest.mark.parametrize("layout", ["heads first", "heads last"])
def test_layouts(layout: str) -> None:
    check(draw(Shape(batch=2, queries=9, keys=11), layout))


def test_memory_that_tasks_share() -> None:
    operands = draw(Shape(queries=9, keys=11))
    operands.x = [x[:1].expand_as(x) for x in operands.x]
    operands.d_o = operands.d_o[..., :1].expand_as(operands.d_o)
    check(operands)


def test_tangents_that_lie_otherwise() -> None:
    operands = draw(Shape(queries=9, keys=11))
    operands.x_dot = [x.mT.contiguous().mT for x in operands.x_dot]
    check(operands)


@pytest.mark.parametrize(
    "present", [(1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1), (0, 0, 0, 0), (1, 1, 1, 0)]
)
@pytest.mark.parametrize("width", [32, 96])
def test_missing_tangents_are_zero(present: tuple[int, ...], width: int) -> None:
    operands = draw(Shape(queries=9, keys=11, width=width))
    operands.x_dot = [x if name in present else None for x, name in zip(operands.x_dot, "qkv", strict=True)]
    operands.d_o_dot = operands.d_o_dot if "d_o" in present else None
    check(operands)


@pytest.mark.parametrize("need", [(True, False, False), (False, True, False), (False, False, True)])
@pytest.mark.parametrize("width", [32, 96])
def test_one_cotangent_alone(need: tuple[bool, bool, bool], width: int) -> None:
    check(draw(Shape(queries=9, keys=11, width=width)), need)


def test_all_masked() -> None:
    operands = draw(Shape(queries=5, keys=7, mask=(1, 7), boolean=True))
    operands.mask = torch.zeros_like(operands.mask)
    assert not any(value.any() for name, value in kernels(operands).items() if name != "peak")


def test_the_least_number_as_a_mask() -> None:
    """Some libraries add the least finite number to what is padded, and so to all keys of a query that is padding."""
    operands = draw(Shape(queries=5, keys=7, mask=(1, 7)))
    least = torch.finfo(torch.float32).min
    operands.mask = torch.zeros_like(operands.mask).masked_fill(torch.arange(7) > 3, least)
    operands.mask = operands.mask.index_fill(-2, torch.tensor([1]), least)
    got = kernels(operands)
    x = [cast(value, torch.float32, torch.device("cpu")).requires_grad_() for value in operands.x]
    mask, d_o = operands.mask.float(), operands.d_o.float()
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        o = F.scaled_dot_product_attention(*x, attn_mask=mask)
    # a few roundings of scores of size one, and sums over seven keys
    bound = 64 * torch.finfo(torch.float32).eps
    for name, value in zip(("o", "d_q", "d_k", "d_v"), (o, *torch.autograd.grad(o, x, d_o)), strict=True):
        assert (got[name] - value).norm() <= bound * value.norm().clamp_min(1.0), name
    # the float64 reference adds the same float32 number, beside which no score is lost: the padded query differs
    want = run(reference, operands, torch.float32, torch.device("cpu"))
    for name in ("o_dot", "d_q_dot", "d_k_dot", "d_v_dot"):
        assert (got[name] - want[name]).norm() <= bound * want[name].norm().clamp_min(1.0), name


def test_no_tasks() -> None:
    operands = draw(Shape(queries=5, keys=7))
    operands.x, operands.x_dot = [x[:0] for x in operands.x], [x[:0] for x in operands.x_dot]
    operands.d_o, operands.d_o_dot = operands.d_o[:0], operands.d_o_dot[:0]
    assert all(value.numel() == 0 for value in kernels(operands).values())


@pytest.mark.parametrize(("rows", "width"), [(70, 32), (40, 96)])
def test_programs_in_any_order_and_bits_in_every_run(rows: int, width: int) -> None:
    operands = draw(Shape(queries=rows, keys=rows, width=width, heads=1, mask=(2, 1, 1, 1, rows)))
    first = kernels(operands)
    with running.reversed_programs():
        again = kernels(operands)
    assert all(torch.equal(first[name], again[name]) for name in first)


# What rounding both operands of a product to 8 bits leaves of 1, over the products that a map chains.
BFLOAT16 = 8 * 2.0**-8


@pytest.mark.parametrize(("setting", "bound"), [("high", 8 * 2.0**-10), ("medium", BFLOAT16)])
@pytest.mark.parametrize("width", [32, 96])
def test_less_precise_products_are_asked_for(setting: str, bound: float, width: int) -> None:
    operands = draw(Shape(queries=40, keys=40, width=width, heads=1))
    truth = run(reference, operands, torch.float64, torch.device("cpu"))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(setting)
    try:
        got = kernels(operands)
    finally:
        torch.set_float32_matmul_precision(before)
    gaps = {name: relative_error(got[name].double(), true) for name, true in truth.items()}
    assert max(gaps.values()) <= bound, gaps
    if setting == "medium":
        assert gaps["o"] > 2.0**-14  # float32 products would be far closer


class Reader(nn.Module):
    """One layer of self-attention over rows, read by a head."""

    def __init__(self) -> None:
        super().__init__()
        self.packed = nn.Linear(8, 96)
        self.mixed = nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (h.unflatten(-1, (2, 16)).transpose(1, 2) for h in self.packed(x).chunk(3, -1))
        return self.mixed(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2).mean(1))


def test_a_meta_gradient(monkeypatch) -> None:
    device = running.device()
    monkeypatch.setattr(trace, "keeps_attention", lambda tensors: True)
    monkeypatch.setattr(op, "backends", lambda *arguments: (Backend("triton", True, ""),))
    model = Reader()
    support, query = ((torch.randn(2, n, 5, 8), torch.randint(3, (2, n))) for n in (3, 2))
    wide = [(x.double(), y) for x, y in (support, query)]
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        truth = maml_loop(Reader.double(model), F.cross_entropy, *wide, 0.1, 2)[3]
        own = maml_loop(model.float(), F.cross_entropy, support, query, 0.1, 2)[3]
    maml = fm.MAML(model.to(device), F.cross_entropy, lr=0.1, steps=2, executor="reference")
    tasks = fm.TaskBatch(*(tuple(t.to(device) for t in pair) for pair in (support, query)))
    assert [row.backend for row in maml.explain(tasks).rows if row.op == "attention"] == ["triton"]
    got = {name: value.cpu() for name, value in maml.value_and_grad(tasks)[1].items()}
    # beside autograd's own error, sums over 30 rows of the projections
    slack = SUMMATION_FACTOR * torch.finfo(torch.float32).eps * math.sqrt(30)
    assert relative_error(got, truth) <= 2 * relative_error(own, truth) + slack


@pytest.mark.gpu
def test_a_graph_replays_every_map() -> None:
    from fastmeta.ops.attention import triton

    operands = draw(Shape(queries=70, keys=70))
    device = torch.device("cuda")
    q, k, v, *dots, d_o, d_o_dot = (
        cast(x, torch.float32, device) for x in (*operands.x, *operands.x_dot, operands.d_o, operands.d_o_dot)
    )

    def everything() -> list[Tensor]:
        saved = triton.forward(q, k, v, None, operands.setting)
        dot = triton.tangent(saved, *dots, operands.setting)
        first = triton.backward(saved, d_o, operands.setting, ALL)
        return [saved.o, dot.o, *first, *triton.tangent_backward(saved, dot, d_o, d_o_dot, operands.setting, ALL)]

    want = everything()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = everything()
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_every_build_has_a_name_of_its_own() -> None:
    running.device()
    from fastmeta.ops.attention import tiles, triton

    builds = triton.shipped()
    assert len({build.name for build in builds}) == len(builds)
    for capability, values in ((80, 2), (90, 3)):  # of seven widths and precisions, some have values apart
        dropping = [build for build in builds if "dropout" in build.name and capability in build.capabilities]
        assert len(dropping) == 5 * 7
        assert sum(capability in build.capabilities for build in builds) == 7 * 6 + values + len(dropping)
    assert all(set(build.signature) == set(build.kernel.arg_names) for build in builds)
    assert tiles.read().keys() == triton.WIDE_KERNELS.keys() == triton.KERNELS.keys()
