"""Dropout inside attention: the four maps with what a forward drew, and when a call keeps it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastmeta as fm
from fastmeta.core.task_op import Call, Unsupported
from fastmeta.engine import trace
from fastmeta.ops.attention import Attention
from tests.ops.four_maps import FLOAT64_BOUND, A, Run, compare
from tests.ops.test_attention import ONES, case, sdpa

WAYS = 3


class Given:
    """The call with ``z``, its last argument, in the place of what it would draw."""

    def __init__(self, call: Call) -> None:
        self.call = call

    def run(self, tensors: list[Tensor]) -> Tensor:
        q, k, v, *mask, z = tensors
        scores = q @ k.mT * q.shape[-1] ** -0.5
        if mask:
            scores = scores.masked_fill(~mask[0], -torch.inf) if mask[0].dtype == torch.bool else scores + mask[0]
        if self.call["is_causal"]:
            scores = scores.masked_fill(scores.new_ones(scores.shape[-2:]).triu(1).bool(), -torch.inf)
        return (z * torch._safe_softmax(scores, -1)) @ v


def given(run: Run, z: Tensor) -> None:
    """Let the truth of ``run`` have ``z``, whose first axis is of tasks."""
    run.truth.x = [[*x, z[t]] for t, x in enumerate(run.truth.x)]
    run.truth.call = Given(run.call)


@pytest.mark.parametrize(
    "mask",
    [(None, 0.4), (None, 0.4, True), (A((2, 1, 4, 6), "bool"), 0.4), (A((4, 6)), 0.4), (None, 1.0)],
    ids=["plain", "causal", "boolean", "added", "all"],
)
def test_four_maps_with_what_was_drawn(mask):
    run = Run(case("dropout", (2, 3, 4, 5), (2, 3, 6, 5), (2, 3, 6, 5), *mask))
    torch.manual_seed(1)
    _, (*_, z) = run.op.forward(run.x)
    given(run, z)
    for x_dot, d_y_dot in (
        (run.x_dot, run.d_y_dot),
        ([None, run.x_dot[1], None], run.d_y_dot),
        ([None, None, run.x_dot[2]], [None]),
    ):
        torch.manual_seed(1)
        got = run.maps(x_dot, d_y_dot=d_y_dot)
        compare(got, run.expected(x_dot, d_y_dot=d_y_dot), FLOAT64_BOUND, "dropout")


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_rate_scale_and_independence(p):
    op = Attention(Call.example(sdpa, *[torch.randn(4, 20, 3)] * 3, None, p))
    assert op.random
    x = [torch.randn(2, 4, 20, 3)] * 3
    z = op.forward(x)[1][-1]
    kept = z != 0
    torch.testing.assert_close(z[kept], torch.full_like(z[kept], 1 / (1 - p)))
    # 1600 draws a task: five standard deviations of the share kept
    assert abs(kept.double().mean() - (1 - p)) < 5 * (p * (1 - p) / kept.numel()) ** 0.5
    assert not torch.equal(kept[0], kept[1])
    assert not torch.equal(op.forward(x)[1][-1], z)


def test_without_dropout_nothing_is_drawn():
    op = Attention(Call.example(sdpa, ONES, ONES, ONES))
    before = torch.get_rng_state()
    assert op.forward([ONES[None]] * 3)[1][-1] is None
    assert not op.random
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("p", [-0.1, 1.5])
def test_a_rate_is_between_zero_and_one(p):
    call = Call.example(sdpa, ONES, ONES, ONES)
    call = Call(call.target, {**call.arguments, "dropout_p": p}, call.inputs, call.outputs)
    with pytest.raises(Unsupported, match=f"dropout_p must be between 0 and 1, got {p}"):
        Attention(call)


class Reader(nn.Module):
    """Self-attention with dropout, a mask that is learned where asked for, and a head."""

    def __init__(self, *, learned: bool = False) -> None:
        super().__init__()
        self.queries, self.keys, self.values = (nn.Linear(4, 8) for _ in range(3))
        self.mask = nn.Parameter(torch.randn(5, 5)) if learned else None
        self.head = nn.Linear(8, WAYS)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (2, 4)).transpose(1, 2) for f in (self.queries, self.keys, self.values))
        mask = x[:, None, None, :, 0] if self.mask is None else self.mask
        h = F.scaled_dot_product_attention(q, k, v, mask, dropout_p=0.3 if self.training else 0.0)
        return self.head(h.transpose(1, 2).flatten(2).mean(1))


def tasks() -> fm.TaskBatch:
    return fm.TaskBatch(*((torch.randn(2, n, 5, 4).double(), torch.randint(WAYS, (2, n))) for n in (4, 3)))


def maml(model: nn.Module, **options) -> fm.MAML:
    return fm.MAML(model.double(), F.cross_entropy, lr=0.1, steps=2, **options)


def operations(learner: fm.MAML) -> list[str]:
    return [row.op for row in learner.explain(tasks()).rows]


@pytest.fixture
def kept_whole(monkeypatch) -> None:
    monkeypatch.setattr(trace, "keeps_attention", lambda tensors: True)
    monkeypatch.setattr(trace, "replays_dropout", lambda *operands: True)


def test_a_cpu_takes_it_apart():
    found = operations(maml(Reader()))
    assert {"softmax", "dropout"} <= set(found)
    assert "attention" not in found
    assert "attention" in operations(maml(Reader().eval()))


def test_what_kernels_take_stays_whole(kept_whole):
    found = operations(maml(Reader()))
    assert "attention" in found
    assert not {"softmax", "dropout", "generic"} & set(found)


def test_a_learned_mask_takes_it_apart(kept_whole):
    """Attention has no derivative by a mask, and what has one could not draw the same again."""
    found = operations(maml(Reader(learned=True), engine="program"))
    assert {"softmax", "dropout"} <= set(found)
    assert not {"attention", "generic"} & set(found)


@pytest.mark.parametrize(
    ("device", "keys", "batch", "replayed"),
    [("cuda", 3, 2, True), ("cpu", 3, 2, False), ("cuda", 0, 2, False), ("cuda", 3, 1, False)],
)
def test_calls_that_kernels_take(device, keys, batch, replayed):
    """The shapes of which the operation has the maps."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        query = torch.empty(2, 3, 4, device=device)
        key = torch.empty(batch, keys, 4, device=device)
    assert trace.replays_dropout(query, key, key) is replayed


def test_the_native_executor_refuses_it(kept_whole):
    model = Reader()
    with pytest.raises(RuntimeError, match=r"scaled_dot_product_attention\.default draws random numbers"):
        maml(model, executor="native").value_and_grad(tasks())
    maml(model.eval(), executor="native").value_and_grad(tasks())


def test_a_meta_gradient_against_differences(kept_whole):
    """Each step, and each set, draws anew; the same numbers at weights that are moved a little."""
    model, batch = Reader(), tasks()
    learner = maml(model)
    assert "attention" in operations(learner)

    def run() -> tuple[Tensor, dict[str, Tensor]]:
        torch.manual_seed(4)
        return learner.value_and_grad(batch)

    gradient = run()[1]
    along = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    ends = []
    for step in (1e-4, -2e-4):
        with torch.no_grad():
            for name, p in model.named_parameters():
                p += step * along[name]
        ends.append(run()[0])
    slope = sum((gradient[name] * along[name]).sum() for name in along)
    # the error of a central difference: its step squared times a third derivative of about 1
    assert abs((ends[0] - ends[1]) / 2e-4 - slope) < 1e-6 * (1 + abs(slope))
