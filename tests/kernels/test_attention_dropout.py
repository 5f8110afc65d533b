"""Dropout inside attention's kernels: every map against the float64 reference with the very numbers that they draw.

The reference draws by a Philox generator of its own here, in NumPy, from the seed that the kernels would get.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastmeta as fm
from fastmeta.core.dispatch import Backend
from fastmeta.engine import trace
from fastmeta.ops.attention import op, reference
from fastmeta.ops.attention.reference import Setting
from tests.kernels import running
from tests.kernels.maps import check as check_maps
from tests.kernels.maps import runs
from tests.kernels.test_attention import ALL, Reader, Shape, check, draw, kernels
from tests.ops.four_maps import SUMMATION_FACTOR, A
from tests.ops.test_attention import case
from tests.ops.test_attention_dropout import given
from tests.oracle import relative_error

pytestmark = pytest.mark.usefixtures("nan_poison")

SEEDS = 2**63 - 1  # of which a forward draws one
P = 0.3


def philox(keys: list[int], words: list[np.ndarray]) -> np.ndarray:
    """The first word of Philox-4x32-10 (Salmon and others, 2011) by two keys and four words, each of 32 bits."""
    low = np.uint64(0xFFFFFFFF)
    words = [word.astype(np.uint64) for word in words]
    for _ in range(10):
        products = np.uint64(0xD2511F53) * words[0], np.uint64(0xCD9E8D57) * words[2]
        (high_a, low_a), (high_b, low_b) = ((x >> np.uint64(32), x & low) for x in products)
        words = [high_b ^ words[1] ^ np.uint64(keys[0]), low_b, high_a ^ words[3] ^ np.uint64(keys[1]), low_a]
        keys = [(key + step) & 0xFFFFFFFF for key, step in zip(keys, (0x9E3779B9, 0xBB67AE85), strict=True)]
    return words[0].astype(np.uint32)


def factors(seed: int, rows: int, queries: int, keys: int, p: float) -> Tensor:
    """Dropout's ``z``, ``[rows, queries, keys]`` with a row for each head of all tasks.

    A word that counts key, query and row is a number of [0, 1), of 31 bits, and below the share that is kept, or not.
    """
    row, query, key = np.indices((rows, queries, keys))
    words = philox([seed & 0xFFFFFFFF, seed >> 32], [key, query, row, np.zeros_like(key)]).view(np.int32)
    uniform = np.where(words < 0, ~words, words).astype(np.float32) * np.float32(4.6566127342e-10)
    return torch.from_numpy(uniform < np.float32(1 - p)).double() / (1 - p or 1)


def drawn(scores: Tensor, p: float) -> Tensor:
    """As ``reference._draw``, by the generator and in the order of the kernels."""
    seed = torch.randint(SEEDS, (1,), device=running.device()).item()
    return factors(seed, math.prod(scores.shape[:-2]), *scores.shape[-2:], p).reshape(scores.shape).to(scores)


@pytest.fixture
def alike(monkeypatch) -> None:
    """The reference draws what kernels draw after the same ``torch.manual_seed``."""
    monkeypatch.setattr(reference, "_draw", drawn)


@pytest.mark.parametrize(
    ("keys", "words", "answer"),
    [
        ([0, 0], [0, 0, 0, 0], 0x6627E8D5),
        ([0xFFFFFFFF] * 2, [0xFFFFFFFF] * 4, 0x408F276D),
        ([0xA4093822, 0x299F31D0], [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344], 0xD16CFE09),
    ],
)
def test_known_answers_of_the_generators_authors(keys: list[int], words: list[int], answer: int) -> None:
    assert philox(keys, [np.array([word]) for word in words])[0] == answer


SHAPES = [
    Shape(width=20, queries=5, keys=35, tasks=1, mask=(2, 5, 35), dropout=P),
    Shape(width=7, queries=3, keys=5, heads=1, mask=(2, 1, 1, 3, 5), boolean=True, dropout=P),  # one attends to nothing
    Shape(queries=35, keys=18, tasks=1, heads=1, causal=True, dropout=P),
    Shape(width=128, queries=3, keys=4, tasks=1, heads=1, dropout=0.9),
    Shape(queries=1, keys=4, tasks=1, heads=1, dropout=1.0),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_map(alike, shape: Shape) -> None:
    check(draw(shape))


@pytest.mark.parametrize(
    ("present", "need"),
    [("q", (True, False, False)), ("v", (False, True, False)), (("k", "d_o"), (False, False, True))],
)
def test_some_tangents_and_one_cotangent(alike, present: tuple[str, ...], need: tuple[bool, bool, bool]) -> None:
    operands = draw(Shape(queries=9, keys=11, tasks=1, heads=1, dropout=P))
    operands.x_dot = [x if name in present else None for x, name in zip(operands.x_dot, "qkv", strict=True)]
    operands.d_o_dot = operands.d_o_dot if "d_o" in present else None
    check(operands, need)


def test_programs_in_any_order_and_bits_in_every_run() -> None:
    operands = draw(Shape(queries=5, keys=5, heads=1, dropout=P))
    first = kernels(operands)
    with running.reversed_programs():
        again = kernels(operands)
    assert all(torch.equal(first[name], again[name]) for name in first)


def dropped(tasks: int, rows: int, p: float) -> Tensor:
    """``z`` as the forward kernel has it: uniform weights, of values that are an identity."""
    from fastmeta.ops.attention import triton

    zeros = torch.zeros(tasks, 1, 1, rows, rows, device=running.device())
    eye = torch.eye(rows, device=running.device()).expand_as(zeros)
    return triton.forward(zeros, zeros, eye, None, Setting(1.0, False, p)).o.cpu() * rows


def test_the_share_kept_and_its_independence() -> None:
    z = dropped(2, 32, P)
    kept = z != 0
    torch.testing.assert_close(z[kept], torch.full_like(z[kept], 1 / (1 - P)))
    # five standard deviations of the share kept, and of neighbours that are: of two tasks, queries and keys
    pairs = kept[0] & kept[1], kept[..., 1:, :] & kept[..., :-1, :], kept[..., 1:] & kept[..., :-1]
    for share, found in ((1 - P, kept), *(((1 - P) ** 2, pair) for pair in pairs)):
        assert abs(found.double().mean() - share) < 5 * (share * (1 - share) / found.numel()) ** 0.5


def test_every_forward_draws_anew_from_pytorchs_generator() -> None:
    torch.manual_seed(3)
    first, second = dropped(1, 16, P), dropped(1, 16, P)
    torch.manual_seed(3)
    assert torch.equal(dropped(1, 16, P), first)
    assert not torch.equal(second, first)


def test_the_mean_of_many_draws_is_the_result_without_dropout() -> None:
    from fastmeta.ops.attention import triton

    draws = 256  # as many queries, all of them alike
    q, k, v = draw(Shape(1, 6, 16, 1, heads=1)).x
    x = [x.float().to(running.device()) for x in (q.expand(1, 1, 1, draws, 16), k, v)]
    found = triton.forward(*x, None, Setting(0.25, False, P)).o.cpu().double().squeeze()
    want = reference.forward(q, k, v, None, Setting(0.25, False)).o.squeeze()
    assert ((found.mean(0) - want).abs() / (found.std(0) / math.sqrt(draws))).max() < 5


@pytest.fixture
def by_kernels(monkeypatch) -> None:
    running.device()
    monkeypatch.setattr(op, "backends", lambda *arguments: (Backend("triton", True, ""),))


def test_the_operation_against_autodiff(by_kernels) -> None:
    run, wide = runs(case("dropout", (2, 5, 8), (2, 6, 8), (2, 6, 8), A((2, 5, 6), "bool"), P), tasks=2)
    torch.manual_seed(5)
    (_, (*_, seed)) = run.op.forward(run.x)
    assert seed.shape == (1,)
    given(wide, factors(seed.item(), 4, 5, 6, P).reshape(2, 2, 5, 6))
    torch.manual_seed(5)
    check_maps(run.maps(), wide.expected(), 8)
    assert run.op.backend == "triton"


class Dropping(Reader):
    """A reader whose attention drops weights."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (h.unflatten(-1, (2, 16)).transpose(1, 2) for h in self.packed(x).chunk(3, -1))
        return self.mixed(F.scaled_dot_product_attention(q, k, v, dropout_p=P).transpose(1, 2).flatten(2).mean(1))


def test_a_meta_gradient(alike, monkeypatch) -> None:
    device = running.device()
    monkeypatch.setattr(trace, "keeps_attention", lambda tensors: True)
    monkeypatch.setattr(trace, "replays_dropout", lambda *operands: True)
    model = Dropping()
    support, query = ((torch.randn(1, n, 5, 8), torch.randint(3, (1, n))) for n in (2, 1))

    def gradient(dtype: torch.dtype, backend: str) -> dict[str, Tensor]:
        monkeypatch.setattr(op, "backends", lambda *arguments: (Backend(backend, True, ""),))
        maml = fm.MAML(model.to(device, dtype), F.cross_entropy, lr=0.1, steps=1, executor="reference")
        tasks = fm.TaskBatch(*((x.to(device, dtype), y.to(device)) for x, y in (support, query)))
        torch.manual_seed(2)
        return {name: value.cpu() for name, value in maml.value_and_grad(tasks)[1].items()}

    truth, own = (gradient(dtype, "reference") for dtype in (torch.float64, torch.float32))
    # beside the reference's own error, sums over 10 rows of the projections
    slack = SUMMATION_FACTOR * torch.finfo(torch.float32).eps * math.sqrt(10)
    got = gradient(torch.float32, "triton")
    assert relative_error(got, truth) <= 2 * relative_error(own, truth) + slack
    assert not all(torch.equal(got[name], own[name]) for name in own)  # kernels sum in another order


@pytest.mark.gpu
def test_a_graph_draws_anew_at_each_replay() -> None:
    from fastmeta.ops.attention import triton

    operands = draw(Shape(queries=70, keys=70, dropout=P))
    q, k, v, d_o = (x.float().cuda() for x in (*operands.x, operands.d_o))

    def everything() -> list[Tensor]:
        saved = triton.forward(q, k, v, None, operands.setting)
        return [saved.o, *triton.backward(saved, d_o, operands.setting, ALL)]

    everything()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = everything()
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        graph.replay()
        found.append([value.clone() for value in got])
    assert all(torch.equal(a, b) for a, b in zip(found[0], found[1], strict=True))
    assert not torch.equal(found[0][0], found[2][0])
