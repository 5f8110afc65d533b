"""Recognises a meta-step that differs from an earlier one in values only, so that nothing is checked twice."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from fastmeta.core import native
from fastmeta.engine.compiler import Programs
from fastmeta.engine.work import Work

MOST = 8  # kinds of meta-step remembered: shapes of training and evaluation, numbers of steps


@dataclass
class _Entry:
    settings: Any
    kinds: Any  # of the tasks' tensors
    work: Work
    programs: Programs


class Recall:
    """The last few kinds of meta-step that were prepared, for as long as the modules stay as they are.

    The comparing is csrc/recall's; without the extension every meta-step is prepared anew.
    """

    def __init__(self, root: nn.Module) -> None:
        self._root = root
        self._snapshot: Any = None
        self._entries: list[_Entry] = []

    def find(self, settings: Any, tensors: tuple[Any, ...]) -> tuple[Work, Programs] | None:
        """A meta-step prepared for these settings and tensors like these; tasks and rates are to be replaced."""
        for entry in self._entries:
            if entry.settings == settings and entry.kinds.fit(tensors):
                if self._snapshot.holds():
                    return entry.work, entry.programs
                self.clear()
                return None
        return None

    def keep(self, settings: Any, tensors: tuple[Any, ...], work: Work, programs: Programs) -> None:
        """Remember a meta-step, and forget the oldest if there are many."""
        extension = native.extension()
        if extension is None or not all(isinstance(t, Tensor) and not t.requires_grad for t in tensors):
            return
        if self._snapshot is None or not self._snapshot.holds():
            self.clear()
            self._snapshot = extension.Snapshot(list(self._root.modules()))
        others = [e for e in self._entries if e.settings != settings or not e.kinds.fit(tensors)]
        self._entries[:] = others[-(MOST - 1) :]
        self._entries.append(_Entry(settings, extension.Kinds(tensors), work, programs))

    def clear(self) -> None:
        """Forget everything."""
        self._snapshot = None
        self._entries.clear()


def pairs(support: Any, query: Any) -> tuple[Any, ...]:
    """What a pair, or a pair of pairs, holds; nothing for tasks of any other form."""
    if type(support) is not tuple or len(support) != 2:
        return ()
    if query is None:
        return support
    return support + query if type(query) is tuple and len(query) == 2 else ()
