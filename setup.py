"""Builds the extension ``fastmeta._C``: C++17 and pybind11, no PyTorch header, a few files once per instruction set.

``FASTMETA_BUILD`` says what to build:

* ``auto`` (the default): the CPU kernels; without a C++ compiler the package installs and runs on its reference
  implementations, and ``fastmeta doctor`` shows what it lost and why;
* ``cpu``: the CPU kernels, or an error;
* ``cuda``: the CUDA kernels as well, or an error (this version has none);
* ``none``: nothing.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
MODES = ("auto", "cpu", "cuda", "none")
X86_LEVELS = ("v2", "v3", "v4")
# What a compiler must know: C++17, and the vector extension of GCC (9 or later) and Clang.
PROBE = """
#include <Python.h>
#include <string_view>
typedef float V __attribute__((vector_size(16)));
V larger(V a, V b) { return a > b ? a : b; }
"""
UNIX_FLAGS = [
    "-std=c++17",
    "-O3",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-g0",
    "-Wall",
    "-Wextra",
]
# Without contraction to fused multiply-adds every instruction set returns the same bits (csrc/inner_update/math.h).
SAME_BITS = "inner_update"
MSVC_FLAGS = ["/std:c++17", "/O2", "/fp:precise", "/EHsc"]


def build_mode() -> str:
    """What ``FASTMETA_BUILD`` asks for; exits with a message where that cannot be."""
    mode = os.environ.get("FASTMETA_BUILD", "auto")
    if mode not in MODES:
        sys.exit(f"setup: FASTMETA_BUILD must be one of {', '.join(MODES)}, got {mode!r}")
    if mode == "cuda":
        sys.exit(
            "setup: FASTMETA_BUILD=cuda cannot be met: this version of fastmeta has no CUDA sources. "
            "Use FASTMETA_BUILD=auto or cpu; on a GPU the operations run through torch."
        )
    return mode


def write_record(folder: Path, mode: str, instruction_sets: list[str], reason: str) -> None:
    """Note beside the package what was built, for ``fastmeta doctor``."""
    record = {"mode": mode, "instruction_sets": instruction_sets, "reason": reason}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "_build.json").write_text(json.dumps(record, indent=2) + "\n")


def remove_extension(folder: Path) -> None:
    """Remove what an earlier build left, which would be used in spite of the record."""
    for stale in folder.glob("_C.*"):
        stale.unlink()


class BuildPython(build_py):
    """Copies the modules, and notes that nothing is compiled where that was asked for."""

    def run(self) -> None:
        """Do it."""
        super().run()
        if build_mode() == "none":
            package = ROOT / "fastmeta" if self.editable_mode else Path(self.build_lib) / "fastmeta"
            remove_extension(package)
            write_record(package, "none", [], "the package was installed with FASTMETA_BUILD=none")


class BuildExtension(build_ext):
    """Compiles ``cpu.cpp`` of every op once per instruction set, everything else once."""

    extensions: list[Extension]
    instruction_sets: list[str]
    folder: Path

    def run(self) -> None:
        """Settle where the package lies, then build."""
        self.folder = ROOT / "fastmeta" if self.inplace else Path(self.build_lib) / "fastmeta"
        super().run()

    def build_extensions(self) -> None:
        """Build; in mode ``auto`` and without a working compiler, go on without and note the reason."""
        mode = build_mode()
        self.instruction_sets = []
        fault = self.fault(PROBE, self.flags())
        if not fault:
            super().build_extensions()
            write_record(self.folder, mode, self.instruction_sets, "")
            return
        if mode != "auto":
            sys.exit(f"setup: FASTMETA_BUILD={mode} needs GCC or Clang with C++17, and Python's headers: {fault}")
        reason = f"neither GCC nor Clang with C++17 and Python's headers was found at installation ({fault})"
        self.warn(f"fastmeta will run on its reference implementations: {reason}")
        remove_extension(self.folder)
        self.extensions = []
        write_record(self.folder, mode, [], reason)

    def flags(self) -> list[str]:
        """Options for every file."""
        return MSVC_FLAGS if self.compiler.compiler_type == "msvc" else UNIX_FLAGS

    def contraction(self, source: str) -> list[str]:
        """Whether products and sums of ``source`` may become fused multiply-adds, as an option."""
        if self.compiler.compiler_type == "msvc":
            return []
        return ["-ffp-contract=off" if Path(source).parent.name == SAME_BITS else "-ffp-contract=fast"]

    def fault(self, source: str, flags: list[str]) -> str:
        """What is wrong with compiling ``source``; empty where nothing is."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "probe.cpp"
            path.write_text(source)
            try:
                self.compiler.compile([str(path)], output_dir=folder, extra_postargs=flags)
            except (CompileError, OSError) as error:
                return str(error)
        return ""

    def build_extension(self, extension: Extension) -> None:
        """Compile and link one extension."""
        msvc = self.compiler.compiler_type == "msvc"
        flags = self.flags()
        x86 = platform.machine().lower() in ("x86_64", "amd64") and not msvc
        levels = [level for level in X86_LEVELS if x86 and not self.fault("", [f"-march=x86-64-{level}"])]
        macros: list[Any] = [(f"FASTMETA_HAVE_{level.upper()}", "1") for level in levels]
        jobs = [(source, "", [*flags, *self.contraction(source)]) for source in extension.sources]
        for source in extension.sources:
            if Path(source).name == "cpu.cpp":
                own = [*flags, *self.contraction(source)]
                jobs += [(source, level, [*own, f"-march=x86-64-{level}"]) for level in levels]

        def compile_one(job: tuple[str, str, list[str]]) -> list[str]:
            source, level, arguments = job
            return self.compiler.compile(
                [source],
                output_dir=str(Path(self.build_temp) / (level or "plain")),
                macros=[*macros, ("FASTMETA_ISA", level or "plain")],
                include_dirs=extension.include_dirs,
                extra_postargs=arguments,
                depends=extension.depends,
            )

        with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
            objects = [name for names in pool.map(compile_one, jobs) for name in names]
        self.compiler.link_shared_object(
            objects,
            self.get_ext_fullpath(extension.name),
            libraries=self.get_libraries(extension),
            extra_postargs=[] if msvc or sys.platform == "darwin" else ["-pthread", "-Wl,--strip-all"],
            build_temp=self.build_temp,
            target_lang="c++",
        )
        self.instruction_sets = ["plain", *levels]


def extensions() -> list[Extension]:
    """The one extension, or none where nothing is to be compiled."""
    if build_mode() == "none":
        return []
    import pybind11

    sources = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*.cpp"))
    headers = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*.h"))
    return [
        Extension(
            "fastmeta._C",
            sources=sources,
            include_dirs=[pybind11.get_include()],
            depends=[*headers, "setup.py"],
            language="c++",
        )
    ]


setup(ext_modules=extensions(), cmdclass={"build_py": BuildPython, "build_ext": BuildExtension})
