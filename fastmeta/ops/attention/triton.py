"""Attention's maps by the Triton kernels: layouts, launches, builds.

The maps are those of ``reference.py``, for float32 tensors of a GPU. A map is one launch a side: a kernel over blocks
of queries and, where keys or values want a cotangent, one over blocks of keys, which reads the row sums that the first
has left. Nothing grows with ``S_q S_k``, there are no atomics, and tiles depend on the head's width and on the
precision alone (tiles.py), so that results do not change from run to run.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from triton import next_power_of_2

from fastmeta.core.triton_support import Shipped, build_precision
from fastmeta.ops.attention import triton_kernels, triton_tangent_kernels, triton_wide_kernels
from fastmeta.ops.attention.reference import Cotangents, Need, Saved, SavedDot, Setting
from fastmeta.ops.attention.tiles import Kind

NARROWEST = 16  # columns of a tile that tensor cores multiply
FARTHEST = 2**31  # elements from a head's first row to its last that 32 bits reach
SEEDS = 2**63 - 1  # of dropout
DROPOUT = ("seed", "share", "factor")  # arguments of the wide kernels, None where there is none
KERNELS = {
    "forward": triton_kernels.forward,
    "backward_queries": triton_kernels.backward_queries,
    "backward_keys": triton_kernels.backward_keys,
    "tangent": triton_tangent_kernels.tangent,
    "tangent_backward_queries": triton_tangent_kernels.tangent_backward_queries,
    "tangent_backward_keys": triton_tangent_kernels.tangent_backward_keys,
    "tangent_backward_values": triton_tangent_kernels.tangent_backward_keys,  # of values alone
}
WIDE_KERNELS = {
    "forward": triton_wide_kernels.forward,
    "backward_queries": triton_wide_kernels.backward_queries,
    "backward_keys": triton_wide_kernels.backward_keys,
    "tangent": triton_wide_kernels.tangent,
    "tangent_backward_queries": triton_wide_kernels.tangent_backward_queries,
    "tangent_backward_keys": triton_wide_kernels.tangent_backward_keys,
    "tangent_backward_values": triton_wide_kernels.tangent_backward_keys,
}
# Columns that a product of the wide kernels takes at a time: more spill with a mask.
COLUMNS = 16


def kernel_of(kind: Kind, name: str) -> Any:
    """The kernel for one of the names of :data:`KERNELS`."""
    return (WIDE_KERNELS if kind.wide else KERNELS)[name]


def forward(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, setting: Setting) -> Saved:
    """``o``, ``peak``, ``log_sum`` and dropout's seed, from PyTorch's generator of this device, beside the operands.

    As :func:`fastmeta.ops.attention.reference.forward` but for the seed ``[1]`` of int64 in the place of ``z``.
    """
    q, k, v = _readable(q), _readable(k), _readable(v)
    seed = torch.randint(SEEDS, (1,), device=q.device) if setting.dropout else None
    saved = Saved(q, k, v, mask, _result(q), q.new_empty(q.shape[:-1]), q.new_empty(q.shape[:-1]), seed)
    _Launch(saved, setting).over_queries("forward", _operands(saved))
    return saved


def backward(saved: Saved, d_o: Tensor, setting: Setting, need: Need) -> Cotangents:
    """``d_q``, ``d_k``, ``d_v``, as :func:`fastmeta.ops.attention.reference.backward`."""
    launch = _Launch(saved, setting)
    q, k, v = saved.q, saved.k, saved.v
    d_q, d_k, d_v = (_result(x) if wanted else None for x, wanted in zip((q, k, v), need, strict=True))
    read = {**_operands(saved), "d_o": _heads_last(d_o), "delta": torch.empty_like(saved.peak)}
    launch.over_queries("backward_queries", {**read, "d_q": d_q}, WANTED=need[0])
    if need[1] or need[2]:
        launch.over_keys("backward_keys", {**read, "d_k": d_k, "d_v": d_v}, WANT_K=need[1], WANT_V=need[2])
    return d_q, d_k, d_v


def tangent(
    saved: Saved, q_dot: Tensor | None, k_dot: Tensor | None, v_dot: Tensor | None, setting: Setting
) -> SavedDot:
    """``o_dot`` and ``lse_dot``, as :func:`fastmeta.ops.attention.reference.tangent`."""
    q_dot, k_dot, v_dot = _laid(q_dot, saved.q), _laid(k_dot, saved.k), _laid(v_dot, saved.v)
    dot = SavedDot(q_dot, k_dot, v_dot, _result(saved.q), torch.empty_like(saved.peak))
    _Launch(saved, setting).over_queries("tangent", {**_operands(saved), **_operands_dot(dot)}, **_present(dot))
    return dot


def tangent_backward(
    saved: Saved, dot: SavedDot, d_o: Tensor, d_o_dot: Tensor | None, setting: Setting, need: Need
) -> Cotangents:
    """Tangents of the cotangents, as :func:`fastmeta.ops.attention.reference.tangent_backward`."""
    launch = _Launch(saved, setting)
    q, k, v = saved.q, saved.k, saved.v
    d_q_dot, d_k_dot, d_v_dot = (_result(x) if wanted else None for x, wanted in zip((q, k, v), need, strict=True))
    read = {
        **_operands(saved),
        **_operands_dot(dot),
        "d_o": _heads_last(d_o),
        "d_o_dot": None if d_o_dot is None else _heads_last(d_o_dot),
        "delta": torch.empty_like(saved.peak),
        "delta_dot": torch.empty_like(saved.peak),
    }
    present = {**_present(dot), "D_O_DOT": d_o_dot is not None}
    launch.over_queries("tangent_backward_queries", {**read, "d_q_dot": d_q_dot}, WANTED=need[0], **present)
    written = {**read, "d_k_dot": d_k_dot, "d_v_dot": d_v_dot}
    if need[1] and need[2] and launch.kind.apart:
        launch.over_keys("tangent_backward_keys", written, WANT_K=True, WANT_V=False, **present)
        launch.over_keys("tangent_backward_values", written, WANT_K=False, WANT_V=True, **present)
    elif need[1] or need[2]:
        launch.over_keys("tangent_backward_keys", written, WANT_K=need[1], WANT_V=need[2], **present)
    return d_q_dot, d_k_dot, d_v_dot


class _Launch:
    """The arguments that the kernels of one call share, and their launches."""

    def __init__(self, saved: Saved, setting: Setting) -> None:
        q, k, v, mask, *_, seed = saved
        tasks, batch, heads, S_q, width = q.shape
        self.rows, self.lengths = tasks * batch * heads, (S_q, k.shape[-2])
        self.device = q.device
        columns, hopper = max(NARROWEST, next_power_of_2(width)), _is_hopper(q.device)
        precision = precision_of(build_precision(), hopper=hopper)
        self.kind = Kind(columns, precision, hopper, dropout=seed is not None)
        strides = {"q": _strides(q), "k": _strides(k), "v": _strides(v)}
        self.numbers = {f"{x}_{axis}": s for x in strides for axis, s in zip("tbhs", strides[x], strict=True)}
        aligned = width % 4 == 0 and all(s % 4 == 0 for s in self.numbers.values())
        of_mask = (0,) * 5 if mask is None else tuple(mask.stride())
        self.numbers.update(zip(("m_t", "m_b", "m_h", "m_q", "m_k"), of_mask, strict=True))
        self.numbers.update(batch=batch, heads=heads, S_q=S_q, S_k=k.shape[-2])
        self.scale = setting.scale
        self.constants = {
            "D": width,
            "WIDTH": columns,
            "MASK": "none" if mask is None else "boolean" if mask.dtype == torch.bool else "added",
            "CAUSAL": setting.causal,
            "ALIGNED": aligned,
            "PRECISION": precision,
        }
        self.dropout: dict[str, Any] = {}
        if self.kind.wide:
            self.constants["COLUMNS"] = COLUMNS
            self.dropout = dict.fromkeys(DROPOUT)  # a build without dropout has no such arguments
        if seed is not None:
            share = 1 - setting.dropout
            self.dropout = dict(zip(DROPOUT, (seed, share, 1 / share if share else 0.0), strict=True))

    def over_queries(self, name: str, tensors: dict[str, Tensor | None], **flags: bool) -> None:
        """One program for each block of queries."""
        self._run(name, 0, tensors, flags)

    def over_keys(self, name: str, tensors: dict[str, Tensor | None], **flags: bool) -> None:
        """One program for each block of keys."""
        self._run(name, 1, tensors, flags)

    def _run(self, name: str, side: int, tensors: dict[str, Tensor | None], flags: dict[str, bool]) -> None:
        kernel, sizes = kernel_of(self.kind, name), self.kind.tile(name)
        programs = self.rows * -(-self.lengths[side] // (sizes.queries, sizes.keys)[side])
        if not programs:
            return
        absent = tensors["peak"]  # stands where a build reads nothing
        given = {n: absent if t is None else t for n, t in tensors.items() if n in kernel.arg_names}
        with _on(self.device):
            kernel[(programs,)](
                **given,
                **self.numbers,
                scale=self.scale,
                **self.dropout,
                **flags,
                **self.constants,
                BLOCK_Q=sizes.queries,
                BLOCK_K=sizes.keys,
                num_warps=sizes.warps,
                num_stages=sizes.stages,
                enable_fp_fusion=True,
            )


def shipped() -> list[Shipped]:
    """Builds of every kernel for the usual widths of a head, all operands varying, without a mask."""
    plain = [(32, "tf32x3"), (64, "tf32x3"), (64, "tf32"), (64, "bf16"), (128, "tf32x3"), (128, "tf32"), (128, "bf16")]
    dropout = [(32, "tf32x3"), (64, "tf32x3"), (128, "tf32x3"), (128, "tf32"), (128, "bf16")]
    asked = [(*kind, False) for kind in plain] + [(*kind, True) for kind in dropout]
    return [found for name in KERNELS for one in asked for found in _builds(name, *one)]


def _builds(name: str, width: int, asked: str, dropout: bool) -> list[Shipped]:
    """One build for both kinds of GPUs where they have the same, else one each."""
    kinds = [Kind(width, precision_of(asked, hopper=hopper), hopper, dropout) for hopper in (False, True)]
    found = [
        build(name, kind, (90,) if kind.hopper else (80,))
        for kind in kinds
        if kind.apart or name != "tangent_backward_values"
    ]
    both = [replace(one, capabilities=(80, 90)) for one in found]
    return both[:1] if both[1:] == both[:1] else found


def build(name: str, kind: Kind, capabilities: tuple[int, ...]) -> Shipped:
    """The build of a kernel with all operands varying, without a mask."""
    kernel, sizes = kernel_of(kind, name), kind.tile(name)
    flags = {"WANTED", "WANT_K", "WANT_V", "Q_DOT", "K_DOT", "V_DOT", "D_O_DOT"}
    constants: dict[str, Any] = {n: True for n in kernel.arg_names if n in flags}
    if KERNELS[name] is KERNELS["tangent_backward_values"] and kind.apart:
        constants |= {"WANT_K": name != "tangent_backward_values", "WANT_V": name == "tangent_backward_values"}
    constants |= {"D": kind.width, "WIDTH": kind.width, "BLOCK_Q": sizes.queries, "BLOCK_K": sizes.keys}
    constants |= {"MASK": "none", "CAUSAL": False, "ALIGNED": True, "PRECISION": kind.precision}
    if kind.wide:
        constants["COLUMNS"] = COLUMNS
    if kind.wide and not kind.dropout:
        constants |= dict.fromkeys(DROPOUT)
    types = dict.fromkeys(triton_kernels.INTEGERS, "i32") | dict.fromkeys(("scale", "share", "factor"), "fp32")
    types |= {"seed": "*i64"} | dict.fromkeys(constants, "constexpr")
    signature = {n: types.get(n, "*fp32") for n in kernel.arg_names}
    label = f"attention {name}, {kind.width} wide, {kind.precision}, {sizes.queries} by {sizes.keys}, "
    label += f"{sizes.warps} warps" + ", dropout" * kind.dropout
    return Shipped(label, kernel, signature, constants, sizes.warps, sizes.stages, True, capabilities)


def _operands(saved: Saved) -> dict[str, Tensor | None]:
    mask = saved.mask
    if mask is not None and mask.dtype == torch.bool:
        mask = mask.view(torch.uint8)
    return {**saved._asdict(), "mask": mask, "o": _heads_last(saved.o)}


def _operands_dot(dot: SavedDot) -> dict[str, Tensor | None]:
    return {f"{name}_dot": value for name, value in dot._asdict().items()}


def _present(dot: SavedDot) -> dict[str, bool]:
    return {"Q_DOT": dot.q is not None, "K_DOT": dot.k is not None, "V_DOT": dot.v is not None}


def _readable(x: Tensor) -> Tensor:
    """``x`` with a dense last axis, rows that 32 bits reach, and no two elements in one place: itself, as a rule."""
    dense = x.shape[-1] == 1 or x.stride(-1) == 1
    near = x.shape[-2] * x.stride(-2) < FARTHEST
    return x if dense and near and _apart(x) else x.contiguous()


def _apart(x: Tensor) -> bool:
    """Whether all elements have places of their own, as a tangent with the strides of ``x`` needs them."""
    reach = 1
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size > 1:
            if stride < reach:
                return False
            reach += stride * (size - 1)
    return True


def _strides(x: Tensor) -> tuple[int, ...]:
    """Strides over all axes but the last; where an axis has one entry its stride says nothing and is left out."""
    return tuple(0 if size == 1 else stride for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True))


def _laid(dot: Tensor | None, x: Tensor) -> Tensor | None:
    """A tangent in the memory layout of its primal, as projections that are alike leave it; a copy where it is not."""
    if dot is None or (_strides(dot) == _strides(x) and (x.shape[-1] == 1 or dot.stride(-1) == 1)):
        return dot
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device).copy_(dot)


def _heads_last(x: Tensor) -> Tensor:
    """``[T, B, H, S, D]`` that lies as ``[T, B, S, H, D]``: itself, if it does so already."""
    return x.transpose(2, 3).contiguous().transpose(2, 3)


def _result(x: Tensor) -> Tensor:
    """An uninitialised result of the shape of ``x``, heads last in memory."""
    tasks, batch, heads, rows, width = x.shape
    return x.new_empty(tasks, batch, rows, heads, width).transpose(2, 3)


def precision_of(asked: str, *, hopper: bool) -> str:
    """Float32's accuracy by products of bfloat16 parts where tensor cores read them from shared memory either way."""
    return "bf16x6" if asked == "tf32x3" and hopper else asked


def _is_hopper(device: torch.device) -> bool:
    """Whether tensor cores multiply from shared memory, 64 rows at a time: of capability 9.0 alone."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


@contextlib.contextmanager
def _on(device: torch.device) -> Iterator[None]:
    """Triton launches on the current device."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            yield
    else:
        yield
