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
# Compiled without optimisation, in a quarter of the time that -O1 takes; nothing is gone that a sanitizer should see.
# Not so a driver whose own plain loops take most of its time.
FLAGS = ["-std=c++17", "-g1", "-march=native", "-ffp-contract=fast", "-fno-math-errno", "-Wall", "-Wextra"]
LEVELS = {"conv_block_driver": "-O1"}
ARGUMENTS = {"conv_block_driver": ["80"]}  # shapes; without sanitizers it takes 200
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


# One test for all of them: where tests run over several processes, two would compile the sources that they share twice.
@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")
def test_drivers_run_clean(tmp_path: Path) -> None:
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
        target = tmp_path / f"{source.parent.name}_{source.stem}.o"
        flags = [*FLAGS, LEVELS.get(source.stem, "-O0"), sanitizer, "-fno-sanitize-recover=all"]
        command = ["g++", *flags, "-c", str(source), "-o", str(target)]
        answer = subprocess.run(command, capture_output=True, text=True, check=False)
        assert answer.returncode == 0, answer.stderr
        assert "warning" not in answer.stderr, answer.stderr
        return target

    wanted = {driver: sources(driver) for driver in DRIVERS}
    every = sorted({path for paths in wanted.values() for path in paths}, key=lambda path: path.parent.name)
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        compiled = dict(zip(every, pool.map(compile_one, every), strict=True))
    for driver, paths in wanted.items():
        program = tmp_path / driver.stem
        parts = [str(compiled[path]) for path in paths]
        subprocess.run(["g++", sanitizer, *parts, "-o", str(program), "-pthread"], check=True)
        command = [str(program), *ARGUMENTS.get(driver.stem, [])]
        answer = subprocess.run(command, capture_output=True, text=True, check=False, timeout=3600)
        assert answer.returncode == 0, f"{driver.stem}: {answer.stdout}{answer.stderr}"
