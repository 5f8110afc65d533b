"""Recognises a meta-step that differs from an earlier one in values only, so that nothing is checked twice."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fastmeta.engine.compiler import Programs
from fastmeta.engine.work import Work

MOST = 8  # kinds of meta-step remembered: shapes of training and evaluation, numbers of steps


class Snapshot:
    """Everything about modules that preparing a meta-step reads, values of tensors excepted."""

    def __init__(self, root: nn.Module) -> None:
        modules = list(root.modules())
        self._parents = [(m._modules, tuple(m._modules.items())) for m in modules if m._modules]
        self._childless = [m._modules for m in modules if not m._modules]
        self._training = [(m, m.training) for m in modules]
        self._tensors = [
            (table, name, t, t.shape, t.dtype, None if t.is_cpu else t.device, t.requires_grad)
            for m in modules
            for table in (m._parameters, m._buffers)
            for name, t in table.items()
            if t is not None
        ]
        self._sizes = [(table, len(table)) for m in modules for table in (m._parameters, m._buffers)]

    def holds(self) -> bool:
        """Whether all of it is as it was."""
        for module, training in self._training:
            if module.training is not training:
                return False
        for table, name, t, shape, dtype, device, grad in self._tensors:
            if table.get(name) is not t or t.shape != shape or t.dtype is not dtype or t.requires_grad is not grad:
                return False
            if device is None:
                if not t.is_cpu:
                    return False
            elif t.device != device:
                return False
        for table, size in self._sizes:
            if len(table) != size:
                return False
        return not any(self._childless) and all(tuple(t.items()) == children for t, children in self._parents)


class Recall:
    """The last few kinds of meta-step that were prepared, for as long as the modules stay as they are."""

    def __init__(self, root: nn.Module) -> None:
        self._root = root
        self._snapshot: Snapshot | None = None
        self._entries: dict[Any, tuple[Work, Programs]] = {}

    def find(self, key: Any) -> tuple[Work, Programs] | None:
        """A prepared meta-step of this key, of which only tasks and rates are to be replaced."""
        entry = self._entries.get(key)
        if entry is None or (self._snapshot is not None and self._snapshot.holds()):
            return entry
        self.clear()
        return None

    def keep(self, key: Any, work: Work, programs: Programs) -> None:
        """Remember a meta-step, and forget the oldest if there are many."""
        if self._snapshot is None or not self._snapshot.holds():
            self.clear()
            self._snapshot = Snapshot(self._root)
        if len(self._entries) >= MOST:
            del self._entries[next(iter(self._entries))]
        self._entries[key] = work, programs

    def clear(self) -> None:
        """Forget everything."""
        self._snapshot = None
        self._entries.clear()


def signature(support: Any, query: Any) -> tuple[Any, ...] | None:
    """Shapes, dtypes and devices of a pair of pairs of tensors; ``None`` for tasks of any other form."""
    sets = (support,) if query is None else (support, query)
    found = []
    for one in sets:
        if type(one) is not tuple or len(one) != 2:
            return None
        for leaf in one:
            if not isinstance(leaf, Tensor) or leaf.requires_grad:
                return None
            found.append((leaf.shape, leaf.dtype, leaf.device))
    return tuple(found)
