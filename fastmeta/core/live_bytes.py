"""How much memory the tensors that a computation makes take at a time."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode


class Exceeded(Exception):
    """More bytes are held than were allowed."""


class LiveBytes(TorchDispatchMode):
    """Inside it, counts the bytes of the storages that operations make, until these are freed.

    What operations hold within themselves is not seen, nor are storages that were there before.

    Args:
        limit: bytes; once more are held :class:`Exceeded` is raised. ``None`` for no limit.

    Attributes:
        now: bytes held at this moment.
        peak: the most that were held at a time.
    """

    def __init__(self, limit: int | None = None) -> None:
        super().__init__()
        self._limit = limit
        self.now = self.peak = 0
        self._held: dict[int, Any] = {}

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operation and look at what it returns."""
        result = func(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key not in self._held and all(t.untyped_storage()._cdata != key for t in _tensors((args, kwargs))):
                self._hold(key, storage)
        return result

    def _hold(self, key: int, storage: Any) -> None:
        size = storage.nbytes()

        def free(_: Any) -> None:
            if self._held.pop(key, None) is not None:
                self.now -= size

        self._held[key] = weakref.ref(storage, free)
        self.now += size
        self.peak = max(self.peak, self.now)
        if self._limit is not None and self.now > self._limit:
            raise Exceeded(f"live bytes: {self._limit} must be enough, got {self.now}")


def _tensors(tree: Any) -> Iterable[Tensor]:
    return (leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor))
