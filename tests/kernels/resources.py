"""Compiles shipped builds of Triton kernels ahead of time, without a GPU, and reads what they take from the cubin.

``python -m tests.kernels.resources [--write] [--all] [module ...]`` compares with ``resources.json``, or writes it;
with another version of Triton than the one that file is of, only what no build may have is looked for. It runs in a
process of its own: kernels that were made for the interpreter cannot be compiled.

One version of Triton makes the same of the same intermediate code, so ``resources.json`` keeps a digest of that beside
what was found, and one of the sources that it all comes from. The first build of each module for the newest GPU is
compiled every time. Where the sources are others, so is every build whose code is not the one that was read; ``--all``
compiles all.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = Path(__file__).with_name("resources.json")
CAPABILITIES = (80, 90)
SHARED_LIMIT = {80: 163 << 10, 90: 227 << 10}  # bytes of shared memory that one block may have
COUNTED = ("HGMMA", "HMMA", "LDL", "STL")


def modules() -> list[str]:
    """The modules that ship kernels."""
    found = sorted((ROOT / "fastmeta" / "ops").glob("*/triton*.py"))
    shipping = [path for path in found if "\ndef shipped()" in path.read_text()]
    return [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in shipping]


def sources() -> str:
    """Of the files that kernels are written in, and their tiles and constants."""
    folders = [path.parent for path in sorted((ROOT / "fastmeta" / "ops").glob("*/triton.py"))]
    files = [path for folder in folders for kind in ("*.py", "*.json") for path in folder.glob(kind)]
    files += (ROOT / "fastmeta" / "core").glob("triton_*.py")
    return hashlib.sha256(b"".join(path.read_bytes() for path in sorted(files))).hexdigest()[:16]


@dataclass(frozen=True)
class Build:
    """One shipped build for one compute capability."""

    shipped: Any
    capability: int

    @property
    def name(self) -> str:
        """Unique among all builds."""
        return f"{self.shipped.name} sm_{self.capability}"

    @property
    def target(self) -> Any:
        """The GPU it is for, as Triton names it."""
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)

    @property
    def options(self) -> dict[str, Any]:
        """Triton's options."""
        return {"num_warps": self.shipped.num_warps, "num_stages": self.shipped.num_stages, "enable_fp_fusion": True}

    def source(self) -> Any:
        """The kernel with its constants; addresses are aligned, as torch's are."""
        from triton.compiler import ASTSource

        kernel, types = self.shipped.kernel, self.shipped.signature
        aligned = [["tt.divisibility", 16]]
        pointers = {}
        for i, name in enumerate(kernel.arg_names):
            if isinstance(types[name], tuple):
                pointers |= {(i, j): aligned for j, kind in enumerate(types[name]) if kind.startswith("*")}
            elif types[name].startswith("*"):
                pointers[i,] = aligned
        return ASTSource(kernel, types, self.shipped.constants, pointers)

    def digest(self) -> str:
        """Of all that Triton's passes are given: code without places in files, target and options."""
        from triton._C.libtriton import ir
        from triton.compiler.compiler import make_backend

        backend, context = make_backend(self.target), ir.context()
        ir.load_dialects(context)
        backend.load_dialects(context)
        options = backend.parse_options(self.options)
        parts = options, backend.get_codegen_implementation(options), backend.get_module_map(), context
        code = self.source().make_ir(self.target, *parts).str_nodebug()
        return hashlib.sha256(f"{self.target} {self.options} {code}".encode()).hexdigest()[:16]


def read(build: Build) -> dict[str, Any]:
    """Registers, stack, shared memory and instructions of one build."""
    import triton

    built = triton.compile(build.source(), target=build.target, options=build.options)
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


def builds(names: list[str]) -> list[Build]:
    """Every shipped build of the modules."""
    shipped = [one for module in names for one in importlib.import_module(module).shipped()]
    return [Build(one, capability) for one in shipped for capability in CAPABILITIES if capability in one.capabilities]


def gather(
    wanted: list[Build], known: dict[str, Any], always: set[str], *, unchanged: bool = False
) -> dict[str, dict[str, Any]]:
    """Resources by name: compiled, or as ``known`` where that is of the same code, ``always`` excepted.

    Where the sources are ``unchanged``, so is the code of what is known.
    """

    def look(build: Build) -> dict[str, Any]:
        before = known.get(build.name)
        if unchanged and before is not None and build.name not in always:
            return dict(before)
        digest = build.digest()
        if build.name not in always and before is not None and before["code"] == digest:
            return dict(before)
        return {"code": digest, **read(build)}

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip([build.name for build in wanted], pool.map(look, wanted), strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("modules", nargs="*", help="modules that ship kernels; all of them by default")
    parser.add_argument("--write", action="store_true", help="write what is found instead of comparing")
    parser.add_argument("--all", action="store_true", help="compile every build")
    arguments = parser.parse_args()
    wanted = builds(arguments.modules or modules())
    kept = json.loads(GOLDEN.read_text()) if GOLDEN.is_file() else {"triton": "", "builds": {}}
    version = importlib.metadata.version("triton")
    golden = kept["builds"] if kept["triton"] == version else {}
    newest = [build for build in wanted if build.capability == CAPABILITIES[-1]]
    first = {build.shipped.kernel.__module__: build for build in reversed(newest)}
    always = {build.name for build in (wanted if arguments.all else first.values())}
    found = gather(wanted, golden, always, unchanged=kept.get("sources") == sources())
    wrong = [
        fault
        for build in wanted
        for fault in faults(build.name, found[build.name], build.capability, tensor_cores=build.shipped.tensor_cores)
    ]
    if arguments.write:
        every = {**(golden if arguments.modules else {}), **found}
        GOLDEN.write_text(
            json.dumps({"triton": version, "sources": sources(), "builds": dict(sorted(every.items()))}, indent=1)
            + "\n"
        )
    elif golden:
        for name, one in found.items():
            before = golden.get(name, {})
            if one | {"code": ""} != before | {"code": ""}:
                wrong.append(f"{name}: {one}, was {before or 'not there'}")
    for name, one in found.items():
        print(name, " ".join(f"{key} {value}" for key, value in one.items()))
    if wrong:
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main()
