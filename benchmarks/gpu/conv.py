"""Times the four maps of a convolution block on a GPU, layer by layer of few-shot networks, beside PyTorch's.

``python -m benchmarks.gpu.conv --tflops 395 --gbytes 3350`` prints a table; ``--kernels`` adds what each kernel takes.

A map is captured in a CUDA graph and replayed: no launch from Python is in its time. Times are medians over
:data:`REPLAYS` replays between events, and operands are those of the replay before: what fits the L2 cache lies there
(warm). PyTorch's maps are those of ``conv_block.reference``: a task is a group of one convolution, and cuDNN may use
tf32, which is PyTorch's default and less exact than the ``tf32x3`` of ours. The floor is the larger of operations by
the peak and of bytes by the bandwidth, where every operand and result of a map moves once and what it keeps does not.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Any

import torch
from torch import Tensor

from fastmeta.bench.gpu_timing import graphed
from fastmeta.core import triton_support
from fastmeta.core.task_op import Call, Need
from fastmeta.ops.conv_block import ConvBlock, reference
from fastmeta.ops.conv_block.op import Parts

aten = torch.ops.aten
REPLAYS = 30
MAPS = ("forward", "backward", "tangent", "tangent_backward")


@dataclass(frozen=True)
class Layer:
    """A block of a few-shot network as its tasks see it: 3x3, batch norm, ReLU, max pooling 2x2."""

    network: str
    tasks: int
    images: int
    channels: int
    out: int
    size: int

    @property
    def first(self) -> bool:
        """Whether it reads the data, which has neither tangent nor cotangent."""
        return self.channels < 16

    def op(self) -> ConvBlock:
        """The operation."""
        x = torch.zeros(self.images, self.channels, self.size, self.size)
        weight, one = torch.zeros(self.out, self.channels, 3, 3), torch.ones(self.out)
        z = torch.zeros(self.images, self.out, self.size, self.size)
        return ConvBlock.of(
            Parts(
                Call.example(aten.conv2d.default, x, weight, None, [1, 1], [1, 1]),
                Call.example(aten._native_batch_norm_legit.no_stats, z, one, one, True, 0.0, 1e-5),
                Call.example(aten.relu.default, z),
                Call.example(aten.max_pool2d.default, z, [2, 2]),
            )
        )

    def flops(self, name: str) -> int:
        """Operations of a map's products for all tasks."""
        factor = {"forward": 1, "backward": 1, "tangent": 1, "tangent_backward": 1} if self.first else {}
        factor = factor or {"forward": 1, "backward": 2, "tangent": 2, "tangent_backward": 4}
        return factor[name] * 18 * self.tasks * self.images * self.size**2 * self.channels * self.out

    def bytes(self, name: str) -> int:
        """Bytes of a map's operands and results for all tasks, each once."""
        x = self.images * self.size**2 * self.channels
        y = self.images * (self.size // 2) ** 2 * self.out
        w, dot = 9 * self.channels * self.out, 0 if self.first else x
        count = {
            "forward": x + w + y,
            "backward": x + w + y + dot + w,
            "tangent": x + w + dot + w + y,
            "tangent_backward": x + w + y + dot + w + y + dot + w,
        }
        return 4 * self.tasks * count[name]


def network(name: str, tasks: int, images: int, channels: int, out: int, size: int) -> list[Layer]:
    """The four blocks of a network."""
    return [Layer(name, tasks, images, out if i else channels, out, size >> i) for i in range(4)]


LAYERS = (
    *network("Omniglot 5-way", 32, 5, 1, 64, 28),
    *network("Omniglot 20-way", 16, 20, 1, 64, 28),
    *network("84x84, support", 4, 5, 3, 32, 84),
    *network("84x84, query", 4, 75, 3, 32, 84),
)


def rows(peaks: Mapping[str, float], layers: Sequence[Layer] = LAYERS) -> list[dict[str, Any]]:
    """Times of every map of ``layers``.

    Args:
        peaks: ``"flops"``, operations a second of matrix products of float32 operands at the precision in use, and
            ``"bytes"``, bytes a second read and written together.
        layers: which.

    Returns:
        One row a layer and map: sizes, operations, bytes, microseconds of ours, of PyTorch's and of the floor, and the
        floor's share of ours.
    """
    found = []
    for layer in layers:
        calls, theirs = _maps(layer, ours=True), _maps(layer, ours=False)
        for name in MAPS:
            if layer.network.endswith("query") and name.startswith("tangent"):
                continue
            mine, torchs = replayed(calls[name]), replayed(theirs[name])
            flops, moved = layer.flops(name), layer.bytes(name)
            floor = max(flops / peaks["flops"], moved / peaks["bytes"]) * 1e6
            found.append(
                {"network": layer.network, "tasks": layer.tasks, "images": layer.images, "size": layer.size}
                | {"channels": layer.channels, "out": layer.out, "map": name, "mflop": flops / 1e6, "mb": moved / 1e6}
                | {"us": mine, "torch_us": torchs, "floor_us": floor, "of_floor": floor / mine, "gain": torchs / mine}
                | {"precision": triton_support.precision()}
            )
    return found


def compile_all() -> None:
    """Run every map of ours once."""
    for layer in LAYERS:
        for call in _maps(layer, ours=True).values():
            call()
    torch.cuda.synchronize()


def _maps(layer: Layer, *, ours: bool) -> dict[str, Callable[[], Any]]:
    """The four maps as calls without arguments, with operands of their own."""
    op = layer.op()
    generator = torch.Generator("cuda").manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(layer.tasks, *shape, device="cuda", generator=generator)

    def last(images: Tensor) -> Tensor:
        return images.movedim(2, -1).contiguous().movedim(-1, 2)

    given = [draw(*i.shape) for i in op.call.inputs]
    dots: list[Tensor | None] = [draw(*i.shape) for i in op.call.inputs]
    result = op.call.outputs[0].shape
    d, d_dot = last(draw(*result)), last(draw(*result))
    given[0] = last(given[0])
    dots[0] = None if layer.first else last(draw(*op.call.inputs[0].shape))
    need = [Need.NONE if layer.first else Need.TASK, Need.TASK, Need.TASK, Need.TASK]
    if ours:
        _, saved = op.forward(given)
        _, saved_dot = op.tangent(saved, tuple(dots))
        return {
            "forward": lambda: op.forward(given),
            "backward": lambda: op.backward(saved, (d,), need),
            "tangent": lambda: op.tangent(saved, tuple(dots)),
            "tangent_backward": lambda: op.tangent_backward(saved, saved_dot, (d,), (d_dot,), need),
        }
    x, weight, *affine = given
    g, needs = op.geometry, [need[0], need[1], Need.NONE, need[2], need[3]]
    _, _, kept = reference.forward(x, weight, None, (affine[0], affine[1]), None, g)
    _, kept_dot = reference.tangent(kept, dots[0], dots[1], None, (dots[2], dots[3]), g)
    return {
        "forward": lambda: reference.forward(x, weight, None, (affine[0], affine[1]), None, g),
        "backward": lambda: reference.backward(kept, d, needs, g),
        "tangent": lambda: reference.tangent(kept, dots[0], dots[1], None, (dots[2], dots[3]), g),
        "tangent_backward": lambda: reference.tangent_backward(kept, kept_dot, d, d_dot, needs, g),
    }


def replayed(call: Callable[[], Any]) -> float:
    """Median microseconds of a call's replay as a CUDA graph."""
    replay = graphed(call)
    for _ in range(3):
        replay()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(REPLAYS + 1)]
    marks[0].record()
    for mark in marks[1:]:
        replay()
        mark.record()
    torch.cuda.synchronize()
    return 1e3 * median(a.elapsed_time(b) for a, b in pairwise(marks))


def kernels(layer: Layer) -> dict[str, dict[str, float]]:
    """Microseconds that each kernel of each of our maps takes, by name."""
    found: dict[str, dict[str, float]] = {}
    for name, call in _maps(layer, ours=True).items():
        call()
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            for _ in range(10):
                call()
            torch.cuda.synchronize()
        found[name] = {event.key: event.self_device_time_total / 10 for event in profile.key_averages()}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tflops", type=float, required=True, help="10^12 operations a second at this precision")
    parser.add_argument("--gbytes", type=float, required=True, help="10^9 bytes a second")
    parser.add_argument("--network", default="", help="only networks whose name begins so")
    parser.add_argument("--kernels", action="store_true", help="what each kernel takes, too")
    arguments = parser.parse_args()
    layers = [layer for layer in LAYERS if layer.network.startswith(arguments.network)]
    head = ("network", "size", "channels", "map", "mflop", "us", "torch_us", "gain", "floor_us", "of_floor")
    print("  ".join(f"{name:>16}" for name in head))
    for row in rows({"flops": arguments.tflops * 1e12, "bytes": arguments.gbytes * 1e9}, layers):
        cells = [row[name] for name in head]
        print("  ".join(f"{cell:>16.2f}" if isinstance(cell, float) else f"{cell:>16}" for cell in cells), flush=True)
    for layer in layers if arguments.kernels else ():
        for name, times in kernels(layer).items():
            listed = ", ".join(f"{kernel[:40]} {time:.1f}" for kernel, time in times.items() if time > 0)
            print(f"{layer.network} {layer.size} {name}: {listed}", flush=True)


if __name__ == "__main__":
    main()
