"""Options of ``python -m pytest benchmarks`` and the comparison that its tests read."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.harness import Comparison, compare
from benchmarks.machine import THREADS, machine_line, use_threads
from benchmarks.report import summary, write
from benchmarks.variants import VARIANTS
from benchmarks.workloads import QUICK_WORKLOADS, WORKLOADS
from fastmeta.bench.timing import QUICK, Effort


class Measured:
    """Comparisons made so far, one a workload, each made when the first test asks for it."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.done: dict[str, Comparison] = {}
        use_threads(config.getoption("--threads"))

    def __call__(self, workload: str) -> Comparison:
        if workload not in self.done:
            effort = QUICK if is_quick() else Effort()
            effort = dataclasses.replace(effort, rounds=self.config.getoption("--rounds") or effort.rounds)
            memory = not is_quick() and not self.config.getoption("--no-memory")
            variants = [VARIANTS[name] for name in chosen(self.config, "--variant", VARIANTS)]
            self.done[workload] = compare(WORKLOADS[workload], variants, effort, memory=memory, say=self._say)
        return self.done[workload]

    def _say(self, line: str) -> None:
        """A line of progress, past pytest's capture: one comparison takes minutes."""
        capture = self.config.pluginmanager.getplugin("capturemanager")
        reporter = self.config.pluginmanager.getplugin("terminalreporter")
        with capture.global_and_fixture_disabled():
            reporter.write_line(line)


MEASURED = pytest.StashKey[Measured]()


def is_quick() -> bool:
    return os.environ.get("FASTMETA_BENCH_QUICK", "") not in ("", "0")


def chosen(config: pytest.Config, option: str, known: dict) -> list[str]:
    """The names given with ``option``, those of a plain run when there are none."""
    names = config.getoption(option)
    if names:
        unknown = [n for n in names if n not in known]
        if unknown:
            raise pytest.UsageError(f"{option} must be one of {', '.join(known)}, got {', '.join(unknown)}")
        return list(names)
    if known is not WORKLOADS:
        return list(known)
    return list(QUICK_WORKLOADS) if is_quick() else [name for name, w in WORKLOADS.items() if w.group == "usual"]


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fastmeta benchmarks")
    group.addoption("--workload", action="append", help="a workload to run; may be given several times")
    group.addoption("--variant", action="append", help="a variant to run; may be given several times")
    group.addoption("--rounds", type=int, help="interleaved rounds")
    group.addoption("--threads", type=int, default=THREADS, help="threads, and physical cores, of every library")
    group.addoption("--no-memory", action="store_true", help="do not measure peak memory")
    group.addoption(
        "--results",
        type=Path,
        default=Path(__file__).parent / "results",
        help="folder for the JSON, the Markdown table and the picture",
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if {"workload", "variant"} <= set(metafunc.fixturenames):
        metafunc.parametrize("variant", chosen(metafunc.config, "--variant", VARIANTS))
        metafunc.parametrize("workload", chosen(metafunc.config, "--workload", WORKLOADS))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Workload by workload, so that a finished comparison's memory is not needed any more."""
    order = list(WORKLOADS)
    items.sort(key=lambda item: order.index(item.callspec.params["workload"]) if hasattr(item, "callspec") else -1)


@pytest.fixture(scope="session")
def measured(request: pytest.FixtureRequest) -> Iterator[Measured]:
    store = request.config.stash[MEASURED] = Measured(request.config)
    yield store
    if store.done:
        write(list(store.done.values()), machine_line(), request.config.getoption("--results"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    store = config.stash.get(MEASURED, None)
    if store is not None and store.done:
        terminalreporter.section("meta-gradient: fastmeta and its peers")
        terminalreporter.write_line(summary(list(store.done.values()), machine_line()))
        terminalreporter.write_line(f"written to {config.getoption('--results')}")
