"""One SGD step of every task's packed parameters, and its adjoint (docs/maths.md, eq. 3, 5 and 7)."""

from __future__ import annotations

from fastmeta.ops.inner_update.op import inner_update

__all__ = ["inner_update"]
