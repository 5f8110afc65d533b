"""Blocks to test, as data; their inputs; and the truth about their four maps by torch.func, one task after another."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmeta.core.task_op import Call, Need
from fastmeta.ops.conv_block import ConvBlock
from fastmeta.ops.conv_block.op import NAMES, Parts

aten = torch.ops.aten
PRODUCTS = ("x", "weight")


@dataclass(frozen=True)
class Layer:
    """One block. ``norm`` is "none", "batch", "affine" or "running"; ``pool`` kernel, stride and padding."""

    channels: int = 3
    out: int = 5
    size: tuple[int, int] = (6, 5)
    images: int = 2
    kernel: int = 3
    stride: int = 1
    padding: int = 1
    bias: bool = False
    norm: str = "affine"
    activation: str = "relu"
    pool: tuple[int, int, int] | None = (2, 2, 0)

    def parts(self) -> Parts:
        """The calls it stands for, bound to examples."""
        x, weight = torch.zeros(self.images, self.channels, *self.size), self.weight()
        bias = torch.zeros(self.out) if self.bias else None
        parts = Parts(Call.example(aten.conv2d.default, x, weight, bias, [self.stride] * 2, [self.padding] * 2))
        z = torch.zeros(parts.convolution.outputs[0].shape)
        one = torch.ones(self.out)
        if self.norm == "running":
            target = aten._native_batch_norm_legit_functional.default
            norm = Call.example(target, z, one, one, one, one, True, 0.3, 1e-3)
            parts = replace(parts, norm=norm, updates=True)
        elif self.norm != "none":
            affine = (one, one) if self.norm == "affine" else (None, None)
            parts = replace(parts, norm=Call.example(aten._native_batch_norm_legit.no_stats, z, *affine, True, 0, 1e-3))
        if self.activation == "relu":
            parts = replace(parts, activation=Call.example(aten.relu.default, z))
        elif self.activation == "leaky_relu":
            parts = replace(parts, activation=Call.example(aten.leaky_relu.default, z, 0.2))
        if self.pool is not None:
            windows = [[length] * 2 for length in self.pool]
            parts = replace(parts, pool=Call.example(aten.max_pool2d.default, z, *windows))
        return parts

    def weight(self) -> Tensor:
        """An empty weight."""
        return torch.zeros(self.out, self.channels, self.kernel, self.kernel)

    def run(self, given: dict[str, Tensor]) -> Tensor:
        """The block on one task's tensors, by PyTorch."""
        z = F.conv2d(given["x"], given["weight"], given.get("bias"), self.stride, self.padding)
        if self.norm != "none":
            z = F.batch_norm(z, None, None, given.get("scale"), given.get("shift"), True, 0.0, 1e-3)
        if self.activation != "identity":
            z = F.relu(z) if self.activation == "relu" else F.leaky_relu(z, 0.2)
        return z if self.pool is None else F.max_pool2d(z, *self.pool)

    @property
    def length(self) -> int:
        """The longest sum in any of its maps."""
        patch = self.channels * self.kernel**2
        return max(patch, self.out * self.kernel**2, self.images * math.prod(self.size))


@dataclass
class Maps:
    """Results of the four maps by the names of the inputs they belong to; statistics are running ones."""

    y: Tensor
    statistics: tuple[Tensor, ...]
    d: dict[str, Tensor]
    y_dot: Tensor
    d_dot: dict[str, Tensor]

    def flat(self) -> dict[str, Tensor]:
        """All of them."""
        named = {"y": self.y, "y_dot": self.y_dot}
        named |= {f"statistic {i}": value for i, value in enumerate(self.statistics)}
        named |= {f"d_{name}": value for name, value in self.d.items()}
        return named | {f"d_{name}_dot": value for name, value in self.d_dot.items()}


@dataclass
class Drawn:
    """A block with everything its maps are given, on a CPU in float64 with float32's values."""

    layer: Layer
    tasks: int = 2
    shared: tuple[str, ...] = ()  # inputs that come without task axis
    summed: bool = False  # whether their cotangents are summed over tasks
    moving: tuple[str, ...] = NAMES  # inputs that have a tangent
    wanted: tuple[str, ...] = NAMES  # inputs whose cotangent is wanted
    seed: int = 0
    op: ConvBlock = field(init=False)

    def __post_init__(self) -> None:
        self.op = ConvBlock.of(self.layer.parts())
        generator = torch.Generator().manual_seed(self.seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).double()

        self.names = [n for n in self.op.shares if self.op.call.position(n) is not None]
        self.names.insert(0, "x")
        self.x: dict[str, Tensor] = {}
        self.x_dot: dict[str, Tensor] = {}
        for name, given in zip(self.names, self.op.call.inputs, strict=True):
            lead = () if name in self.shared else (self.tasks,)
            value = draw(*lead, *given.shape)
            self.x[name] = value.abs() + 0.5 if name == "running_var" else value
            if name in NAMES:
                self.x_dot[name] = draw(self.tasks, *given.shape)
        result = self.op.call.outputs[0].shape
        self.d, self.d_dot = draw(self.tasks, *result), draw(self.tasks, *result)

    @property
    def differentiable(self) -> list[str]:
        """The inputs that have a derivative."""
        return [name for name in self.names if name in NAMES]

    def maps(
        self,
        dtype: torch.dtype = torch.float64,
        device: torch.device | str = "cpu",
        *,
        first: bool = True,
        second: bool = True,
    ) -> Maps:
        """By the operation; without the first or the second cotangent of the last map where they are to be ``None``."""

        def given(value: Tensor) -> Tensor:
            return value.to(device, dtype)

        op, rest = self.op, (None,) * (len(self.op.call.outputs) - 1)
        need = [self._need(name) for name in self.names]
        y, saved = op.forward([given(self.x[name]) for name in self.names])
        d = op.backward(saved, (given(self.d), *rest), need)
        dots = [given(self.x_dot[n]) if n in self.moving and n in self.x_dot else None for n in self.names]
        y_dot, saved_dot = op.tangent(saved, tuple(dots))
        cotangents = (given(self.d) if first else None, *rest), (given(self.d_dot) if second else None, *rest)
        d_dot = op.tangent_backward(saved, saved_dot, *cotangents, need)
        return Maps(_cpu(y[0]), tuple(map(_cpu, y[1:])), self._named(d), _cpu(y_dot[0]), self._named(d_dot))

    def truth(self, *, first: bool = True, second: bool = True) -> Maps:
        """By torch.func in float64."""
        names = self.differentiable
        rows = [self._task(t, names, first, second) for t in range(self.tasks)]
        y, y_dot = (torch.stack([row[i] for row in rows]) for i in (0, 2))
        d, d_dot = ({n: torch.stack([row[i][n] for row in rows]) for n in names if n in self.wanted} for i in (1, 3))
        for of in (d, d_dot):
            of.update({n: v.sum(0) for n, v in of.items() if n in self.shared and self.summed})
        return Maps(y, self._statistics(), d, y_dot, d_dot)

    def _statistics(self) -> tuple[Tensor, ...]:
        if self.layer.norm != "running":
            return ()
        means, variances = [], []
        for t in range(self.tasks):
            z = F.conv2d(*(self._of(n, t) for n in PRODUCTS), None, self.layer.stride, self.layer.padding)
            mean, variance = self._of("running_mean", t).clone(), self._of("running_var", t).clone()
            z = z if not self.layer.bias else z + self._of("bias", t)[:, None, None]
            F.batch_norm(z, mean, variance, None, None, True, 0.3, 1e-3)
            means.append(mean)
            variances.append(variance)
        return torch.stack(means), torch.stack(variances)

    def _of(self, name: str, t: int) -> Tensor:
        return self.x[name] if name in self.shared else self.x[name][t]

    def _task(self, t: int, names: list[str], first: bool, second: bool) -> tuple[Any, ...]:
        def f(*values: Tensor) -> Tensor:
            return self.layer.run(dict(zip(names, values, strict=True)))

        def gradient(d: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
            return torch.func.vjp(f, *values)[1](d)

        point = tuple(self._of(name, t) for name in names)
        moves = tuple(self.x_dot[n][t] * (n in self.moving) for n in names)
        y, y_dot = torch.func.jvp(f, point, moves)
        d = dict(zip(names, gradient(self.d[t], *point), strict=True))
        given, move = self.d[t] * first, self.d_dot[t] * second
        d_dot = dict(zip(names, torch.func.jvp(gradient, (given, *point), (move, *moves))[1], strict=True))
        return y, d, y_dot, d_dot

    def _need(self, name: str) -> Need:
        if name not in NAMES or name not in self.wanted:
            return Need.NONE
        return Need.SHARED if self.summed and name in self.shared else Need.TASK

    def _named(self, values: Any) -> dict[str, Tensor]:
        named = dict(zip(self.names, values, strict=True))
        for name, value in named.items():
            if name not in self.differentiable or name not in self.wanted:
                assert value is None, f"{name} was not asked for"
        return {name: _cpu(named[name]) for name in self.differentiable if name in self.wanted}


def _cpu(value: Any) -> Tensor:
    assert isinstance(value, Tensor)
    return value.cpu()


def distance(a: Tensor, b: Tensor) -> float:
    """Largest difference relative to the largest value of ``b``, or to one where all of ``b`` is smaller."""
    assert a.shape == b.shape
    gap = (a.double() - b.double()).abs().max().item()
    return gap / max(1.0, b.double().abs().max().item()) if gap == gap else math.inf
