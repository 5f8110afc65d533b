"""Softmax ``p`` and log-softmax ``log p`` along axis ``dim``: the maps of docs/maths.md, section 2."""

from __future__ import annotations

from torch import Tensor


def total(value: Tensor, dim: int) -> Tensor:
    """Sum along ``dim``, which stays as an axis of one."""
    return value.sum(dim, keepdim=True)


def derivative(p: Tensor, v: Tensor, dim: int) -> Tensor:
    """``p (v - sum p v)``: the derivative of softmax applied to ``v``; it is its own transpose."""
    return p * (v - total(p * v, dim))


def cotangent_dot(p: Tensor, p_dot: Tensor, d: Tensor, dim: int) -> Tensor:
    """The part of the tangent of ``p (d - sum p d)`` that comes from ``p_dot``."""
    return p_dot * (d - total(p * d, dim)) - p * total(p_dot * d, dim)


def log_backward(p: Tensor, d: Tensor, dim: int) -> Tensor:
    """``d - p sum d``: the transpose of log-softmax's derivative."""
    return d - p * total(d, dim)


def log_tangent(p: Tensor, v: Tensor, dim: int) -> Tensor:
    """``v - sum p v``: log-softmax's derivative."""
    return v - total(p * v, dim)
