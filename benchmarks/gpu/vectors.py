"""What goes over vectors on a GPU, beside a copy: they lie beyond any cache, so that time is that of their bytes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fastmeta.bench.gpu_peaks import Peaks
from fastmeta.bench.gpu_timing import graphed, interleaved
from fastmeta.core.curves import Curve
from fastmeta.ops import conjugate_gradients as cg
from fastmeta.ops.inner_update import op as inner_update

TASKS, PARTS, ELEMENTS = 16, 8, 1 << 22  # of a task: 256 MiB a vector in all


def rows(peaks: Peaks) -> list[dict[str, Any]]:
    """Milliseconds, bytes and the share of the copy's rate of each map."""
    from fastmeta.ops.sum_block import triton as sum_block

    theta, g = (torch.randn(TASKS, ELEMENTS, device="cuda") for _ in range(2))
    out, alpha = torch.empty_like(theta), torch.tensor([0.1], device="cuda")
    parts = [part.contiguous() for part in g.split(ELEMENTS // PARTS, 1)]
    once = theta.numel() * theta.element_size()
    maps: dict[str, tuple[int, Callable[[], Any]]] = {
        "step": (3, lambda: inner_update.step(theta, g, alpha, out=out)),
        f"step of {PARTS} gradients": (3, lambda: inner_update.step_parts(theta, parts, alpha, out=out)),
        "adjoint": (2, lambda: inner_update.adjoint(theta, g, alpha, need_alpha=False)),
        "adjoint, rates learned": (4, lambda: inner_update.adjoint(theta, g, alpha)),
        "sum and ReLU": (3, lambda: sum_block.forward(Curve("relu"), theta, g)),
        "sum and ReLU, tangent": (4, lambda: sum_block.derivative(Curve("relu"), out, theta, g)),
    }
    calls = {name: graphed(call) for name, (_, call) in maps.items()}
    state, diagonal = cg.start(theta, 0.0), g.abs()
    state.enough.fill_(-1.0)  # so that no task ends

    def iteration() -> None:
        cg.advance(state, torch.mul(diagonal, state.p, out=out), 0.5)

    name = (
        "conjugate gradients of a diagonal"  # the next iteration goes on from this one, which a graph's replay cannot
    )
    maps[name], calls[name] = (14, iteration), iteration
    times = interleaved(calls, rounds=5)
    return [
        {
            "map": name,
            "MiB": passes * once / 2**20,
            "ms": times[name].median,
            "TB/s": passes * once / times[name].median / 1e9,
            "share of copy": passes * once / times[name].median * 1e3 / peaks.bytes,
        }
        for name, (passes, _) in maps.items()
    ]
