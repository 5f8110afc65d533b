"""The ground floor: messages of checks, files written in one step, choice of a backend."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from fastmeta.core import checks, files, native, product, rounding
from fastmeta.core.dispatch import Backend, select
from tests.oracle import relative_error

X = torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("kind", "message", "check"),
    [
        (TypeError, "op: x must be a torch.Tensor, got int", lambda: checks.tensor("op", "x", 1)),
        (TypeError, "op: x must be a floating-point tensor, got int64", lambda: checks.floating("op", "x", X.long())),
        (
            TypeError,
            "op: x must be float64 (that of y), got float32; convert it with .to(torch.float64)",
            lambda: checks.dtype("op", "x", X, torch.float64, "that of y"),
        ),
        (
            ValueError,
            "op: x must be on meta, got a tensor on cpu; move it with .to('meta')",
            lambda: checks.device("op", "x", X, torch.device("meta")),
        ),
        (ValueError, "op: x must be of shape [T, 4], got [2, 3]", lambda: checks.shape("op", "x", X, ("T", 4))),
        (ValueError, "op: x must be of shape [T], got [2, 3]", lambda: checks.shape("op", "x", X, ("T",))),
        (ValueError, "op: x must be one of 'a', 'b', got 'c'", lambda: checks.one_of("op", "x", "c", ["a", "b"])),
        (ValueError, "op: x must be at least 1, got 0", lambda: checks.at_least("op", "x", 0, 1)),
        (ValueError, "op: x must be at least 1, got nan", lambda: checks.at_least("op", "x", float("nan"), 1)),
        (
            ValueError,
            "op: x must be finite, got inf at index [1, 0]",
            lambda: checks.finite("op", "x", torch.tensor([[0.0, 1.0], [float("inf"), float("nan")]])),
        ),
    ],
)
def test_messages(kind: type[Exception], message: str, check: Any) -> None:
    with pytest.raises(kind, match=f"^{re.escape(message)}$"):
        check()


def test_what_is_right_passes() -> None:
    assert checks.tensor("op", "x", X) is X
    checks.floating("op", "x", X)
    checks.dtype("op", "x", X, torch.float32)
    checks.device("op", "x", X, torch.device("cpu"))
    checks.shape("op", "x", X, ("T", 3))
    checks.one_of("op", "x", "a", ["a", "b"])
    checks.at_least("op", "x", 1, 1)
    checks.finite("op", "x", X)


def test_written_whole_with_missing_folders(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "record.json"
    files.write_json(path, {"loss": 0.5, "name": "Ångström"})
    assert json.loads(path.read_text(encoding="utf-8")) == {"loss": 0.5, "name": "Ångström"}
    files.write_text(path, "new")
    assert path.read_text() == "new"
    files.write_bytes(path, b"\x00\xff")
    assert path.read_bytes() == b"\x00\xff"
    assert [p.name for p in path.parent.iterdir()] == ["record.json"]


def test_a_failure_leaves_the_old_content_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "state"
    files.write_bytes(path, b"old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=f"cannot write {path}: No space left on device"):
        files.write_bytes(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["state"]


def test_nan_is_not_json(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        files.write_json(tmp_path / "record.json", {"loss": float("nan")})
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    folder = tmp_path / "file" / "runs"
    with pytest.raises(OSError, match=f"cannot write into folder {folder}: Not a directory; choose another"):
        files.write_text(folder / "record.json", "{}")


def test_an_unwritable_folder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)  # an administrator may write anywhere; pretend not to be one
    with pytest.raises(PermissionError, match=f"cannot write into folder {tmp_path}: permission denied"):
        files.make_folder(tmp_path)


TABLE = (Backend("native", False, "it was not built"), Backend("reference", True, "torch"))


def test_the_first_available_backend_is_chosen() -> None:
    assert select("op", TABLE) == "reference"
    assert select("op", (Backend("native", True, ""), *TABLE[1:])) == "native"
    assert select("op", TABLE, "reference") == "reference"


@pytest.mark.parametrize(
    ("table", "requested", "kind", "message"),
    [
        (TABLE, "native", RuntimeError, "op: backend 'native' is not available here: it was not built"),
        (TABLE, "triton", ValueError, "op: backend must be one of 'native', 'reference', got 'triton'"),
        (TABLE[:1], None, RuntimeError, "op: no backend can run this call (native: it was not built)"),
    ],
)
def test_a_choice_that_cannot_be_made(table: Any, requested: str | None, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=re.escape(message)):
        select("op", table, requested)


def test_native_names_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ImportError("libgone.so: cannot open shared object file")

    native._load.cache_clear()
    monkeypatch.setattr(native.importlib, "import_module", missing)
    monkeypatch.setattr(native, "build_record", dict)
    try:
        assert native.extension() is None
        with pytest.raises(RuntimeError, match=r"op: backend 'native' is not available here: .*libgone\.so"):
            native.require("op")
    finally:
        native._load.cache_clear()


def test_nudged_weights_are_a_few_units_in_the_last_place_away() -> None:
    model = torch.nn.Linear(30, 20)
    before = [p.clone() for p in model.parameters()]
    moved = rounding.nudged(model, 1, ulps=4)
    for p, old, new in zip(model.parameters(), before, moved.parameters(), strict=True):
        assert torch.equal(p, old)
        distance = ((new - old) / old).abs() / torch.finfo(old.dtype).eps
        assert 1 < distance.max() <= 5  # two roundings of half a unit each
    again, other = (rounding.nudged(model, seed, ulps=4).weight for seed in (1, 2))
    assert torch.equal(again, moved.weight)
    assert not torch.equal(other, moved.weight)


@pytest.mark.parametrize("quicker", [False, True])
@pytest.mark.parametrize("shape", [(3, 5, 7), (100, 96, 130), (1, 900, 700), (700, 25, 900), (25, 900, 700)])
def test_products_by_either_library(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int, int], quicker: bool
) -> None:
    if quicker and not torch.backends.mkldnn.is_available():
        pytest.skip("torch is built without oneDNN")
    monkeypatch.setattr(product, "onednn_is_quicker", lambda: quicker)
    torch.manual_seed(0)
    m, k, n = shape
    a, b, bias = torch.randn(m, k), torch.randn(k, n), torch.randn(n)
    truth = a.double() @ b.double()
    for left in (a, a.t().contiguous().t(), torch.stack([a, a], 1)[:, 0]):
        for right in (b, b.t().contiguous().t()):
            assert relative_error(product.product(left, right), truth) <= 1e-6
            assert relative_error(product.linear(left, right.t(), bias), truth + bias) <= 1e-6
    a.requires_grad_()
    product.product(a, b).sum().backward()  # where autograd records, it can differentiate
    assert relative_error(a.grad, b.sum(1).expand(m, k)) <= 1e-5
