"""The imports agree with the picture of the storeys in docs/architecture.md."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "fastmeta"
LONGEST = 500  # lines of a file

MODULES = sorted(PACKAGE.rglob("*.py"))
ENTRIES = {"fastmeta", "fastmeta.__main__"}  # the public names and `python -m fastmeta`: for the top storey alone


def storeys() -> list[list[str]]:
    """The picture's rows, top first, each a list of names."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    picture = re.search(r"```storeys\n(.*?)```", text, re.DOTALL)
    assert picture is not None, "docs/architecture.md has no picture of the storeys"
    return [re.split(r",\s*", re.split(r"\s{2,}", line)[0]) for line in picture[1].splitlines()]


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return path.is_dir() or path.with_suffix(".py").is_file()


def storey_of(name: str) -> str:
    """The row of the picture in which a module stands: ``fastmeta.ops.linear.op`` in ``ops/<op>``."""
    parts = name.split(".")
    if parts[1] == "ops" and len(parts) > 2 and (PACKAGE / "ops" / parts[2]).is_dir():
        return "ops/<op>"
    return parts[1]


def imports(path: Path, source: str | None = None) -> set[str]:
    """Names of the modules of this repository that a file imports anywhere, functions included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text() if source is None else source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                found.add(full if is_module(full) else node.module)
    return {name for name in found if name.split(".")[0] in ("fastmeta", "tests", "benchmarks", "examples")}


def faults(name: str, imported: set[str], rows: list[list[str]]) -> list[str]:
    """What is wrong with module ``name`` importing ``imported``."""
    level = {storey: (row, place) for row, names in enumerate(rows) for place, storey in enumerate(names)}
    found = []
    for other in sorted(imported):
        if other.split(".")[0] != "fastmeta":
            found.append(f"{name} imports {other}")
        elif other == "fastmeta" and storey_of(name) in rows[0]:
            continue
        elif other in ENTRIES:
            found.append(f"{name} imports the package's own front, {other}")
        elif storey_of(name) == storey_of(other) == "ops/<op>":
            if name.split(".")[2] != other.split(".")[2]:
                found.append(f"{name} imports its sibling {other}")
        elif level[storey_of(name)] > level[storey_of(other)]:
            found.append(f"{name} imports {other}, which stands above it")
    return found


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_run_downward(path: Path) -> None:
    name = name_of(path)
    if name not in ENTRIES:
        assert faults(name, imports(path), storeys()) == []


@pytest.mark.parametrize(
    ("name", "line", "fault"),
    [
        ("fastmeta.core.checks", "from fastmeta.engine import plan", "stands above"),
        ("fastmeta.ops.linear.op", "import fastmeta.engine.plan", "stands above"),
        ("fastmeta.ops.linear.op", "from fastmeta.ops.conv2d import reference", "sibling"),
        ("fastmeta.ops.linear.op", "from fastmeta.ops import catalogue", "stands above"),
        ("fastmeta.ops.linear.op", "def f():\n    from fastmeta.tasks.batch import TaskBatch", "stands above"),
        ("fastmeta.learner.run", "from fastmeta.cli import main", "stands above"),
        ("fastmeta.engine.plan", "from tests import oracle", "imports tests"),
        ("fastmeta.engine.plan", "import benchmarks", "imports benchmarks"),
        ("fastmeta.learner.run", "from examples import common", "imports examples"),
        ("fastmeta.core.checks", "from fastmeta import MAML", "front"),
        ("fastmeta.cli.main", "from fastmeta.learner import run\nfrom fastmeta.core import files", ""),
        ("fastmeta.ops.linear.op", "from fastmeta.ops.linear import reference\nimport torch", ""),
    ],
)
def test_the_check_finds_what_it_should(name: str, line: str, fault: str) -> None:
    found = faults(name, imports(PACKAGE, line), storeys())
    assert len(found) == bool(fault)
    assert all(fault in message for message in found)


def test_the_picture_names_every_folder_and_no_other() -> None:
    named = {storey for row in storeys() for storey in row}
    folders = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").is_file()}
    assert named == folders | {"ops/<op>"}


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_files_are_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) < LONGEST


@pytest.mark.parametrize(
    "folder", [p.name for p in sorted((PACKAGE / "ops").iterdir()) if (p / "__init__.py").is_file()]
)
def test_an_op_has_its_reference_and_its_entry(folder: str) -> None:
    assert (PACKAGE / "ops" / folder / "reference.py").is_file()
    assert (PACKAGE / "ops" / folder / "op.py").is_file()


@pytest.mark.parametrize("folder", [p.name for p in sorted((ROOT / "csrc").iterdir()) if p.is_dir()])
def test_native_sources_belong_to_an_op_to_the_executor_or_to_a_module(folder: str) -> None:
    of_an_op = (PACKAGE / "ops" / folder / "native.py").is_file()
    of_a_module = any(
        (PACKAGE / storey / f"{folder}.py").is_file() for storey in ("core", "algorithms", "engine", "compat")
    )
    of_the_executor = any(f'"{folder}"' in path.read_text() for path in (PACKAGE / "engine" / "lower").glob("*.py"))
    assert folder in ("common", "executor") or of_an_op or of_the_executor or of_a_module


NATIVE = sorted(p for ending in ("h", "cpp", "cuh", "cu") for p in (ROOT / "csrc").glob(f"*/*.{ending}"))


def native_faults(folder: str, entry: bool, included: list[str]) -> list[str]:
    """Headers that a native source of ``folder`` must not include: those of other operations."""
    below = {".", "common", "executor"} if folder != "common" else {"."}
    return [] if entry else [path for path in included if str(Path(path).parent).removeprefix("../") not in below]


@pytest.mark.parametrize("path", NATIVE, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_native_operations_include_no_sibling(path: Path) -> None:
    included = re.findall(r'^#include "([^"]+)"', path.read_text(), re.MULTILINE)
    assert native_faults(path.parent.name, path.name.startswith("bind"), included) == []


@pytest.mark.parametrize(
    ("folder", "included", "fault"),
    [
        ("pool", "../conv_block/geometry.h", True),
        ("common", "../executor/plan.h", True),
        ("pool", "../common/pool.h", False),
        ("pool", "kernels.h", False),
        ("norm", "../executor/operation.h", False),
    ],
)
def test_the_check_of_includes_finds_what_it_should(folder: str, included: str, fault: bool) -> None:
    assert native_faults(folder, False, [included]) == [included] * fault
