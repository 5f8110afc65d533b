"""Rows of padding that nothing reads are left out, eq. (31): the same meta-gradient from less work."""

from __future__ import annotations

import copy
import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastmeta as fm
from fastmeta.core import native
from fastmeta.engine.kept_rows import Attended, KeptRows, Picked, Weighted
from fastmeta.engine.profile import collect
from tests.oracle import maml_loop, relative_error, total_error

pytestmark = [
    pytest.mark.skipif(native.extension() is None, reason=f"no extension: {native.missing_reason()}"),
    pytest.mark.usefixtures("traced_once"),
]
EXACT = 1e-10
WAYS, WORDS = 3, 11


def mean(states: Tensor, mask: Tensor) -> Tensor:
    weights = mask.unsqueeze(-1).to(states.dtype)
    return (states * weights).sum(1) / weights.sum(1)


POOLS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mean": mean,
    "first": lambda states, mask: states[:, 0],
    "largest": lambda states, mask: states.masked_fill(~mask.unsqueeze(-1), -torch.inf).amax(1),
    "chosen": lambda states, mask: torch.where(mask.unsqueeze(-1), states, 0.5).sum(1),
    "unmasked": lambda states, mask: states.mean(1),
}


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    closed = torch.full((), torch.finfo(dtype).min, dtype=dtype)
    return torch.where(mask[:, None, None, :], torch.zeros((), dtype=dtype), closed)


MASKS: dict[str, Callable[[Tensor, torch.dtype], Tensor | None]] = {
    "additive": additive,
    "small": lambda mask, dtype: (1 - mask[:, None, None, :].to(dtype)) * -1e4,
    "none": lambda mask, dtype: None,
    "boolean": lambda mask, dtype: mask[:, None, None, :],
    "causal": lambda mask, dtype: None,
}
OWN = ("boolean", "causal")  # by PyTorch's own attention


class Block(nn.Module):
    """Attention and a perceptron between residual connections, each behind a layer norm."""

    def __init__(self, width: int, heads: int, mask: str) -> None:
        super().__init__()
        self.heads, self.own, self.causal = heads, mask in OWN, mask == "causal"
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        n, length, width = x.shape
        q, k, v = (
            layer(x).view(n, length, self.heads, width // self.heads).transpose(1, 2)
            for layer in (self.q, self.k, self.v)
        )
        if self.own:
            mixed = F.scaled_dot_product_attention(q, k, v, mask, is_causal=self.causal)
        else:
            scores = q @ k.transpose(-1, -2) / math.sqrt(width // self.heads)
            mixed = torch.softmax(scores if mask is None else scores + mask, -1) @ v
        x = self.norms[0](x + self.o(mixed.transpose(1, 2).reshape(n, length, width)))
        y: Tensor = self.norms[1](x + self.down(F.gelu(self.up(x))))
        return y


class Encoder(nn.Module):
    """Words, two blocks, a pooling and a head; the word 0 is padding."""

    def __init__(self, width: int, heads: int, pool: str = "mean", mask: str = "additive") -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, width)
        self.places = nn.Parameter(0.1 * torch.randn(1, 8, width))
        self.blocks = nn.ModuleList(Block(width, heads, mask) for _ in range(2))
        self.head = nn.Linear(width, WAYS)
        self.pool, self.mask = pool, mask

    def forward(self, tokens: Tensor) -> Tensor:
        present = tokens != 0
        states = self.words(tokens) + self.places[:, : tokens.shape[1]]
        added = MASKS[self.mask](present, states.dtype)
        for block in self.blocks:
            states = block(states, added)
        y: Tensor = self.head(POOLS[self.pool](states, present))
        return y


def encoder(width: int = 8, heads: int = 2, dtype: torch.dtype = torch.float64, **options: Any) -> Encoder:
    torch.manual_seed(0)
    return Encoder(width, heads, **options).to(dtype)


shared = functools.cache(encoder)  # for tests that change none of its weights: its trace is then one as well


def sentences(tasks: int = 3, sizes: tuple[int, int] = (3, 4), length: int = 6, seed: int = 1) -> fm.TaskBatch:
    torch.manual_seed(seed)
    made = []
    for n in sizes:
        tokens = torch.randint(1, WORDS, (tasks, n, length))
        lengths = torch.randint(1, length + 1, (tasks, n, 1))
        tokens[torch.arange(length) >= lengths] = 0
        made.append((tokens, torch.randint(WAYS, (tasks, n))))
    return fm.TaskBatch(*made)


def loop(model: nn.Module, tasks: fm.TaskBatch, lr: Any, steps: int, *options: Any) -> Any:
    with sdpa_kernel(SDPBackend.MATH):  # the others have no second derivative
        return maml_loop(model, F.cross_entropy, tasks.support, tasks.query, lr, steps, *options)


def left_out(maml: fm.MAML, tasks: fm.TaskBatch) -> tuple[float, ...] | None:
    work, programs = maml._prepare(tasks, None, differentiate=True)
    shares = programs.native.row_shares(work)
    return None if shares is None else tuple(1 - share for share in shares)


def padding(tasks: fm.TaskBatch) -> tuple[float, ...]:
    return tuple(float((batch[0] == 0).double().mean()) for batch in (tasks.support, tasks.query))


CHOICES: dict[str, dict[str, Any]] = {
    "all": {},
    "linear": {"parameters": ["blocks.*", "head.*"]},
    "head": {"parameters": ["head.*"]},
    "first order": {"first_order": True},
    "learned rate": {"learn_lr": True},
}


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize(
    ("pool", "mask", "width", "heads"),
    [
        *[(pool, mask, 8, 2) for pool, mask in itertools.product(("mean", "first"), ("additive", "boolean"))],
        *[("largest", "boolean", 12, 4), ("chosen", "additive", 12, 4), ("mean", "boolean", 32, 2)],
    ],
)
def test_the_gradient_is_exact(choice: str, pool: str, mask: str, width: int, heads: int) -> None:
    model, tasks = shared(width, heads, pool=pool, mask=mask), sentences()
    options = dict(CHOICES[choice])
    rate = nn.Parameter(torch.tensor(0.05, dtype=torch.float64)) if options.pop("learn_lr", False) else 0.05
    maml = fm.MAML(model, F.cross_entropy, lr=rate, steps=2, executor="native", **options)
    assert left_out(maml, tasks) == pytest.approx(padding(tasks))
    loss, found = maml.value_and_grad(tasks)
    names = [name for name, _ in model.named_parameters()]
    chosen = options.get("parameters", ["*"])
    adapted = [name for name in names if any(name.startswith(one.rstrip("*")) for one in chosen)]
    truth = loop(model, tasks, rate, 2, options.get("first_order", False), adapted)
    assert float((loss - truth[0]).detach().abs()) <= EXACT
    assert relative_error({name: found[name] for name in truth[3]}, truth[3]) <= EXACT


@settings(max_examples=15, deadline=None)
@given(
    lengths=st.lists(st.lists(st.integers(0, 5), min_size=2, max_size=2), min_size=1, max_size=3),
    pool=st.sampled_from(["mean", "first"]),
    mask=st.sampled_from(["additive", "boolean", "causal"]),
)
def test_any_lengths(lengths: list[list[int]], pool: str, mask: str) -> None:
    """The mean of no words is none, so that sequences have one where they are pooled like that."""
    shortest = 1 if pool == "mean" else 0
    tokens = torch.randint(1, WORDS, (len(lengths), 2, 5))
    kept = torch.tensor(lengths).clamp(min=shortest).unsqueeze(-1)
    tokens[torch.arange(5) >= kept] = 0
    batch = tokens, torch.randint(WAYS, (len(lengths), 2))
    tasks, model = fm.TaskBatch(batch, batch), shared(8, 2, pool=pool, mask=mask)
    found = fm.MAML(model, F.cross_entropy, lr=0.05, executor="native").value_and_grad(tasks)[1]
    assert relative_error(found, loop(model, tasks, 0.05, 1)[3]) <= EXACT


def test_float32_is_as_near_as_torch() -> None:
    model, tasks = encoder(32, 4, torch.float32), sentences(5)
    exact, torchs = (loop(each, tasks, 0.05, 2)[3] for each in (copy.deepcopy(model).double(), model))
    ours = fm.MAML(model, F.cross_entropy, lr=0.05, steps=2, executor="native").value_and_grad(tasks)[1]
    assert total_error(ours, exact) <= 2 * total_error(torchs, exact) + 1e-6


def test_adapted_weights_and_outputs() -> None:
    model, tasks = encoder(), sentences()
    maml = fm.MAML(model, F.cross_entropy, lr=0.05, steps=2, executor="native")
    out, truth = maml(tasks), loop(model, tasks, 0.05, 2)
    torch.testing.assert_close(out.logits, truth[2], rtol=0, atol=1e-11)
    torch.testing.assert_close(out.task_losses, truth[1], rtol=0, atol=1e-11)


@pytest.mark.parametrize(
    ("options", "shares"),
    [
        ({"pool": "unmasked"}, None),  # all rows are read
        ({"mask": "small"}, (0.0, 0.0)),  # exp(-1e4) is no zero by the mask alone
        ({"pool": "first", "mask": "none"}, (0.0, 0.0)),  # the first word attends to all
        ({"pool": "first", "mask": "causal"}, (5 / 6, 5 / 6)),  # and here to itself
    ],
)
def test_what_may_be_read_is_kept(options: dict[str, str], shares: tuple[float, ...] | None) -> None:
    model, tasks = encoder(**options), sentences()
    maml = fm.MAML(model, F.cross_entropy, lr=0.05, executor="native")
    assert left_out(maml, tasks) == (shares if shares is None else pytest.approx(shares))
    truth = loop(model, tasks, 0.05, 1)[3]
    assert relative_error(maml.value_and_grad(tasks)[1], truth) <= EXACT


def test_padding_may_hold_anything() -> None:
    """What stands in rows that nothing reads does not reach the result, though autograd multiplies it by zero."""
    model, tasks = encoder(), sentences()
    maml = fm.MAML(model, F.cross_entropy, lr=0.05, executor="native")
    before = maml.value_and_grad(tasks)[1]
    with torch.no_grad():
        model.words.weight[0] = math.inf
    after = maml.value_and_grad(tasks)[1]
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_explain_and_a_profile_count_what_is_gone_through() -> None:
    model, tasks = encoder(), sentences()
    maml = fm.MAML(model, F.cross_entropy, lr=0.05, executor="native")
    support, query = (f"{share:.0%}" for share in padding(tasks))
    said = maml.explain(tasks).executor
    assert f"rows of padding left out: {support} of the support's and {query} of the query's" in said
    whole = fm.MAML(encoder(pool="unmasked"), F.cross_entropy, lr=0.05, executor="native")
    flops = []
    for each in (maml, whole):
        with collect() as profile:
            each.value_and_grad(tasks)
        layers = [record for record in profile.records if record.module.endswith(".up")]
        flops.append([sum(r.flops for r in layers if r.phase == phase) for phase in ("support", "query")])
    for share, kept, every in zip(padding(tasks), *flops, strict=True):
        assert kept == pytest.approx((1 - share) * every, rel=1e-6)


def rows(*readers: Weighted | Picked, attentions: tuple[Attended, ...] = (), length: int = 4) -> KeptRows:
    return KeptRows(2, length, readers, attentions)


def kept_of(rows: KeptRows, *data: Tensor) -> list[list[int]]:
    """Of each task the rows that its list names."""
    lists = rows.list_of(data)
    assert lists.shape == (data[0].shape[0], rows.numbers)
    found = []
    for one in lists.tolist():
        starts, positions = (
            one[: rows.sequences + 1],
            one[rows.sequences + 1 : rows.sequences + 1 + one[rows.sequences]],
        )
        by_sequence = [sum(p // rows.length == i for p in positions) for i in range(rows.sequences)]
        assert starts == [sum(by_sequence[:i]) for i in range(rows.sequences + 1)]
        assert positions == sorted(positions)
        found.append(positions)
    return found


def test_lists_name_what_is_weighted_and_a_row_of_each_sequence() -> None:
    weights = torch.tensor([[[1.0, 0, 2, 0], [0, 0, 0, 0]], [[0, 0, 0, 1], [1, 1, 1, 1]]])
    assert kept_of(rows(Weighted(0, (2, 4, 1), (2, 4, 5))), weights) == [[0, 2, 4], [3, 4, 5, 6, 7]]
    shared = torch.tensor([[1.0, 0, 0, 1], [0, 1, 0, 0]])  # the same for both sequences
    assert kept_of(rows(Weighted(0, (4, 1), (2, 4, 5))), shared) == [[0, 3, 4, 7], [1, 5]]
    assert kept_of(rows(Picked((False, True, False, False, False, False, False, True))), shared) == [[1, 7], [1, 7]]


def test_lists_follow_attention() -> None:
    """From row 0 to what it attends to, and on from there; a query whose scores are all closed attends to every key."""
    first = Picked((True, False, False, False, True, False, False, False))
    closed = torch.finfo(torch.float32).min
    mask = torch.full((1, 2, 1, 4, 4), closed)
    mask[0, 0, 0, 0, 2] = mask[0, 0, 0, 2, 3] = mask[0, 0, 0, 3, 3] = mask[0, 1, 0, 0, 0] = 0
    once = Attended(0, (2, 1, 4, 4))
    assert kept_of(rows(first, attentions=(once, once)), mask) == [[0, 2, 3, 4]]
    mask[0, 1, 0, 0, 0] = closed
    assert kept_of(rows(first, attentions=(once,)), mask) == [[0, 2, 3, 4, 5, 6, 7]]
    assert kept_of(rows(first, attentions=(Attended(None),)), mask) == [list(range(8))]
    mask = mask > closed / 2
    assert kept_of(rows(first, attentions=(once,)), mask) == [[0, 2, 3, 4, 5, 6, 7]]
    second = Picked((False, True, False, False, False, False, True, False))
    assert kept_of(rows(second, attentions=(Attended(None, causal=True),)), mask) == [[0, 1, 4, 5, 6]]
