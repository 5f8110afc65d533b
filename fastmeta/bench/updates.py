"""The kernels of inner rules on packed parameters: a step and its adjoint, by every backend."""

from __future__ import annotations

import functools
import importlib
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fastmeta.bench import gpu_timing
from fastmeta.bench.pieces import as_double, error
from fastmeta.bench.timing import Effort, interleave
from fastmeta.engine import cost
from fastmeta.ops.adaptive_update.form import Coefficients, Form, State

BOUND = 1e-5  # of the relative error in float32
COLD, MOST = 64 << 20, 64  # bytes of all copies of the operands, and how many there may be
# Adam's first step: betas 0.9 and 0.999, bias corrected.
ADAM = Coefficients(keep_first=0.9, take_first=0.1, keep_second=0.999, take_second=1e-3, of_first=10.0, of_second=1e3)
Arguments = dict[str, tuple[Any, ...]]


def measure(tasks: int, size: int, effort: Effort, device: str) -> list[dict[str, Any]]:
    """Microseconds of calls, and what a row says beside, for ``tasks`` rows of ``size`` packed parameters."""
    made = []
    for op, arguments in _arguments(tasks, size, device).items():
        table = importlib.import_module(f"fastmeta.ops.{op}.op").backends(torch.device(device), torch.float32)
        names = [backend.name for backend in table if backend.available]
        modules = {name: importlib.import_module(f"fastmeta.ops.{op}.{name}") for name in names}
        for step, given in arguments.items():
            copies = _in_turn(given, device)
            calls = {name: _bound(getattr(module, step), copies) for name, module in modules.items()}
            truth = getattr(modules["reference"], step)(*as_double(given))
            errors = {name: error(call(), truth) for name, call in calls.items()}
            for name, times in _timed(calls, effort, device).items():
                moved = 4 * size * cost.UPDATES[op][step]
                row = {"op": op, "map": step, "backend": name, "times": [us / tasks for us in times], "of": "map"}
                made.append(row | {"error": errors[name], "bound": BOUND, "flops": 0, "bytes": moved})
    return made


def _arguments(tasks: int, size: int, device: str) -> dict[str, Arguments]:
    """Of each map of each operation, by position."""
    draw = torch.Generator(device).manual_seed(0)
    a, b, c, d, e = (torch.randn(tasks, size, device=device, generator=draw) for _ in range(5))
    rate = torch.full((), 0.01, device=device)
    before, after = State(first=c, second=d * d), State(first=e, second=c)
    form = Form.AVERAGED
    return {
        "inner_update": {"step": (a, b, rate), "adjoint": (a, b, rate, None, False)},
        "adaptive_update": {
            "step": (form, a, b, before, ADAM._replace(eps=1e-3), rate),
            "adjoint": (form, a, after, None, b, before, ADAM._replace(eps=1e-3), rate, None, False),
        },
    }


def _in_turn(arguments: tuple[Any, ...], device: str) -> list[tuple[Any, ...]]:
    """Copies of the operands, together more than caches hold where they are large: a step's are new to the cache.

    On a GPU there is one, which a graph replays.
    """
    size = sum(x.nbytes for x in pytree.tree_leaves(arguments) if isinstance(x, Tensor))
    count = 1 if device == "cuda" else max(1, min(MOST, COLD // size))
    clone = functools.partial(pytree.tree_map, lambda x: x.clone() if isinstance(x, Tensor) else x)
    return [arguments, *(clone(arguments) for _ in range(count - 1))]


def _bound(call: Callable[..., Any], arguments: list[tuple[Any, ...]]) -> Callable[[], Any]:
    turns = itertools.cycle(arguments)
    return lambda: call(*next(turns))


def _timed(calls: dict[str, Callable[[], Any]], effort: Effort, device: str) -> dict[str, list[float]]:
    """Microseconds of calls."""
    if device == "cuda":
        replayed = {name: gpu_timing.graphed(call) for name, call in calls.items()}
        found = gpu_timing.interleaved(replayed, effort.rounds, 1e3 * effort.slot_s or 1.0)
        return {name: [1e3 * ms for ms in (t.low, t.median, t.high)] for name, t in found.items()}
    with torch.no_grad():
        timed = interleave(calls, effort)
    return {name: [1e6 * s for s in times.seconds] for name, times in timed.items()}
