"""The hyper-parameters of an optimizer as tensors that can be learned, and back."""

from __future__ import annotations

import collections
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastmeta.compat.higher.utils import flatten, mapped
from fastmeta.core.checks import fail


def per_group(
    name: str, override: Mapping[str, Sequence[Any]], groups: list[dict[str, Any]]
) -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """Each hyper-parameter of ``override``, its value for each of ``groups``, and that group.

    Raises:
        ValueError: a hyper-parameter has neither one value nor one for each group.
    """
    for key, values in override.items():
        if len(values) not in (1, len(groups)):
            expected = f"one value or {len(groups)}, one for each group"
            fail(ValueError, name, f"override[{key!r}]", expected, str(len(values)))
        for i, group in enumerate(groups):
            yield key, values[0 if len(values) == 1 else i], group


def get_trainable_opt_params(opt: torch.optim.Optimizer, device: torch.device | None = None) -> dict[str, list[Any]]:
    """The numbers among the hyper-parameters of ``opt``, as leaves that require grad, in the form of ``override``.

    Args:
        opt: any optimizer.
        device: where the tensors are put.

    Returns:
        By name, a list with one value for each group: a tensor ``[]`` of the default dtype, or a tuple of such. Flags,
        and hyper-parameters that hold anything else than numbers, are left out.
    """

    def leaf(x: float) -> Tensor:
        return torch.tensor(float(x), device=device, requires_grad=True)

    override = collections.defaultdict[str, list[Any]](list)
    for group in opt.param_groups:
        for name, value in group.items():
            if name != "params" and all(type(x) in (int, float) for x in flatten(value)):
                override[name].append(mapped(leaf, value))
    return override


def apply_trainable_opt_params(opt: torch.optim.Optimizer, override: Mapping[str, Sequence[Any]]) -> None:
    """Write learned hyper-parameters back into the groups of ``opt``.

    Numbers become floats, except that an int stays one where the learned value is whole; a tensor is written in place.

    Raises:
        ValueError: a hyper-parameter that ``opt`` does not have, another structure than its, or another number of
            values than one or one for each group.
    """
    for name, value, group in per_group("apply_trainable_opt_params", override, opt.param_groups):
        if name not in group:
            fail(ValueError, "apply_trainable_opt_params", "override", "of hyper-parameters of the optimizer", name)
        group[name] = _applied(name, value, group[name])


def _applied(name: str, value: Any, target: Any) -> Any:
    if isinstance(target, (list, tuple)) and isinstance(value, (list, tuple)) and len(value) == len(target):
        return type(target)(_applied(name, v, t) for v, t in zip(value, target, strict=True))
    if isinstance(target, Tensor) and isinstance(value, Tensor):
        with torch.no_grad():
            target.copy_(value)
        return target
    if isinstance(target, (int, float)) and isinstance(value, (int, float, Tensor)):
        number = value.item() if isinstance(value, Tensor) else float(value)
        return type(target)(number) if type(target)(number) == number else number
    return fail(ValueError, "apply_trainable_opt_params", f"override[{name!r}]", f"shaped as {target!r}", repr(value))
