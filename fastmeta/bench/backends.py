"""The operations of a meta-step on each backend that is present: recorded, judged, and timed in turns."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from fastmeta.algorithms.maml import MAML
from fastmeta.bench import gpu_timing
from fastmeta.bench.networks import Network, built
from fastmeta.bench.pieces import Calls, Piece, as_double, error, pieces, recorded
from fastmeta.bench.timing import Effort, interleave
from fastmeta.core.live_bytes import LiveBytes
from fastmeta.core.rounding import nudged
from fastmeta.core.triton_support import without
from fastmeta.engine import cost
from fastmeta.engine.native import NativeStep
from fastmeta.engine.profile import Profile, collect
from fastmeta.engine.program import Program
from fastmeta.tasks import TaskBatch

STEPS = 2  # inner steps: at the second each task has weights of its own
FACTOR = 2.0  # the project's law: at most twice the float32 error that plain float32 has on the same work
NUDGES, ULPS = 3, 1  # copies with weights moved in their last place, whose error is float32's too
OF_A_MAP = 1e-5  # relative error of one map in float32 on operands it is given; what is wrong is far above
REFERENCE = "reference"

Gradients = dict[str, Tensor]


@dataclass
class Run:
    """One backend.

    Attributes:
        name: of the backend.
        pieces: its operations, and what they are called with.
        whole: error of the meta-gradient and its bound, where that is what is judged; ``None`` where each map is.
        errors: of each map by piece and name.
        times: microseconds a task, likewise.
        allocated: bytes a task, likewise.
    """

    name: str
    pieces: list[Piece]
    whole: tuple[float, float] | None = None
    errors: dict[tuple[int, str], float] = field(default_factory=dict)
    times: dict[tuple[int, str], list[float]] = field(default_factory=dict)
    allocated: dict[tuple[int, str], float] = field(default_factory=dict)

    def error_of(self, number: int, name: str) -> tuple[float, str]:
        """The error of a piece's map, and of what it is."""
        return (self.errors[number, name], "map") if self.whole is None else (self.whole[0], "meta-gradient")

    def bound_of(self, of: str) -> float:
        """What that error may be."""
        return OF_A_MAP if self.whole is None or of == "map" else self.whole[1]

    def name_of(self, number: int) -> str:
        """The backend of a piece: on a GPU some operations have no kernels of their own."""
        return self.name if self.name != "triton" else self.pieces[number].calls["forward"][0][0].op.backend


@dataclass(frozen=True)
class _Setting:
    """What every learner of this measurement has in common."""

    network: Network
    model: nn.Module
    loss: Any
    tasks: TaskBatch

    def learner(self, model: nn.Module | None = None, **options: Any) -> MAML:
        return MAML(self.model if model is None else model, self.loss, self.network.lr, STEPS, plan="dense", **options)

    def gradients(self, tasks: TaskBatch | None = None, model: nn.Module | None = None, **options: Any) -> Gradients:
        torch.manual_seed(0)  # dropout draws the same for all
        return self.learner(model, **options).value_and_grad(self.tasks if tasks is None else tasks)[1]


def backends(network: Network, effort: Effort, device: str) -> list[Run]:
    """Measure the reference, and beside it the native executor on a CPU, or Triton's kernels on a GPU.

    On a CPU the reference's calls are made one after another as in a meta-step, each timed by itself, in turns with
    whole meta-steps of the native executor, of which its own profile says what each operation took
    (:mod:`fastmeta.engine.profile`). On a GPU each call is a graph, replayed.

    Raises:
        RuntimeError: ``device`` is ``cuda``, and no GPU is visible.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("bench: device 'cuda' must be there, but no GPU is visible")
    model, loss, tasks = built(network)
    setting = _Setting(network, model.to(device), loss, tasks.to(device=device))
    with without():
        program, calls = _record(setting.learner(executor="reference", cuda_graph=False), setting.tasks)
    native = _native(setting) if device == "cpu" else None
    single = [(i, instruction.op.name) for i, instruction in enumerate(program.instructions)]
    if native is not None:
        starts = _starts(native, program) or single
        runs = [Run(REFERENCE, pieces(program, calls, starts)), Run("native", pieces(program, calls, starts))]
        native.close(starts)
    else:
        runs = [Run(REFERENCE, pieces(program, calls, single))]
    if device == "cuda":
        fused = _record(setting.learner(cuda_graph=False), setting.tasks)
        runs[0] = Run(REFERENCE, pieces(program, calls, _fused_starts(fused[0], program)))
        ops = [(i, instruction.op.name) for i, instruction in enumerate(fused[0].instructions)]
        runs.append(Run("triton", pieces(*fused, ops)))
    _judge(setting, runs)
    _time(runs, effort, native, device)
    return runs


def _record(maml: MAML, tasks: TaskBatch) -> tuple[Program, Calls]:
    """The support program of a learner, and what a meta-step calls its maps with."""
    _, programs = maml.prepare(tasks)
    if programs is None:
        raise RuntimeError("bench: the network must be traceable, got one that only autodiff runs")
    with recorded(programs.support) as calls:
        maml.value_and_grad(tasks)
    return programs.support, calls


class _Native:
    """Meta-steps of the native executor, and what each of its operations took in them."""

    def __init__(self, maml: MAML, tasks: TaskBatch, step: NativeStep) -> None:
        self.step, self.maml, self.tasks = step, maml, tasks
        self.groups: list[range] = []  # of its operations, those of each piece
        self.samples: list[dict[tuple[int, str], float]] = []

    def close(self, starts: list[tuple[int, str]]) -> None:
        """Say which of its operations belong to each piece: those from one start to the next."""
        firsts = [i for i, operands in enumerate(self.step.operands) if operands.instruction is not None]
        bounds = [0, *firsts[1:], len(self.step.operands)] if firsts else []
        self.groups = [range(a, b) for a, b in pairwise(bounds)][: len(starts)]

    def __call__(self) -> None:
        with collect() as profile:
            self.maml.value_and_grad(self.tasks)
        self.samples.append(self._microseconds(profile))

    def _microseconds(self, profile: Profile) -> dict[tuple[int, str], float]:
        """Of one task, with all threads at work, by piece and map."""
        threads, number = torch.get_num_threads(), -1
        taken: dict[tuple[int, str], float] = {}
        for record in profile.records:
            if record.phase != "support":
                break
            number += record.map == "forward"  # every operation has one, and it comes first
            piece = next(i for i, group in enumerate(self.groups) if number in group)
            key = piece, record.map
            taken[key] = taken.get(key, 0.0) + 1e6 * record.seconds / record.calls / threads
        return taken


class _Sweeps:
    """Calls of the reference in a meta-step's order: forward, backward, and the adjoint's tangent and its backward.

    Each is made once a sweep and timed by itself. So between two calls with the same operands lie those of all others,
    as in a meta-step: they are in a cache as far as its own would still be.
    """

    def __init__(self, pieces: Sequence[Piece]) -> None:
        self.samples: list[dict[tuple[int, str], float]] = []
        self._calls: list[tuple[tuple[int, str], Callable[[], Any], int]] = []
        for name in cost.MAPS:
            numbers = [number for number, piece in enumerate(pieces) if name in piece.calls]
            for number in numbers if name in ("forward", "tangent") else reversed(numbers):
                self._calls.append(((number, name), pieces[number].run(name), pieces[number].tasks))

    def __call__(self) -> None:
        taken = {}
        for place, call, tasks in self._calls:
            begin = time.perf_counter()
            call()
            taken[place] = 1e6 * (time.perf_counter() - begin) / tasks
        self.samples.append(taken)


def _native(setting: _Setting) -> _Native | None:
    """``None`` where the native executor cannot run the network."""
    maml = setting.learner()
    _, programs = maml.prepare(setting.tasks)
    if programs is None or not isinstance(programs.native, NativeStep):
        return None
    return _Native(maml, setting.tasks, programs.native)


def _starts(native: _Native, program: Program) -> list[tuple[int, str]]:
    """Where the pieces begin that the native operations stand for; nothing where they do not follow each other."""
    maml = native.maml
    _, programs = maml.prepare(native.tasks)
    if programs is None or len(programs.support.instructions) != len(program.instructions):
        return []
    places = {id(instruction): i for i, instruction in enumerate(programs.support.instructions)}
    found = [(places[id(o.instruction)], o.operation) for o in native.step.operands if o.instruction is not None]
    positions = [position for position, _ in found]
    if positions != sorted(set(positions)):
        return []
    return [(0, found[0][1]), *found[1:]]


def _fused_starts(fused: Program, program: Program) -> list[tuple[int, str]]:
    """The same for operations that end where calls of ``program`` end: slots are numbered alike."""
    places = {slot: i for i, instruction in enumerate(program.instructions) for slot in instruction.outputs}
    starts, begin = [], 0
    for instruction in fused.instructions:
        starts.append((begin, instruction.op.name))
        begin = places[instruction.outputs[0]] + 1
    return starts


def _judge(setting: _Setting, runs: list[Run]) -> None:
    """Errors against float64: of the reference map by map, of others by the meta-gradient against autodiff's."""
    plain = runs[0]
    double = setting.learner(copy.deepcopy(setting.model).double(), executor="reference", cuda_graph=False)
    exact, _ = _record(double, setting.tasks.to(dtype=torch.float64))
    twins = iter(exact.instructions)
    for number, piece in enumerate(plain.pieces):
        ops = {id(instruction): next(twins).op for instruction, _ in piece.calls["forward"]}
        for name, calls in piece.calls.items():
            torch.manual_seed(0)
            found = piece.run(name)()
            torch.manual_seed(0)
            exactly = [getattr(ops[id(i)], name)(*as_double(arguments)) for i, arguments in calls]
            plain.errors[number, name] = max(map(error, found, exactly))
            with LiveBytes() as live:
                piece.run(name)()
            plain.allocated[number, name] = live.peak / piece.tasks
    if len(runs) == 1:
        return
    truth = setting.gradients(
        setting.tasks.to(dtype=torch.float64), copy.deepcopy(setting.model).double(), engine="autodiff"
    )
    copies = [setting.model, *(nudged(setting.model, seed, ulps=ULPS) for seed in range(NUDGES))]
    with without():
        float32 = max(_off(setting.gradients(model=m, executor="reference", cuda_graph=False), truth) for m in copies)
    for run in runs[1:]:
        run.whole = _off(setting.gradients(cuda_graph=False), truth), FACTOR * float32


def _off(gradients: Gradients, truth: Gradients) -> float:
    """Relative error of all gradients as one vector."""
    return error([gradients[name] for name in truth], list(truth.values()))


def _time(runs: list[Run], effort: Effort, native: _Native | None, device: str) -> None:
    if device == "cuda":
        _time_replays(runs, effort)
        return
    sources: list[_Sweeps | _Native] = [_Sweeps(runs[0].pieces), *([native] if native is not None else [])]
    for source in sources:
        source()  # compiled and packed
        source.samples.clear()
    with torch.no_grad():
        interleave({run.name: source for run, source in zip(runs, sources, strict=True)}, effort)
    for run, source in zip(runs, sources, strict=True):
        for sample in source.samples:
            for place, us in sample.items():
                run.times.setdefault(place, []).append(us)


def _time_replays(runs: list[Run], effort: Effort) -> None:
    places = {
        f"{run.name} {number} {name}": (run, number, name)
        for run in runs
        for number, piece in enumerate(run.pieces)
        for name in piece.calls
    }
    replayed = {key: gpu_timing.graphed(run.pieces[number].run(name)) for key, (run, number, name) in places.items()}
    for key, timed in gpu_timing.interleaved(replayed, effort.rounds, 1e3 * effort.slot_s or 1.0).items():
        run, number, name = places[key]
        tasks = run.pieces[number].tasks
        run.times[number, name] = [1e3 * ms / tasks for ms in (timed.low, timed.median, timed.high)]
