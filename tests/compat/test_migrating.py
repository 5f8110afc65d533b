"""The code of docs/migrating.md, as it stands there: what is said to be the same is the same."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

PAGE = Path(__file__).resolve().parents[2] / "docs" / "migrating.md"


def blocks(section: str) -> list[str]:
    """The Python of one section of the page."""
    found = re.search(rf"^## {section}\n(.*?)(?=^## |\Z)", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    assert found is not None, f"docs/migrating.md has no section {section}"
    return re.findall(r"```python\n(.*?)```", found[1], re.DOTALL)


def run(*code: str) -> dict[str, Any]:
    names: dict[str, Any] = {}
    for block in code:
        exec(compile(block, str(PAGE), "exec"), names)
    return names


def results(learner: torch.nn.Module) -> list[Tensor]:
    """Gradients and the parameters after the optimizer's step."""
    return [x for p in learner.parameters() for x in (p.grad, p.detach())]


def assert_close(value: list[Tensor], truth: list[Tensor]) -> None:
    for a, b in zip(value, truth, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-6)


def test_learn2learn_loop_and_engine_give_the_same() -> None:
    setup, loop, engine, _ = blocks("learn2learn")
    before = run(setup)["model"]
    of_loop, of_engine = run(setup, loop), run(setup, engine)
    truth = results(of_loop["maml"])
    assert_close(results(of_engine["maml"]), truth)
    moved = zip(before.parameters(), of_engine["maml"].parameters(), strict=True)
    assert all(not torch.equal(p, q) for p, q in moved)
    with pytest.raises(AssertionError):  # one step fewer is seen
        assert_close(results(run(setup, engine.replace("steps=5", "steps=4"))["maml"]), truth)


def test_learn2learn_meta_sgd_and_its_loop_give_the_same() -> None:
    setup, loop, _, engine = blocks("learn2learn")
    made, step = engine.split("opt.zero_grad()")
    of_engine = run(setup, made, "opt.zero_grad()" + step)
    of_loop = run(setup, made, loop.replace("maml", "meta"))
    assert len(results(of_loop["meta"])) == 16  # 4 parameters and 4 rates
    assert_close(results(of_engine["meta"]), results(of_loop["meta"]))


def test_learn2learn_in_float64() -> None:
    setup, loop, engine, _ = blocks("learn2learn")
    setup = setup.replace("torch.manual_seed(0)\n", "torch.manual_seed(0)\ntorch.set_default_dtype(torch.float64)\n")
    try:
        of_loop, of_engine = run(setup, loop), run(setup, engine)
    finally:
        torch.set_default_dtype(torch.float32)
    for p, q in zip(of_loop["maml"].parameters(), of_engine["maml"].parameters(), strict=True):
        assert float((p.grad - q.grad).norm()) <= 1e-12 * float(p.grad.norm())
