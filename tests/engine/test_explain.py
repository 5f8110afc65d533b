"""``explain()`` tells what runs, what it keeps and why; the figures are those of the real tensors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastmeta as fm
from fastmeta.core import native
from tests.engine.cases import CASES, T


def explained(name: str, **settings):
    case = CASES[name]
    model = case.model()
    maml = fm.MAML(model, case.loss, **{"lr": case.lr, "steps": 2, "executor": "reference", **settings})
    return maml.explain(fm.TaskBatch(*case.tasks(torch.float32)))


def test_every_call_has_a_row_with_its_operation() -> None:
    table = explained("conv4")
    assert [row.op for row in table.rows].count("conv2d") == 4
    assert {row.op for row in table.rows} >= {
        "conv2d",
        "batch_norm",
        "activation",
        "max_pool",
        "linear",
        "cross_entropy",
    }
    assert all(row.reason == "" for row in table.rows)
    text = str(table)
    assert "kept per inner step: operands" in text
    assert all(row.op in text for row in table.rows)


def test_the_native_executor_is_named_with_what_a_task_keeps() -> None:
    if native.extension() is None:
        pytest.skip(native.missing_reason())
    table = explained("conv4", executor="native")
    assert {row.backend for row in table.rows} == {"native"}
    assert {row.plan for row in table.rows} == {"resident"}
    assert set(table.kept) == {"values and cotangents", "fast weights"}
    assert f"instruction set {native.extension().instruction_set()}" in str(table)
    assert explained("conv4", executor="native", first_order=True).kept == {}
    assert "the reference executor was asked for" in explained("conv4").executor


def test_the_workloads_need_no_generic_operation() -> None:
    for name in ("mlp-relu", "mlp-tanh-mse", "mlp-layernorm-bce", "conv4", "residual", "transformer"):
        assert [row.op for row in explained(name).rows if row.op == "generic"] == [], name


def test_a_generic_operation_gives_its_reason() -> None:
    reasons = [row.reason for row in explained("generic").rows if row.op == "generic"]
    assert reasons
    assert all("aten." in reason for reason in reasons)


def test_rows_name_the_module_and_count_operations() -> None:
    rows = {row.module: row for row in explained("mlp-relu").rows if row.op == "linear"}
    assert set(rows) == {"0", "2", "4"}
    # The first layer, whose input is data: forward and dw, and in two steps' tangents one term for y_dot and one for
    # dw_dot. Later layers have dx beside, y_dot of two terms, dw_dot and dx_dot of two each. 5 rows, 6 of the query.
    assert rows["0"].flops == 2 * 4 * 8 * (2 * 5 * (2 + 2) + 6 * 2) * T
    assert rows["2"].flops == 2 * 8 * 7 * (2 * 5 * (3 + 6) + 6 * 3) * T


def test_what_is_kept_is_counted_from_the_tensors_themselves() -> None:
    model = nn.Sequential(nn.Linear(4, 8, bias=False), nn.Tanh(), nn.Linear(8, 3, bias=False))
    tasks = fm.TaskBatch(*((torch.randn(T, n, 4), torch.randn(T, n, 3)) for n in (5, 5)))
    kept = fm.MAML(model, F.mse_loss, lr=0.1, steps=1, executor="reference").explain(tasks).kept
    floats = 4 * T
    assert kept["fast weights"] == floats * (4 * 8 + 8 * 3)
    # tanh keeps its result, which is the second layer's input; the loss keeps outputs or their difference
    assert floats * 5 * (8 + 3) <= kept["operands"] <= floats * 5 * (8 + 8 + 3 + 3)
    # of the loss, of its broadcast operand, of the second layer's result, of tanh's, of the first layer's
    assert floats * (1 + 5 * 3) <= kept["cotangents"] <= floats * (1 + 5 * (3 + 3 + 8 + 8))


def test_first_order_keeps_nothing_for_the_hessian() -> None:
    assert explained("conv4", first_order=True).kept == {}
    rate = torch.tensor(0.1, requires_grad=True)
    assert set(explained("conv4", first_order=True, lr=rate).kept) == {"gradients"}


def test_what_no_task_changes_runs_once() -> None:
    class Prior(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(4))
            self.head = nn.Linear(4, 3)

        def forward(self, x):
            return self.head(x * F.softplus(self.scale))

    tasks = fm.TaskBatch(*((torch.randn(T, n, 4), torch.randint(3, (T, n))) for n in (5, 5)))
    rows = fm.MAML(Prior(), F.cross_entropy, parameters=["head.*"]).explain(tasks).rows
    assert [row.plan for row in rows if "softplus" in row.reason or row.reason.startswith("no task")] == ["shared"]


def test_autodiff_says_why() -> None:
    text = str(explained("mlp-relu", engine="autodiff"))
    assert "autodiff engine" in text
    assert "it was asked for" in text


def test_a_linear_layer_has_a_time_for_each_plan() -> None:
    def rows(width: int, **settings):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 3))
        tasks = fm.TaskBatch(*((torch.randn(8, n, width), torch.randint(3, (8, n))) for n in (5, 5)))
        maml = fm.MAML(model, F.cross_entropy, **{"lr": 0.1, "steps": 2, **settings})
        return maml.explain(tasks).rows

    wide, activation, head, loss = rows(1536)
    assert wide.plan == "factored"
    assert 0 < wide.factored_ms < wide.dense_ms
    assert 0 < head.dense_ms < head.factored_ms
    assert [(row.dense_ms, row.factored_ms) for row in (activation, loss)] == [(None, None)] * 2
    again = rows(1536, plan="dense")[0]
    assert (again.dense_ms, again.factored_ms) == (wide.dense_ms, wide.factored_ms)
    longer = rows(1536, steps=4)[0]
    assert longer.dense_ms > wide.dense_ms
    assert longer.factored_ms > wide.factored_ms


def test_a_weight_without_a_choice_says_why() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x):
            return self.head(self.layer(self.layer(x).tanh()))

    tasks = fm.TaskBatch(*((torch.randn(T, n, 4), torch.randint(3, (T, n))) for n in (5, 5)))
    model = Twice()
    rows = [row for row in fm.MAML(model, F.cross_entropy).explain(tasks).rows if row.op == "linear"]
    assert [row.dense_ms is None for row in rows] == [True, True, False]
    assert [row.reason for row in rows] == ["several calls read its weight, so it is formed"] * 2 + [""]
    rates = {name: torch.full_like(p, 0.1) for name, p in model.named_parameters()}
    rows = [row for row in fm.MAML(model, F.cross_entropy, rates).explain(tasks).rows if row.op == "linear"]
    assert {row.reason for row in rows} == {"one rate an element: its steps are of full rank, so it is formed"}
    assert all(row.dense_ms is None and row.factored_ms is None for row in rows)
