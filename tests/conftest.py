"""What every test may use: seeds, thread counts, poisoned memory, data, and the rules for what a machine lacks."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import hypothesis
import numpy
import pytest
import torch

# Where there is no GPU, Triton's kernels run in its interpreter, which must be known before Triton is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from fastmeta.core import environment, native
from fastmeta.engine.compiler import Compiler

ROOT = Path(__file__).resolve().parent.parent
REQUIRED = {word for word in os.environ.get("FASTMETA_REQUIRE", "").split(",") if word}

torch.manual_seed(0)  # what tests draw while they are collected is the same in every process that runs them

# The same examples in every run: a failure is a property of the code, not of the day. How long they take to be
# drawn does not count either: on a loaded machine that has no bound.
hypothesis.settings.register_profile(
    "fastmeta",
    deadline=None,
    derandomize=True,
    max_examples=40,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("fastmeta")


# Each process begins with its share of the tests in their order, and takes from others at its end.
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long tests first: one that began last would leave every other core idle."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") is not None and not torch.cuda.is_available():
        lack("cuda", environment.gpu()["reason"])


def lack(what: str, reason: str) -> None:
    """Skip the test, or fail it where ``FASTMETA_REQUIRE`` (a comma-separated list) says the machine has ``what``."""
    if what in REQUIRED:
        pytest.fail(f"FASTMETA_REQUIRE asks for {what}, but {reason}")
    pytest.skip(reason)


@pytest.fixture(scope="session", autouse=True)
def _default_rates(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Plans are compared by the default rates, whatever has been measured of this machine, and when."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTMETA_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session", autouse=True)
def _builds(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A folder for what tests compile; processes that share the tests share it, the parent of each one's own."""
    folder = tmp_path_factory.getbasetemp()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTMETA_TEST_BUILDS", str(folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder))
        yield


@pytest.fixture(autouse=True)
def _seeded() -> None:
    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def set_threads() -> Iterator[Callable[[int], None]]:
    """Set the number of torch's threads for this test alone."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def one_thread(set_threads: Callable[[int], None]) -> None:
    """PyTorch on one thread."""
    set_threads(1)


@pytest.fixture
def nan_poison() -> Iterator[None]:
    """Memory that torch allocates without a value holds NaN, so that reading it shows."""
    fill, mode = torch.utils.deterministic.fill_uninitialized_memory, torch.get_deterministic_debug_mode()
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.utils.deterministic.fill_uninitialized_memory = fill
    torch.set_deterministic_debug_mode(mode)


@pytest.fixture
def extension() -> ModuleType:
    """The compiled extension; its instruction set is back at the default after the test."""
    module = native.extension()
    if module is None:
        lack("native", native.missing_reason())
    assert module is not None
    return module


@pytest.fixture(params=["plain", "v3", "v4"])
def instruction_set(request: pytest.FixtureRequest, extension: ModuleType) -> Iterator[str]:
    """Every instruction set of this build that this processor runs."""
    name: str = request.param
    if name not in extension.compiled_instruction_sets():
        pytest.skip(f"instruction set {name} is not in this build")
    if name not in extension.supported_instruction_sets():
        pytest.skip(f"this processor does not run instruction set {name}")
    extension.use_instruction_set(name)
    yield name
    extension.use_instruction_set("")


@pytest.fixture(scope="module")
def _graphs() -> dict[Any, Any]:
    return {}


@pytest.fixture
def traced_once(_graphs: dict[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """One trace, which takes most of a small test's time, of a model and a loss at the same shapes and modes.

    Within a module, whatever meta-steps ask for it; each plans, lowers and runs it anew. For tests that change no
    model: where PyTorch is asked again is what others test.
    """
    own = Compiler._graph

    def graph(self: Compiler, work: Any, batch: Any, key: Any, objective: Any) -> Any:
        place = id(objective.model), id(objective.loss), objective._uses_set, key
        if place not in _graphs:  # the objective is kept with it, so that nothing else gets its address
            _graphs[place] = objective, own(self, work, batch, key, objective)
        return _graphs[place][1]

    monkeypatch.setattr(Compiler, "_graph", graph)


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """Folder of the real data: ``FASTMETA_DATA``, or ``../shared/data`` beside the repository."""
    folder = Path(os.environ.get("FASTMETA_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        lack("data", f"there is no data folder {folder} (FASTMETA_DATA says where it is)")
    return folder
