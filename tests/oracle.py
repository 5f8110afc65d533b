"""The truth tests and benchmarks compare with: MAML by plain PyTorch autograd, one task after another.

It imports nothing of fastmeta. In float64 it is the reference of every error that is reported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

NULL = 1e-6  # a parameter whose reference norm is below this share of the whole has a gradient of rounding alone


def maml_loop(
    model: nn.Module,
    loss: Callable[[Any, Any], Tensor],
    support: Any,
    query: Any,
    lr: float | Tensor | Mapping[str, Tensor | float],
    steps: int,
    first_order: bool = False,
    adapted_names: Iterable[str] | None = None,
    *,
    momentum: float | Tensor = 0.0,
    dampening: float | Tensor = 0.0,
    nesterov: bool = False,
    weight_decay: float | Tensor = 0.0,
    update: Callable[..., tuple[Tensor, Any]] | Mapping[str, Callable[..., tuple[Tensor, Any]]] | None = None,
    hyper: Mapping[str, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Any, dict[str, Tensor]]:
    """Meta-gradient of the mean query loss after ``steps`` of inner SGD (docs/maths.md, eq. 1-4).

    Args:
        model: any module, in the mode it stands in; its parameters, gradients and buffers are left as they are.
        loss: ``loss(outputs, targets)`` for ``(inputs, targets)`` batches, ``loss(model, batch)`` for other pytrees.
        support: a pair ``(inputs, targets)`` or a pytree; every tensor ``[T, ...]``.
        query: likewise.
        lr: one inner learning rate, a tensor ``[]`` or ``[K]`` (it may require grad) or one per parameter name.
        steps: number of inner steps.
        first_order: treat the inner gradients as constants.
        adapted_names: the parameters that adapt; all that require grad when ``None``.
        momentum, dampening, nesterov, weight_decay: as torch.optim.SGD has them; tensors may require grad.
        update: another optimizer's step instead, ``(phi, g, state, lr) -> (phi, state)``, or one per parameter name;
            the first state is ``None``.
        hyper: tensors that it reads and whose gradients are wanted, by name.

    Returns:
        ``(loss, task_losses, logits, grads)``: the mean loss ``[]``, one loss a task ``[T]``, the query outputs
        ``[T, Nq, ...]`` (``None`` for a ``loss(model, batch)``), and the meta-gradient by parameter name, zero where a
        parameter is not used. If ``lr`` holds tensors that require grad, ``grads`` has them as ``"lr"`` or
        ``"lr.<name>"``; likewise ``"momentum"``, ``"dampening"``, ``"weight_decay"`` and what ``hyper`` names.
    """
    theta = {name: p.detach().requires_grad_() for name, p in model.named_parameters() if p.requires_grad}
    adapted = [name for name in theta if adapted_names is None or name in set(adapted_names)]
    alphas = dict(lr) if isinstance(lr, Mapping) else {"": lr}
    learned = {f"lr.{k}" if k else "lr": a for k, a in alphas.items() if isinstance(a, Tensor) and a.requires_grad}
    others = {"momentum": momentum, "dampening": dampening, "weight_decay": weight_decay}
    learned |= {name: v for name, v in others.items() if isinstance(v, Tensor) and v.requires_grad}
    learned |= {name: v for name, v in (hyper or {}).items() if v.requires_grad}
    wanted = {**theta, **learned}
    tasks = pytree.tree_leaves(support)[0].shape[0]

    grads = {name: torch.zeros_like(value) for name, value in wanted.items()}
    task_losses, logits = [], []
    for t in range(tasks):
        batch_s, batch_q = (pytree.tree_map(lambda x: x[t], batch) for batch in (support, query))  # noqa: B023
        phi, buffer = dict(theta), dict[str, Any]()
        for k in range(steps):
            inner, _ = _evaluate(model, loss, phi, batch_s)
            g = torch.autograd.grad(inner, [phi[n] for n in adapted], create_graph=not first_order, allow_unused=True)
            for name, d in zip(adapted, g, strict=True):
                if d is not None:
                    alpha = alphas[name] if isinstance(lr, Mapping) else alphas[""]
                    alpha = alpha[k] if isinstance(lr, Tensor) and lr.dim() else alpha
                    if update is not None:
                        own = update[name] if isinstance(update, Mapping) else update
                        phi[name], buffer[name] = own(phi[name], d, buffer.get(name), alpha)
                        continue
                    d = d + weight_decay * phi[name]
                    known = buffer.get(name)
                    buffer[name] = d if known is None else momentum * known + (1 - dampening) * d
                    if isinstance(momentum, Tensor) or momentum != 0:
                        d = d + momentum * buffer[name] if nesterov else buffer[name]
                    phi[name] = phi[name] - alpha * d
        outer, outputs = _evaluate(model, loss, phi, batch_q)
        for name, d in zip(wanted, torch.autograd.grad(outer, list(wanted.values()), allow_unused=True), strict=True):
            if d is not None:
                grads[name] += d / tasks
        task_losses.append(outer.detach())
        logits.append(pytree.tree_map_only(Tensor, Tensor.detach, outputs))

    stacked = None if logits[0] is None else pytree.tree_map(lambda *x: torch.stack(x), *logits)
    losses = torch.stack(task_losses)
    return losses.mean(), losses, stacked, grads


def _evaluate(
    model: nn.Module, loss: Callable[[Any, Any], Tensor], phi: dict[str, Tensor], batch: Any
) -> tuple[Tensor, Any]:
    """Loss and outputs of one batch at weights ``phi``; buffers are copies, so running statistics stay as they are."""
    state = {**phi, **{name: b.clone() for name, b in model.named_buffers()}}
    if isinstance(batch, (tuple, list)) and len(batch) == 2:
        inputs, targets = batch
        arguments = tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)
        outputs = functional_call(model, state, arguments)
        return loss(outputs, targets), outputs
    holder = _Bound(model, loss)
    return functional_call(holder, {f"model.{name}": value for name, value in state.items()}, (batch,)), None


class _Bound(nn.Module):
    """A model with a loss that takes the model itself, so that ``functional_call`` reaches the model's weights."""

    def __init__(self, model: nn.Module, loss: Callable[[Any, Any], Tensor]) -> None:
        super().__init__()
        self.model = model
        self.loss = loss

    def forward(self, batch: Any) -> Tensor:
        return self.loss(self.model, batch)


def relative_errors(value: Mapping[str, Tensor], truth: Mapping[str, Tensor]) -> dict[str, float]:
    """Relative error ``|value - truth| / |truth|`` (2-norms, in float64) of every entry of ``truth``.

    An entry whose true norm is under ``NULL`` of the whole, such as a bias in front of a batch norm, holds nothing but
    rounding; its error is measured against the norm of the whole. Non-finite values give ``inf``.
    """
    if value.keys() != truth.keys():
        raise ValueError(f"relative_errors: names must be {sorted(truth)}, got {sorted(value)}")
    whole = _norm(truth.values())
    errors = {}
    for name, true in truth.items():
        if value[name].shape != true.shape:
            raise ValueError(f"relative_errors: {name} must be {tuple(true.shape)}, got {tuple(value[name].shape)}")
        scale = _norm([true])
        scale = scale if scale > NULL * whole else whole
        errors[name] = _ratio(_norm([value[name].detach().double() - true.detach().double()]), scale)
    return errors


def relative_error(value: Tensor | Mapping[str, Tensor], truth: Tensor | Mapping[str, Tensor]) -> float:
    """Worst relative error over the entries (:func:`relative_errors`), or that of a single tensor."""
    if isinstance(value, Tensor) and isinstance(truth, Tensor):
        return relative_errors({"": value}, {"": truth})[""]
    if isinstance(value, Mapping) and isinstance(truth, Mapping):
        return max(relative_errors(value, truth).values())
    raise TypeError(f"relative_error: both must be tensors or mappings, got {type(value)} and {type(truth)}")


def total_error(value: Mapping[str, Tensor], truth: Mapping[str, Tensor]) -> float:
    """Relative error of all entries taken as one vector."""
    difference = [value[name].detach().double() - true.detach().double() for name, true in truth.items()]
    return _ratio(_norm(difference), _norm(truth.values()))


def _norm(tensors: Iterable[Tensor]) -> float:
    return float(torch.stack([t.detach().double().norm() for t in tensors]).norm())


def _ratio(error: float, scale: float) -> float:
    if not error < float("inf"):
        return float("inf")
    return error / scale if scale > 0 else error
