"""A model after adaptation, ready to be used."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

M = TypeVar("M", bound=nn.Module)


class AdaptedModel:
    """The model with weights adapted to one task, or to T tasks.

    Calling it never writes to the model: buffers that a forward pass would update are cloned.

    Attributes:
        parameters: adapted weights by name, ``[*shape]``, or ``[T, *shape]`` for a batch of tasks.
        support_losses: support loss before each inner step, ``[K]`` or ``[K, T]``.
    """

    def __init__(
        self,
        model: nn.Module,
        adapted: dict[str, Tensor],
        support_losses: Tensor,
        *,
        single: bool,
        buffers: dict[str, Tensor] | None = None,
    ) -> None:
        self._model = model
        self._buffers = {} if buffers is None else buffers  # those that have other values than the model's own
        self._single = single
        self._batched = adapted
        self.parameters = {n: p[0] for n, p in adapted.items()} if single else adapted
        self.support_losses = support_losses[:, 0] if single else support_losses

    @property
    def tasks(self) -> int:
        """Number of tasks adapted to."""
        return next(iter(self._batched.values())).shape[0]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Outputs for inputs of the task, or for inputs ``[T, ...]`` of all tasks.

        Raises:
            ValueError: the inputs' leading axis is not the number of tasks.
        """
        if self._single:
            return self._call(0, args, kwargs)
        sizes = {leaf.shape[0] for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        if sizes != {self.tasks}:
            raise ValueError(f"AdaptedModel: inputs must have the leading task axis {self.tasks}, got {sorted(sizes)}")

        def pick(t: int) -> Any:
            return pytree.tree_map(lambda leaf: leaf[t] if isinstance(leaf, Tensor) else leaf, (args, kwargs))

        results = [pytree.tree_flatten(self._call(t, *pick(t))) for t in range(self.tasks)]
        columns = zip(*[leaves for leaves, _ in results], strict=True)
        return pytree.tree_unflatten([torch.stack(column) for column in columns], results[0][1])

    def module(self, task: int = 0) -> nn.Module:
        """A copy of the model that holds the weights adapted to ``task``, for export or further training.

        Raises:
            IndexError: there is no such task.
        """
        if not 0 <= task < self.tasks:
            raise IndexError(f"AdaptedModel: task must be in [0, {self.tasks}), got {task}")
        clone = deep_copy(self._model)
        with torch.no_grad():
            for name, parameter in clone.named_parameters():
                if name in self._batched:
                    parameter.copy_(self._batched[name][task])
            for name, buffer in clone.named_buffers():
                if name in self._buffers:
                    buffer.copy_(self._buffers[name])
        return clone

    def _call(self, task: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        state: dict[str, Tensor] = {n: self._buffers.get(n, b).clone() for n, b in self._model.named_buffers()}
        state.update((n, p[task]) for n, p in self._batched.items() if not n.startswith("loss."))
        return functional_call(self._model, state, args, kwargs)


def deep_copy(module: M) -> M:
    """A copy of a module, though a forward pass has left tensors behind, such as a pruned module's weight.

    They are results of autograd, which ``deepcopy`` refuses; the next forward pass computes them anew.
    """
    computed = (
        value
        for part in module.modules()
        for value in part.__dict__.values()
        if isinstance(value, Tensor) and not value.is_leaf
    )
    return copy.deepcopy(module, {id(value): value.detach().clone() for value in computed})
