"""A meta-step on a GPU as one CUDA graph: captured once for each kind of meta-step, then replayed with other values.

A meta-step is hundreds of small kernels, each of which takes longer to launch than to run; a graph launches all of them
at once. The first meta-step of a kind runs eagerly, which also prepares libraries and compiles kernels; the second is
captured. Tasks, buffers, rates and cotangents are copied into memory of the graph's own before each replay, parameters
are read where they lie, and results are copied out, so that nothing a caller holds is ever written.
"""

from __future__ import annotations

import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fastmeta.engine.evaluation import Cotangents, Evaluation
from fastmeta.engine.work import Work, leaves

MOST = 8  # kinds of meta-step whose graphs are kept: shapes of training and evaluation, numbers of steps
MOVES = 3  # captures of one kind, after which parameters that lie elsewhere every time are no longer followed

Execute = Callable[[Work, Cotangents | None], Evaluation]


@dataclass
class _Kind:
    """Meta-steps that differ in values only.

    Attributes:
        captures: how many times it has been captured.
        parameters: addresses of the parameters that the graph reads.
        inputs: what is copied in before a replay, in :func:`_inputs`' order.
        graph: once it is captured.
        results: what the graph writes.
        alone: how many of them, the first, are given memory of their own when they are copied.
        together: makes an evaluation of tensors like these.
        reason: why it runs eagerly for good.
    """

    captures: int = 0
    parameters: list[int] = field(default_factory=list)
    inputs: list[Tensor] = field(default_factory=list)
    graph: torch.cuda.CUDAGraph | None = None
    results: list[Tensor] = field(default_factory=list)
    alone: int = 0
    together: Callable[[Iterable[Tensor]], Evaluation] | None = None
    reason: str = ""


class Captures:
    """The graphs of one learner. They share their memory, so one replays at a time, whatever stream it is called on."""

    def __init__(self) -> None:
        self._kinds: OrderedDict[Hashable, _Kind] = OrderedDict()
        self._lock = threading.Lock()
        self._done: dict[torch.device, torch.cuda.Event] = {}

    def clear(self) -> None:
        """Forget every graph."""
        with self._lock:
            self._kinds.clear()
            self._done.clear()

    def run(self, kind: Hashable, work: Work, cotangents: Cotangents | None, execute: Execute) -> Evaluation:
        """``execute(work, cotangents)``, by a graph from the second time on.

        Args:
            kind: all that the computation depends on beside what ``work`` and ``cotangents`` hold.
            work: the meta-step; :func:`objection` has none.
            cotangents: of the objective.
            execute: computes it eagerly, without waiting for the device.
        """
        short = Captures, kind, _given(cotangents), *_settings()
        inputs = _inputs(work, cotangents)
        with self._lock, torch.cuda.device(work.alpha.device):
            known: _Kind | None = work.memory.get(short)
            if known is None:
                known = self._known((kind, _signature(work, cotangents)))
                if known is None:
                    return execute(work, cotangents)
                work.memory[short] = known
            addresses = [p.data_ptr() for p in work.parameters.values()]
            if known.graph is None or known.parameters != addresses:
                self._capture(known, work, cotangents, inputs, addresses, execute)
            return execute(work, cotangents) if known.reason else self._replay(known, inputs)

    def _known(self, key: Hashable) -> _Kind | None:
        """What has come before, or ``None`` the first time."""
        known = self._kinds.get(key)
        if known is None:
            self._kinds[key] = _Kind()
            while len(self._kinds) > MOST:
                self._kinds.popitem(last=False)
            return None
        self._kinds.move_to_end(key)
        return known

    def reason(self, kind: Hashable, work: Work, cotangents: Cotangents | None) -> str:
        """Why meta-steps like this one are no longer captured; empty where they are, or will be."""
        known = self._kinds.get((kind, _signature(work, cotangents)))
        return "" if known is None else known.reason

    def _capture(
        self,
        kind: _Kind,
        work: Work,
        cotangents: Cotangents | None,
        inputs: list[Tensor],
        addresses: list[int],
        execute: Execute,
    ) -> None:
        if kind.reason:
            return
        kind.graph, kind.results, kind.together = None, [], None
        if kind.captures == MOVES:
            _give_up(kind, "the parameters lie elsewhere in memory at every meta-step")
            return
        kind.captures += 1
        device = work.alpha.device
        kind.inputs = [torch.empty_like(x, memory_format=torch.contiguous_format).copy_(x) for x in inputs]
        work, cotangents = _on(work, cotangents, kind.inputs)
        pool = self._pool(device)
        graph = torch.cuda.CUDAGraph()
        try:
            # other threads may allocate memory meanwhile: that is no part of the graph, and no error
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                result = execute(work, cotangents)
        except RuntimeError as error:
            torch.cuda.synchronize(device)
            with torch.cuda.graph(torch.cuda.CUDAGraph()):  # the generator believes in a capture until one succeeds
                torch.zeros((), device=device)
            _give_up(kind, f"it cannot be captured: {str(error).splitlines()[0]}")
            return
        kind.results, kind.together = result.apart()
        kind.alone = 3 + len(result.outputs)  # losses and outputs: callers may write into what autograd knows
        kind.graph, kind.parameters = graph, addresses

    def _pool(self, device: torch.device) -> Any:
        """The memory of the graphs that there are; a new one where none is: PyTorch shares none that no graph uses."""
        for kind in self._kinds.values():
            if kind.graph is not None and kind.results[0].device == device:
                return kind.graph.pool()
        return torch.cuda.graph_pool_handle()

    def _replay(self, kind: _Kind, inputs: list[Tensor]) -> Evaluation:
        graph, together = kind.graph, kind.together
        if graph is None or together is None:
            raise RuntimeError("capture: a kind of meta-step must have a graph to be replayed, got none")
        device = kind.results[0].device
        stream = torch.cuda.current_stream(device)
        done = self._done.get(device)
        if done is None:
            done = self._done[device] = torch.cuda.Event()
        else:
            stream.wait_event(done)
        for group in _by_dtype(kind.inputs, inputs):
            torch._foreach_copy_(*group)
        graph.replay()
        copies = _copies(kind.results, kind.alone)
        done.record(stream)
        return together(copies)


def _give_up(kind: _Kind, reason: str) -> None:
    """Let meta-steps of a kind run eagerly for good, and say so: they are several times slower."""
    kind.reason = reason
    warnings.warn(
        f"fastmeta: a meta-step is not captured in a CUDA graph and runs eagerly from now on, because {reason}; "
        "cuda_graph=False asks for that",
        stacklevel=2,
    )


def objection(work: Work) -> str:
    """Why a meta-step on a GPU cannot be captured; empty where it can."""
    if not work.cuda_graph:
        return "it was asked not to be"
    if work.check_finite:
        return "check_finite looks at every loss"
    if work.query_weights is not None or work.stepwise:
        return "the query loss or the parameters are others at every step"
    if torch.cuda.is_current_stream_capturing():
        return "the caller captures a graph"
    return ""


def _signature(work: Work, cotangents: Cotangents | None) -> Hashable:
    """What a graph depends on of these, and of PyTorch's settings."""
    sets = [*pytree.tree_leaves(work.support), *pytree.tree_leaves(work.query)]
    return (
        tuple((x.shape, x.dtype) for x in sets),
        work.alpha.shape,
        work.rate_shapes,
        work.rule,
        work.clip_norm,
        work.stop,
        work.implicit,
        work.alpha.device,
        work.steps,
        work.first_order,
        work.keep_mutations,
        _given(cotangents),
        *_settings(),
    )


def _given(cotangents: Cotangents | None) -> Hashable:
    """Which cotangents there are."""
    return None if cotangents is None else (cotangents.losses is None, *(d is None for d in cotangents.outputs))


def _settings() -> tuple[str, bool]:
    """What a user has asked PyTorch for that changes the results."""
    return torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32


def _inputs(work: Work, cotangents: Cotangents | None) -> list[Tensor]:
    """The tensors that differ from one meta-step of a kind to the next."""
    given = () if cotangents is None else (cotangents.losses, *cotangents.outputs)
    everything = (
        *leaves(work.support),
        *leaves(work.query),
        *work.buffers.values(),
        work.alpha.detach(),
        None if work.hyper is None else work.hyper.detach(),
        *given,
    )
    return [x for x in everything if isinstance(x, Tensor)]


def _on(work: Work, cotangents: Cotangents | None, inputs: list[Tensor]) -> tuple[Work, Cotangents | None]:
    """The meta-step on other tensors, in the order of :func:`_inputs`."""
    given = iter(inputs)

    def other(tree: Any) -> Any:
        return pytree.tree_map(lambda x: next(given) if isinstance(x, Tensor) else x, tree)

    support, query = other(work.support), other(work.query)
    buffers = {name: next(given) for name in work.buffers}
    moved = replace(work, support=support, query=query, buffers=buffers, alpha=next(given))
    moved.hyper = other(work.hyper)
    if cotangents is None:
        return moved, None
    losses = other(cotangents.losses)
    return moved, Cotangents(losses, other(list(cotangents.outputs)))


def _by_dtype(first: list[Tensor], second: list[Tensor]) -> list[tuple[list[Tensor], list[Tensor]]]:
    """Pairs of both lists, grouped so that one launch copies many."""
    groups: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
    for a, b in zip(first, second, strict=True):
        pair = groups.setdefault(a.dtype, ([], []))
        pair[0].append(a)
        pair[1].append(b)
    return list(groups.values())


def _copies(tensors: list[Tensor], alone: int) -> list[Tensor]:
    """A copy of each, in few launches; those after the first ``alone`` share memory by dtype."""
    copies = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in tensors[:alone]]
    rest = tensors[alone:]
    if rest:
        alike = [x.dtype == rest[0].dtype for x in rest]
        sizes = [x.numel() for x, same in zip(rest, alike, strict=True) if same]
        pieces = iter(rest[0].new_empty(sum(sizes)).split(sizes))
        copies += [
            next(pieces).view(x.shape) if same else torch.empty_like(x) for x, same in zip(rest, alike, strict=True)
        ]
    for group in _by_dtype(copies, tensors):
        torch._foreach_copy_(*group)
    return copies
