"""Which parameters are the head of a model."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase

from torch import nn


def head_module(model: nn.Module, algorithm: str) -> str:
    """Name of the last submodule, in the order of registration, that has parameters of its own.

    Raises:
        ValueError: the model has no parameters.
    """
    owners = [name for name, module in model.named_modules() if any(True for _ in module.parameters(recurse=False))]
    if not owners:
        raise ValueError(f"{algorithm}: model must have parameters, got none in {type(model).__name__}")
    return owners[-1]


def head_parameters(model: nn.Module, head: str | Iterable[str] | None, algorithm: str) -> frozenset[str]:
    """Names of the head's parameters.

    Args:
        model: the model.
        head: names of submodules, or names or ``fnmatch`` patterns of parameters; ``None`` for :func:`head_module`.
        algorithm: whose message an error is.

    Raises:
        ValueError: one of them fits no parameter, or no parameter is left beside the head.
    """
    names = [name for name, _ in model.named_parameters()]
    wanted = [head_module(model, algorithm)] if head is None else [head] if isinstance(head, str) else list(head)

    def belongs(name: str, pattern: str) -> bool:
        return name.startswith(f"{pattern}.") or fnmatchcase(name, pattern) or pattern == ""

    unmatched = [pattern for pattern in wanted if not any(belongs(name, pattern) for name in names)]
    if unmatched or not wanted:
        raise ValueError(
            f"{algorithm}: head must name submodules or parameters of the model, got {unmatched or wanted}; "
            f"known parameters: {names}"
        )
    found = frozenset(name for name in names if any(belongs(name, pattern) for pattern in wanted))
    if len(found) == len(names):
        raise ValueError(
            f"{algorithm}: head must leave parameters for the body, got all of {sorted(found)}; name fewer by head="
        )
    return found
