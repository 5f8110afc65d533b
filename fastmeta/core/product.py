"""Products of two matrices by the library that is quicker on this processor."""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn import functional as F

from fastmeta.core import environment

LEAST = 1 << 19  # multiply-adds from which on the longer way to oneDNN is made up for


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x W^T + b``: ``[m, k]``, ``[n, k]`` and ``[n]`` to ``[m, n]``, whichever way the matrices lie.

    PyTorch's products of float32 matrices are MKL's, which leaves the widest vectors (AVX-512) unused on processors
    that are not its maker's: there oneDNN, which comes with PyTorch too, is 1.5 to 2.3 times as quick from some 25 rows
    on (AMD Zen 5, torch 2.13). Not differentiable by autograd where that is used.
    """
    large = x.shape[0] * x.shape[1] * weight.shape[0] >= LEAST
    if large and x.dtype == torch.float32 and x.is_cpu and onednn_is_quicker() and not _recorded(x, weight, bias):
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return y
    return F.linear(x, weight, bias)


def product(a: Tensor, b: Tensor) -> Tensor:
    """``a b``: ``[m, k]`` and ``[k, n]`` to ``[m, n]``; see :func:`linear`."""
    return linear(a, b.t())


@functools.cache
def onednn_is_quicker() -> bool:
    """Whether MKL is in use, on a processor with AVX-512 that is not Intel's, and oneDNN is there."""
    return (
        torch.backends.mkl.is_available()
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and "AVX512" in torch.backends.cpu.get_cpu_capability()
        and environment.vendor() not in ("", "GenuineIntel")
    )


def _recorded(*tensors: Tensor | None) -> bool:
    """Whether autograd would want to differentiate."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
