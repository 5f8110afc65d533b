from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from fastmeta.core import files
from fastmeta.learner import checkpoint

TENSORS = {"a": torch.arange(6.0).view(2, 3), "b.c": torch.tensor(3, dtype=torch.int64), "d": torch.zeros(0)}


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    state = {"step": 3, "loss": 0.1 + 0.2, "deep": {"x": [1, None, "y"]}}
    checkpoint.save(tmp_path / "new", "last", TENSORS, state)
    tensors, loaded = checkpoint.load(tmp_path / "new", "last")
    assert loaded == state
    assert tensors.keys() == TENSORS.keys()
    assert all(torch.equal(tensors[n], t) and tensors[n].dtype == t.dtype for n, t in TENSORS.items())


def test_tied_and_strided_tensors_are_saved(tmp_path: Path) -> None:
    whole = torch.arange(6.0).view(2, 3)
    checkpoint.save(tmp_path, "last", {"whole": whole, "same": whole, "turned": whole.T}, {})
    tensors, _ = checkpoint.load(tmp_path, "last")
    assert torch.equal(tensors["same"], whole)
    assert torch.equal(tensors["turned"], whole.T)


def test_a_new_checkpoint_replaces_the_old_one_only(tmp_path: Path) -> None:
    for step in range(3):
        checkpoint.save(tmp_path, "last", {"a": torch.full((2,), float(step))}, {"step": step})
        checkpoint.save(tmp_path, "best", {"a": torch.full((2,), float(step))}, {"step": step})
    assert checkpoint.load(tmp_path, "last")[1] == {"step": 2}
    assert len(list(tmp_path.glob("*.safetensors"))) == 2


def test_dying_while_saving_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint.save(tmp_path, "last", TENSORS, {"step": 1})

    def die(path: Path, value: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(files, "write_json", die)
    with pytest.raises(OSError, match="disk full"):
        checkpoint.save(tmp_path, "last", {"a": torch.ones(1)}, {"step": 2})
    tensors, state = checkpoint.load(tmp_path, "last")
    assert state == {"step": 1}
    assert torch.equal(tensors["a"], TENSORS["a"])


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [cut, flip, lambda p: p.write_bytes(b"")])
def test_damaged_tensors_are_named(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    checkpoint.save(tmp_path, "last", TENSORS, {})
    (file,) = tmp_path.glob("*.safetensors")
    damage(file)
    with pytest.raises(ValueError, match=f"{file.name} must have the SHA-256 .*damaged or truncated"):
        checkpoint.load(tmp_path, "last")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "must be JSON"),
        ('{"version": 1, "tens', "must be JSON"),
        ("[]", "must hold"),
        ('{"version": 1}', "must hold"),
        ('{"version": 9, "tensors": "x", "sha256": "0", "state": {}}', "must be of version 1, got 9"),
        ('{"version": 1, "tensors": "../x", "sha256": "0", "state": {}}', "must name a file beside it"),
        ('{"version": 1, "tensors": "x", "sha256": "0", "state": {}}', "must lie beside x, which is missing"),
    ],
)
def test_a_damaged_record_is_named(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "last.json").write_text(content)
    with pytest.raises(ValueError, match=f"last.json {message}"):
        checkpoint.load(tmp_path, "last")


def test_a_file_that_is_no_safetensors_is_named(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, "last", TENSORS, {})
    record = json.loads((tmp_path / "last.json").read_text())
    (tmp_path / "x").write_bytes(b"\x00" * 40)
    record |= {"tensors": "x", "sha256": __import__("hashlib").sha256(b"\x00" * 40).hexdigest()}
    (tmp_path / "last.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="x must be a safetensors file"):
        checkpoint.load(tmp_path, "last")


def test_a_missing_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no .*last\.json; train first"):
        checkpoint.load(tmp_path, "last")


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.Adam(p, lr=0.1, amsgrad=True),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        lambda p: torch.optim.SGD(p, lr=0.1),
        lambda p: torch.optim.AdamW([{"params": p[:1], "lr": 0.2}, {"params": p[1:]}]),
    ],
)
def test_an_optimizer_goes_on_as_it_would_have(tmp_path: Path, make: Callable[..., torch.optim.Optimizer]) -> None:
    def advance(parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
        for p in parameters:
            p.grad = p.detach().sin()
        optimizer.step()

    one = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.full((2,), 2.0))]
    first = make(one)
    for _ in range(3):
        advance(one, first)
    tensors, state = checkpoint.pack_optimizer(first)
    checkpoint.save(tmp_path, "last", tensors, state)
    other = [nn.Parameter(p.detach().clone()) for p in one]
    second = make(other)
    checkpoint.unpack_optimizer(second, *checkpoint.load(tmp_path, "last"))
    for _ in range(2):
        advance(one, first)
        advance(other, second)
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_weights_of_another_model_are_refused() -> None:
    state = nn.Linear(3, 2).state_dict()
    model = nn.Linear(3, 2)
    checkpoint.load_module(model, state, "here")
    assert torch.equal(model.weight, state["weight"])
    with pytest.raises(
        ValueError, match=r"here must fit the model, got: weight is torch.float32 \[2, 3\] and not .* \[2, 4\]"
    ):
        checkpoint.load_module(nn.Linear(4, 2), state, "here")
    with pytest.raises(ValueError, match="bias is unknown"):
        checkpoint.load_module(nn.Linear(3, 2, bias=False), state, "here")
    with pytest.raises(ValueError, match=r"0\.weight is missing"):
        checkpoint.load_module(nn.Sequential(nn.Linear(3, 2)), state, "here")
    with pytest.raises(ValueError, match=r"torch\.float32 .* and not torch.float64"):
        checkpoint.load_module(nn.Linear(3, 2).double(), state, "here")


def test_prefixes() -> None:
    packed = checkpoint.with_prefix("model", {"a": torch.ones(1)}) | {"modelx.a": torch.ones(1)}
    assert list(checkpoint.under("model", packed)) == ["a"]
