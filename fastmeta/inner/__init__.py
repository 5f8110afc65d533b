"""Inner update rules: a step and its adjoint, and the rates they take."""

from __future__ import annotations

from fastmeta.inner.sgd import SGD

__all__ = ["SGD"]
