"""The C++ executor and its kernels under AddressSanitizer and UndefinedBehaviorSanitizer, by drivers of their own.

``tests/csrc/<name>_driver.cpp`` are programs that check their results themselves; here they are compiled with the
sources they include headers of, for the widest vectors this processor has, and run.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DRIVERS = sorted((ROOT / "tests" / "csrc").glob("*_driver.cpp"))
FLAGS = ["-std=c++17", "-O1", "-g", "-march=native", "-ffp-contract=fast", "-fno-math-errno", "-Wall", "-Wextra"]
SANITIZERS = {"address": "address,undefined", "thread": "thread"}
CHOSEN = os.environ.get("FASTMETA_SANITIZER", "address")


def sources(driver: Path) -> list[Path]:
    """The driver and every source of the folders whose headers it reaches, bindings excepted."""
    folders, seen, pending = set(), set(), [driver]
    while pending:
        path = pending.pop()
        seen.add(path)
        for name in re.findall(r'^#include "([^"]+)"', path.read_text(), re.MULTILINE):
            header = (path.parent / name).resolve()
            if header.is_relative_to(ROOT / "csrc"):
                folders.add(header.parent)
            if header not in seen:
                pending.append(header)
    sources = [path for folder in sorted(folders) for path in sorted(folder.glob("*.cpp"))]
    return [driver, *(path for path in sources if not path.name.startswith("bind"))]  # those need Python


@pytest.fixture(scope="session")
def objects(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of what is compiled, for all drivers."""
    return tmp_path_factory.mktemp("objects")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")
@pytest.mark.parametrize("driver", DRIVERS, ids=[d.stem for d in DRIVERS])
def test_drivers_run_clean(driver: Path, tmp_path: Path, objects: Path) -> None:
    sanitizer = f"-fsanitize={SANITIZERS[CHOSEN]}"
    probe = subprocess.run(
        ["g++", sanitizer, "-x", "c++", "-", "-o", str(tmp_path / "probe")],
        input="int main() {}",
        text=True,
        capture_output=True,
        check=False,
    )
    if probe.returncode:
        pytest.skip(f"g++ has no {CHOSEN} sanitizer here: {probe.stderr.strip().splitlines()[-1]}")

    def compile_one(source: Path) -> Path:
        target = objects / f"{source.parent.name}_{source.stem}.o"
        if target.exists():  # from another driver
            return target
        command = ["g++", *FLAGS, sanitizer, "-fno-sanitize-recover=all", "-c", str(source), "-o", str(target)]
        answer = subprocess.run(command, capture_output=True, text=True, check=False)
        assert answer.returncode == 0, answer.stderr
        assert "warning" not in answer.stderr, answer.stderr
        return target

    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        compiled = [str(path) for path in pool.map(compile_one, sources(driver))]
    program = tmp_path / "driver"
    subprocess.run(["g++", sanitizer, *compiled, "-o", str(program), "-pthread"], check=True)
    answer = subprocess.run([str(program)], capture_output=True, text=True, check=False, timeout=300)
    assert answer.returncode == 0, answer.stdout + answer.stderr
