"""The code of docs/migrating_higher.md runs as it stands, and its ways agree."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.compat.models import close

PAGE = Path(__file__).resolve().parents[2] / "docs" / "migrating_higher.md"
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
HIGHER, HIGHER_BATCHED, OVERRIDE, OVERRIDE_BATCHED, TORCHOPT, TORCHOPT_BATCHED = range(1, 7)


@pytest.fixture(autouse=True)
def float64_by_default() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def run(*blocks: int, originals: bool = False) -> dict[str, Any]:
    """The page's first block, then ``blocks``; all from the same seed."""
    torch.manual_seed(0)
    names: dict[str, Any] = {}
    for block in (0, *blocks):
        code = BLOCKS[block]
        if originals:
            code = re.sub(r"import fastmeta\.compat\.(\w+) as \w+", r"import \1", code)
            assert "fastmeta" not in code
        exec(compile(code, f"{PAGE.name}, block {block}", "exec"), names)
    return names


def gradients(names: dict[str, Any]) -> list[Tensor]:
    return [p.grad for p in names["model"].parameters()]


def weights(names: dict[str, Any]) -> list[Tensor]:
    return [p.detach() for p in names["model"].parameters()]


def test_the_page_runs_from_top_to_bottom() -> None:
    assert len(BLOCKS) == 7
    first = run()
    names = run(*range(1, 7))
    moved = [not torch.equal(a, b) for a, b in zip(weights(first), weights(names), strict=True)]
    assert all(moved)


@pytest.mark.parametrize(("loop", "batched"), [((HIGHER,), (HIGHER_BATCHED,)), ((TORCHOPT,), (TORCHOPT_BATCHED,))])
def test_three_lines_stand_for_the_loop(loop: tuple[int, ...], batched: tuple[int, ...]) -> None:
    ours = run(*loop)
    if batched == (TORCHOPT_BATCHED,):
        batched = (HIGHER_BATCHED,)
        assert BLOCKS[TORCHOPT_BATCHED] in BLOCKS[HIGHER_BATCHED]
    theirs = run(*batched)
    for a, b in zip(gradients(ours), gradients(theirs), strict=True):
        close(a, b, 1e-9)
    for a, b in zip(weights(ours), weights(theirs), strict=True):
        close(a, b, 1e-9)


def test_a_learned_rate() -> None:
    """After one step of the meta-optimizer either way; the gradients of both blocks are added to those it left."""
    loop = run(HIGHER, OVERRIDE)
    batched = run(HIGHER_BATCHED, OVERRIDE_BATCHED)
    close(loop["rate"].grad, batched["rate"].grad, 1e-8)
    assert loop["rate"].grad.abs() > 0
    for a, b in zip(gradients(loop), gradients(batched), strict=True):
        close(a, b, 1e-8)


@pytest.mark.parametrize(("library", "block"), [("higher", HIGHER), ("torchopt", TORCHOPT)])
def test_the_import_is_the_whole_change(library: str, block: int) -> None:
    pytest.importorskip(library)
    ours, theirs = run(block), run(block, originals=True)
    assert ours[library] is not theirs[library]
    assert theirs[library].__name__ == library
    for a, b in zip(gradients(ours), gradients(theirs), strict=True):
        close(a, b, 1e-12)
