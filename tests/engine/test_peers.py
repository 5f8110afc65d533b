"""The same work by other libraries: their meta-gradient is ours."""

from __future__ import annotations

import copy

import pytest
import torch

import fastmeta as fm
from tests.engine.test_exactness import problem
from tests.oracle import relative_error

higher, torchopt = pytest.importorskip("higher"), pytest.importorskip("torchopt")

pytestmark = pytest.mark.usefixtures("traced_once")
# float64 through the same sums in another order
EXACT = 1e-9
NAMES = ["mlp-relu", "mlp-tanh-mse", "conv4", "residual"]


def by_higher(model, case, support, query, steps):
    optimizer = torch.optim.SGD(model.parameters(), lr=case.lr)
    model.zero_grad()
    tasks = len(support[0])
    for t in range(tasks):
        with higher.innerloop_ctx(model, optimizer, copy_initial_weights=False) as (fast, inner):
            for _ in range(steps):
                inner.step(case.loss(fast(support[0][t]), support[1][t]))
            (case.loss(fast(query[0][t]), query[1][t]) / tasks).backward()
    return {n: p.grad for n, p in model.named_parameters()}


def by_torchopt(model, case, support, query, steps):
    optimizer = torchopt.MetaSGD(model, lr=case.lr)
    model.zero_grad()
    parameters = dict(model.named_parameters())
    start = torchopt.extract_state_dict(model, by="reference"), torchopt.extract_state_dict(optimizer, by="reference")
    tasks = len(support[0])
    for t in range(tasks):
        for _ in range(steps):
            optimizer.step(case.loss(model(support[0][t]), support[1][t]))
        (case.loss(model(query[0][t]), query[1][t]) / tasks).backward()
        torchopt.recover_state_dict(model, start[0])
        torchopt.recover_state_dict(optimizer, start[1])
    return {n: p.grad for n, p in parameters.items()}


@pytest.mark.parametrize("peer", [by_higher, by_torchopt])
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("name", NAMES)
def test_the_meta_gradient_is_theirs(name, steps, peer) -> None:
    case, model, (support, query) = problem(name)
    _, ours = fm.MAML(model, case.loss, lr=case.lr, steps=steps, engine="program").value_and_grad(
        fm.TaskBatch(support, query)
    )
    assert relative_error(ours, peer(copy.deepcopy(model), case, support, query, steps)) <= EXACT
