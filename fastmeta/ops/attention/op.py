"""``aten.scaled_dot_product_attention`` as one operation, where it is not taken apart into products and a softmax."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastmeta.core import triton_support
from fastmeta.core.dispatch import Backend, select
from fastmeta.core.task_op import Call, Input, Need, TaskOp, Tensors, Unsupported, registry
from fastmeta.ops.attention import reference
from fastmeta.ops.attention.reference import Saved, SavedDot, Setting

WIDEST = 128  # columns of a head; the sums of a wider one do not fit registers


def backends(
    device: torch.device | None = None, dtype: torch.dtype | None = None, width: int = 64, value_width: int = 64
) -> tuple[Backend, ...]:
    """The implementations, best first, and whether each can run tensors of this device, dtype and these head widths."""
    if device is not None and device.type != "cuda":
        kernels = Backend("triton", False, f"runs on cuda, not on {device.type}")
    else:
        kernels = triton_support.backend(device or torch.device("cuda"), dtype or torch.float32)
    if kernels.available and width != value_width:
        kernels = Backend("triton", False, f"values must be as wide as keys, got {value_width} and {width}")
    elif kernels.available and width > WIDEST:
        kernels = Backend("triton", False, f"a head must be at most {WIDEST} wide, got {width}")
    return kernels, Backend("reference", True, "torch")


@registry.register
class Attention(TaskOp):
    """``softmax(c q k^T + mask) v``; saves operands, result and the logarithm of each query's sum of exponentials.

    Neither the scores nor their softmax are kept: every map forms them again. The kernels hold tiles of them alone.
    Dropout is of the softmax, anew at every forward and for each task; the other maps replay it, by the kernels from a
    seed.
    """

    name: ClassVar[str] = "attention"
    targets: ClassVar[tuple[str, ...]] = ("aten.scaled_dot_product_attention.default",)
    fixed: ClassVar[tuple[str, ...]] = ("attn_mask",)
    saved_names: ClassVar[tuple[str, ...]] = ("queries", "keys", "values", "mask", "result", "logsumexp", "dropout")

    def __init__(self, call: Call) -> None:
        super().__init__(call)
        q, k, v, mask = (call[name] for name in ("query", "key", "value", "attn_mask"))
        dropout = float(call["dropout_p"])
        if not 0 <= dropout <= 1:
            raise Unsupported(f"attention: dropout_p must be between 0 and 1, got {dropout}")
        if call["enable_gqa"]:
            raise Unsupported("attention: enable_gqa must be False")
        if not q.shape[:-2] == k.shape[:-2] == v.shape[:-2]:
            raise Unsupported(
                "attention: query, key and value must agree in all but the last two axes, got "
                f"{q.shape}, {k.shape} and {v.shape}"
            )
        if len({i.dtype for i in (q, k, v)}) > 1:
            raise Unsupported("attention: query, key and value must have one dtype")
        if mask is not None and mask.dtype not in (torch.bool, q.dtype):
            raise Unsupported(f"attention: attn_mask must be boolean or of query's dtype, got {mask.dtype}")
        if mask is not None and call["is_causal"]:
            raise Unsupported("attention: attn_mask must be None where is_causal is set")
        if not k.shape[-2]:
            raise Unsupported("attention: there must be a key, got none")
        self.batch = q.shape[:-2]
        self.scores = (*self.batch, q.shape[-2], k.shape[-2])
        self.widths = q.shape[-1], v.shape[-1]
        self.mask = mask
        scale = call["scale"]
        scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
        self.setting = Setting(scale, bool(call["is_causal"]), dropout)
        self.random = dropout > 0  # type: ignore[misc]  # of this call, where the class can only say "maybe"

    def flops(self) -> int:
        return 2 * math.prod(self.scores) * sum(self.widths)

    def forward(self, x: Sequence[Tensor]) -> tuple[Tensors, Tensors]:
        q, k, v = (self._heads(value) for value in x[:3])
        saved = self._maps(q).forward(q, k, v, self._mask(x), self.setting)
        return (self._result(saved.o),), tuple(saved)

    def backward(self, saved: tuple[Any, ...], d_y: Tensors, need: Sequence[Need]) -> Tensors:
        kept = Saved(*saved)
        return self._results(self._maps(kept.q).backward(kept, self._heads(d_y[0]), self.setting, _wanted(need)))

    def tangent(self, saved: tuple[Any, ...], x_dot: Tensors) -> tuple[Tensors, Tensors]:
        kept = Saved(*saved)
        dots = [self._heads(value) for value in x_dot[:3]]
        if all(dot is None for dot in dots):
            return (None,), ()
        saved_dot = self._maps(kept.q).tangent(kept, *dots, self.setting)
        return (self._result(saved_dot.o),), tuple(saved_dot)

    def tangent_backward(
        self, saved: tuple[Any, ...], saved_dot: tuple[Any, ...], d_y: Tensors, d_y_dot: Tensors, need: Sequence[Need]
    ) -> Tensors:
        if d_y[0] is None or not saved_dot:  # linear in the cotangent's tangent
            return self._nothing() if d_y_dot[0] is None else self.backward(saved, d_y_dot, need)
        kept, dot = Saved(*saved), SavedDot(*saved_dot)
        d_o, d_o_dot = self._heads(d_y[0]), self._heads(d_y_dot[0])
        maps = self._maps(kept.q)
        return self._results(maps.tangent_backward(kept, dot, d_o, d_o_dot, self.setting, _wanted(need)))

    def _maps(self, q: Tensor) -> Any:
        """The module whose maps run tensors like ``q``."""
        self.backend = select(self.name, backends(q.device, q.dtype, *self.widths))
        if self.backend == "reference":
            return reference
        from fastmeta.ops.attention import triton

        return triton

    def _heads(self, value: Tensor | None) -> Any:
        """``[T, *batch, S, D]`` as ``[T, B, H, S, D]``."""
        if value is None or len(self.batch) == 2:
            return value
        heads = self.batch[-1] if self.batch else 1
        return value.reshape(value.shape[0], math.prod(self.batch[:-1]), heads, *value.shape[-2:])

    def _result(self, value: Tensor) -> Tensor:
        """``[T, B, H, S, D]`` as ``[T, *batch, S, D]``."""
        return value.reshape(value.shape[0], *self.batch, *value.shape[-2:])

    def _mask(self, x: Sequence[Tensor]) -> Tensor | None:
        """The mask as ``[T, B, H, S_q, S_k]``, along most axes usually one value in memory."""
        if not isinstance(self.mask, Input):
            return None
        mask = x[self.mask.position]
        aligned = (1,) * (len(self.scores) - len(self.mask.shape)) + self.mask.shape
        return self._heads(mask.reshape(mask.shape[0], *aligned).expand(mask.shape[0], *self.scores))

    def _results(self, cotangents: Sequence[Tensor | None]) -> Tensors:
        found = tuple(None if d is None else self._result(d) for d in cotangents)
        return found + self._nothing()[3:]

    def _nothing(self) -> Tensors:
        return (None,) * len(self.call.inputs)


def _wanted(need: Sequence[Need]) -> reference.Need:
    return bool(need[0]), bool(need[1]), bool(need[2])
