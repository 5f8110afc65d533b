"""The objective of one task as a pure function of parameters, buffers and a batch."""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm

Loss = Callable[..., Any]

# What batch norm normalises by; docs/algorithms.md has the table. Followed and per step are nn.BatchNorm's own manner.
BATCH_NORM = ("transductive", "followed", "running", "per_step", "per_task")


class Objective:
    """``(parameters, buffers, batch) -> (loss, outputs)`` for one task, whatever form the batch takes.

    The forms are those of :class:`fastmeta.TaskBatch`: ``(inputs, targets)``, ``(inputs, targets, weights)``, or any
    other pytree for a loss that is given the model itself. A loss that is a module brings its own parameters and
    buffers; their names start with ``loss.``.
    """

    def __init__(self, model: nn.Module, loss: Loss) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"MAML: model must be a torch.nn.Module, got {type(model).__name__}")
        if not callable(loss):
            raise TypeError(f"MAML: loss must be callable, got {type(loss).__name__}")
        self.model = model
        self.loss = loss
        self.root = _Bound(model, loss)  # holds both
        self._uses_set: bool | None = None

    def normalising(self, uses_set: bool | None) -> Objective:
        """The same with batch norm by the set's statistics, or by running ones; ``None`` for as its flags say."""
        if uses_set == self._uses_set:
            return self
        other = copy.copy(self)
        other._uses_set = uses_set
        return other

    def parameters(self) -> dict[str, nn.Parameter]:
        """Every distinct parameter by name; a tied parameter appears once."""
        return {_public(name): p for name, p in self.root.named_parameters()}

    def buffers(self) -> dict[str, Tensor]:
        """Every distinct buffer by name."""
        return {_public(name): b for name, b in self.root.named_buffers()}

    def modes(self) -> tuple[bool, ...]:
        """Training flag of every submodule: a trace holds for one combination."""
        if self._uses_set is None:
            return tuple(m.training for m in self.root.modules())
        return tuple(self._uses_set if isinstance(m, _BatchNorm) else m.training for m in self.root.modules())

    def statistics(self) -> frozenset[str]:
        """Names of the buffers that batch norms follow their sets by."""
        own = {id(b) for _, m in norms_of(self.root) for b in m.buffers(recurse=False)}
        return frozenset(name for name, b in self.buffers().items() if id(b) in own)

    def modules(self) -> list[tuple[str, nn.Module]]:
        """Submodules of model and loss by name."""
        return [(_public(name), m) for name, m in self.root.named_modules()]

    def __call__(
        self, parameters: Mapping[str, Tensor], buffers: Mapping[str, Tensor], batch: Any
    ) -> tuple[Tensor, Any]:
        """Loss (0-dim) and outputs of one task.

        Raises:
            ValueError: the loss is not a scalar.
            TypeError: the loss is not a tensor.
        """
        state = {place: parameters[name] for place, name in self._places(nn.Module.named_parameters)}
        state.update((place, buffers[name]) for place, name in self._places(nn.Module.named_buffers))
        with by_set(self.root, self._uses_set):
            loss, outputs = functional_call(self.root, state, (batch,), tie_weights=False)
        if not isinstance(loss, Tensor):
            raise TypeError(f"MAML: loss must return a tensor, got {type(loss).__name__}")
        if loss.dim() != 0:
            raise ValueError(
                f"MAML: loss must return a scalar for one task, got shape {tuple(loss.shape)}; reduce it with a mean"
            )
        return loss, outputs

    def _places(self, named: Callable[..., Iterator[tuple[str, Tensor]]]) -> list[tuple[str, str]]:
        """Every place that holds a tensor, once, with the one name under which the tensor is known.

        A tied tensor has several places. A module that is used twice has one: to swap it under each of its names, as
        ``functional_call`` ties weights by itself, would put back the wrong tensor.
        """
        known = {id(t): _public(name) for name, t in named(self.root)}
        return [
            (f"{prefix}.{name}" if prefix else name, known[id(t)])
            for prefix, module in self.root.named_modules()
            for name, t in named(module, recurse=False, remove_duplicate=False)
        ]


def uses_set(batch_norm: str | None, *, query: bool) -> bool | None:
    """Whether batch norm normalises by the statistics of the set it sees; ``None`` where its training flag says it.

    Args:
        batch_norm: one of :data:`BATCH_NORM`, or ``None``.
        query: of a pass over the query set.
    """
    return {"transductive": True, "running": False, "per_task": not query}.get(batch_norm or "")


def norms_of(module: nn.Module) -> list[tuple[str, _BatchNorm]]:
    """Every batch norm of a module, by name."""
    return [(name, m) for name, m in module.named_modules() if isinstance(m, _BatchNorm)]


@contextlib.contextmanager
def by_set(module: nn.Module, uses_set: bool | None) -> Iterator[None]:
    """While a module runs, batch norm by the set's statistics, or by running ones; ``None`` leaves all as it is."""
    flags = [] if uses_set is None else [(norm, norm.training) for _, norm in norms_of(module)]
    try:
        for norm, _ in flags:
            norm.training = bool(uses_set)
        yield
    finally:
        for norm, flag in flags:
            norm.training = flag


class _Bound(nn.Module):
    """Model and loss under one roof, so that one functional call swaps the state of both."""

    def __init__(self, model: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.model = model
        self.loss = loss

    def forward(self, batch: Any) -> tuple[Any, Any]:
        if isinstance(batch, tuple) and len(batch) in (2, 3):
            outputs = call_model(self.model, batch[0])
            if len(batch) == 2:
                return self.loss(outputs, batch[1]), outputs
            return _weighted(self.loss, outputs, batch[1], batch[2]), outputs
        result = self.loss(self.model, batch)
        if isinstance(result, tuple):
            if len(result) != 2:
                raise ValueError(
                    f"MAML: a loss on (model, batch) must return loss or (loss, outputs), got {len(result)} values"
                )
            return result
        return result, None


def call_model(model: Callable[..., Any], inputs: Any) -> Any:
    """``model(inputs)``, with a tuple spread over positional and a dict over keyword arguments."""
    if isinstance(inputs, tuple):
        return model(*inputs)
    if isinstance(inputs, dict):
        return model(**inputs)
    return model(inputs)


def _weighted(loss: Loss, outputs: Any, targets: Any, weights: Tensor) -> Tensor:
    """``sum(w * l) / sum(w)`` over per-sample losses ``l``."""
    if isinstance(loss, nn.Module) and hasattr(loss, "reduction"):
        reduction = loss.reduction
        setattr(loss, "reduction", "none")  # noqa: B010  a plain attribute that nn.Module's types do not know
        try:
            losses = loss(outputs, targets)
        finally:
            setattr(loss, "reduction", reduction)  # noqa: B010
    elif "reduction" in _parameter_names(loss):
        losses = loss(outputs, targets, reduction="none")
    else:
        return loss(outputs, targets, weights)
    if losses.shape[: weights.dim()] != weights.shape:
        raise ValueError(
            f"MAML: per-sample losses must start with the shape {tuple(weights.shape)} of the weights, "
            f"got {tuple(losses.shape)}"
        )
    if losses.dim() > weights.dim():
        losses = losses.flatten(weights.dim()).mean(-1)
    return (losses * weights).sum() / weights.sum()


def _parameter_names(loss: Loss) -> frozenset[str]:
    try:
        return frozenset(inspect.signature(loss).parameters)
    except (TypeError, ValueError):  # a builtin without a signature takes no keyword we could rely on
        return frozenset()


def _public(name: str) -> str:
    return name.removeprefix("model.")
