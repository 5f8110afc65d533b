"""The benchmark harness stays alive, reports no time for a wrong gradient, and hides nobody."""

from __future__ import annotations

import ast
import dataclasses
import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import probe, scaling
from benchmarks.breakdown import Breakdown, Line, break_down
from benchmarks.gpu import report as gpu_report
from benchmarks.harness import compare
from benchmarks.memory import RESET, allocated_mib, peak_mib
from benchmarks.peers import LOOP
from benchmarks.peers.base import Step, Unavailable, Variant
from benchmarks.report import as_json, markdown, markdown_table, summary, text_table, where_time_goes
from benchmarks.sentences import MissingSentences
from benchmarks.variants import VARIANTS
from benchmarks.workloads import WORKLOADS, Problem, Workload, named, sinusoid
from fastmeta.bench import timing
from fastmeta.bench.timing import Effort, interleave
from fastmeta.core import native
from tests.oracle import maml_loop, relative_error, relative_errors
from tests.profiling.hand import clock

ROOT = Path(__file__).resolve().parents[1]
BRIEF = Effort(rounds=2, slot_s=0.0, budget_s=1.0)
K1 = WORKLOADS["sinusoid_k1"]


@pytest.mark.skipif(native.extension() is None, reason=f"no extension: {native.missing_reason()}")
def test_the_breakdown_adds_up_and_is_written() -> None:
    result = compare(K1, [VARIANTS["fastmeta"]], BRIEF)
    breakdown = result.breakdown
    names = [(line.operation, line.module) for line in breakdown.lines]
    assert names == [("linear_block", "0"), ("linear_block", "2"), ("linear_block", "4"), ("loss", "")]
    # Threads do not overlap, so nothing is left over but what no operation takes.
    assert 0 <= breakdown.rest_ms < breakdown.ms
    assert breakdown.executor_ms < breakdown.ms
    assert sum(line.ms for line in breakdown.lines) <= breakdown.executor_ms
    assert sum(line.share for line in breakdown.lines) + breakdown.rest_ms / breakdown.ms == pytest.approx(1)
    assert breakdown.total.flops == result.floor.flops
    assert all(line.floor_ms > 0 for line in breakdown.lines)
    # Each operation's floor is at least that of its products, and the loss, without products, has that of its bytes.
    assert breakdown.total.floor_ms >= result.floor.flops / (1e6 * result.floor.peak_gflops) * (1 - 1e-9)
    assert breakdown.lines[3].gflops is None

    header, *_, rest, total = markdown_table(*where_time_goes(breakdown)).splitlines()
    assert header.split(" | ")[0] == "| operation"
    assert rest.startswith("| everything else |")
    assert total.startswith("| meta-step |")
    assert "| linear_block 2 |" in markdown([result], "", "picture.png")
    stored = as_json([result], "")["workloads"][0]["breakdown"]
    assert [line["floor_over_time"] for line in stored["lines"]] == [line.floor_share for line in breakdown.lines]


def test_a_breakdown_is_shown_line_by_line() -> None:
    lines = [Line("conv_block", "0", 2.0, 0.5, 4_000_000_000, 10**6, 1.0), Line("loss", "", 0.5, 0.125, 0, 100, 0.25)]
    shown = text_table(*where_time_goes(Breakdown(4.0, 3.0, lines, 1.5))).splitlines()
    assert [line.split() for line in shown[2:]] == [
        ["conv_block", "0", "2", "50.0", "%", "2e+03", "1", "0.50"],
        ["loss", "0.5", "12.5", "%", "0.25", "0.50"],
        ["everything", "else", "1.5", "37.5", "%"],
        ["meta-step", "4", "100.0", "%", "1e+03", "1.25", "0.31"],
    ]


def test_without_the_native_executor_there_is_no_breakdown() -> None:
    problem = sinusoid(1, tasks=2)
    layer = nn.Linear(1, 1)
    model = nn.Sequential(layer, nn.Tanh(), layer)  # a weight that is read twice runs on the reference
    assert break_down(dataclasses.replace(problem, model=model)) is None


def test_a_wrong_gradient_gets_no_time() -> None:
    def prepare(problem: Problem) -> Step:
        right = LOOP.prepare(problem).run()
        return Step(lambda: {name: g * 1.001 for name, g in right.items()})

    result = compare(K1, [Variant("off", "off", "eager", prepare, "0.1 % too large"), LOOP], BRIEF)
    assert result["off"].status == "wrong"
    assert result["off"].times_ms == []
    assert "is over" in result["off"].reason
    assert result.best("eager").name == "loop"


def test_an_absent_or_broken_peer_is_shown_with_its_reason() -> None:
    def absent(problem: Problem) -> Step:
        raise Unavailable("No module named 'absent'")

    def broken(problem: Problem) -> Step:
        raise RuntimeError("does not run here")

    variants = [
        Variant("absent", "absent", "eager", absent, ""),
        Variant("broken", "broken", "eager", broken, ""),
        LOOP,
    ]
    result = compare(K1, variants, BRIEF)
    assert [o.status for o in result.outcomes] == ["not installed", "failed", "ok"]
    for text in (summary([result], ""), markdown([result], "", "picture.png")):
        assert "No module named 'absent'" in text
        assert "does not run here" in text


def test_a_compiler_that_does_not_end_is_stopped_and_a_broken_one_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refusal(does: str, limit_s: float) -> str:
        stand_in = tmp_path / "python"
        stand_in.write_text(f"#!/bin/sh\n{does}\n")
        stand_in.chmod(0o755)
        monkeypatch.setattr(probe.sys, "executable", str(stand_in))
        return probe.refusal("sinusoid_k1", "loop", limit_s)

    assert probe.refusal("sinusoid_k1", "loop", 400) == ""
    # The process that is waited for holds the pipe open: what its shell has started ends with it.
    assert refusal("sleep 10000 & sleep 10000", 0.01) == "compiling did not finish within 0.01 s"
    assert refusal("echo Traceback >&2; echo 'KeyError: no such thing' >&2; exit 1", 400) == "KeyError: no such thing"


def test_a_part_of_the_parameters_adapts() -> None:
    def head_only() -> Problem:
        return dataclasses.replace(sinusoid(3, tasks=4), adapted=("4.weight", "4.bias"))

    names = ["loop", "torch.func", "higher", "fastmeta", "fastmeta.backward"]
    result = compare(Workload("head", "head only", head_only), [VARIANTS[n] for n in names], BRIEF)
    assert [o.status for o in result.outcomes] == ["ok", "ok", "unsupported", "ok", "ok"]
    assert result["higher"].reason == "adapts every parameter"
    assert max(o.errors.worst for o in result.outcomes if o.errors) < 1e-5


class Others:
    """Other processes, which take part of the machine during the first turn alone."""

    seen = 0

    def cores(self) -> float:
        Others.seen += 1
        return 0.9 * (Others.seen == 1)


def test_turns_are_interleaved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "Foreign", Others)
    monkeypatch.setattr(Others, "seen", 0)
    monkeypatch.setattr(timing.time, "perf_counter", clock())
    order: list[str] = []
    calls = {name: (lambda name=name: order.append(name)) for name in "abc"}
    times = interleave(calls, Effort(rounds=3, slot_s=0.0, budget_s=1.0))
    # One call of each before those that are timed; then the order rotates, and who was disturbed gets one more turn.
    assert "".join(order) == "aabbcc" + "bca" + "cab" + "a"
    assert {name: (len(t.seconds), t.disturbed) for name, t in times.items()} == {"a": (3, 1), "b": (3, 0), "c": (3, 0)}


@pytest.mark.parametrize("name", list(WORKLOADS))
def test_workloads_are_the_same_every_time(name: str) -> None:
    try:
        first, second = WORKLOADS[name].build(), WORKLOADS[name].build()
    except MissingSentences as error:
        pytest.skip(str(error))
    assert first.support[0].shape[0] == first.query[0].shape[0] == first.tasks
    for a, b in zip((*first.support, *first.query), (*second.support, *second.query), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(first.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.skipif(not RESET.exists(), reason="the high-water mark can be reset on Linux only")
def test_peak_memory_sees_what_a_step_allocates() -> None:
    def prepare(problem: Problem) -> Step:
        return Step(lambda: {"x": torch.zeros(problem.tasks * 2**20)})  # 4 MiB a task

    variant = Variant("", "", "eager", prepare, "")
    peak = peak_mib(variant, sinusoid(1, tasks=8))
    assert allocated_mib(variant, sinusoid(1, tasks=8)) == 32
    assert allocated_mib(dataclasses.replace(variant, peer="jax"), sinusoid(1)) is None
    # The tensor itself, pages that come or go beside it, and those that the kernel has not yet counted for a processor.
    assert 30 <= peak <= 36


def test_peers_do_not_know_fastmeta() -> None:
    for path in (ROOT / "benchmarks" / "peers").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not [n for n in names if n.split(".")[0] == "fastmeta"], path


@pytest.mark.slow
def test_a_run_of_pytest_is_timed_judged_and_written(tmp_path: Path) -> None:
    names, results = ["loop", "torch.func", "fastmeta", "fastmeta.backward"], tmp_path / "results"
    command = [sys.executable, "-m", "pytest", "benchmarks", "-q", "-p", "no:cacheprovider", "--threads", "1"]
    command += ["--workload", "sinusoid_k1", *(word for name in names for word in ("--variant", name)), "--rounds", "2"]
    command += ["--results", str(results), "--benchmark-json", str(tmp_path / "bench.json")]
    # The inner pytest-benchmark must not think that it is one of several processes, in which it times nothing.
    outer = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    environment = {**outer, "FASTMETA_BENCH_QUICK": "1"}
    answer = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    # No temporary file is left.
    assert sorted(p.name for p in results.iterdir()) == ["meta_step.json", "meta_step.md", "meta_step.png"]
    assert (results / "meta_step.png").read_bytes().startswith(b"\x89PNG")
    stored = json.loads((results / "meta_step.json").read_text())["workloads"][0]
    outcomes = {outcome["name"]: outcome for outcome in stored["outcomes"]}
    assert {name: outcome["status"] for name, outcome in outcomes.items()} == dict.fromkeys(names, "ok")
    best = min(outcomes[name]["median_ms"] for name in names[:2])
    assert stored["best_eager_over_ours"] == pytest.approx(best / outcomes["fastmeta"]["median_ms"])

    entries = {b["params"]["variant"]: b for b in json.loads((tmp_path / "bench.json").read_text())["benchmarks"]}
    for name, outcome in outcomes.items():
        stats = entries[name]["stats"]
        assert stats["rounds"] == len(outcome["times_ms"]) > 0
        # Times are stored in ms with five digits after the point; a clock that sums them rounds once more.
        assert 1e3 * stats["min"] == pytest.approx(min(outcome["times_ms"]), abs=1e-4)
        assert entries[name]["extra_info"]["error"]["total"] == outcome["errors"]["total"]


@pytest.mark.parametrize("first_order", [False, True])
def test_oracle_against_finite_differences(first_order: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2)).double()
    xs, xq = torch.randn(2, 3, 6, 3, dtype=torch.float64)
    ys, yq = torch.randint(0, 2, (2, 3, 6))
    alpha = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    before = {name: b.clone() for name, b in model.named_buffers()}

    def run(lr: Tensor | float) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
        return maml_loop(model, F.cross_entropy, (xs, ys), (xq, yq), lr, 2, first_order=first_order)

    loss, task_losses, logits, grads = run(alpha)
    assert torch.equal(loss, task_losses.mean())
    assert logits.shape == (3, 6, 2)
    assert all(torch.equal(b, before[name]) for name, b in model.named_buffers())

    direction = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    step = 1e-6

    def moved(sign: int) -> float:
        with torch.no_grad():
            for name, p in model.named_parameters():
                p += sign * step * direction[name]
        value = float(run(0.3)[0])
        with torch.no_grad():
            for name, p in model.named_parameters():
                p -= sign * step * direction[name]
        return value

    slope = sum(float((grads[name] * d).sum()) for name, d in direction.items())
    measured = (moved(1) - moved(-1)) / (2 * step)
    # Central differences: truncation step^2 and rounding eps / step, both about 1e-10 here; 1e-7 leaves room for scale.
    assert (slope == pytest.approx(measured, rel=1e-7)) is not first_order
    if not first_order:
        by_lr = (float(run(0.3 + step)[0]) - float(run(0.3 - step)[0])) / (2 * step)
        assert float(grads["lr"]) == pytest.approx(by_lr, rel=1e-7)


def test_oracle_takes_model_losses_and_a_choice_of_parameters() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    xs, xq = torch.randn(2, 3, 6, 3, dtype=torch.float64)
    ys, yq = torch.randint(0, 2, (2, 3, 6))
    rates = {name: 0.1 for name, _ in model.named_parameters()}
    pair = maml_loop(model, F.cross_entropy, (xs, ys), (xq, yq), rates, 3)
    own = maml_loop(
        model, lambda m, b: F.cross_entropy(m(b["x"]), b["y"]), {"x": xs, "y": ys}, {"x": xq, "y": yq}, 0.1, 3
    )
    assert own[2] is None
    assert relative_error(own[3], pair[3]) == 0.0
    head = maml_loop(model, F.cross_entropy, (xs, ys), (xq, yq), 0.1, 3, adapted_names=["2.weight", "2.bias"])
    assert head[3].keys() == pair[3].keys()
    assert relative_error(head[3], pair[3]) > 1e-3  # adapting less is another function


def test_relative_errors_of_null_and_non_finite_gradients() -> None:
    truth = {"a": torch.tensor([3.0, 4.0]), "bias": torch.tensor([1e-17])}
    assert relative_errors({"a": truth["a"], "bias": torch.tensor([5e-7])}, truth)["bias"] == pytest.approx(1e-7)
    assert relative_error({"a": truth["a"], "bias": torch.tensor([torch.nan])}, truth) == float("inf")
    with pytest.raises(ValueError, match="names must be"):
        relative_errors({"a": truth["a"]}, truth)


def test_scaling_is_measured_fitted_and_drawn(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(scaling, "Point", functools.partial(scaling.Point, tasks=2, steps=1))
    monkeypatch.setattr(scaling, "PEERS", ("loop", "torch.func"))
    monkeypatch.setattr(scaling, "UNROLLED", ())
    path = tmp_path / "scaling.json"
    monkeypatch.setattr(scaling, "AXES", {"width": ("width", (8,))})
    with monkeypatch.context() as narrow:  # memory takes a process for each number
        narrow.setattr(scaling, "PEERS", ("loop",))
        narrow.setattr(scaling, "OURS", ())
        found = scaling.measure(scaling.Point(width=8), BRIEF, memory=RESET.exists())
    assert (found["loop"]["mib"] is not None) == RESET.exists()
    scaling.run(["width"], BRIEF, memory=False, path=path)
    monkeypatch.setattr(scaling, "AXES", {"width": ("width", (8, 16))})
    data = scaling.run(["width"], BRIEF, memory=False, path=path)
    assert scaling.run(["width"], BRIEF, path=path) == data == json.loads(path.read_text())  # nothing is done again
    monkeypatch.setattr(scaling, "AXES", {"width": ("width", (8, 16)), "samples": ("samples N", (2,))})
    both = scaling.run(["samples"], BRIEF, memory=False, path=path)
    assert both["axes"] == ["width", "samples"]  # what one run does not measure again stays in the document
    assert len(both["points"]) == 3
    rows = scaling.rows_of(data, "width")
    assert scaling.curve(rows, "peer", "ms") == [
        min(row["found"][n]["ms"] for n in ("loop", "torch.func")) for row in rows
    ]
    text = scaling.document(data)
    assert text.count("| 16 |") == 1
    assert "T = 2, K = 1, N = 5" in text
    assert scaling.picture(data).startswith(b"\x89PNG")
    assert scaling.exponent([1, 2, 4, 8], [7, 3, 12, 48]) == pytest.approx(2)


def test_scaling_says_what_a_task_costs_and_what_a_graph_holds() -> None:
    variants = (*scaling.PEERS, *scaling.OURS)
    points = {
        point.name: {v: {"ms": 2.0 * value, "mib": 3.0 * value} for v in variants}
        for axis in ("tasks", "steps")
        for value, point in scaling.points_of(axis)
    }
    data = {"machine": "a machine", "base": {}, "axes": ["tasks", "steps"], "points": points}
    text = scaling.document(data)
    assert "| 64 | 2000 | 2000 | 2000 | 2000 |" in text
    assert "| inner steps K | chosen plan, MiB | weights as factors, MiB | graph of one task, MiB |" in text
    assert "| 8 | 24 | 24 | 24 | 24 |" in text
    points[scaling.Point(steps=8).name]["torch.func"]["mib"] = None  # an earlier run did not measure that
    assert "graph of one task" not in scaling.document(data)
    deep = scaling.Point(layers=3, width=8)
    layers = [m for m in named(deep.name).build().model if isinstance(m, nn.Linear)]
    assert [m.out_features for m in layers] == [8, 8, 8, 10]


@pytest.mark.skipif(not (scaling.RESULTS / "scaling.json").is_file(), reason="no run of benchmarks.scaling is kept")
def test_the_document_on_performance_is_that_of_its_run() -> None:
    assert scaling.DOCUMENT.read_text() == scaling.document(json.loads((scaling.RESULTS / "scaling.json").read_text()))


def test_the_table_of_a_gpu_is_that_of_its_run() -> None:
    results = ROOT / "benchmarks" / "results"
    assert (results / "gpu.md").read_text() == gpu_report.table(json.loads((results / "gpu.json").read_text()))


def test_an_error_beyond_its_bound_makes_no_peer() -> None:
    def row(variant: str, ms: float, error: float) -> dict[str, object]:
        return {"variant": variant, "ms": ms, "low": ms, "high": ms, "error": error, "bound": 1e-3, "mib": 0.0}

    ours = row("fastmeta", 1, 1e-4) | {"task_error": 1e-6, "task_bound": 2e-6}
    result = {"workload": "x", "title": "a step", "precision": "float32", "reasons": {"torch.compile": "out of time"}}
    result["rows"] = [ours, row("loop", 3, 1e-3), row("torch.func", 2, 2e-3)]
    peer = gpu_report.best_peer(result)
    assert peer is not None
    assert peer["variant"] == "loop"
    found = {"machine": "a GPU", "peaks": {"bytes": 1.0, "flops": {}, "node_s": 1.0}, "step x": result}
    text = gpu_report.table(found)
    assert "| fastmeta | 1 | 1 | 1 | 1.00 | 1.0e-04 (1.0e-03) | 1.0e-06 (2.0e-06) | 0.0 |" in text
    assert "in brackets" in text
    assert "was not measured" not in text
    assert "Best peer / fastmeta: 3.00 (loop)." in text
