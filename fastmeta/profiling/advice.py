"""What to do about the entries of a profile that take longest."""

from __future__ import annotations

from collections.abc import Iterator

from fastmeta.core import rates
from fastmeta.engine import timeline
from fastmeta.engine.timed import ADJOINT
from fastmeta.profiling.report import REST, KindReport, Line, Report

TOP = 5  # operations of a kind of meta-step that something is said of
MOST = 8  # and of all kinds together
LEAST = 0.05  # share of the meta-step below which nothing is
NEAR = 0.5  # share of the floor from which on only less work is quicker


def advice(report: Report) -> list[str]:
    """Sentences, the whole program's first, then each kind's of meta-step, then the top operations'."""
    said = list(_of_the_program(report))
    kinds = [kind for kind in report.kinds if kind.whole >= LEAST * (report.working or 1.0)]
    for kind in kinds:
        said += _of_a_kind(kind, report)
    return list(dict.fromkeys([*said, *_of_operations(kinds, report)]))


def _of_operations(kinds: list[KindReport], report: Report) -> list[str]:
    """Of each operation once, where it takes longest; those that take longest first."""
    found: dict[str, tuple[float, str]] = {}
    for kind in kinds:
        for line in kind.lines[:TOP]:
            seconds = line.share * kind.whole
            if line.share >= LEAST and seconds > found.get(line.name, (0.0, ""))[0]:
                found[line.name] = seconds, _of_a_line(line, kind, report)
    return [sentence for _, sentence in sorted(found.values(), reverse=True)[:MOST]]


def _of_the_program(report: Report) -> Iterator[str]:
    where, working = report.where, report.working or 1.0
    share = {name: seconds / working for name, seconds in where.items()}
    if share[timeline.DATA] > 0.2:
        yield (
            f"data: {percent(share[timeline.DATA])} of the time lies between an outer step and the next meta-step: "
            "draw and move the next tasks while a meta-step runs, or keep the data where the model is"
        )
    if share[timeline.BETWEEN] > 0.2:
        yield (
            f"between meta-steps: {percent(share[timeline.BETWEEN])} of the time lies there, and no step of "
            "torch.optim was seen in it: the program's own update, sampling and logging are not told apart"
        )
    if share[timeline.OUTER_STEP] > 0.15:
        yield (
            f"outer step: {percent(share[timeline.OUTER_STEP])} of the time: give the optimizer foreach=True or "
            "fused=True"
        )
    yield from _of_preparation(report, working)


def _of_preparation(report: Report, working: float) -> Iterator[str]:
    """The first of each kind traces and plans; the others should find everything as it was."""
    kinds = len(report.kinds)
    spans = (span["seconds"] for span in report.data["spans"] if span["name"] == timeline.PREPARATION)
    seconds = sorted(spans, reverse=True)
    first, others = sum(seconds[:kinds]) / working, sum(seconds[kinds:]) / working
    if first > 0.1:
        yield (
            f"preparation: {percent(first)} of the time traced and planned {counted(kinds, 'kind', 'kinds')} of "
            "meta-step, once each: a longer run, or fewer shapes of tasks, pays it off"
        )
    if others > 0.1:
        yield (
            f"preparation: {percent(others)} of the time checked meta-steps like earlier ones: check_finite and "
            "update_running_stats look at each anew, and so do parameters chosen by a function; leave them out"
        )


def _of_a_kind(kind: KindReport, report: Report) -> Iterator[str]:
    what = "meta-steps" if kind.gradient else "evaluations"
    if kind.executor == "autodiff":
        yield f"{what} run task by task on plain autograd, because {kind.why}"
    elif kind.executor == "reference" and kind.why:
        yield f"{what} run on the task-batched executor, because {kind.why}"
    if kind.device == "cuda" and kind.executor == "reference":
        yield (
            f"{what} on the GPU were launched one by one, to time their operations; profile with operations=False "
            "(--whole) for how long they take when they are replayed"
        )
    cores = report.data["cores"]
    if kind.device == "cpu" and kind.threads < cores:
        yield f"{what} use {kind.threads} of {cores} cores: see torch.set_num_threads, OMP_NUM_THREADS, --threads"
    rest = kind.parts[REST] / kind.whole if kind.whole and kind.lines else 0.0
    if rest > 0.4:
        yield f"{what}: {percent(rest)} is in no operation: {_rest(kind)}"


def _rest(kind: KindReport) -> str:
    if kind.executor == "native":
        inside = kind.busy / kind.seconds if kind.seconds else 0.0
        if inside < 0.6:
            return f"{percent(1 - inside)} is Python around the call: more tasks in a meta-step share it"
        return (
            "threads wait for one another, or weights are packed and summed: more tasks than threads, or fewer threads"
        )
    return "inner steps, sums over tasks, and Python between operations: more tasks in a meta-step share it"


def _of_a_line(line: Line, kind: KindReport, report: Report) -> str:
    head = f"{line.name}, {percent(line.share)}:"
    least = line.floor_seconds / line.calls
    if line.plan == "generic":
        return (
            f"{head} it runs on the generic operation, which torch.func differentiates, because {line.reason}; "
            "write it by calls that an operation covers, or add one (CONTRIBUTING.md)"
        )
    if line.backend == "callback":
        return f"{head} Python is called back for each task, because {line.reason.removeprefix('called back: ')}"
    if kind.executor == "reference" and kind.device == "cpu" and least < rates.known().call_s:
        return (
            f"{head} the work of a call would take {1e6 * least:.1f} us at the machine's best, less than the call "
            "itself: more tasks at a time (a larger meta-batch, chunk_size) share it"
        )
    if line.floor_share >= NEAR:
        return (
            f"{head} it reaches {percent(line.floor_share)} of what the machine can do: only less work is quicker "
            "(fewer inner steps, first_order=True, a smaller layer)"
        )
    bound = "memory" if _by_memory(line, report, kind) else "products"
    said = f"{head} it reaches {percent(line.floor_share)} of its floor, which the speed of {bound} sets"
    back = line.parts[ADJOINT] / line.seconds
    if back > 0.2:
        said += f"; {percent(back)} of its time is the adjoint, which first_order=True leaves out for another gradient"
    return f"{said}; {line.reason}" if line.reason else said


def _by_memory(line: Line, report: Report, kind: KindReport) -> bool:
    return line.floor_seconds > 1.5 * line.flops / report.roof(kind).flops


def counted(number: int, one: str, many: str) -> str:
    """A number and what it counts."""
    return f"{number} {one if number == 1 else many}"


def percent(share: float) -> str:
    """A share, rounded."""
    return "< 1 %" if 0 < share < 0.01 else f"{100 * share:.0f} %"
