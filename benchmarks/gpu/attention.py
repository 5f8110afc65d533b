"""Attention's four maps and its whole Hessian-vector product on a GPU, beside what PyTorch has for the latter."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastmeta.bench.gpu_peaks import Peaks
from fastmeta.bench.gpu_timing import Timed, graphed, interleaved
from fastmeta.core.triton_support import PRECISIONS
from fastmeta.ops.attention import reference
from fastmeta.ops.attention.reference import Saved, SavedDot, Setting

SHAPES = ((4, 8, 512, 64), (4, 12, 1024, 64), (8, 12, 2048, 64))  # batch, heads, length, width
ROUNDS, SLOT_MS = 5, 15.0
# Products of a length-by-length matrix with one of a head's width, on either side; those that form the scores again
# count, as no kernel keeps them.
PRODUCTS = {"forward": 2, "backward": 7, "tangent": 5, "tangent_backward": 18}
WHOLE = "all four maps"
LARGEST_CAPTURED = 2**27  # scores of a peer that is captured: a graph holds the peer's memory a second time
ALL = (True, True, True)

Results = Sequence[Tensor]


class Problem:
    """Operands, tangents and cotangents of one call, ``[1, B, H, S, D]``, heads last in memory."""

    def __init__(self, batch: int, heads: int, length: int, width: int) -> None:
        self.name = f"{batch}x{heads}, {length}, {width}"
        self.scores = batch * heads * length**2
        self.flops = {what: 2 * n * self.scores * width for what, n in PRODUCTS.items()}
        self.flops[WHOLE] = sum(self.flops.values())
        self.setting = Setting(width**-0.5, False)
        memory = 1, batch, length, heads, width
        draw = torch.Generator("cuda").manual_seed(0)
        self.tensors = [torch.randn(memory, device="cuda", generator=draw).transpose(2, 3) for _ in range(8)]

    def maps(self, module: Any, part: Callable[[Tensor], Tensor] = lambda x: x) -> dict[str, Callable[[], Results]]:
        """The maps of ``module`` on ``part`` of every tensor, and all of them one after another."""
        q, k, v, d_o, q_dot, k_dot, v_dot, d_o_dot = (part(x) for x in self.tensors)
        saved: Saved = module.forward(q, k, v, None, self.setting)
        dot: SavedDot = module.tangent(saved, q_dot, k_dot, v_dot, self.setting)

        def whole() -> Results:
            kept = module.forward(q, k, v, None, self.setting)
            first = module.backward(kept, d_o, self.setting, ALL)
            moved = module.tangent(kept, q_dot, k_dot, v_dot, self.setting)
            second = module.tangent_backward(kept, moved, d_o, d_o_dot, self.setting, ALL)
            return [kept.o, *first, moved.o, *second]

        return {
            "forward": lambda: [module.forward(q, k, v, None, self.setting).o],
            "backward": lambda: module.backward(saved, d_o, self.setting, ALL),
            "tangent": lambda: [module.tangent(saved, q_dot, k_dot, v_dot, self.setting).o],
            "tangent_backward": lambda: module.tangent_backward(saved, dot, d_o, d_o_dot, self.setting, ALL),
            WHOLE: whole,
        }

    def peers(self) -> dict[str, Callable[[], Results]]:
        """What gives the same as all four maps."""
        q, k, v, d_o, q_dot, k_dot, v_dot, d_o_dot = (x[0] for x in self.tensors)

        def double_backward() -> Results:
            leaves = [x.detach().requires_grad_() for x in (q, k, v, d_o)]
            with sdpa_kernel(SDPBackend.MATH):
                o = torch.nn.functional.scaled_dot_product_attention(*leaves[:3])
            first = torch.autograd.grad(o, leaves[:3], leaves[3], create_graph=True)
            *second, o_dot = torch.autograd.grad((*first, o), leaves, (q_dot, k_dot, v_dot, d_o_dot))
            return [x.detach() for x in (o, *first, o_dot, *second)]

        def plain(*operands: Tensor) -> Tensor:
            return torch.softmax(operands[0] @ operands[1].mT * self.setting.scale, -1) @ operands[2]

        def gradient(*operands: Tensor) -> tuple[Tensor, ...]:
            o, pull = torch.func.vjp(plain, *operands[:3])
            return (o, *pull(operands[3]))

        def forward_over_reverse() -> Results:
            primal, tangent = torch.func.jvp(gradient, (q, k, v, d_o), (q_dot, k_dot, v_dot, d_o_dot))
            return [*primal, *tangent]

        return {"SDPA-math, double backward": double_backward, "torch.func, jvp of vjp": forward_over_reverse}


def rows(peaks: Peaks) -> list[dict[str, Any]]:
    """A row for each map, for all of them and for each peer, by shape and precision of products.

    Times are medians in milliseconds, of replayed graphs but for peers whose memory a graph would double. The error is
    that of all results together against float64, on two heads.
    """
    from fastmeta.ops.attention import triton

    found = []
    before = torch.get_float32_matmul_precision()
    try:
        for setting, precision in PRECISIONS.items():
            torch.set_float32_matmul_precision(setting)
            _compile(triton)
            for shape in SHAPES:
                found += _compare(Problem(*shape), triton, precision, peaks.of(precision))
                gc.collect()
                torch.cuda.empty_cache()
    finally:
        torch.set_float32_matmul_precision(before)
    return found


def compile_all() -> None:
    """Compile every kernel for each precision."""
    from fastmeta.ops.attention import triton

    before = torch.get_float32_matmul_precision()
    for setting in PRECISIONS:
        torch.set_float32_matmul_precision(setting)
        _compile(triton)
    torch.set_float32_matmul_precision(before)


def _compare(problem: Problem, kernels: Any, precision: str, peak: float) -> list[dict[str, Any]]:
    truth = {what: call() for what, call in problem.maps(reference, lambda x: x[:, :1, :2].double()).items()}
    ours, peers = problem.maps(kernels), problem.peers()
    errors = {what: _error(call(), truth[what]) for what, call in ours.items()}
    errors |= {name: _error([x.unsqueeze(0) for x in call()], truth[WHOLE]) for name, call in peers.items()}
    replayed: dict[str, Callable[[], Any]] = {what: graphed(call) for what, call in ours.items()}
    captured = problem.scores <= LARGEST_CAPTURED
    times = interleaved(replayed | {n: graphed(c) if captured else c for n, c in peers.items()}, ROUNDS, SLOT_MS)
    return [_row(problem, precision, what, times, errors[what], peak) for what in times]


def _row(
    problem: Problem, precision: str, what: str, times: dict[str, Timed], error: float, peak: float
) -> dict[str, Any]:
    ms, flops = times[what].median, problem.flops.get(what)
    row = {"batch x heads, length, width": problem.name, "products": precision, "what": what, "ms": ms}
    row |= {"20 %": times[what].low, "80 %": times[what].high, "error": error}
    if flops is None:
        return row | {"/ all four maps": ms / times[WHOLE].median}
    rate = flops / ms * 1e3
    return row | {"TFLOP/s": rate / 1e12, "share of peak": rate / peak}


def _error(results: Results, truth: Results) -> float:
    """Relative error of all results together, on the heads that the truth has."""
    gaps = [(x[:, :1, :2].double() - true).norm() for x, true in zip(results, truth, strict=True)]
    return float(torch.stack(gaps).norm() / torch.stack([true.norm() for true in truth]).norm())


def _compile(kernels: Any) -> None:
    """Compile every kernel, several at a time, so that measuring begins within seconds."""
    small = Problem(1, 2, 64, SHAPES[0][-1])
    q, k, v, d_o, q_dot, k_dot, v_dot, d_o_dot = small.tensors
    row = torch.zeros_like(q[..., 0])
    saved, dot = Saved(q, k, v, None, q, row, row), SavedDot(q_dot, k_dot, v_dot, q, row)
    calls = [
        partial(kernels.forward, q, k, v, None, small.setting),
        partial(kernels.tangent, saved, q_dot, k_dot, v_dot, small.setting),
        partial(kernels.backward, saved, d_o, small.setting, ALL),
        partial(kernels.tangent_backward, saved, dot, d_o, d_o_dot, small.setting, ALL),
    ]
    with ThreadPoolExecutor(len(calls)) as pool:
        for done in [pool.submit(call) for call in calls]:
            done.result()
    torch.cuda.synchronize()
