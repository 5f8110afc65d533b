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
    if _goes_to_onednn(x.shape[0] * x.shape[1] * weight.shape[0], x, weight, bias):
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return y
    return F.linear(x, weight, bias)


def product(a: Tensor, b: Tensor) -> Tensor:
    """``a b``: ``[m, k]`` and ``[k, n]`` to ``[m, n]``; see :func:`linear`."""
    return linear(a, b.t())


def products(a: Tensor, b: Tensor, onto: Tensor | None = None) -> Tensor:
    """``a_t b_t`` of every task, ``[T, m, k]`` and ``[T, k, n]`` to ``[T, m, n]``; see :func:`linear`.

    Args:
        a: left factors.
        b: right factors.
        onto: ``[T, m, n]``, what the products are added to; it is overwritten.
    """
    if not _goes_to_onednn(a.shape[1] * a.shape[2] * b.shape[2], a, b):
        return torch.bmm(a, b) if onto is None else onto.baddbmm_(a, b)
    if a.shape[0] == 1:
        if onto is None:
            return product(a[0], b[0]).unsqueeze(0)
        y: Tensor = torch.ops.mkldnn._linear_pointwise.binary(a[0], onto[0], b[0].t(), None, "add")
        return y.unsqueeze(0)
    each = [product(left, right) for left, right in zip(a, b, strict=True)]
    if onto is None:
        return torch.stack(each)
    for total, part in zip(onto, each, strict=True):
        total.add_(part)
    return onto


def _goes_to_onednn(size: int, *tensors: Tensor | None) -> bool:
    """Whether a product of so many multiply-adds does."""
    x = tensors[0]
    if size < LEAST or x is None or x.dtype != torch.float32 or not x.is_cpu:
        return False
    return onednn_is_quicker() and not _recorded(*tensors)


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
