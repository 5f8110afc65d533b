"""Attention as one operation: its maps against torch.func, what it refuses, a transformer that keeps it whole."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastmeta as fm
from fastmeta.core.dispatch import select
from fastmeta.core.task_op import Call, Need, Unsupported
from fastmeta.engine import trace
from fastmeta.ops.attention import Attention
from fastmeta.ops.attention.op import backends
from tests.engine.cases import CASES as MODELS
from tests.engine.cases import WAYS, T
from tests.ops import four_maps
from tests.ops.four_maps import A, Case, Run
from tests.oracle import maml_loop, relative_error

sdpa = torch.ops.aten.scaled_dot_product_attention.default
EXACT = 1e-9  # as in tests/engine/test_exactness.py


def case(name, q, k, v, *args, **kwargs):
    return Case(name, sdpa, (A(q), A(k), A(v), *args), kwargs, fixed=("attn_mask",))


CASES = [
    case("plain", (2, 3, 5, 4), (2, 3, 5, 4), (2, 3, 5, 4)),
    case("causal", (1, 2, 5, 4), (1, 2, 5, 4), (1, 2, 5, 4), None, 0.0, True),
    case("more-queries", (1, 2, 6, 3), (1, 2, 4, 3), (1, 2, 4, 3), None, 0.0, True),
    case("more-keys-and-wider-values", (2, 1, 3, 4), (2, 1, 6, 4), (2, 1, 6, 5), scale=0.3),
    case("one-row", (1, 1, 1, 2), (1, 1, 1, 2), (1, 1, 1, 2)),
    case("no-heads", (5, 4), (6, 4), (6, 4)),
    case("heads-alone", (3, 5, 4), (3, 6, 4), (3, 6, 4)),
    case("two-batches", (2, 3, 2, 3, 4), (2, 3, 2, 3, 4), (2, 3, 2, 3, 4), A((3, 1, 3, 3))),
    case("added", (2, 2, 3, 4), (2, 2, 5, 4), (2, 2, 5, 4), A((2, 1, 3, 5))),
    case("boolean", (2, 2, 3, 4), (2, 2, 5, 4), (2, 2, 5, 4), A((2, 1, 1, 5), "bool")),
    case("boolean-rows", (2, 2, 4, 4), (2, 2, 3, 4), (2, 2, 3, 4), A((4, 3), "bool")),  # some attend to nothing
]


@pytest.fixture(autouse=True)
def _twice_differentiable():
    with sdpa_kernel(SDPBackend.MATH):
        yield


@pytest.mark.parametrize("case", CASES, ids=str)
def test_four_maps(case):
    four_maps.check_all(case)


@settings(max_examples=20)
@given(batch=st.lists(st.integers(1, 2), max_size=3), sizes=st.tuples(*[st.integers(1, 5)] * 4), causal=st.booleans())
def test_drawn_shapes(batch, sizes, causal):
    queries, keys, width, value_width = sizes
    shapes = (*batch, queries, width), (*batch, keys, width), (*batch, keys, value_width)
    with sdpa_kernel(SDPBackend.MATH):
        four_maps.check(case("drawn", *shapes, None, 0.0, causal))


def test_no_tasks():
    op = Run(CASES[0]).op
    x = [torch.randn(0, *i.shape) for i in op.call.inputs]
    (y,), saved = op.forward(x)
    assert y.shape == (0, 2, 3, 5, 4)
    _, saved_dot = op.tangent(saved, tuple(x))
    for d in (op.backward(saved, (y,), [Need.TASK] * 3), op.tangent_backward(saved, saved_dot, (y,), (y,), [1, 1, 1])):
        assert [v.shape for v in d] == [v.shape for v in x]


def test_queries_that_attend_to_nothing_give_zero():
    run = Run(CASES[-1])
    run.x[3][:, 1] = False
    maps = run.maps()
    assert not maps.forward[0][..., 1, :].any()
    for values in (maps.backward, maps.tangent_backward):
        assert not values[0][..., 1, :].any()
    for _, values in maps:
        assert all(v.isfinite().all() for v in values)


ONES = torch.ones(2, 3, 4, 4)


@pytest.mark.parametrize(
    ("args", "kwargs", "reason"),
    [
        ((ONES, ONES[:, :1], ONES[:, :1]), {"enable_gqa": True}, "enable_gqa must be False"),
        ((ONES, ONES[:, :, :0], ONES[:, :, :0]), {}, "there must be a key, got none"),
        ((ONES, ONES[:1], ONES), {}, r"must agree in all but the last two axes, got \(2, 3, 4, 4\), \(1, 3, 4, 4\)"),
    ],
)
def test_what_it_refuses(args, kwargs, reason):
    with pytest.raises(Unsupported, match=reason):
        Attention(Call.example(sdpa, *args, **kwargs))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"is_causal": True}, "attn_mask must be None where is_causal is set"),
        ({"value": torch.float64}, "must have one dtype"),
        ({"attn_mask": torch.float64}, "must be boolean or of query's dtype, got torch.float64"),
    ],
)
def test_what_torch_refuses_too(change, reason):
    call = Call.example(sdpa, ONES, ONES, ONES, ONES)
    arguments = dict(call.arguments)
    for name, value in change.items():
        old = arguments[name]
        arguments[name] = old.__class__(old.position, old.shape, value) if isinstance(value, torch.dtype) else value
    with pytest.raises(Unsupported, match=reason):
        Attention(Call(call.target, arguments, call.inputs, call.outputs))


def test_who_runs_a_call():
    assert [b.name for b in backends()] == ["triton", "reference"]
    assert backends(torch.device("cpu"), torch.float32)[0].reason == "runs on cuda, not on cpu"
    for dtype in (torch.float32, torch.float64):
        assert select("attention", backends(torch.device("cpu"), dtype)) == "reference"


def test_widths_without_kernels(monkeypatch):
    from fastmeta.core import triton_support

    monkeypatch.setattr(triton_support, "missing_reason", lambda device, dtype: "")
    cuda = torch.device("cuda", 0)
    assert backends(cuda, torch.float32, 128, 128)[0].available
    assert backends(cuda, torch.float32, 129, 129)[0].reason == "a head must be at most 128 wide, got 129"
    assert backends(cuda, torch.float32, 64, 32)[0].reason == "values must be as wide as keys, got 32 and 64"


class Encoder(nn.Module):
    """Self-attention with padded tokens masked, causal attention, and the pooling of learned queries."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(11, 8)
        self.packed = nn.Linear(8, 24)
        self.mixed = nn.Linear(8, 8)
        self.queries = nn.Parameter(torch.randn(2, 8))
        self.head = nn.Linear(16, WAYS)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.tokens(ids)
        q, k, v = (x.unflatten(-1, (2, 4)).transpose(1, 2) for x in self.packed(h).chunk(3, -1))
        padding = (ids != 0)[:, None, None, :]
        h = h + self.mixed(F.scaled_dot_product_attention(q, k, v, attn_mask=padding).transpose(1, 2).flatten(2))
        h = h + F.scaled_dot_product_attention(h, h, torch.tanh(h), is_causal=True, scale=0.4)
        pooled = F.scaled_dot_product_attention(self.queries.expand(len(ids), 2, 8), h, h)
        return self.head(pooled.flatten(1))


def calls(maml, tasks):
    return [row.op for row in maml.explain(tasks).rows]


@pytest.fixture
def kept_whole(monkeypatch):
    monkeypatch.setattr(trace, "keeps_attention", lambda tensors: True)


@pytest.mark.usefixtures("traced_once")
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("adapted", [None, ["head.weight", "head.bias", "mixed.weight"]], ids=["all", "some"])
def test_a_transformer_that_keeps_it_whole(kept_whole, steps, adapted):
    model = Encoder().double()
    tokens = [torch.randint(11, (T, n, 5)) for n in (4, 5)]
    support, query = ((x, torch.randint(WAYS, x.shape[:2])) for x in tokens)
    tasks = fm.TaskBatch(support, query)
    truth = maml_loop(model, F.cross_entropy, support, query, 0.1, steps, adapted_names=adapted)[3]
    for executor in ("reference", "auto"):
        maml = fm.MAML(model, F.cross_entropy, lr=0.1, steps=steps, executor=executor, parameters=adapted)
        assert relative_error(maml.value_and_grad(tasks)[1], truth) <= EXACT
        assert calls(maml, tasks).count("attention") == 3
        assert "softmax" not in calls(maml, tasks)


def test_a_cpu_keeps_it_whole():
    model = MODELS["transformer"]
    tasks = fm.TaskBatch(*model.tasks(torch.float64))
    found = calls(fm.MAML(model.model().double(), model.loss, lr=0.1, executor="reference"), tasks)
    assert "attention" in found
    assert "softmax" not in found


class Odd(nn.Module):
    """Attention that is taken apart wherever it runs: fewer heads of keys than of queries, a learned mask."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 8)
        self.mask = nn.Parameter(torch.randn(4, 4))
        self.head = nn.Linear(8, WAYS)

    def forward(self, x: Tensor) -> Tensor:
        h = self.inner(x).unflatten(-1, (2, 4)).transpose(0, 1)  # [2, N, 4]
        h = h + F.scaled_dot_product_attention(h, h[:1], h[:1], enable_gqa=True)
        h = h.transpose(0, 1).unflatten(1, (1, 2)).expand(-1, 4, 2, 4).transpose(1, 2)  # [N, 2, 4, 4]
        return self.head(F.scaled_dot_product_attention(h, h, h, attn_mask=self.mask)[:, :, 0].flatten(1))


def test_what_it_does_not_cover_is_exact_all_the_same(kept_whole):
    model = Odd().double()
    support, query = ((torch.randn(T, n, 4).double(), torch.randint(WAYS, (T, n))) for n in (4, 5))
    truth = maml_loop(model, F.cross_entropy, support, query, 0.1, 2)[3]
    maml = fm.MAML(model, F.cross_entropy, lr=0.1, steps=2, executor="reference", engine="program")
    assert relative_error(maml.value_and_grad(fm.TaskBatch(support, query))[1], truth) <= EXACT
    reasons = [row.reason for row in maml.explain(fm.TaskBatch(support, query)).rows if row.op == "generic"]
    assert "attention has no derivative by attn_mask" in reasons
