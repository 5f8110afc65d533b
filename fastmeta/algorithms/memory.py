"""What a learner remembers from one meta-step to the next."""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn

from fastmeta.algorithms.recall import Recall
from fastmeta.engine.compiler import Compiler
from fastmeta.engine.function import Custom


class Memory:
    """Traces and programs, meta-steps as they were prepared, and what was warned of. A copy remembers nothing.

    Args:
        root: the modules whose changes meta-steps must see.
    """

    def __init__(self, root: nn.Module) -> None:
        self._root = root
        self.compiler = Compiler()
        self.custom = Custom()
        self.recall = Recall(root)
        self._warned: set[str] = set()

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and files have the modules alone, and find out the rest for themselves."""
        return Memory, (self._root,)

    def forget(self) -> None:
        """Every trace."""
        self.compiler.clear()
        self.recall.clear()

    def warn_once(self, message: str, stacklevel: int) -> None:
        """Warn, unless of the same before."""
        if message not in self._warned:
            self._warned.add(message)
            warnings.warn(message, stacklevel=stacklevel + 1)
