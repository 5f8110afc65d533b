"""Attention, which models write as products, a softmax and changes of shape, as one operation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from fastmeta.engine.lower.lowering import Data, Lowering, Value, is_rename
from fastmeta.engine.program import Instruction


@dataclass(frozen=True)
class Heads:
    """A value whose features are heads, seen along ``axes``: samples n, tokens s, heads h, features d."""

    value: int
    shape: tuple[int, int, int, int]  # n, s, h, d
    axes: str
    scale: float = 1.0


@dataclass(frozen=True)
class Scores:
    """``scale q k^T + mask``, or its softmax along the last axis."""

    q: Heads
    k: Heads
    scale: float
    mask: int | None = None  # a slot of data: added, or where it is boolean and false a key has no weight
    normalised: bool = False
    causal: bool = False  # no key has weight for an earlier query
    safe: bool = False  # a query whose keys all have no weight gives zeros


@dataclass(frozen=True)
class Mixed:
    """Softmax of scores times values, seen along ``axes``, or with heads and features as one axis: ``nse``."""

    scores: Scores
    v: Heads
    axes: str


Meaning = Heads | Scores | Mixed | None


def lower_attention(lowering: Lowering, part: Sequence[Instruction], slot: int) -> bool:
    """Emit ``part``, whose result is ``slot``, as one native operation, where that is what it is."""
    meanings: dict[int, Meaning] = {}
    for instruction in part:
        if len(instruction.outputs) != 1:
            return False
        found = _meaning(lowering, instruction, meanings)
        if found is None:
            return False
        meanings[instruction.outputs[0]] = found
    whole = meanings.get(slot)
    if not isinstance(whole, Mixed) or whole.axes != "nse":
        return False
    scores, v = whole.scores, whole.v
    n, rows, heads, dim = scores.q.shape
    described: dict[str, Any] = {"n": n, "rows": rows, "columns": scores.k.shape[1], "heads": heads, "dim": dim}
    sources = [(False, each.value) for each in (scores.q, scores.k, v)]
    described |= {"scale": scores.scale, "mask": (), "boolean": False, "causal": scores.causal, "safe": scores.safe}
    if scores.mask is not None:
        held = lowering.held[scores.mask]
        sources.append((True, held.index))
        mask = lowering.graph.values[scores.mask]
        described |= {"mask": _strides(mask.shape), "boolean": mask.dtype == torch.bool}
    softmax = next(i for i in part if i.op.name in ("softmax", "attention"))
    index = lowering.emit("attention", described, sources, of=softmax)
    lowering.held[slot] = Value(index, n * rows, heads * dim)
    return True


def _meaning(lowering: Lowering, instruction: Instruction, meanings: dict[int, Meaning]) -> Meaning:
    op: Any = instruction.op
    read = [_read(lowering, slot, meanings) for slot in instruction.inputs]
    shape = lowering.graph.values[instruction.outputs[0]].shape
    if op.name == "view":
        return _view(instruction, read[0], shape)
    if op.name == "matmul":
        return _product(read[0], read[1])
    if op.name == "softmax" and isinstance(read[0], Scores) and op.dim == -1 and not read[0].normalised:
        return replace(read[0], normalised=True)
    if op.name == "attention":
        return _attention(lowering, instruction, read)
    if op.name == "dropout" and not op.random:
        return read[0]
    if op.name in ("product", "quotient") and op.number is not None and len(read) == 1:
        return _scaled(read[0], op.number if op.name == "product" else 1 / op.number)
    if op.name == "sum" and not op.offset and len(read) == 1:
        return _scaled(read[0], op.factors[0])
    if op.name == "sum" and not op.offset and op.factors == (1, 1):
        return _masked(lowering, instruction, read)
    return None


def _read(lowering: Lowering, slot: int, meanings: dict[int, Meaning]) -> Meaning:
    """What a slot means: that of an instruction before, or a value's own features as heads."""
    if slot in meanings:
        return meanings[slot]
    held, shape = lowering.held.get(slot), lowering.graph.values[slot].shape
    if not isinstance(held, Value) or held.pixels != 1:
        return None
    if len(shape) == 3 and (held.samples, held.channels) == (shape[0] * shape[1], shape[2]):
        return Heads(held.index, (shape[0], shape[1], 1, shape[2]), "nse")
    if len(shape) == 4 and (held.samples, held.channels) == (shape[0] * shape[1], shape[2] * shape[3]):
        n, s, h, d = shape
        return Heads(held.index, (n, s, h, d), "nshd")
    return None


def _view(instruction: Instruction, x: Meaning, shape: tuple[int, ...]) -> Meaning:
    call = instruction.op.call
    target, old = str(call.target), call.inputs[0].shape
    if not isinstance(x, (Heads, Mixed)):
        return x if is_rename(instruction) and old == shape else None
    if target in ("aten.transpose.int", "aten.permute.default"):
        order = list(range(len(old)))
        if target == "aten.permute.default":
            order = [d % len(old) for d in call["dims"]]
        else:
            a, b = call["dim0"] % len(old), call["dim1"] % len(old)
            order[a], order[b] = order[b], order[a]
        return replace(x, axes="".join(x.axes[i] for i in order))
    if not is_rename(instruction):
        return None
    if old == shape:
        return x
    if isinstance(x, Heads) and x.axes == "nse" and len(shape) == 4 and shape[:2] == x.shape[:2]:
        return replace(x, shape=(shape[0], shape[1], shape[2], shape[3]), axes="nshd")
    if isinstance(x, Mixed) and x.axes == "nshd" and shape[-1] == old[-1] * old[-2] and len(shape) in (2, 3):
        return replace(x, axes="nse")
    if isinstance(x, Mixed) and x.axes == "nse" and shape[-1] == old[-1]:
        return x
    return None


def _product(a: Meaning, b: Meaning) -> Meaning:
    if isinstance(a, Heads) and isinstance(b, Heads) and (a.axes, b.axes) == ("nhsd", "nhds"):
        return Scores(a, b, a.scale * b.scale) if _fit(a, b) else None
    if isinstance(a, Scores) and isinstance(b, Heads) and a.normalised and b.axes == "nhsd" and b.scale == 1:
        return Mixed(a, b, "nhsd") if b.shape == a.k.shape else None
    return None


def _fit(q: Heads, k: Heads) -> bool:
    return q.shape[0] == k.shape[0] and q.shape[2:] == k.shape[2:]


def _scaled(x: Meaning, factor: float) -> Meaning:
    if isinstance(x, Heads) or (isinstance(x, Scores) and x.mask is None and not x.normalised):
        return replace(x, scale=x.scale * factor)
    return None


def _masked(lowering: Lowering, instruction: Instruction, read: list[Meaning]) -> Meaning:
    at = next((i for i, x in enumerate(read) if isinstance(x, Scores)), None)
    if at is None:
        return None
    scores, slot = read[at], instruction.inputs[1 - at]
    mask = lowering.graph.values[slot]
    whole = lowering.graph.values[instruction.outputs[0]].shape == lowering.graph.values[instruction.inputs[at]].shape
    if not isinstance(scores, Scores) or scores.mask is not None or scores.normalised or not whole:
        return None
    if not _is_mask(lowering, slot) or mask.dtype == torch.bool:
        return None
    return replace(scores, mask=slot)


def _attention(lowering: Lowering, instruction: Instruction, read: list[Meaning]) -> Meaning:
    """PyTorch's own operation: the same, but that a query may be left without a key."""
    op: Any = instruction.op
    q, k, v = read[:3]
    if not (isinstance(q, Heads) and isinstance(k, Heads) and isinstance(v, Heads)):
        return None
    if {q.axes, k.axes, v.axes} != {"nhsd"} or v.scale != 1 or not _fit(q, k) or v.shape != k.shape:
        return None
    position = op.call.position("attn_mask")
    mask = None if position is None else instruction.inputs[position]
    if mask is not None and not _is_mask(lowering, mask):
        return None
    scale = q.scale * k.scale * op.setting.scale
    return Mixed(Scores(q, k, scale, mask, normalised=True, causal=op.setting.causal, safe=True), v, "nhsd")


def _is_mask(lowering: Lowering, slot: int) -> bool:
    return isinstance(lowering.held.get(slot), Data) and lowering.graph.values[slot].dtype in (
        torch.bool,
        lowering.dtype,
    )


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Of a contiguous mask along samples, heads, rows and columns; 0 where it repeats."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step if size > 1 else 0)
        step *= size
    return (*[0] * (4 - len(shape)), *strides[::-1])
