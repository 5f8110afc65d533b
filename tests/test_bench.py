"""``fastmeta bench``: operations are recorded, judged, timed and reported; runs are compared."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
import torch
from torch import nn

from benchmarks import command, published
from fastmeta.algorithms.maml import MAML
from fastmeta.bench import backends, networks, ops, reports
from fastmeta.bench.ceilings import Ceilings
from fastmeta.bench.html import Bars, Section, Table, page
from fastmeta.bench.machine import machine_line
from fastmeta.bench.networks import NETWORKS, QUICK, built
from fastmeta.bench.pieces import as_double, error, recorded
from fastmeta.bench.regressions import Timing, changes
from fastmeta.cli.main import main
from fastmeta.core import native, triton_support
from fastmeta.engine import cost
from fastmeta.engine.native import NativeStep
from fastmeta.ops.catalogue import NAMES
from tests.profiling.hand import clock

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
RATES = Ceilings(1e11, lambda size: 1e10, "two rates")
needs_extension = pytest.mark.skipif(native.extension() is None, reason=f"no extension: {native.missing_reason()}")


@pytest.fixture(scope="module")
def rows() -> Iterator[list[ops.Row]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "ceilings", lambda device: RATES)
        yield ops.measure(QUICK, ops.QUICK)


def test_every_map_is_timed_and_judged(rows: list[ops.Row]) -> None:
    found = {(row.op, row.map, row.backend) for row in rows}
    layer = "linear_block" if native.extension() else "linear"
    assert {(layer, name, "reference") for name in cost.MAPS} <= found
    assert {("inner_update", "step", "reference"), ("adaptive_update", "adjoint", "reference")} <= found
    for row in rows:
        assert row.p20 <= row.us <= row.p80
        assert row.right, row
        assert row.floor_us == pytest.approx(1e6 * max(row.flops / 1e11, row.bytes / 1e10))
        assert (row.gflops is None) == (row.flops == 0)
    json.dumps(ops.as_json(rows, "", ""), allow_nan=False)


@needs_extension
def test_the_native_executor_stands_beside_the_same_calls(rows: list[ops.Row]) -> None:
    places = {row.place for row in rows if row.backend == "reference"}
    own = [row for row in rows if row.backend == "native"]
    assert {row.place for row in own} == places
    base = {row.place: row for row in rows if row.backend == "reference"}
    for row in own:
        other = base[row.place]
        assert (row.flops, row.bytes) == (other.flops, other.bytes)  # one formula
        assert row.gain == pytest.approx(other.us / row.us)
    assert {row.of for row in own if row.op == "linear_block"} == {"meta-gradient"}


def test_a_wrong_result_gets_no_comparison(rows: list[ops.Row]) -> None:
    from dataclasses import replace

    plain = next(row for row in rows if row.backend == "reference")
    wrong = replace(plain, backend="other", error=1e-3, gain=None)
    right = replace(plain, backend="third", gain=None)
    gains = {row.backend: row.gain for row in ops.compared([plain, wrong, right])}
    assert gains == {"reference": None, "other": None, "third": pytest.approx(1.0)}
    assert "wrong" in ops.cells(wrong)[9]
    text = page("", "", reports.of_ops([plain, wrong]))
    assert '<tr class="bad">' in text  # and it is shown


def test_the_judgement_sees_a_wrong_map(monkeypatch: pytest.MonkeyPatch) -> None:
    model, loss, tasks = built(QUICK)
    setting = backends._Setting(QUICK, model, loss, tasks)
    program, calls = backends._record(setting.learner(executor="reference"), tasks)
    starts = [(i, instruction.op.name) for i, instruction in enumerate(program.instructions)]
    run = backends.Run("reference", backends.pieces(program, calls, starts))
    first = program.instructions[0].op
    tangent = first.tangent

    def off(*arguments: Any) -> Any:
        results, kept = tangent(*arguments)
        return tuple(1.001 * y for y in results), kept

    monkeypatch.setattr(first, "tangent", off)
    backends._judge(setting, [run])
    wrong = [place for place, found in run.errors.items() if found > backends.OF_A_MAP]
    assert wrong == [(0, "tangent")]


class Step:
    """Stands for a piece of a program whose calls are noted."""

    tasks = 4

    def __init__(self, number: int, made: list[tuple[int, str]], lacks: str = "") -> None:
        self.number, self.made = number, made
        self.calls = dict.fromkeys(name for name in cost.MAPS if name != lacks)

    def run(self, name: str) -> Any:
        return lambda: self.made.append((self.number, name))


def test_calls_of_the_reference_come_one_after_another_as_in_a_meta_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends.time, "perf_counter", clock())
    made: list[tuple[int, str]] = []
    run = backends.Run("reference", [Step(0, made), Step(1, made, lacks="tangent"), Step(2, made)])  # type: ignore[list-item]
    backends._time([run], ops.QUICK, None, "cpu")
    sweep = [(0, "forward"), (1, "forward"), (2, "forward"), (2, "backward"), (1, "backward"), (0, "backward")]
    sweep += [(0, "tangent"), (2, "tangent"), *((number, "tangent_backward") for number in (2, 1, 0))]
    sweeps = len(made) // len(sweep)
    assert sweeps >= 3
    assert made == sweep * sweeps  # none twice in a row, which would find its operands in the cache
    counted = [pytest.approx(1e3 / Step.tasks)] * (sweeps - 1)  # the first brings in code
    assert run.times == dict.fromkeys(sweep, counted)


@pytest.mark.parametrize("name", ["mlp784", "omniglot_20way"])
@needs_extension
def test_operands_are_those_that_the_native_executor_counts(name: str) -> None:
    model, loss, tasks = built(NETWORKS[name])
    maml = MAML(model, loss, 0.01, 2, plan="dense")
    _, programs = maml.prepare(tasks)
    assert programs is not None
    assert isinstance(programs.native, NativeStep)
    instructions = programs.support.instructions
    places = {id(instruction): i for i, instruction in enumerate(instructions)}
    own = [o for o in programs.native.operands if o.instruction is not None]
    starts = [0, *(places[id(o.instruction)] for o in own[1:]), len(instructions)]
    for operands, begin, end in zip(own, starts, starts[1:], strict=False):
        run = cost.operands_of(programs.support, instructions[begin:end])
        assert cost.bytes_by_map(run) == cost.bytes_by_map(operands)


def test_the_networks_have_every_operation_of_the_catalogue() -> None:
    seen = {"inner_update", "adaptive_update", "conjugate_gradients"}  # which no program calls
    for network in (QUICK, NETWORKS["omniglot_5way"], NETWORKS["encoder"], NETWORKS["ranking"]):
        model, loss, tasks = built(network)
        maml = MAML(model, loss, 0.01, 2, plan="dense", executor="reference")
        _, programs = maml.prepare(tasks)
        assert programs is not None
        seen |= {type(instruction.op).__module__.split(".")[2] for instruction in programs.support.instructions}
    # On a CPU these are calls of several others in the program, and single operations of the native executor.
    assert set(NAMES) - seen == {"conv_block", "linear_block", "sum_block"}


def test_recording_leaves_no_trace() -> None:
    model, loss, tasks = built(QUICK)
    maml = MAML(model, loss, 0.01, 2, plan="dense", executor="reference")
    before = maml.value_and_grad(tasks)[1]
    _, programs = maml.prepare(tasks)
    assert programs is not None
    with recorded(programs.support) as calls:
        maml.value_and_grad(tasks)
    assert all("forward" not in vars(instruction.op) for instruction in programs.support.instructions)
    assert [len(found["forward"]) for found in calls] == [2] * len(calls)
    assert all(torch.equal(before[name], g) for name, g in maml.value_and_grad(tasks)[1].items())


def test_networks_are_the_same_every_time_and_draw_nothing_from_others() -> None:
    torch.manual_seed(3)
    first = torch.rand(())
    torch.manual_seed(3)
    model, _, tasks = built(QUICK)
    assert torch.equal(torch.rand(()), first)
    again, _, same = networks.built(QUICK)
    assert all(map(torch.equal, model.parameters(), again.parameters()))
    assert torch.equal(tasks.support[0], same.support[0])
    assert isinstance(model, nn.Sequential)


def test_errors_are_relative_and_of_all_results_together() -> None:
    truth = [torch.tensor([3.0, 0.0], dtype=torch.float64), None, torch.tensor([4.0], dtype=torch.float64)]
    assert error([torch.tensor([3.0, 0.5]), None, torch.tensor([4.0])], truth) == pytest.approx(0.1)
    assert error([None], [None]) == 0.0
    assert [x.dtype for x in as_double([torch.ones(1), torch.ones(1, dtype=torch.int64)])] == [
        torch.float64,
        torch.int64,
    ]


def test_triton_is_passed_over_where_it_is_compared_with() -> None:
    with triton_support.without():
        assert "passed over" in triton_support.missing_reason(torch.device("cuda"), torch.float32)
    assert "passed over" not in triton_support.missing_reason(torch.device("cpu"), torch.float32)


def test_a_change_counts_beyond_the_noise_of_both_runs() -> None:
    before = {name: Timing(10, 9, 11) for name in ("slow", "noisy", "quick", "close", "gone")}
    after = {"slow": Timing(13, 12, 14), "noisy": Timing(13, 10.5, 20), "quick": Timing(7, 6, 8)}
    after |= {"close": Timing(11.4, 11.3, 12), "new": Timing(1, 1, 1)}
    before["close"] = Timing(11, 10.9, 11.1)
    found = {change.name: change.verdict for change in changes(before, after)}
    same = "same within noise"
    assert found == {"slow": "slower", "noisy": same, "close": same, "quick": "quicker"}
    with pytest.raises(ValueError, match="nothing in common"):
        changes({"a": Timing(1, 1, 1)}, {"b": Timing(1, 1, 1)})


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch, rows: list[ops.Row]) -> None:
    monkeypatch.setattr(ops, "measure", lambda *arguments: rows)
    monkeypatch.setattr("fastmeta.bench.ceilings.ceilings", lambda device: RATES)


def run(*words: str) -> int:
    with pytest.raises(SystemExit) as left:
        main(["bench", *words])
    return int(left.value.code or 0)


@pytest.mark.usefixtures("measured")
def test_the_command_writes_compares_and_says_by_its_status(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], rows: list[ops.Row]
) -> None:
    file, report = tmp_path / "now.json", tmp_path / "report.html"
    assert run("ops", "--quick", "--json", str(file), "--html", str(report)) == 0
    assert "us a task" in capsys.readouterr().out
    assert file.is_file()
    assert report.is_file()
    assert run("ops", "--quick", "--compare", str(file)) == 0
    earlier = json.loads(file.read_text())
    for row in earlier["rows"]:
        row.update({key: row[key] / 100 for key in ("us", "p20", "p80")})
    file.write_text(json.dumps(earlier))
    capsys.readouterr()
    assert run("ops", "--quick", "--compare", str(file)) == 2
    shown = capsys.readouterr()
    assert "now / before" in shown.out
    assert shown.err.rstrip().splitlines()[-1].startswith("slower: ")
    assert run("ops", "--quick", "--json", "-") == 0
    assert json.loads(capsys.readouterr().out)["rows"][0]["network"] == rows[0].network


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("ops", "--workload", "nothing"), "--workload must be one of"),
        (("ops", "--device", "tpu"), "--device must be cpu or cuda, got 'tpu'"),
        (("steps", "--peers", "nobody"), "--peers must be one of"),
        (("steps", "--workload", "nothing"), "--workload must be one of"),
        (("ops", "--compare", "absent.json"), "absent.json"),
    ],
)
def test_wrong_words_are_named(words: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*words) == 1
    assert said in capsys.readouterr().err


def test_a_file_of_something_else_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "other.json"
    for content in ('{"kind": "steps"}', "[1]", "no JSON"):
        file.write_text(content)
        assert run("ops", "--compare", str(file)) == 1
        assert "must be" in capsys.readouterr().err


def test_without_a_checkout_the_command_says_where_to_get_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("fastmeta.cli.bench.__file__", str(tmp_path / "site" / "fastmeta" / "cli" / "bench.py"))
    assert run("steps", "--quick") == 1
    assert "comes with a checkout" in capsys.readouterr().err


def test_peers_are_chosen_by_name() -> None:
    ours = {"loop": False, "jax": False, "fastmeta": True}
    assert command.chosen("all", ours) == ["loop", "jax", "fastmeta"]
    assert command.chosen("none", ours) == ["fastmeta"]
    assert command.chosen("jax, fastmeta", ours) == ["jax", "fastmeta"]
    content = json.loads((published.RESULTS / "meta_step.json").read_text())
    kept = command.timings(content)
    assert kept["mlp784: fastmeta"].p20 <= kept["mlp784: fastmeta"].median <= kept["mlp784: fastmeta"].p80
    assert "sinusoid_tanh: compile.vmap" not in kept  # it was wrong
    assert command.is_ours("mlp784: fastmeta.backward")
    assert not command.is_ours("mlp784: loop")


def test_the_machine_line_says_what_matters() -> None:
    line = machine_line()
    for word in (f"torch {torch.__version__}", "threads", "triton", "revision"):
        assert word in line


BARS = Bars("a picture", [("ours", 1.0, "1 ms", "ours"), ("a<b", 30.0, "30 ms", "other")])
CELLS = [["b", "2.5", ""], ["a", "10", "slow"], ["c", "", "wrong"]]
TABLE = Table(["what", "ms", "reason"], CELLS, ["ours", "", "bad"])
PAGE = page("times <&>", "a machine", [Section("steps", ["Some words.", BARS]), Section("", [TABLE])])


class _Structure(HTMLParser):
    """Tags that are open, addresses, and cells."""

    VOID = ("meta", "br", "img", "link")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.addresses: list[str] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        self.addresses += [value or "" for name, value in attributes if name in ("src", "href", "xlink:href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("td", "text", "h1"):
            self.words.append(data)


def test_the_page_is_whole_and_needs_no_network() -> None:
    found = _Structure(PAGE)
    assert found.open == []
    assert found.addresses == []
    assert "http" not in PAGE
    assert "url(" not in PAGE
    assert found.seen.count("th") == 3
    assert found.seen.count("button") == 3  # every column can be sorted by, with keys too
    assert {"svg", "table", "script", "style"} <= set(found.seen)
    assert {"times <&>", "a<b", "wrong", "10"} <= set(found.words)
    assert "prefers-color-scheme: dark" in PAGE
    assert '<td data-value="10.0">10</td>' in PAGE
    assert '<tr class="bad">' in PAGE


@pytest.mark.skipif(BROWSER is None, reason="no chromium is installed")
def test_a_browser_shows_it_light_and_dark_and_sorts(tmp_path: Path) -> None:
    file = tmp_path / "page.html"
    clicks = 'document.querySelectorAll("th button")[1].click();'
    file.write_text(PAGE.replace("</body>", f"<script>{clicks}</script></body>"))
    base = [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]

    def browse(*options: str) -> str:
        ran = subprocess.run([*base, *options, file.as_uri()], capture_output=True, text=True, check=False, timeout=300)
        assert ran.returncode == 0, ran.stderr
        return ran.stdout

    def order() -> list[str]:
        cells = _Structure(browse("--dump-dom")).words
        return [word for word in cells if word in ("a", "b", "c")]

    assert order() == ["b", "a", "c"]  # 2.5, 10, none: as numbers, the empty cell last
    file.write_text(PAGE.replace("</body>", f"<script>{clicks}{clicks}</script></body>"))
    assert order() == ["a", "b", "c"]
    for scheme, dark in ((1, False), (0, True)):
        picture = tmp_path / f"{scheme}.png"
        browse(f"--blink-settings=preferredColorScheme={scheme}", "--window-size=900,600", f"--screenshot={picture}")
        grey = matplotlib.image.imread(picture)[..., :3].mean(-1)
        background = float(np.median(grey))
        assert (background < 0.3) is dark
        assert float(np.abs(grey - background).max()) > 0.5  # and something stands out from it


def test_the_readme_has_the_tables_of_the_runs() -> None:
    text = published.README.read_text()
    assert published.readme(text) == text
    assert published.readme(text.replace("**0.0619**", "**0.0001**")) == text
    with pytest.raises(RuntimeError, match="marker"):
        published.readme("no table")
