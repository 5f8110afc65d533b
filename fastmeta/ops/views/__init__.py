"""Views and other linear rearrangements."""

from __future__ import annotations

from fastmeta.ops.views.op import View

__all__ = ["View"]
