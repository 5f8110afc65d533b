"""What a profile says: floors by hand, advice with its reason, tables, pictures and files."""

from __future__ import annotations

import copy
import io
import json
from functools import cache
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from matplotlib.text import Annotation
from rich.console import Console
from torch import Tensor, nn

import fastmeta as fm
from fastmeta.core import native
from fastmeta.engine import timeline
from fastmeta.engine.floor import copy_rate_of, peaks
from fastmeta.profiling.advice import advice
from fastmeta.profiling.picture import drawn
from fastmeta.profiling.report import Report, report_of
from fastmeta.profiling.tables import show
from tests.profiling.hand import clock, machine


def operation(**more: Any) -> dict[str, Any]:
    one = {"part": "inner loop", "map": "forward", "calls": 2, "seconds": 1.0, "flops": 0, "bytes": 0, "sharing": 1}
    said = {"operation": "linear", "module": "layer4", "call": "linear", "plan": "dense", "backend": "reference"}
    return {**said, "reason": "", "maps": [{**one, **m} for m in more.pop("maps", [{}])], **more}


def data(*operations: dict[str, Any], **more: Any) -> dict[str, Any]:
    kind = {"executor": "reference", "why": "", "gradient": True, "device": "cuda", "dtype": "float32", "steps": 3}
    kind |= {"first_order": False, "samples": [4, 5], "threads": 2, "count": 10, "tasks": 40, "seconds": 8.0}
    kind |= {"busy": 6.0, "device_seconds": 8.0, "flops": 0, "operations": list(operations)}
    where = {**dict.fromkeys(timeline.NAMES, 0.0), "start": 5.0, "meta-step": 8.0, **more.pop("where", {})}
    run = {"kind": 0, "begin": 0.0, "seconds": 0.8, "busy": 0.6, "resident": 3 << 20, "allocated": 0, "peak": 0}
    found = {"machine": "hand", "cores": 2, "process": 1, "seconds": sum(where.values()), "where": where, "count": 10}
    found |= {"resident_at_first": 1 << 20, "runs": [run] * 2, "spans": [], "utilisation": []}
    return {**found, "kinds": [{**kind, **more}]}


def report(*operations: dict[str, Any], **more: Any) -> Report:
    return report_of(data(*operations, **more), machine)


def printed(of: Report) -> str:
    text = io.StringIO()
    show(of, Console(file=text, width=160))
    return text.getvalue()


def test_floors_are_those_of_each_map() -> None:
    by_products = {"flops": 10**9, "bytes": 10**7, "seconds": 2.0}
    by_bytes = {"flops": 10**8, "bytes": 10**8, "seconds": 4.0, "part": "adjoint", "map": "tangent"}
    (kind,) = report(operation(maps=[by_products, by_bytes])).kinds
    (line,) = kind.lines
    assert line.floor_seconds == 1.0 + 1.0  # 1e9 / 1e9, and 1e8 / 1e8
    assert line.floor_share == pytest.approx(2.0 / 6.0)
    assert (line.seconds, line.share, line.calls) == (6.0, 0.75, 4)
    assert line.flops_rate == pytest.approx(1.1e9 / 6)
    assert line.bytes_rate == pytest.approx(1.1e8 / 6)
    assert line.parts == {"inner loop": 2.0, "query": 0.0, "adjoint": 4.0}
    assert kind.parts["steps, sums, Python"] == 2.0
    assert kind.tasks_per_s == 5.0


def test_rates_are_over_the_time_from_the_first_meta_step_to_the_last() -> None:
    found = report(operation(), where={"data": 2.0, "end": 100.0})
    assert found.working == 10.0
    assert (found.tasks_per_s, found.samples_per_s) == (4.0, 36.0)
    assert found.to_json()["samples_per_s"] == 36.0


@pytest.mark.parametrize(
    ("said", "more"),
    [
        (
            "layer4 (linear), 12 %: it runs on the generic operation",
            {"plan": "generic", "reason": "no operation covers x"},
        ),
        ("because no operation covers x", {"plan": "generic", "reason": "no operation covers x"}),
        (
            "Python is called back for each task, because it is odd",
            {"backend": "callback", "reason": "called back: it is odd"},
        ),
        ("reaches 80 % of what the machine can do", {"maps": [{"flops": 8 * 10**8, "bytes": 1}]}),
        ("reaches 10 % of its floor, which the speed of products sets", {"maps": [{"flops": 10**8, "bytes": 1}]}),
        ("reaches 20 % of its floor, which the speed of memory sets", {"maps": [{"flops": 10**8, "bytes": 2 * 10**7}]}),
        ("100 % of its time is the adjoint", {"maps": [{"flops": 10**8, "bytes": 1, "part": "adjoint"}]}),
        ("each task has rows", {"maps": [{"flops": 10**8, "bytes": 1}], "reason": "each task has rows"}),
    ],
)
def test_what_to_do_about_an_operation(said: str, more: dict[str, Any]) -> None:
    assert any(said in line for line in advice(report(operation(**more))))
    assert not any(
        "layer4" in line
        for line in advice(
            report(operation(**more), operation(module="", maps=[{}] * 6), seconds=200.0, device_seconds=0.0)
        )
    )


@pytest.mark.parametrize(
    ("said", "more"),
    [
        ("run on the task-batched executor, because clipped", {"why": "clipped"}),
        ("run task by task on plain autograd, because it branches", {"executor": "autodiff", "why": "it branches"}),
        ("launched one by one", {}),
        ("uses 1 of 2 cores", {"device": "cpu", "threads": 1, "operations": []}),
        ("data: 50 % of the time", {"where": {"data": 8.0}}),
        ("outer step: 50 % of the time", {"where": {"outer step": 8.0}}),
        ("no step of torch.optim was seen", {"where": {"between meta-steps": 8.0}}),
        ("is in no operation", {}),
    ],
)
def test_what_to_do_about_the_rest(said: str, more: dict[str, Any]) -> None:
    found = data(operation(), **more)
    said = said.replace("uses", "use")
    assert any(said in line for line in advice(report_of(found, machine)))
    quiet = data(operation(maps=[{"seconds": 7.0}]), device="cuda", executor="native", why="", threads=2)
    assert not any(said in line for line in advice(report_of(quiet, machine)))


def test_an_operation_is_spoken_of_once_where_it_takes_longest() -> None:
    found = data(operation(), operation(module="layer5"))
    (kind,) = found["kinds"]
    shorter = copy.deepcopy(kind) | {"gradient": False}
    for one in shorter["operations"]:
        one["maps"] = [m | {"seconds": 0.5 * m["seconds"]} for m in one["maps"]]
    found["kinds"] = [shorter, kind]
    said = [line for line in advice(report_of(found, machine)) if line.startswith(("layer4", "layer5"))]
    assert len(said) == 2
    alone = data(operation(), operation(module="layer5"))
    assert said == [line for line in advice(report_of(alone, machine)) if line.startswith(("layer4", "layer5"))]


def test_tracing_once_and_checking_again_are_told_apart() -> None:
    def spans(*seconds: float) -> list[dict[str, Any]]:
        return [{"name": "preparation", "begin": 0.0, "seconds": s} for s in seconds]

    once, again = data(operation(), where={"preparation": 8.0}), data(operation(), where={"preparation": 8.0})
    once["spans"], again["spans"] = spans(7.9, 0.05, 0.05), spans(*[0.4] * 20)
    first, second = (" ".join(advice(report_of(found, machine))) for found in (once, again))
    assert "traced and planned 1 kind of meta-step" in first
    assert "checked meta-steps like earlier ones" not in first
    assert "checked meta-steps like earlier ones" in second
    assert "traced and planned" not in second


class Cubed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.special.expit(x) * torch.erfinv(0.5 * torch.tanh(x))  # no operation covers erfinv


@cache
def ran(executor: Literal["native", "reference"] = "reference") -> fm.profile:
    model = nn.Sequential(nn.Linear(4, 9), nn.Tanh(), nn.Linear(9, 7), Cubed(), nn.Linear(7, 3))
    maml = fm.MAML(model, F.cross_entropy, steps=2, executor=executor)
    tasks = fm.TaskBatch(*[(torch.randn(6, n, 4), torch.randint(3, (6, n))) for n in (4, 5)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timeline.time, "perf_counter", clock())
        with fm.profile() as prof:
            for _ in range(2):
                maml(tasks).loss.backward()
    prof._report = report_of(prof.data, machine)
    return prof


def test_a_generic_operation_is_named_with_its_reason() -> None:
    (kind,) = ran().report.kinds
    (line,) = [line for line in kind.lines if "erfinv" in line.operation]
    assert (line.plan, line.operation) == ("generic", "generic erfinv")
    assert "no operation covers aten.erfinv.default" in line.reason
    assert {(line.module, line.plan) for line in kind.lines if line.operation == "linear"} == {
        *(("0", "dense"), ("2", "dense"), ("4", "dense"))
    }
    shown = printed(ran().report)
    assert "generic erfinv" in shown
    assert "2 meta-steps on the reference executor (cpu, float32" in shown
    assert "because the reference executor was asked for" in shown


@pytest.mark.skipif(native.extension() is None, reason=f"no extension: {native.missing_reason()}")
def test_what_is_called_back_for_as_one_has_all_its_names_and_its_reason() -> None:
    (kind,) = ran("native").report.kinds
    (line,) = [line for line in kind.lines if line.backend == "callback"]
    assert (line.operation, line.plan) == ("callback erfinv, mul", "resident")
    assert line.reason == "called back: generic (aten.erfinv.default) has no native kernel of its own"


def test_files(tmp_path: Path) -> None:
    prof = ran()
    prof.save(tmp_path / "deep" / "p.json")
    found = json.loads((tmp_path / "deep" / "p.json").read_text())
    assert found["count"] == 2
    assert sum(found["where"].values()) == pytest.approx(found["seconds"])
    assert found["kinds"][0]["lines"][0]["floor_share"] > 0
    assert found["roofs"][0]["flops"] == 1e9
    prof.picture(tmp_path / "p.svg")
    assert "<svg" in (tmp_path / "p.svg").read_text()
    with pytest.raises(ValueError, match=r"must end in \.png or \.svg, got .*p\.pdf"):
        prof.picture(tmp_path / "p.pdf")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["deep", "p.svg"]


def test_a_trace_has_the_spans_and_the_operations(tmp_path: Path) -> None:
    maml = fm.MAML(nn.Linear(4, 3), F.cross_entropy, steps=1, executor="reference")
    tasks = fm.TaskBatch(*[(torch.randn(2, n, 4), torch.randint(3, (2, n))) for n in (4, 5)])
    with fm.profile(trace=tmp_path / "t.json", trace_steps=2):
        for _ in range(5):
            maml.value_and_grad(tasks)
    names = [event.get("name") for event in json.loads((tmp_path / "t.json").read_text())["traceEvents"]]
    assert names.count("fastmeta: meta-step") == 2
    assert names.count("fastmeta: linear linear tangent_backward") == 2
    assert [p.name for p in tmp_path.iterdir()] == ["t.json"]


def test_labels_of_the_picture_do_not_overlap() -> None:
    near = [operation(module=f"layer{i}", maps=[{"flops": 10**8 + i * 10**6, "bytes": 10**6}]) for i in range(12)]
    figure = drawn(report(*near, seconds=12.0, device_seconds=12.0))
    figure.draw_without_rendering()
    ax, beside = figure.axes
    numbers = [t for t in ax.texts if isinstance(t, Annotation) and t.get_text().isdigit()]
    assert [t.get_text() for t in numbers] == [str(i + 1) for i in range(12)]
    for texts in (numbers, beside.texts):
        boxes = [t.get_window_extent() for t in texts]
        assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    assert all(figure.bbox.contains(*corner) for t in beside.texts for corner in t.get_window_extent().get_points())


def test_a_picture_needs_products() -> None:
    with pytest.raises(ValueError, match="a roofline needs operations with products, got none"):
        drawn(report(operation(maps=[{"bytes": 10}])))


def test_a_profile_is_used_once_and_read_when_it_has_ended() -> None:
    prof = fm.profile()
    with pytest.raises(RuntimeError, match="it must have begun, use it as"):
        _ = prof.data
    with prof, pytest.raises(RuntimeError, match="the block must have ended"):
        _ = prof.report
    assert "no meta-step ran" in printed(prof.report)
    with pytest.raises(RuntimeError, match="can be used once"):
        prof.start()
    with pytest.raises(ValueError, match="trace_steps must be at least 1, got 0"):
        fm.profile(trace_steps=0)


def test_peaks_of_this_machine() -> None:
    found = peaks("cpu", torch.float32, 1)
    assert found is peaks("cpu", torch.float32, 1)
    assert 1e8 < found.flops < 1e13
    assert 1e8 < found.bytes < 1e13
    assert torch.get_num_threads() >= 1
    if found.rate(1 << 20) != found.bytes:  # the extension is there
        assert found.rate((1 << 16) + 5) == copy_rate_of(1 << 16, 1)
        assert found.rate(1) == copy_rate_of(128, 1)
