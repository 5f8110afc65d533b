"""Products of two values that may both differ between tasks, such as the scores of attention."""

from fastmeta.ops.matmul.op import Matmul

__all__ = ["Matmul"]
