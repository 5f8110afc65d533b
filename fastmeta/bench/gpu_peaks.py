"""The ceilings of a GPU, measured on the spot: a large copy, large products, a node of a graph."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fastmeta.bench.gpu_timing import graphed, interleaved

COPY_BYTES = 1 << 30  # far beyond any cache
SIZE = 8192  # of the products
NODES = 400


@dataclass(frozen=True)
class Peaks:
    """Rates of one device.

    Attributes:
        bytes: read and written each second by a large copy.
        flops: operations each second of a large product by precision: ``fp32``, ``tf32``, ``bf16``.
        node_s: seconds from one tiny dependent kernel of a graph to the next.
    """

    bytes: float
    flops: dict[str, float]
    node_s: float

    def of(self, precision: str) -> float:
        """The rate that products in ``precision`` cannot exceed; three tf32 products make one of ``tf32x3``."""
        return self.flops["tf32"] / 3 if precision == "tf32x3" else self.flops[precision]


def measure() -> Peaks:
    """Measure them; about five seconds."""
    copy = _copy()
    flops = {}
    a, b = (torch.randn(SIZE, SIZE, device="cuda") for _ in range(2))
    before = torch.get_float32_matmul_precision()
    for name, precision in (("fp32", "highest"), ("tf32", "high")):
        torch.set_float32_matmul_precision(precision)
        flops[name] = _product(a, b)
    torch.set_float32_matmul_precision(before)
    flops["bf16"] = _product(a.bfloat16(), b.bfloat16())
    tiny = torch.zeros(32, device="cuda")

    def chain() -> None:
        for _ in range(NODES):
            tiny.add_(1)

    node = interleaved({"chain": graphed(chain)}, rounds=3)["chain"].median / 1e3 / NODES
    return Peaks(2 * COPY_BYTES / copy, flops, node)


def _copy() -> float:
    """Seconds."""
    source = torch.randn(COPY_BYTES // 4, device="cuda")
    target = torch.empty_like(source)
    return interleaved({"copy": lambda: target.copy_(source)}, rounds=3)["copy"].median / 1e3


def _product(a: torch.Tensor, b: torch.Tensor) -> float:
    out = torch.empty_like(a)
    seconds = interleaved({"product": lambda: torch.mm(a, b, out=out)}, rounds=3)["product"].median / 1e3
    return 2 * SIZE**3 / seconds
