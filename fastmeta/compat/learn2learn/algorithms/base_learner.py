"""A wrapper that looks like the module inside it."""

from __future__ import annotations

from typing import Any

from torch import nn


class BaseLearner(nn.Module):
    """A module around ``module``: calls go to it, and so do attributes that the wrapper has not got.

    Args:
        module: what is wrapped.
    """

    module: nn.Module

    def __init__(self, module: nn.Module | None = None) -> None:
        super().__init__()
        self.module = module  # type: ignore[assignment]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            module = self.__dict__.get("_modules", {}).get("module")
            if module is None:  # while it is being made, or unpickled
                raise
            return getattr(module, name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the module returns."""
        return self._modules["module"](*args, **kwargs)  # type: ignore[misc]  # as an attribute it takes longer to find
