"""Copies of modules that autograd sees, and updates of them: what every algorithm here is made of."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastmeta.core.checks import fail


def magic_box(x: Any) -> Any:
    """``exp(x - stop_gradient(x))``: 1, whose derivative is that of ``x``.

    Source: J. Foerster et al., DiCE: The Infinitely Differentiable Monte Carlo Estimator, ICML 2018.

    Args:
        x: a tensor; anything else is given back as it is.

    Returns:
        A tensor of ones in x's shape, differentiable to any order.
    """
    return torch.exp(x - x.detach()) if isinstance(x, Tensor) else x


def clone_parameters(param_list: Iterable[Tensor]) -> list[Tensor]:
    """``torch.clone`` of every tensor of a list; gradients flow back to the originals."""
    return [p.clone() for p in param_list]


def clone_named_parameters(param_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``torch.clone`` of every tensor of a mapping; gradients flow back to the originals."""
    return {name: p.clone() for name, p in param_dict.items()}


def clone_module(module: nn.Module, memo: dict[Tensor, Tensor] | None = None) -> nn.Module:
    """A copy of a module whose parameters are ``torch.clone`` of the original's, so that gradients flow back to them.

    * A tensor that stands in several places is cloned once: tied weights stay tied, and the parameters of a submodule
      that is used twice are the same in both copies of it.
    * A buffer is cloned only if it requires grad. Others are shared: batch norm's running statistics are one for the
      original and all its clones, and every forward pass in training mode writes them.
    * Hooks and all other attributes are shared as well. The flat weights of recurrent layers are built anew.
    * What is no module, such as a ``None`` in a ``ModuleList``, is given back as it is.

    Args:
        module: the module.
        memo: clones by their original, for a module that shares tensors with one cloned before.

    Returns:
        The copy. Its parameters are no leaves and no ``nn.Parameter``.
    """
    if not isinstance(module, nn.Module):
        return module
    memo = {} if memo is None else memo
    clone = module.__new__(type(module))
    clone.__dict__ = module.__dict__.copy()
    clone._parameters = {name: _cloned(p, memo) for name, p in module._parameters.items()}  # type: ignore[misc]
    clone._buffers = {
        name: _cloned(b, memo) if b is not None and b.requires_grad else b for name, b in module._buffers.items()
    }
    clone._modules = {name: clone_module(child, memo) for name, child in module._modules.items()}  # type: ignore[arg-type]
    _flatten(clone)
    return clone


def update_module(
    module: nn.Module, updates: Sequence[Tensor | None] | None = None, memo: dict[Tensor, Tensor] | None = None
) -> nn.Module:
    """Replace every parameter ``p`` of a module by ``p + u``, so that gradients flow to both.

    The module is changed in place, its tensors are not. Tied parameters stay tied.

    Args:
        module: the module, usually a clone.
        updates: ``u`` for each of ``module.parameters()``, in their order; a parameter with ``None`` stays. If the
            whole is ``None``, each parameter or buffer that has an attribute ``update`` moves by that.
        memo: what tensors have become, for a module that shares tensors with one updated before.

    Returns:
        The module.

    Raises:
        ValueError: another number of updates than of parameters.
    """
    if not isinstance(module, nn.Module):
        return module
    memo = {} if memo is None else memo
    if updates is not None:
        parameters = list(module.parameters())
        require_as_many("update_module", "updates", updates, parameters)
        for p, u in zip(parameters, updates, strict=True):
            p.update = u  # type: ignore[attr-defined]
    for tensors in (module._parameters, module._buffers):
        for name, tensor in tensors.items():
            if tensor is not None:
                tensors[name] = _updated(tensor, memo)  # type: ignore[assignment]
    for child in module._modules.values():
        update_module(child, None, memo)  # type: ignore[arg-type]
    _flatten(module)
    return module


def detach_module(module: nn.Module, keep_requires_grad: bool = False) -> None:
    """Cut the parameters of a module, and buffers that require grad, from their graph, in place.

    Args:
        module: the module, usually a clone.
        keep_requires_grad: let what required grad require it again, as a leaf; by default nothing does.
    """
    if not isinstance(module, nn.Module):
        return
    for child in module.modules():
        buffers = (b for b in child._buffers.values() if b is not None and b.requires_grad)
        for tensor in (*(p for p in child._parameters.values() if p is not None), *buffers):
            required = tensor.requires_grad
            tensor.detach_().requires_grad_(keep_requires_grad and required)


def accuracy(preds: Tensor, targets: Tensor) -> Tensor:
    """Share ``[]`` of the rows of ``preds`` ``[N, classes]`` whose largest entry is at ``targets`` ``[N]``."""
    return (preds.argmax(dim=1).long() == targets.long()).sum().float() / preds.size(0)


def require_as_many(op: str, name: str, given: Sequence[object], parameters: Sequence[object]) -> None:
    """Raise ``ValueError`` unless there is one of ``given`` for each of the parameters."""
    if len(given) != len(parameters):
        fail(
            ValueError,
            op,
            name,
            f"one for each of the module's {len(parameters)} parameters",
            f"{len(given)}",
            "their order is that of module.parameters()",
        )


def _cloned(tensor: Tensor | None, memo: dict[Tensor, Tensor]) -> Tensor | None:
    if tensor is None:
        return None
    if tensor not in memo:
        memo[tensor] = tensor.clone()
    return memo[tensor]


def _updated(tensor: Tensor, memo: dict[Tensor, Tensor]) -> Tensor:
    if tensor not in memo:
        update = getattr(tensor, "update", None)
        if update is None:
            return tensor
        tensor.update = None  # type: ignore[attr-defined]
        memo[tensor] = tensor + update
    return memo[tensor]


def _flatten(module: nn.Module) -> None:
    """Let a recurrent layer see the tensors that have become its weights."""
    if isinstance(module, nn.RNNBase):
        module._init_flat_weights()
    elif hasattr(module, "flatten_parameters"):
        module._apply(lambda tensor: tensor)
