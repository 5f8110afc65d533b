"""Check the four maps of an operation against torch.func, task by task.

A :class:`Case` describes one ATen call as data; :func:`check` draws task-batched inputs for it, computes the truth with
``vjp``, ``jvp`` and the ``jvp`` of the ``vjp`` of the ATen call itself on every task alone, and compares.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastmeta.core.task_op import Call, Need, TaskOp, registry
from fastmeta.ops import catalogue  # noqa: F401  fills the registry

# Rounding of float64 through a few hundred terms; anything wrong in a formula is many orders above it.
FLOAT64_BOUND = 2e-12
# Allowance of the tolerance law for the order of summation: c * eps * sqrt(n), see CONTRIBUTING.md.
SUMMATION_FACTOR = 8.0

LAYOUTS = ("plain", "strided", "expanded", "repeated")


@dataclass(frozen=True)
class A:
    """One tensor argument of a case: the shape one task sees, and how its values are drawn."""

    shape: tuple[int, ...]
    kind: str = "normal"  # normal | positive | nonzero | unit | classes | bool | spread
    high: int = 2
    shift: float = 0.0

    def draw(self, tasks: int | None, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
        """Draw ``[tasks, *shape]``, or ``shape`` where ``tasks`` is ``None``."""
        shape = self.shape if tasks is None else (tasks, *self.shape)
        if self.kind == "classes":
            return torch.randint(self.high, shape, generator=generator)
        if self.kind == "bool":
            return torch.rand(shape, generator=generator) < 0.5
        if self.kind == "unit":
            return torch.rand(shape, dtype=torch.float64, generator=generator).to(dtype)
        if self.kind == "spread":  # evenly spaced and never zero: no ties, and no kink within rounding
            n = math.prod(shape)
            values = (torch.randperm(n, generator=generator).double() + 0.3 - n // 2) / max(1, n) * 4
            return values.reshape(shape).to(dtype)
        values = torch.randn(shape, dtype=torch.float64, generator=generator)
        if self.kind == "positive":
            values = values.abs() + 0.5
        if self.kind == "nonzero":
            values = values + 0.5 * values.sign()
        return (values + self.shift).to(dtype)


@dataclass(frozen=True)
class Case:
    """One ATen call as data. Arguments may be constants, :class:`A`, or lists of those."""

    name: str
    target: torch._ops.OpOverload
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    outputs: tuple[int, ...] = (0,)  # outputs that carry derivatives
    fixed: tuple[str, ...] = ()  # floating arguments that carry none

    def __str__(self) -> str:
        return self.name

    def call(self, dtype: torch.dtype) -> Call:
        generator = torch.Generator().manual_seed(0)
        args, kwargs = self._map(lambda a: a.draw(None, dtype, generator))
        return Call.example(self.target, *args, **kwargs)

    def draw(self, call: Call, tasks: int, dtype: torch.dtype, shared: Sequence[str], layout: str, seed: int) -> list:
        """Task-batched inputs; arguments named in ``shared`` come without a task axis."""
        generator = torch.Generator().manual_seed(seed)
        without = {call.position(name) for name in shared}
        drawn: list[Tensor] = []

        def one(a: A) -> Tensor:
            position = len(drawn)
            value = a.draw(None if position in without or layout == "expanded" else tasks, dtype, generator)
            if layout == "expanded" and position not in without:
                value = value.expand(tasks, *a.shape)
            drawn.append(laid(value, layout))
            return drawn[-1]

        self._map(one)
        return drawn

    def _map(self, f: Callable[[A], Tensor]) -> tuple[list, dict]:
        def walk(value: Any) -> Any:
            if isinstance(value, A):
                return f(value)
            return [walk(v) for v in value] if isinstance(value, (list, tuple)) else value

        return [walk(v) for v in self.args], {k: walk(v) for k, v in self.kwargs.items()}


def laid(value: Tensor, layout: str) -> Tensor:
    """``value`` as ``layout`` has it in memory; ``repeated`` makes all entries along the last axis one and the same."""
    if layout == "repeated" and value.dim() > 1 and value.is_floating_point():
        return value[..., :1].expand_as(value)
    return strided(value) if layout == "strided" else value


def strided(value: Tensor) -> Tensor:
    """The same values in memory that is neither contiguous nor dense."""
    if value.dim() == 0:
        return value
    turned = value.mT.contiguous().mT if value.dim() > 1 else value
    wide = torch.empty(*turned.shape[:-1], turned.shape[-1] * 2, dtype=value.dtype)
    wide[..., ::2] = turned
    return wide[..., ::2]


def floating(call: Call, fixed: Sequence[str] = ()) -> list[int]:
    """Positions of the inputs that carry derivatives."""
    skip = {call.position(name) for name in fixed}
    return [i.position for i in call.inputs if i.dtype.is_floating_point and i.position not in skip]


class Truth:
    """The four maps by torch.func on one task's tensors at a time."""

    def __init__(self, case: Case, call: Call, x: Sequence[Tensor], tasks: int) -> None:
        self.case, self.call, self.tasks = case, call, tasks
        self.positions = floating(call, case.fixed)
        self.x = [
            [
                (v[t] if i.has_tasks(v) else v).clone(memory_format=torch.contiguous_format)
                for i, v in zip(call.inputs, x, strict=True)
            ]
            for t in range(tasks)
        ]

    def _function(self, t: int) -> Callable[..., tuple[Tensor, ...]]:
        def f(*values: Tensor) -> tuple[Tensor, ...]:
            tensors = list(self.x[t])
            for p, v in zip(self.positions, values, strict=True):
                tensors[p] = v
            result = self.call.run(tensors)
            result = result if isinstance(result, (list, tuple)) else (result,)
            return tuple(result[o] for o in self.case.outputs)

        return f

    def _point(self, t: int) -> tuple[Tensor, ...]:
        return tuple(self.x[t][p] for p in self.positions)

    def forward(self) -> tuple[Tensor, ...]:
        results = []
        for t in range(self.tasks):
            result = self.call.run(self.x[t])
            results.append(result if isinstance(result, (list, tuple)) else (result,))
        return tuple(torch.stack(r) for r in zip(*results, strict=True))

    def backward(self, d_y: Sequence[Tensor]) -> list[Tensor]:
        rows = []
        for t in range(self.tasks):
            _, pull = torch.func.vjp(self._function(t), *self._point(t))
            rows.append(pull(tuple(d[t] for d in d_y)))
        return [torch.stack(r) for r in zip(*rows, strict=True)]

    def tangent(self, x_dot: Sequence[Tensor]) -> list[Tensor]:
        rows = [
            torch.func.jvp(self._function(t), self._point(t), tuple(d[t] for d in x_dot))[1] for t in range(self.tasks)
        ]
        return [torch.stack(r) for r in zip(*rows, strict=True)]

    def tangent_backward(self, x_dot: Sequence[Tensor], d_y: Sequence[Tensor], d_y_dot: Sequence[Tensor]) -> list:
        n = len(self.positions)
        rows = []
        for t in range(self.tasks):

            def gradient(*values: Tensor, t: int = t) -> tuple[Tensor, ...]:
                return torch.func.vjp(self._function(t), *values[:n])[1](tuple(values[n:]))

            point = (*self._point(t), *(d[t] for d in d_y))
            direction = (*(d[t] for d in x_dot), *(d[t] for d in d_y_dot))
            rows.append(torch.func.jvp(gradient, point, direction)[1])
        return [torch.stack(r) for r in zip(*rows, strict=True)]


@dataclass
class Maps:
    """Results of the four maps of one operation, dense: ``None`` replaced by zeros."""

    forward: tuple[Tensor, ...]
    backward: list[Tensor]
    tangent: list[Tensor]
    tangent_backward: list[Tensor]

    def __iter__(self) -> Iterator[tuple[str, Sequence[Tensor]]]:
        return iter(vars(self).items())

    def cpu(self) -> Maps:
        """The same on a CPU."""
        return Maps(*(type(values)(v.cpu() for v in values) for values in vars(self).values()))


class Run:
    """One operation on drawn inputs, tangents and cotangents."""

    def __init__(
        self,
        case: Case,
        *,
        tasks: int = 3,
        dtype: torch.dtype = torch.float64,
        shared: Sequence[str] = (),
        layout: str = "plain",
        seed: int = 1,
        op: type[TaskOp] | None = None,
        need: Need | None = None,
    ) -> None:
        self.case, self.tasks, self.dtype = case, tasks, dtype
        self.call = case.call(dtype)
        kind = op or registry.lookup(case.target)
        if kind is None:
            raise LookupError(f"{case.target} has no operation")
        self.op = kind(self.call)
        self.x = case.draw(self.call, tasks, dtype, shared, layout, seed)
        self.positions = floating(self.call, case.fixed)
        self.without = frozenset(self.call.position(name) for name in shared)
        full = Need.TASK if need is None else need
        self.need = [
            (Need.SHARED if full is Need.SHARED and i.position in self.without else Need.TASK)
            if i.position in self.positions
            else Need.NONE
            for i in self.call.inputs
        ]
        generator = torch.Generator().manual_seed(seed + 1)

        def like(shape: tuple[int, ...]) -> Tensor:
            value = torch.randn(tasks, *shape, dtype=torch.float64, generator=generator).to(dtype)
            return laid(value, layout)

        self.x_dot = [like(self.call.inputs[p].shape) for p in self.positions]
        self.d_y = [like(self.call.outputs[o].shape) for o in case.outputs]
        self.d_y_dot = [like(self.call.outputs[o].shape) for o in case.outputs]
        self.truth = Truth(case, self.call, self.x, tasks)

    def maps(self, x_dot: Sequence | None = None, d_y: Sequence | None = None, d_y_dot: Sequence | None = None) -> Maps:
        """Run the four maps; ``None`` entries are passed on as ``None``."""
        x_dot = self.x_dot if x_dot is None else x_dot
        d_y = self.d_y if d_y is None else d_y
        d_y_dot = self.d_y_dot if d_y_dot is None else d_y_dot
        before = [v.clone() for v in (*self.x, *self.x_dot, *self.d_y, *self.d_y_dot)]
        dots = self._scatter(x_dot, self.positions, len(self.call.inputs))
        cotangents = self._scatter(d_y, self.case.outputs, len(self.call.outputs))
        cotangents_dot = self._scatter(d_y_dot, self.case.outputs, len(self.call.outputs))
        y, saved = self.op.forward(self.x)
        d_x = self.op.backward(saved, cotangents, self.need) if any(d is not None for d in d_y) else ()
        y_dot, saved_dot = self.op.tangent(saved, dots) if any(d is not None for d in x_dot) else ((), ())
        d_x_dot: tuple = ()
        if y_dot or any(d is not None for d in d_y_dot):
            d_x_dot = self.op.tangent_backward(saved, saved_dot, cotangents, cotangents_dot, self.need)
        for value, old in zip((*self.x, *self.x_dot, *self.d_y, *self.d_y_dot), before, strict=True):
            if not torch.equal(value, old):
                raise AssertionError(f"{self.op.name}: a map wrote into what it was given")
        return Maps(
            tuple(y),
            [self._cotangent(d_x, p) for p in self.positions],
            [self._dense(y_dot, o, self.call.outputs[o].shape) for o in self.case.outputs],
            [self._cotangent(d_x_dot, p) for p in self.positions],
        )

    def expected(
        self, x_dot: Sequence | None = None, d_y: Sequence | None = None, d_y_dot: Sequence | None = None
    ) -> Maps:
        """The same by torch.func."""
        x_dot, d_y, d_y_dot = (
            [torch.zeros_like(f) if g is None else g for f, g in zip(full, given or full, strict=True)]
            for full, given in ((self.x_dot, x_dot), (self.d_y, d_y), (self.d_y_dot, d_y_dot))
        )
        return Maps(
            self.truth.forward(),
            self._reduce(self.truth.backward(d_y)),
            self.truth.tangent(x_dot),
            self._reduce(self.truth.tangent_backward(x_dot, d_y, d_y_dot)),
        )

    def _reduce(self, values: list[Tensor]) -> list[Tensor]:
        return [v.sum(0) if self.need[p] is Need.SHARED else v for p, v in zip(self.positions, values, strict=True)]

    def _cotangent(self, values: Sequence, position: int) -> Tensor:
        shape = self.call.inputs[position].shape
        if self.need[position] is Need.SHARED:
            value = values[position] if len(values) else None
            return self.x[0].new_zeros(shape, dtype=self.dtype) if value is None else value
        return self._dense(values, position, shape)

    def _dense(self, values: Sequence, index: int, shape: tuple[int, ...]) -> Tensor:
        value = values[index] if len(values) else None
        return self.x[0].new_zeros((self.tasks, *shape), dtype=self.dtype) if value is None else value

    @staticmethod
    def _scatter(values: Sequence, positions: Sequence[int], length: int) -> tuple:
        result: list[Tensor | None] = [None] * length
        for p, v in zip(positions, values, strict=True):
            result[p] = v
        return tuple(result)


def distance(a: Tensor, b: Tensor) -> float:
    """Largest difference relative to the largest value of ``b`` (or to one, where all of ``b`` is smaller)."""
    if a.shape != b.shape:
        raise AssertionError(f"shape {tuple(a.shape)}, expected {tuple(b.shape)}")
    if b.numel() == 0:
        return 0.0
    gap = (a.double() - b.double()).abs().max().item()
    if math.isnan(gap):
        return math.inf
    return gap / max(1.0, b.double().abs().max().item())


def compare(got: Maps, want: Maps, bound: float, label: str) -> None:
    """Raise where any map is further than ``bound`` from what it should be."""
    for (name, a), (_, b) in zip(got, want, strict=True):
        for i, (p, q) in enumerate(zip(a, b, strict=True)):
            gap = distance(p, q)
            if not gap <= bound:
                raise AssertionError(f"{label}: {name}[{i}] is off by {gap:.2e}, allowed {bound:.1e}")


def check(case: Case, **options: Any) -> None:
    """All four maps in float64 against torch.func."""
    run = Run(case, **options)
    compare(run.maps(), run.expected(), FLOAT64_BOUND, str(case))


def check_float32(case: Case, **options: Any) -> None:
    """Float32 by the tolerance law: at most twice torch's own error, plus the order of summation."""
    run = Run(case, dtype=torch.float32, **options)
    wide = Run(case, dtype=torch.float64, **options)
    for name in ("x", "x_dot", "d_y", "d_y_dot"):
        setattr(wide, name, [v.double() if v.is_floating_point() else v for v in getattr(run, name)])
    wide.truth = Truth(case, wide.call, wide.x, wide.tasks)
    exact, own = wide.expected(), run.expected()
    length = max([1] + [math.prod(i.shape) for i in run.call.inputs])
    slack = SUMMATION_FACTOR * torch.finfo(torch.float32).eps * math.sqrt(length)
    for (name, a), (_, b), (_, c) in zip(run.maps(), exact, own, strict=True):
        for i, (got, want, torchs) in enumerate(zip(a, b, c, strict=True)):
            gap, allowed = distance(got, want), 2 * distance(torchs, want) + slack
            if not gap <= allowed:
                raise AssertionError(f"{case}: {name}[{i}] is off by {gap:.2e}, allowed {allowed:.1e}")


def check_missing(case: Case, **options: Any) -> None:
    """``None`` for each tangent and cotangent in turn means zero."""
    run = Run(case, **options)
    nothing = [None] * len(run.d_y)
    for alone in range(len(run.x_dot)):
        x_dot = [d if i == alone else None for i, d in enumerate(run.x_dot)]
        for d_y, d_y_dot in ((run.d_y, run.d_y_dot), (nothing, run.d_y_dot), (run.d_y, nothing)):
            got, want = run.maps(x_dot, d_y, d_y_dot), run.expected(x_dot, d_y, d_y_dot)
            compare(got, want, FLOAT64_BOUND, f"{case} with x_dot[{alone}] alone")
    for alone in range(len(run.d_y)):
        if len(run.d_y) > 1:
            some = [d if i == alone else None for i, d in enumerate(run.d_y)]
            other = [None if i == alone else d for i, d in enumerate(run.d_y_dot)]
            compare(run.maps(None, some, other), run.expected(None, some, other), FLOAT64_BOUND, f"{case} d_y[{alone}]")
    for wanted in run.positions:
        one = Run(case, **options)
        one.need = [n if i == wanted else Need.NONE for i, n in enumerate(run.need)]
        got, want = one.maps(), run.expected()
        index = run.positions.index(wanted)
        for name in ("backward", "tangent_backward"):
            gap = distance(getattr(got, name)[index], getattr(want, name)[index])
            if not gap <= FLOAT64_BOUND:
                raise AssertionError(f"{case}: {name}[{index}] asked for alone is off by {gap:.2e}")


def check_poisoned(case: Case, **options: Any) -> None:
    """The same with every fresh ``torch.empty`` filled with NaN first."""
    was, fill = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        run = Run(case, **options)
        got = run.maps()
    finally:
        torch.use_deterministic_algorithms(was)
        torch.utils.deterministic.fill_uninitialized_memory = fill
    compare(got, run.expected(), FLOAT64_BOUND, f"{case}, poisoned")


def check_all(case: Case, shares: Sequence[str] = ()) -> None:
    """Every check that applies to a case as it stands."""
    for layout in LAYOUTS:
        check(case, layout=layout)
    check(case, tasks=1)
    check_float32(case)
    check_missing(case)
    check_poisoned(case)
    if shares:
        check(case, shared=shares, need=Need.SHARED)
        check(case, shared=shares, need=Need.TASK)
        check(case, shared=shares, need=Need.SHARED, layout="strided")
        check(case, shared=shares[:1], need=Need.SHARED)
        check_missing(case, shared=shares, need=Need.SHARED)
        check_float32(case, shared=shares, need=Need.SHARED)
