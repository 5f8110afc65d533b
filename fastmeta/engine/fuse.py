"""``fuse``: a convolution and what follows it become one call, where there are kernels for the whole."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from fastmeta.core import triton_support
from fastmeta.core.task_op import TaskOp, Unsupported
from fastmeta.engine.trace import Graph, Node
from fastmeta.ops.conv_block import ConvBlock
from fastmeta.ops.conv_block.op import Parts

CONVOLUTIONS = ("aten.conv2d.default", "aten.conv2d.padding")
NORMS = (
    "aten._native_batch_norm_legit_functional.default",
    "aten._native_batch_norm_legit.no_stats",
    "aten._native_batch_norm_legit_no_training.default",
)
ACTIVATIONS = ("aten.relu.default", "aten.leaky_relu.default")
POOLS = ("aten.max_pool2d.default", "aten.max_pool2d_with_indices.default")
STATISTICS = slice(3, 5)  # new running mean and variance among a batch norm's results

IN_INTERPRETER = False  # whether to fuse on a CPU too, where kernels run in Triton's interpreter: for tests


@dataclass(frozen=True, kw_only=True)
class Fused(Node):
    """A call that stands for several, with its operation."""

    op: TaskOp


def fuse(graph: Graph, nodes: Sequence[Node], device: torch.device) -> tuple[list[Node], dict[int, str]]:
    """Replace each convolution, with the batch norm, activation and pooling that alone read it, by one node.

    Args:
        graph: the traced objective.
        nodes: its calls in execution order.
        device: where the program will run: only a GPU has the kernels.

    Returns:
        The calls, and by a call's first result the reason why it is not fused.
    """
    if device.type != "cuda" and not (IN_INTERPRETER and triton_support.interpreted()):
        return list(nodes), {}
    blocks = _Blocks(graph, nodes)
    taken: dict[int, Node] = {}  # by the position of a block's last call
    dropped: set[int] = set()
    for i, node in enumerate(nodes):
        if str(node.call.target) in CONVOLUTIONS and i not in dropped:
            unmet = triton_support.missing_reason(device, node.call.outputs[0].dtype)
            run = _Run([i]) if unmet else blocks.run(i)
            if unmet or run.block is None:
                blocks.refusals.setdefault(node.outputs[0], unmet)
                continue
            dropped.update(run.positions)
            taken[run.positions[-1]] = run.block
    kept = [taken.get(i, node) for i, node in enumerate(nodes) if i in taken or i not in dropped]
    return kept, blocks.refusals


@dataclass
class _Run:
    """Calls that one block takes along, by their positions, and the block."""

    positions: list[int]
    block: Fused | None = None
    inputs: list[int] = field(default_factory=list)


class _Blocks:
    """Finds what can follow a convolution in its block."""

    def __init__(self, graph: Graph, nodes: Sequence[Node]) -> None:
        self._nodes = nodes
        self._buffers = set(graph.buffers.values())
        self._mutations = set(graph.mutations.values())
        self._reads = Counter(slot for node in nodes for slot in node.inputs)
        self._reads.update((graph.loss, *graph.outputs, *graph.mutations.values()))
        self._readers = {slot: i for i, node in enumerate(nodes) for slot in node.inputs}
        self.refusals: dict[int, str] = {}

    def run(self, start: int) -> _Run:
        """The longest block that starts with the convolution at ``start``."""
        node = self._nodes[start]
        run, parts = _Run([start], inputs=list(node.inputs)), Parts(node.call)
        self._take(run, parts, node, node.outputs[0], [])
        for kind, targets in (("norm", NORMS), ("activation", ACTIVATIONS), ("pool", POOLS)):
            slot = run.block.outputs[0] if run.block is not None else -1
            i = self._readers.get(slot, -1) if self._reads[slot] == 1 else -1
            if i < 0 or str(self._nodes[i].call.target) not in targets or self._nodes[i].inputs[0] != slot:
                continue
            follower = self._nodes[i]
            named: dict[str, Any] = {kind: follower.call}
            more = replace(parts, **named)
            statistics: list[int] = []
            if kind == "norm":
                statistics = self._statistics(follower)
                more = replace(more, updates=bool(statistics))
            if self._take(run, more, follower, follower.outputs[0], statistics, i):
                parts = more
        return run

    def _take(
        self, run: _Run, parts: Parts, node: Node, result: int, statistics: list[int], position: int | None = None
    ) -> bool:
        """Extend the block by ``node``, or note why not."""
        try:
            if position is not None:
                self._check(node, result, statistics)
            op = ConvBlock.of(parts)
        except Unsupported as reason:
            self.refusals[node.outputs[0]] = str(reason)
            return False
        if position is not None:
            run.positions.append(position)
            run.inputs += node.inputs[1:]
        earlier = () if run.block is None else run.block.outputs[1:]
        module = self._nodes[run.positions[0]].module
        run.block = Fused(op.call, tuple(run.inputs), (result, *statistics, *earlier), module, op=op)
        return True

    def _statistics(self, norm: Node) -> list[int]:
        """The new running statistics, if they are read."""
        slots = norm.outputs[STATISTICS]
        return list(slots) if any(self._reads[slot] for slot in slots) else []

    def _check(self, node: Node, result: int, statistics: list[int]) -> None:
        read = [slot for slot in node.outputs if self._reads[slot] and slot != result and slot not in statistics]
        if read or any(slot not in self._mutations or self._reads[slot] > 1 for slot in statistics):
            raise Unsupported(f"conv_block: results of {node.call.target} beside the first are read")
        running = [node.call.position(name) for name in ("running_mean", "running_var")]
        if any(p is not None and node.inputs[p] not in self._buffers for p in running):
            raise Unsupported("conv_block: running statistics that are not buffers")
