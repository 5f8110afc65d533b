"""What nvcc makes of the resident executor: no stack, no spills, and the registers that are known."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = Path(__file__).with_name("resident_resources.json")
CAPABILITIES = ("80", "90")
REGISTERS = {"meta_step": 128, "sum_over_tasks": 255}  # a block of 512 threads has 128 for each


def version() -> str:
    """nvcc's own; the registers it uses are another's with another."""
    words = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"release [\d.]+, V([\d.]+)", words)
    assert found is not None, words
    return found[1]


def resources(capability: str, target: Path) -> dict[str, dict[str, int]]:
    """Registers, bytes of stack, of spills and of static shared memory of each kernel."""
    words = ["nvcc", "-std=c++17", "-O3", f"-arch=sm_{capability}", "-Xptxas", "-v", "-cubin"]
    words += [str(ROOT / "csrc" / "resident" / "cuda.cu"), "-o", str(target)]
    answer = subprocess.run(words, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
    assert "warning" not in answer.stderr, answer.stderr
    kernel = re.compile(
        r"Function properties for _Z\w*?\d+(meta_step|sum_over_tasks)I([fd])"
        r"(?:NS0_(?:4Plan|(8Factored))E(Lb[01])E|NS0_5Fixed\w*?ActivationE(\d)E\w*?((?:Li\d+E)+)\w*)?E\w+\s+"
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads\s+"
        r"ptxas info\s+: Used (\d+) registers(.*)"
    )
    found = {}
    curves = {"": "", "Lb0": ", straight curves", "Lb1": ", smooth curves", "1": ", ReLU", "3": ", tanh"}
    for one in kernel.findall(answer.stderr):
        name, kind, factored, smooth, activation, widths, stack, stores, loads, registers, rest = one
        shared = re.search(r"(\d+) bytes smem", rest)
        network = " ".join(re.findall(r"\d+", widths))
        key = f"{name} {'float' if kind == 'f' else 'double'}{curves[smooth or activation]}{network and f' {network}'}"
        key += ", factored" if factored else ""
        found[key] = {"registers": int(registers), "stack": int(stack), "spills": int(stores) + int(loads)}
        found[key]["shared"] = int(shared[1]) if shared else 0
    assert len(found) == 11, answer.stderr
    return found


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_resources(capability: str, tmp_path: Path) -> None:
    found = resources(capability, tmp_path / "resident.cubin")
    for name, kernel in found.items():
        assert (kernel["stack"], kernel["spills"]) == (0, 0), name
        assert kernel["registers"] <= REGISTERS[name.split()[0]], name
    golden = json.loads(GOLDEN.read_text())
    if golden["nvcc"] == version():
        assert found == golden[f"sm_{capability}"]
