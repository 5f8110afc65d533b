"""A batch of tasks: the support and query sets of T tasks as pytrees of tensors with the task axis first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


class TaskBatch:
    """Support and query sets of T tasks.

    Each of ``support`` and ``query`` is a pytree whose leaves are tensors ``[T, ...]``:

    * ``(inputs, targets)``: the loss is called as ``loss(model(inputs), targets)``. ``inputs`` may be a tensor, a tuple
      (passed as ``model(*inputs)``) or a dict (``model(**inputs)``).
    * ``(inputs, targets, weights)``: weights ``[T, N]``, one a sample; the loss becomes
      ``sum(weights * per-sample loss) / sum(weights)``. Zero weights mask the padding of smaller tasks.
    * anything else, such as the dict a Hugging Face model takes: the loss is called as ``loss(model, batch)``.

    Args:
        support: what the inner loop adapts to.
        query: what the adapted model is judged by; ``None`` where only adaptation is wanted.

    Raises:
        TypeError: a leaf is not a tensor.
        ValueError: no tasks, an empty support or query, or leading axes that differ.
    """

    def __init__(self, support: Any, query: Any = None) -> None:
        support = _as_tuple(support)
        query = _as_tuple(query)
        self.support = support
        self.query = query
        self.size = _check_leaves("support", support, None)
        if query is not None:
            _check_leaves("query", query, self.size)

    def __len__(self) -> int:
        return self.size

    def __repr__(self) -> str:
        def shapes(tree: Any) -> Any:
            return pytree.tree_map(lambda t: f"{str(t.dtype).removeprefix('torch.')}{list(t.shape)}", tree)

        return f"TaskBatch(size={self.size}, support={shapes(self.support)}, query={shapes(self.query)})"

    def __getitem__(self, index: slice) -> TaskBatch:
        """The tasks of a slice."""
        if not isinstance(index, slice):
            raise TypeError(f"TaskBatch: index must be a slice, got {type(index).__name__}; use task(i) for one task")

        def cut(tree: Any) -> Any:
            return None if tree is None else pytree.tree_map(lambda t: t[index], tree)

        return TaskBatch(cut(self.support), cut(self.query))

    def task(self, index: int) -> tuple[Any, Any]:
        """Support and query of one task, without the task axis."""
        if not -self.size <= index < self.size:
            raise IndexError(f"TaskBatch: task must be below {self.size}, got {index}")

        def pick(tree: Any) -> Any:
            return None if tree is None else pytree.tree_map(lambda t: t[index], tree)

        return pick(self.support), pick(self.query)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> TaskBatch:
        """The same tasks on another device; ``dtype`` is applied to floating-point leaves only."""

        def move(t: Tensor) -> Tensor:
            return t.to(device=device, dtype=dtype if dtype is not None and t.is_floating_point() else None)

        support = pytree.tree_map(move, self.support)
        return TaskBatch(support, None if self.query is None else pytree.tree_map(move, self.query))

    def pin_memory(self) -> TaskBatch:
        """The same tasks in pinned host memory, for asynchronous copies to a GPU."""
        support = pytree.tree_map(Tensor.pin_memory, self.support)
        return TaskBatch(support, None if self.query is None else pytree.tree_map(Tensor.pin_memory, self.query))

    @classmethod
    def stack(cls, tasks: Sequence[tuple[Any, Any]]) -> TaskBatch:
        """Stack tasks given one by one as ``(support, query)``, each ``(inputs, targets)``.

        Tasks of one size are stacked as they are. Tasks of unequal size are padded with zeros to the largest, and
        weights ``[T, N]`` (1 for a sample, 0 for padding) become the third element of support or query.

        Raises:
            ValueError: no tasks, or shapes that differ beyond the number of samples.
        """
        if not tasks:
            raise ValueError("TaskBatch.stack: tasks must hold at least one task, got none")
        return cls(_stack("support", [t[0] for t in tasks]), _stack("query", [t[1] for t in tasks]))


def _as_tuple(tree: Any) -> Any:
    """A list written for a tuple is taken as one: DataLoaders turn tuples into lists."""
    return tuple(tree) if isinstance(tree, list) else tree


def _check_leaves(name: str, tree: Any, size: int | None) -> int:
    leaves = pytree.tree_leaves(tree)
    if not leaves:
        raise ValueError(f"TaskBatch: {name} must hold at least one tensor, got {tree!r}")
    for leaf in leaves:
        if not isinstance(leaf, Tensor):
            raise TypeError(f"TaskBatch: every leaf of {name} must be a tensor, got {type(leaf).__name__}")
        if leaf.dim() == 0:
            raise ValueError(f"TaskBatch: every tensor of {name} must have the task axis first, got a 0-dim tensor")
    sizes = [leaf.shape[0] for leaf in leaves]
    expected = sizes[0] if size is None else size
    if any(s != expected for s in sizes):
        raise ValueError(
            f"TaskBatch: every tensor of {name} must have the leading task axis {expected}, got {sizes}; "
            "tasks of unequal size are padded and weighted by TaskBatch.stack"
        )
    if expected == 0:
        raise ValueError(f"TaskBatch: {name} must hold at least one task, got a leading axis of 0")
    if any(leaf.dim() > 1 and leaf.shape[1] == 0 for leaf in leaves):
        raise ValueError(
            f"TaskBatch: {name} must hold at least one sample a task, got {[tuple(x.shape) for x in leaves]}"
        )
    devices = {leaf.device for leaf in leaves}
    if len(devices) > 1:
        raise ValueError(f"TaskBatch: every tensor of {name} must be on one device, got {sorted(map(str, devices))}")
    return expected


def _stack(name: str, sets: list[Any]) -> Any:
    flat = [pytree.tree_flatten(s) for s in sets]
    spec = flat[0][1]
    if any(other != spec for _, other in flat):
        raise ValueError(
            f"TaskBatch.stack: every task's {name} must have the same structure, got {[s for _, s in flat]}"
        )
    columns = list(zip(*[leaves for leaves, _ in flat], strict=True))
    for column in columns:
        if not all(isinstance(leaf, Tensor) and leaf.dim() >= 1 for leaf in column):
            raise TypeError(f"TaskBatch.stack: every leaf of {name} must be a tensor with a sample axis")
    if all(leaf.shape == column[0].shape for column in columns for leaf in column):
        return pytree.tree_unflatten([torch.stack(column) for column in columns], spec)
    counts = [leaf.shape[0] for leaf in columns[0]]
    most = max(counts)
    if not (isinstance(sets[0], (tuple, list)) and len(sets[0]) == 2):
        raise ValueError(
            f"TaskBatch.stack: {name} of unequal tasks must be an (inputs, targets) pair so that weights can mask the "
            f"padding, got {type(sets[0]).__name__}; pad and mask such batches yourself"
        )
    padded = []
    for column in columns:
        if [leaf.shape[0] for leaf in column] != counts or any(
            leaf.shape[1:] != column[0].shape[1:] for leaf in column
        ):
            raise ValueError(
                f"TaskBatch.stack: tensors of {name} may differ in the number of samples only, "
                f"got {[tuple(leaf.shape) for leaf in column]}"
            )
        padded.append(torch.stack([_pad(leaf, most) for leaf in column]))
    inputs, targets = pytree.tree_unflatten(padded, spec)
    floating = next((p.dtype for p in padded if p.is_floating_point()), torch.get_default_dtype())
    rows = torch.arange(most, device=padded[0].device)
    weights = (rows < torch.tensor(counts, device=rows.device)[:, None]).to(floating)  # [T, N]
    return inputs, targets, weights


def _pad(leaf: Tensor, most: int) -> Tensor:
    return torch.cat([leaf, leaf.new_zeros(most - leaf.shape[0], *leaf.shape[1:])])
