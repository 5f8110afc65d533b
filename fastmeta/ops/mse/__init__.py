"""Mean squared error."""

from __future__ import annotations

from fastmeta.ops.mse.op import MSE

__all__ = ["MSE"]
