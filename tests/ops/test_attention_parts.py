"""What attention is made of: products of two values that differ between tasks, softmax, embeddings."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastmeta.core.task_op import Call, Unsupported
from fastmeta.ops.embedding import Embedding
from fastmeta.ops.matmul import Matmul
from tests.ops import four_maps
from tests.ops.four_maps import A, Case

aten = torch.ops.aten

CASES = [
    Case("softmax-last", aten.softmax.int, (A((2, 3, 5)), -1)),
    Case("softmax-first", aten.softmax.int, (A((4, 5)), 0)),
    Case("log-softmax", aten.log_softmax.int, (A((4, 5)), 1)),
    Case("log-softmax-middle", aten.log_softmax.int, (A((2, 4, 3)), -2)),
    Case("matmul", aten.matmul.default, (A((2, 3, 4)), A((2, 4, 5)))),
    Case("matmul-broadcast", aten.matmul.default, (A((2, 1, 3, 4)), A((6, 4, 5)))),
    Case("matmul-matrix", aten.matmul.default, (A((2, 3, 4)), A((4, 5)))),
    Case("bmm", aten.bmm.default, (A((2, 1, 4)), A((2, 4, 1)))),
    Case("mm", aten.mm.default, (A((3, 4)), A((4, 1)))),
]
TABLES = [
    Case("embedding", aten.embedding.default, (A((7, 3)), A((4, 2), "classes", 7))),
    Case("embedding-vector", aten.embedding.default, (A((5, 2)), A((6,), "classes", 5))),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_four_maps(case):
    four_maps.check_all(case)


@pytest.mark.parametrize("case", TABLES, ids=str)
def test_embedding(case):
    four_maps.check_all(case, ("weight",))


@given(batch=st.lists(st.integers(1, 3), max_size=2), sizes=st.tuples(*[st.integers(1, 4)] * 3))
def test_drawn_products(batch, sizes):
    m, k, n = sizes
    four_maps.check(Case("drawn", aten.matmul.default, (A((*batch, m, k)), A((*batch[1:], k, n)))))


def test_padding_gets_no_gradient():
    call = Call.example(aten.embedding.default, torch.randn(5, 2), torch.tensor([0, 3, 3]), 3)
    op = Embedding(call)
    _, saved = op.forward([torch.randn(2, 5, 2), torch.tensor([[0, 3, 3], [3, 1, 1]])])
    d, _ = op.backward(saved, (torch.ones(2, 3, 2),), [2, 0])
    assert d[:, 3].abs().max() == 0
    assert d[1, 1, 0] == 2


@pytest.mark.parametrize("indices", [[[0, 5], [1, 2]], [[0, 1], [-1, 2]], [[0, 1], [2, 5]]])
@pytest.mark.parametrize("table", [(5, 2), (2, 5, 2)])
def test_an_index_out_of_range_raises_and_reads_no_other_tasks_row(table, indices):
    op = Embedding(Call.example(aten.embedding.default, torch.randn(5, 2), torch.tensor([0, 3])))
    with pytest.raises(IndexError, match="out of range"):
        op.forward([torch.randn(table), torch.tensor(indices)])


def test_vectors_are_refused():
    with pytest.raises(Unsupported, match="vector"):
        Matmul(Call.example(aten.matmul.default, torch.randn(3), torch.randn(3)))
