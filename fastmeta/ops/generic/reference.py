"""Any function of one task, for all tasks at once: the four maps from ``torch.func``.

``f(x, c)`` takes one task's differentiable tensors ``x`` and its constants ``c``, two tuples, and returns a tuple of
tensors. Every argument below carries the task axis first. The maps that hold a tangent have two forms: forward mode,
and reverse mode alone for functions that PyTorch cannot differentiate forward.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Many = tuple[Tensor, ...]
Function = Callable[[Many, Many], Many]


def forward(f: Function, x: Many, c: Many) -> Many:
    """``y = f(x)``; random numbers are drawn for each task."""
    return _each_task(f, x, c)


def backward(f: Function, x: Many, c: Many, d_y: Many) -> Many:
    """``d_x = (df/dx)^T d_y``."""
    return _each_task(lambda x, c, d_y: _pull(f, x, c, d_y), x, c, d_y)


def tangent(f: Function, x: Many, c: Many, x_dot: Many) -> Many:
    """``y_dot = (df/dx) x_dot``."""

    def one(x: Many, c: Many, x_dot: Many) -> Many:
        return torch.func.jvp(lambda *x: f(x, c), x, x_dot)[1]

    return _each_task(one, x, c, x_dot)


def tangent_reverse(f: Function, x: Many, c: Many, x_dot: Many) -> Many:
    """The same from two reverse passes: ``u -> (df/dx)^T u`` is linear, and its transpose is what is wanted."""

    def one(x: Many, c: Many, x_dot: Many) -> Many:
        pulled = torch.func.vjp(lambda *x: f(x, c), *x)
        zero = tuple(torch.zeros_like(y) for y in pulled[0])
        return torch.func.vjp(pulled[1], zero)[1](x_dot)[0]

    return _each_task(one, x, c, x_dot)


def tangent_backward(f: Function, x: Many, c: Many, x_dot: Many, d_y: Many, d_y_dot: Many) -> Many:
    """``d_x_dot = (df/dx)^T d_y_dot + (d2f/dx2 [x_dot])^T d_y``, the tangent of :func:`backward`."""

    def one(x: Many, c: Many, x_dot: Many, d_y: Many, d_y_dot: Many) -> Many:
        return torch.func.jvp(lambda x, d_y: _pull(f, x, c, d_y), (x, d_y), (x_dot, d_y_dot))[1]

    return _each_task(one, x, c, x_dot, d_y, d_y_dot)


def tangent_backward_reverse(f: Function, x: Many, c: Many, x_dot: Many, d_y: Many, d_y_dot: Many) -> Many:
    """The same by reverse passes: second derivatives commute, so the Hessian term is a ``vjp`` of ``x -> d_x``."""

    def one(x: Many, c: Many, x_dot: Many, d_y: Many, d_y_dot: Many) -> Many:
        pull = torch.func.vjp(lambda *x: _pull(f, x, c, d_y), *x)[1]
        return tuple(a + b for a, b in zip(_pull(f, x, c, d_y_dot), pull(x_dot), strict=True))

    return _each_task(one, x, c, x_dot, d_y, d_y_dot)


def _each_task(one: Callable[..., Many], *args: Many) -> Many:
    """``one`` for every task; a single task, as the native executor has it, does without batching rules."""
    if all(value.shape[0] == 1 for many in args for value in many):
        return tuple(value.unsqueeze(0) for value in one(*(tuple(v.squeeze(0) for v in many) for many in args)))
    return torch.func.vmap(one, randomness="different")(*args)


def _pull(f: Function, x: Many, c: Many, d_y: Many) -> Many:
    return torch.func.vjp(lambda *x: f(x, c), *x)[1](d_y)
