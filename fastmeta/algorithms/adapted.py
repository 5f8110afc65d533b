"""A model after adaptation, ready to be used."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

from fastmeta.engine.objective import by_set, norms_of

M = TypeVar("M", bound=nn.Module)


class AdaptedModel:
    """The model with weights adapted to one task, or to T tasks.

    Calling it never writes to the model: buffers that a forward pass would update are cloned.

    Attributes:
        parameters: adapted weights by name, ``[*shape]``, or ``[T, *shape]`` for a batch of tasks.
        support_losses: support loss before each inner step, ``[K]`` or ``[K, T]``.
        steps_taken: how many inner steps each task took, ``[]`` or ``[T]``; ``None`` where none may stop early.
        statistics: running statistics of each task's own by name, ``[*shape]`` or ``[T, *shape]``, where it has such.
    """

    def __init__(
        self,
        model: nn.Module,
        adapted: dict[str, Tensor],
        support_losses: Tensor,
        *,
        single: bool,
        steps_taken: Tensor | None = None,
        buffers: dict[str, Tensor] | None = None,
        statistics: dict[str, Tensor] | None = None,
        by_set: bool | None = None,
    ) -> None:
        self._model = model
        self._buffers = {} if buffers is None else buffers  # those that have other values than the model's own
        self._own = {n: r for n, r in (statistics or {}).items() if not n.startswith("loss.")}
        self._by_set = by_set  # whether batch norm is by the statistics of the set; as the model's flags say where None
        self._single = single
        self._batched = adapted
        self.parameters = {n: p[0] for n, p in adapted.items()} if single else adapted
        self.support_losses = support_losses[:, 0] if single else support_losses
        self.steps_taken = steps_taken[0] if single and steps_taken is not None else steps_taken
        self.statistics = {n: r[0] for n, r in self._own.items()} if single else self._own

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

        Its batch norms are in the mode they adapted to, and hold the task's own statistics where it has such.

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
                if name in self._own:
                    buffer.copy_(self._own[name][task])
                elif name in self._buffers:
                    buffer.copy_(self._buffers[name])
        if self._by_set is not None:
            for _, norm in norms_of(clone):
                norm.training = self._by_set
        return clone

    def _call(self, task: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        state: dict[str, Tensor] = {n: self._buffers.get(n, b).clone() for n, b in self._model.named_buffers()}
        state.update((n, r[task].clone()) for n, r in self._own.items())
        state.update((n, p[task]) for n, p in self._batched.items() if not n.startswith("loss."))
        with by_set(self._model, self._by_set):
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
