"""Compiles shipped builds of Triton kernels ahead of time, without a GPU, and reads what they take from the cubin.

``python -m tests.kernels.resources [--write] [module ...]`` compares with ``resources.json``, or writes it; with
another version of Triton than the one that file is of, only what no build may have is looked for. It runs in a process
of its own: kernels that were made for the interpreter cannot be compiled.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = Path(__file__).with_name("resources.json")
CAPABILITIES = (80, 90)
SHARED_LIMIT = {80: 163 << 10, 90: 227 << 10}  # bytes of shared memory that one block may have
COUNTED = ("HGMMA", "HMMA", "LDL", "STL")


def modules() -> list[str]:
    """The modules that ship kernels."""
    found = sorted((ROOT / "fastmeta" / "ops").glob("*/triton.py"))
    return [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in found]


def read(shipped: Any, capability: int) -> dict[str, Any]:
    """Registers, stack, shared memory and instructions of one build."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = shipped.kernel.arg_names
    pointers = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if shipped.signature[n].startswith("*")}
    source = ASTSource(shipped.kernel, shipped.signature, shipped.constants, pointers)
    options = {"num_warps": shipped.num_warps, "num_stages": shipped.num_stages, "enable_fp_fusion": True}
    built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(built.asm["cubin"])
        usage = _output(tool, "-res-usage", cubin)
        code = _output(tool, "-sass", cubin)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"resources: cuobjdump must report registers, got {usage!r}")
    counts = {name: len(re.findall(rf"\b{name}\b", code)) for name in COUNTED}
    return {"registers": int(found[1]), "stack": int(found[2]), "shared": built.metadata.shared, **counts}


def _output(*command: Any) -> str:
    ran = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=False)
    return ran.stdout + ran.stderr


def faults(name: str, found: dict[str, Any], capability: int, *, tensor_cores: bool) -> list[str]:
    """What no build may have: local memory, more shared memory than a block can get, tensor cores unused."""
    wrong = []
    if found["stack"] or found["LDL"] or found["STL"]:
        wrong.append(f"{name}: spills: {found}")
    if found["shared"] > SHARED_LIMIT[capability]:
        wrong.append(f"{name}: {found['shared']} bytes of shared memory, at most {SHARED_LIMIT[capability]}")
    if tensor_cores and not found["HGMMA"] and not found["HMMA"]:
        wrong.append(f"{name}: uses no tensor core")
    return wrong


def gather(names: list[str]) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Resources of every shipped build of the modules by name, and what is wrong with them."""
    jobs = [
        (f"{shipped.name} sm_{capability}", shipped, capability)
        for module in names
        for shipped in importlib.import_module(module).shipped()
        for capability in CAPABILITIES
        if capability in shipped.capabilities
    ]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = list(pool.map(lambda job: read(job[1], job[2]), jobs))
    wrong = [
        fault
        for (name, shipped, capability), one in zip(jobs, found, strict=True)
        for fault in faults(name, one, capability, tensor_cores=shipped.tensor_cores)
    ]
    return {name: one for (name, _, _), one in zip(jobs, found, strict=True)}, wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("modules", nargs="*", help="modules that ship kernels; all of them by default")
    parser.add_argument("--write", action="store_true", help="write what is found instead of comparing")
    arguments = parser.parse_args()
    found, wrong = gather(arguments.modules or modules())
    kept = json.loads(GOLDEN.read_text()) if GOLDEN.is_file() else {"triton": "", "builds": {}}
    version, golden = importlib.metadata.version("triton"), kept["builds"]
    if arguments.write:
        others = golden if arguments.modules and kept["triton"] == version else {}
        builds = dict(sorted({**others, **found}.items()))
        GOLDEN.write_text(json.dumps({"triton": version, "builds": builds}, indent=1) + "\n")
    elif version == kept["triton"]:
        wrong += [f"{name}: {one}, was {golden.get(name)}" for name, one in found.items() if one != golden.get(name)]
    for name, one in found.items():
        print(name, " ".join(f"{key} {value}" for key, value in one.items()))
    if wrong:
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main()
