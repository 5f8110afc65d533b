"""The contract of a task-batched operation: one ATen call of a traced graph, evaluated for all tasks at once.

An operation has four maps (docs/maths.md, section 2). For ``y = f(x)`` with cotangent ``d_y``, tangent ``x_dot`` and
tangent of the cotangent ``d_y_dot``::

    forward            y       = f(x)
    backward           d_x     = (df/dx)^T d_y
    tangent            y_dot   = (df/dx) x_dot
    tangent_backward   d_x_dot = (df/dx)^T d_y_dot + (d2f/dx2 [x_dot])^T d_y

Shapes. Every tensor an operation sees carries the task axis first, ``[T, ...]``, except the arguments it lists in
``shares``: those may also come without it, when all tasks hold the same value. The executor expands everything else.
"""

from __future__ import annotations

import enum
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

Tensors = tuple[Tensor | None, ...]


class Need(enum.IntEnum):
    """What is wanted of the cotangent of one input."""

    NONE = 0  # nothing depends on it
    SHARED = 1  # the sum over tasks, without a task axis (only for arguments in ``shares`` that came without one)
    TASK = 2  # one cotangent a task, ``[T, ...]``
    FACTORS = 3  # one a task as :class:`fastmeta.core.low_rank.LowRank` (of a linear operation's weight)


class Unsupported(Exception):
    """An operation cannot represent this call; the message is the reason ``explain()`` shows."""


@dataclass(frozen=True)
class Input:
    """A tensor argument of a call: its position among the call's tensors and what one task's value looks like."""

    position: int
    shape: tuple[int, ...]  # of one task, without T
    dtype: torch.dtype

    def has_tasks(self, value: Tensor) -> bool:
        """Whether ``value`` carries the task axis in front of this argument's own shape."""
        return value.dim() == len(self.shape) + 1


@dataclass(frozen=True)
class Output:
    """One tensor result of a call, as one task sees it."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Call:
    """One ATen call with its arguments bound to the schema's names.

    ``arguments`` maps every schema name to a constant, an :class:`Input`, ``None`` or a list of those; defaults are
    filled in, so an operation never has to know what a caller left out.
    """

    target: torch._ops.OpOverload
    arguments: dict[str, Any]
    inputs: tuple[Input, ...]
    outputs: tuple[Output, ...]

    def __getitem__(self, name: str) -> Any:
        return self.arguments[name]

    def position(self, name: str) -> int | None:
        """Position of the tensor argument ``name`` among the inputs, ``None`` where there is none."""
        value = self.arguments.get(name)
        return value.position if isinstance(value, Input) else None

    def run(self, tensors: Sequence[Tensor]) -> Any:
        """Call the ATen overload itself on one task's tensors."""
        bound = {name: fill(value, tensors) for name, value in self.arguments.items()}
        args, kwargs = [], {}
        for argument in self.target._schema.arguments:
            if argument.kwarg_only:
                kwargs[argument.name] = bound[argument.name]
            else:
                args.append(bound[argument.name])
        return self.target(*args, **kwargs)

    @classmethod
    def bind(cls, target: torch._ops.OpOverload, args: Sequence[Any], kwargs: dict[str, Any], result: Any) -> Call:
        """Bind a call to its schema.

        Args:
            target: the ATen overload.
            args: positional arguments; tensors (real or fake, of one task) become :class:`Input`.
            kwargs: keyword arguments, likewise.
            result: what the call returned for them; tensors become :class:`Output`.
        """
        inputs: list[Input] = []

        def walk(value: Any) -> Any:
            if isinstance(value, Tensor):
                inputs.append(Input(len(inputs), tuple(value.shape), value.dtype))
                return inputs[-1]
            if isinstance(value, (list, tuple)):
                return [walk(v) for v in value]
            return value

        arguments: dict[str, Any] = {}
        for i, argument in enumerate(target._schema.arguments):
            if i < len(args) and not argument.kwarg_only:
                arguments[argument.name] = walk(args[i])
            elif argument.name in kwargs:
                arguments[argument.name] = walk(kwargs[argument.name])
            else:
                arguments[argument.name] = argument.default_value if argument.has_default_value() else None
        results = result if isinstance(result, (list, tuple)) else (result,)
        outputs = tuple(Output(tuple(r.shape), r.dtype) for r in results if isinstance(r, Tensor))
        return cls(target, arguments, tuple(inputs), outputs)

    @classmethod
    def example(cls, target: torch._ops.OpOverload, *args: Any, **kwargs: Any) -> Call:
        """Bind a call by running it once on one task's real tensors (for tests and for use by hand)."""
        with torch.no_grad():
            return cls.bind(target, args, kwargs, target(*args, **kwargs))


def fill(value: Any, tensors: Sequence[Tensor]) -> Any:
    """Replace every :class:`Input` in an argument by its tensor."""
    if isinstance(value, Input):
        return tensors[value.position]
    if isinstance(value, list):
        return [fill(v, tensors) for v in value]
    return value


class TaskOp(ABC):
    """One operation of a program: how it was called, and its four maps on task-batched tensors.

    ``saved`` and ``saved_dot`` are flat tuples of tensors, so that a program can count them, hand them to autograd
    for safe keeping, or drop them. Maps never write into what they are given.
    """

    name: ClassVar[str]
    backend: str = "reference"  # who computes its maps, for ``explain()``
    targets: ClassVar[tuple[str, ...]] = ()  # ATen overloads it covers, e.g. ``"aten.linear.default"``
    shares: ClassVar[tuple[str, ...]] = ()  # schema names of arguments it takes without a task axis, too
    fixed: ClassVar[tuple[str, ...]] = ()  # floating arguments it has no derivative for: generic where one is wanted
    saved_names: ClassVar[tuple[str, ...]] = ()  # what ``saved`` holds, for ``explain()``
    random: ClassVar[bool] = False  # draws random numbers, so its results differ between tasks whatever goes in

    def __init__(self, call: Call) -> None:
        """Read the attributes of ``call``; raise :class:`Unsupported` with the reason where it cannot be met."""
        self.call = call

    @property
    def shared_positions(self) -> frozenset[int]:
        """Positions of the inputs that may come without a task axis."""
        return frozenset(p for p in (self.call.position(n) for n in self.shares) if p is not None)

    @abstractmethod
    def forward(self, x: Sequence[Tensor]) -> tuple[Tensors, Tensors]:
        """Return ``(outputs, saved)``; ``saved`` is what the other maps need and nothing else."""

    @abstractmethod
    def backward(self, saved: Tensors, d_y: Tensors, need: Sequence[Need]) -> Tensors:
        """Return a cotangent (or ``None``) for every input. At least one of ``d_y`` is not ``None``."""

    @abstractmethod
    def tangent(self, saved: Tensors, x_dot: Tensors) -> tuple[Tensors, Tensors]:
        """Return ``(y_dot, saved_dot)``. ``None`` in ``x_dot`` is zero; tangents always carry the task axis."""

    @abstractmethod
    def tangent_backward(
        self, saved: Tensors, saved_dot: Tensors, d_y: Tensors, d_y_dot: Tensors, need: Sequence[Need]
    ) -> Tensors:
        """Return the tangent of what :meth:`backward` returned. ``None`` in ``d_y`` or ``d_y_dot`` is zero."""

    def flops(self) -> int:
        """Floating-point operations of one forward for one task; 0 where only memory traffic counts."""
        return 0


class Registry:
    """Which operation covers which ATen overload."""

    def __init__(self) -> None:
        self._by_target: dict[str, type[TaskOp]] = {}

    def register(self, op: type[TaskOp]) -> type[TaskOp]:
        """Class decorator: enter ``op`` under each of its targets."""
        for target in op.targets:
            if target in self._by_target:
                raise RuntimeError(f"registry: {target} is already covered by {self._by_target[target].__name__}")
            self._by_target[target] = op
        return op

    def lookup(self, target: torch._ops.OpOverload) -> type[TaskOp] | None:
        """The operation that covers ``target``, or ``None``."""
        return self._by_target.get(str(target))

    def __iter__(self) -> Iterator[type[TaskOp]]:
        return iter(dict.fromkeys(self._by_target.values()))


registry = Registry()


def plus(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """Sum of two values of which ``None`` means zero."""
    if a is None:
        return b
    return a if b is None else a + b
