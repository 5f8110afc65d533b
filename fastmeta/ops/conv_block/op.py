"""A convolution and what follows it as one operation: how it is put together from calls, and who computes its maps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastmeta.core import triton_support
from fastmeta.core.dispatch import Backend, select
from fastmeta.core.task_op import Call, Input, Need, Output, TaskOp, Tensors, Unsupported
from fastmeta.ops.conv_block import reference
from fastmeta.ops.conv_block.geometry import Geometry, Window

NAMES = ("x", "weight", "bias", "scale", "shift")  # what has a derivative
STATISTICS = ("running_mean", "running_var")
LARGEST = 1 << 30  # elements of one task's tensor: kernels count them in int32
ACTIVATIONS = {"aten.relu.default": "relu", "aten.leaky_relu.default": "leaky_relu"}
LARGEST_WINDOW = 127  # positions of a pooling's window: where its maximum lies is kept in seven bits


@dataclass(frozen=True)
class Parts:
    """The calls that a block stands for, in their order.

    Attributes:
        convolution: of ``aten.conv2d``.
        norm: of batch norm.
        activation: of an elementwise function.
        pool: of ``aten.max_pool2d``.
        updates: whether the new running statistics are read.
    """

    convolution: Call
    norm: Call | None = None
    activation: Call | None = None
    pool: Call | None = None
    updates: bool = False


class ConvBlock(TaskOp):
    """``y = pool(act(c x + b))``, ``x = (z - mu) r``, ``z = a * W + bias``, of which all but ``z`` may be missing.

    Inputs are image, weight and, where there are such, bias, scale, shift, running mean and running variance; results
    are ``y`` and, where they are read, each task's new running statistics. Triton computes float32 on a GPU, the
    reference everything else. Build it with :meth:`of`.
    """

    name: ClassVar[str] = "conv_block"
    backend: str = "triton"
    shares: ClassVar[tuple[str, ...]] = (*NAMES[1:], *STATISTICS)
    fixed: ClassVar[tuple[str, ...]] = STATISTICS
    saved_names: ClassVar[tuple[str, ...]] = (
        "input",
        "packed weight",
        "packed for the transpose",
        "convolution",
        "mean",
        "reciprocal deviation",
        "scale",
        "positions of the maxima",
        "convolution there",
    )

    def __init__(self, call: Call) -> None:
        super().__init__(call)
        self.geometry: Geometry = call["geometry"]
        self.uses_batch_statistics = self.geometry.normalised
        self.momentum = self.geometry.momentum
        self._at = [call.position(name) for name in NAMES]
        self._running = [call.position(name) for name in STATISTICS]

    @classmethod
    def of(cls, parts: Parts) -> ConvBlock:
        """The block that stands for ``parts``.

        Raises:
            Unsupported: one of them cannot be taken along; the message names it.
        """
        return cls(_call(parts))

    @staticmethod
    def backends(device: torch.device, dtype: torch.dtype) -> list[Backend]:
        """Who can compute tensors of this device and dtype, best first."""
        return [triton_support.backend(device, dtype), Backend("reference", True, "PyTorch")]

    def forward(self, x: Sequence[Tensor]) -> tuple[Tensors, Tensors]:
        a, weight, bias, scale, shift = self._named(x)
        running: Any = None if self._running[0] is None else tuple(x[p] for p in self._running if p is not None)
        maps, _, _ = self._maps(x[0])
        with torch.cuda.device_of(x[0]):
            y, new, saved = maps.forward(a, weight, bias, (scale, shift), running, self.geometry)
        return (y, *(new or ()))[: len(self.call.outputs)], tuple(vars(saved).values())

    def backward(self, saved: tuple[Any, ...], d_y: Tensors, need: Sequence[Need]) -> Tensors:
        if d_y[0] is None:
            return (None,) * len(self.call.inputs)
        maps, kind, _ = self._maps(d_y[0])
        with torch.cuda.device_of(d_y[0]):
            return self._results(maps.backward(kind(*saved), d_y[0], self._needs(need), self.geometry))

    def tangent(self, saved: tuple[Any, ...], x_dot: Tensors) -> tuple[Tensors, Tensors]:
        a_dot, weight_dot, bias_dot, scale_dot, shift_dot = self._named(x_dot)
        maps, kind, _ = self._maps(saved[0])
        with torch.cuda.device_of(saved[0]):
            y_dot, kept = maps.tangent(kind(*saved), a_dot, weight_dot, bias_dot, (scale_dot, shift_dot), self.geometry)
        return (y_dot, *(None,) * (len(self.call.outputs) - 1)), tuple(vars(kept).values())

    def tangent_backward(
        self, saved: tuple[Any, ...], saved_dot: tuple[Any, ...], d_y: Tensors, d_y_dot: Tensors, need: Sequence[Need]
    ) -> Tensors:
        d, d_dot = d_y[0], d_y_dot[0]
        if d is None:
            return self.backward(saved, d_y_dot, need)
        maps, kind, kind_dot = self._maps(d)
        with torch.cuda.device_of(d):
            d_dot = torch.zeros_like(d) if d_dot is None else d_dot
            return self._results(
                maps.tangent_backward(kind(*saved), kind_dot(*saved_dot), d, d_dot, self._needs(need), self.geometry)
            )

    def flops(self) -> int:
        return self.geometry.flops

    def _maps(self, like: Tensor) -> tuple[Any, Any, Any]:
        """The module that computes tensors like this, and its records of what the maps keep."""
        maps: Any = reference
        if select(self.name, self.backends(like.device, like.dtype)) == "triton":
            from fastmeta.ops.conv_block import triton as maps
        return maps, maps.Saved, maps.SavedDot

    def _named(self, values: Sequence[Tensor | None]) -> list[Any]:
        return [None if p is None else values[p] for p in self._at]

    def _needs(self, need: Sequence[Need]) -> list[Need]:
        return [Need.NONE if p is None else need[p] for p in self._at]

    def _results(self, named: dict[str, Tensor | None]) -> Tensors:
        results: list[Tensor | None] = [None] * len(self.call.inputs)
        for name, position in zip(NAMES, self._at, strict=True):
            if position is not None:
                results[position] = named.get(name)
        return tuple(results)


def _call(parts: Parts) -> Call:
    """The calls of ``parts`` as one, whose inputs are theirs in the order of ``NAMES`` and ``STATISTICS``."""
    given: dict[str, Input] = {"x": parts.convolution["input"], "weight": parts.convolution["weight"]}
    if parts.convolution["bias"] is not None:
        given["bias"] = parts.convolution["bias"]
    geometry = _convolution(parts.convolution)
    if parts.norm is not None:
        geometry = _normalised(geometry, parts.norm)
        theirs = {"scale": "weight", "shift": "bias", **{name: name for name in STATISTICS}}
        given |= {
            name: parts.norm[of] for name, of in theirs.items() if isinstance(parts.norm.arguments.get(of), Input)
        }
    if parts.activation is not None:
        geometry = _activated(geometry, parts.activation)
    if parts.pool is not None:
        geometry = _pooled(geometry, parts.pool)
    if geometry.largest > LARGEST:
        raise Unsupported(f"conv_block: one task's tensors must have at most {LARGEST} elements")
    inputs = {name: Input(i, value.shape, value.dtype) for i, (name, value) in enumerate(given.items())}
    if {value.dtype for value in inputs.values()} != {torch.float32}:
        raise Unsupported(f"conv_block: every input must be torch.float32, got {given['x'].dtype}")
    outputs = [Output((geometry.images, geometry.out, *geometry.pool_size), torch.float32)]
    outputs += [Output((geometry.out,), torch.float32)] * (2 if parts.updates else 0)
    arguments: dict[str, Any] = dict.fromkeys((*NAMES, *STATISTICS)) | inputs | {"geometry": geometry}
    return Call(parts.convolution.target, arguments, tuple(inputs.values()), tuple(outputs))


def _pair(value: Any) -> tuple[int, int]:
    pair = (value,) if isinstance(value, int) else tuple(value)
    return (pair[0], pair[-1])


def _convolution(call: Call) -> Geometry:
    shape, weight = call["input"].shape, call["weight"].shape
    if len(shape) != 4:
        raise Unsupported("conv_block: an image without batch axis")
    if call["groups"] != 1 or _pair(call["dilation"]) != (1, 1):
        raise Unsupported("conv_block: a convolution with groups or dilation")
    kernel, padding = _pair(weight[2:]), call["padding"]
    if padding == "same" and not (kernel[0] % 2 and kernel[1] % 2):
        raise Unsupported("conv_block: padding 'same' that is not symmetric")
    if isinstance(padding, str):
        padding = (0, 0) if padding == "valid" else (kernel[0] // 2, kernel[1] // 2)
    window = Window(kernel, _pair(call["stride"]), _pair(padding))
    size = _pair(call.outputs[0].shape[2:])
    return Geometry(shape[0], shape[1], _pair(shape[2:]), weight[0], window, size, pool_size=size)


def _normalised(geometry: Geometry, call: Call) -> Geometry:
    if not call.arguments.get("training", False):
        raise Unsupported("conv_block: batch norm by running statistics")
    return replace(geometry, normalised=True, eps=float(call["eps"]), momentum=float(call["momentum"]))


def _activated(geometry: Geometry, call: Call) -> Geometry:
    kind = ACTIVATIONS.get(str(call.target))
    if kind is None:
        raise Unsupported(f"conv_block: activation {call.target}")
    return replace(geometry, activation=kind, slope=float(call["negative_slope"]) if kind == "leaky_relu" else 0.0)


def _pooled(geometry: Geometry, call: Call) -> Geometry:
    kernel = _pair(call["kernel_size"])
    if call["ceil_mode"] or _pair(call["dilation"]) != (1, 1):
        raise Unsupported("conv_block: max pooling with dilation or by ceil_mode")
    window = Window(kernel, _pair(call["stride"] or kernel), _pair(call["padding"]))
    if window.taps > LARGEST_WINDOW or len(call["self"].shape) != 4:
        raise Unsupported("conv_block: max pooling of large windows, or of an image without batch axis")
    return replace(geometry, pool=window, pool_size=_pair(call.outputs[0].shape[2:]))
