"""Copies of modules that autograd sees, and updates of them: what every algorithm here is made of."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastmeta.core.checks import fail

Memo = dict[int, tuple[Tensor, Tensor]]  # by id: the tensor, which keeps its id while it lives, and what it became


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


def clone_module(module: nn.Module, memo: Memo | None = None) -> nn.Module:
    """A copy of a module whose parameters are ``torch.clone`` of the original's, so that gradients flow back to them.

    * A tensor that stands in several places is cloned once: tied weights stay tied, and the parameters of a submodule
      that is used twice are the same in both copies of it.
    * A buffer is cloned only if it requires grad. Others are shared: batch norm's running statistics are one for the
      original and all its clones, and every forward pass in training mode writes them.
    * Hooks and all other attributes are shared as well. The flat weights of recurrent layers are built anew.
    * What is no module, such as a ``None`` in a ``ModuleList``, is given back as it is.

    Args:
        module: the module.
        memo: a dict, empty at first, that ties the clones of several modules which share tensors.

    Returns:
        The copy. Its parameters are no leaves and no ``nn.Parameter``.
    """
    if not isinstance(module, nn.Module):
        return module
    memo = {} if memo is None else memo
    clone = module.__new__(type(module))
    # Straight into __dict__, for a module's own way of setting an attribute takes most of the time of a small clone.
    state = module.__dict__
    clone.__dict__.update(
        state,
        _parameters={name: p if p is None else _cloned(p, memo) for name, p in state["_parameters"].items()},
        _buffers={
            name: _cloned(b, memo) if b is not None and b.requires_grad else b for name, b in state["_buffers"].items()
        },
        _modules={name: clone_module(child, memo) for name, child in state["_modules"].items()},
    )
    _flatten(clone)
    return clone


def update_module(
    module: nn.Module, updates: Sequence[Tensor | None] | None = None, memo: Memo | None = None
) -> nn.Module:
    """Replace every parameter ``p`` of a module by ``p + u``, so that gradients flow to both.

    The module is changed in place, its tensors are not. Tied parameters stay tied.

    Args:
        module: the module, usually a clone.
        updates: ``u`` for each of ``module.parameters()``, in their order; a parameter with ``None`` stays. If the
            whole is ``None``, each parameter or buffer that has an attribute ``update`` moves by that.
        memo: a dict, empty at first, that ties the updates of several modules which share tensors.

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
    _update(module, memo)
    return module


def replace_parameters(module: nn.Module, steps: Iterable[tuple[Tensor, Tensor]]) -> nn.Module:
    """:func:`update_module` with pairs of a parameter and what stands for it from now on, not its update."""
    _update(module, {id(pair[0]): pair for pair in steps})
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


def _cloned(tensor: Tensor, memo: Memo) -> Tensor:
    found = memo.get(id(tensor))
    if found is None:
        found = memo[id(tensor)] = (tensor, tensor.clone())
    return found[1]


def _update(module: nn.Module, memo: Memo) -> None:
    state = module.__dict__
    for tensors in (state["_parameters"], state["_buffers"]):
        for name, tensor in tensors.items():
            if tensor is not None:
                tensors[name] = _updated(tensor, memo)
    for child in state["_modules"].values():
        if isinstance(child, nn.Module):
            _update(child, memo)
    _flatten(module)


def _updated(tensor: Tensor, memo: Memo) -> Tensor:
    found = memo.get(id(tensor))
    if found is None:
        update = getattr(tensor, "update", None)
        if update is None:
            return tensor
        tensor.update = None  # type: ignore[attr-defined]
        found = memo[id(tensor)] = (tensor, tensor + update)
    return found[1]


def _flatten(module: nn.Module) -> None:
    """Let a recurrent layer see the tensors that have become its weights."""
    if isinstance(module, nn.RNNBase):
        module._init_flat_weights()
    elif hasattr(type(module), "flatten_parameters"):  # of the class: a module is slow to say what it has not got
        module._apply(lambda tensor: tensor)
