"""On a GPU ``explain()`` names a kernel for every node of the workloads: ours, or a library's product.

Without one, kernels run in Triton's interpreter, and an operation is told that its tensors are on a GPU.
"""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastmeta as fm
from fastmeta.core import native
from fastmeta.core.dispatch import Backend
from fastmeta.core.task_op import registry
from fastmeta.engine import explain, fuse, joined, trace
from fastmeta.engine.compiler import Fit
from fastmeta.engine.explain import LIBRARIES, Row, backend_of
from fastmeta.learner.models import conv_net
from fastmeta.ops.activation import Activation
from fastmeta.ops.attention import op as attention
from fastmeta.ops.linear import Linear
from tests.engine.cases import CASES
from tests.kernels.running import device

WORKLOADS = ("mlp-relu", "mlp-tanh-mse", "convolutions", "residual", "transformer")
WAYS = 3


def told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every operation that has kernels run them, and nothing run whole meta-steps."""
    for switch in (fuse, joined):
        monkeypatch.setattr(switch, "IN_INTERPRETER", True)
    for missing in ("extension", "cuda_extension"):
        monkeypatch.setattr(native, missing, lambda: None)
    for kind in registry:
        if hasattr(kind, "_on_gpu"):
            assert len(inspect.signature(kind._on_gpu).parameters) == 2, kind
            monkeypatch.setattr(kind, "_on_gpu", lambda self, x: x.dtype == torch.float32)
    monkeypatch.setattr(explain, "predicted", lambda *of, **more: Fit(1, False, 0))  # which runs meta-steps
    monkeypatch.setattr(attention, "backends", lambda *of: (Backend("triton", True, "interpreter"),))
    monkeypatch.setattr(trace, "replays_dropout", lambda *operands: True)


def workload(name: str) -> tuple[nn.Module, Any, fm.TaskBatch]:
    """Model, loss and tasks; few and small, since each program takes the interpreter milliseconds."""
    if name == "convolutions":
        sets = [(torch.randn(2, n, 2, 8, 8), torch.randint(WAYS, (2, n))) for n in (3, 4)]
        return conv_net(2, WAYS, filters=4, image_size=8, blocks=2), F.cross_entropy, fm.TaskBatch(*sets)
    case = CASES[name]
    model = case.model().float()
    if name == "transformer":
        model.encoder.self_attn.dropout = 0.1
    return model, case.loss, fm.TaskBatch(*case.tasks(torch.float32))[:2]


def rows(name: str, monkeypatch: pytest.MonkeyPatch) -> list[Row]:
    where = device()
    with monkeypatch.context() as patch:
        if where.type == "cpu":
            told(patch)
        model, loss, tasks = workload(name)
        maml = fm.MAML(model.to(where), loss, lr=0.1, steps=1)
        return list(maml.explain(tasks.to(where)).rows)


def unnamed(row: Row) -> bool:
    """Whether neither a kernel of ours nor a library's product runs a call; a view needs none."""
    return row.backend not in ("triton", "cuda", *LIBRARIES.values()) and row.op not in LIBRARIES


@pytest.mark.slow
@pytest.mark.parametrize("name", WORKLOADS)
def test_every_node_has_a_kernel(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = rows(name, monkeypatch)
    assert "generic" not in {row.op for row in found}
    # what counts batches is one number for all tasks; a mean over an axis, and a sum with what all rows share, are one
    # kernel of PyTorch's each
    others = {row.op for row in found if unnamed(row) and not row.reason.startswith("no task differs")}
    assert others <= ({"reduction", "sum"} if name == "transformer" else set())
    assert ("attention" in {row.op for row in found}) == (name == "transformer")  # with its dropout


def test_a_gpus_libraries_are_named() -> None:
    linear, relu = object.__new__(Linear), object.__new__(Activation)
    assert [backend_of(linear, cuda=cuda) for cuda in (False, True)] == ["reference", "cublas"]
    assert [backend_of(relu, cuda=cuda) for cuda in (False, True)] == ["reference", "torch"]
    relu.backend = "triton"
    assert backend_of(relu, cuda=True) == "triton"
