"""Builds the extensions: C++17, CUDA and pybind11, no PyTorch header.

``fastmeta._C`` has the CPU kernels, a few files once per instruction set; ``fastmeta._cuda`` what stands in folders
with a ``.cu``, linked with the static CUDA runtime. ``FASTMETA_BUILD`` says what to build:

* ``auto`` (the default): the CPU kernels, and the CUDA kernels where nvcc is found and compiles them; without a C++
  compiler the package installs and runs on its reference implementations; ``fastmeta doctor`` shows what it lost, and
  why;
* ``cpu``: the CPU kernels, or an error;
* ``cuda``: the CPU kernels and the CUDA kernels, or an error;
* ``none``: nothing.

An optimisation level in ``CXXFLAGS`` takes the place of the kernels' own: ``-O0`` builds in a third of
the time what is many times slower.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
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
X86_LEVELS = ("v3", "v4")  # v2 has no wider vectors than a plain build
# What a compiler must know: C++17, and the vector extension of GCC (9 or later) and Clang.
PROBE = """
#include <Python.h>
#include <string_view>
typedef float V __attribute__((vector_size(16)));
V larger(V a, V b) { return a > b ? a : b; }
"""
UNIX_FLAGS = [
    "-std=c++17",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-g0",
    "-Wall",
    "-Wextra",
]
# Without contraction to fused multiply-adds every instruction set returns the same bits (csrc/inner_update/math.h).
SAME_BITS = ("inner_update", "adaptive_update")
# Where a loop of products happens to begin is worth up to 7 % of its time, most where another thread shares the core.
ALIGNED = "-falign-loops=64"
MSVC_FLAGS = ["/std:c++17", "/O2", "/fp:precise", "/EHsc"]
CUDA_MODULE = ROOT / "csrc" / "cuda_module.cpp"
CAPABILITIES = ("80", "90")  # machine code for these; other devices translate what they are given for the last
NVCC_FLAGS = ["-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden,-Wall", "--threads", "0"]
NVCC_FLAGS += [f"-gencode=arch=compute_{c},code=sm_{c}" for c in CAPABILITIES[:-1]]
NVCC_FLAGS += ["-gencode=arch=compute_{0},code=[sm_{0},compute_{0}]".format(CAPABILITIES[-1])]


def build_mode() -> str:
    """What ``FASTMETA_BUILD`` asks for; exits with a message where that cannot be."""
    mode = os.environ.get("FASTMETA_BUILD", "auto")
    if mode not in MODES:
        sys.exit(f"setup: FASTMETA_BUILD must be one of {', '.join(MODES)}, got {mode!r}")
    return mode


def write_record(folder: Path, mode: str, instruction_sets: list[str], reason: str, cuda_reason: str) -> None:
    """Note beside the package what was built, and why not the rest, for ``fastmeta doctor``."""
    cuda = {"capabilities": [] if cuda_reason else list(CAPABILITIES), "reason": cuda_reason}
    record = {"mode": mode, "instruction_sets": instruction_sets, "reason": reason, "cuda": cuda}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "_build.json").write_text(json.dumps(record, indent=2) + "\n")


def remove_extension(folder: Path, name: str) -> None:
    """Remove what an earlier build left, which would be used in spite of the record."""
    for stale in folder.glob(f"{name}.*"):
        stale.unlink()


def nvcc() -> str:
    """The CUDA compiler: what ``NVCC`` names, else on the path, else below ``CUDA_HOME``; empty where there is none."""
    named = os.environ.get("NVCC") or "nvcc"
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    return shutil.which(named) or shutil.which(str(Path(home) / "bin" / named)) or ""


def call(*command: str) -> None:
    """Run a compiler; raises ``CompileError`` with its last words."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise CompileError(str(error)) from error
    if done.returncode:
        words = (done.stderr.strip() or done.stdout.strip() or "it says nothing").splitlines()
        raise CompileError(f"{command[0]} failed: {' / '.join(words[-3:])}")


def size_of(source: str) -> int:
    """Bytes of all files beside a source, as its time to compile is that of the headers it includes."""
    return sum(path.stat().st_size for path in (ROOT / source).parent.iterdir() if path.is_file())


class BuildPython(build_py):
    """Copies the modules, and notes that nothing is compiled where that was asked for."""

    def run(self) -> None:
        """Do it."""
        super().run()
        if build_mode() == "none":
            package = ROOT / "fastmeta" if self.editable_mode else Path(self.build_lib) / "fastmeta"
            reason = "the package was installed with FASTMETA_BUILD=none"
            for name in ("_C", "_cuda"):
                remove_extension(package, name)
            write_record(package, "none", [], reason, reason)


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
            cuda = self.cuda_fault(mode)
            super().build_extensions()
            write_record(self.folder, mode, self.instruction_sets, "", cuda)
            return
        if mode != "auto":
            sys.exit(f"setup: FASTMETA_BUILD={mode} needs GCC or Clang with C++17, and Python's headers: {fault}")
        reason = f"neither GCC nor Clang with C++17 and Python's headers was found at installation ({fault})"
        self.warn(f"fastmeta will run on its reference implementations: {reason}")
        for name in ("_C", "_cuda"):
            remove_extension(self.folder, name)
        self.extensions = []
        write_record(self.folder, mode, [], reason, reason)

    def cuda_fault(self, mode: str) -> str:
        """Build the CUDA kernels, and take them off the list; why they are missing where they are."""
        wanted = [e for e in self.extensions if e.name == "fastmeta._cuda"]
        if not wanted:
            remove_extension(self.folder, "_cuda")
            return f"the package was installed with FASTMETA_BUILD={mode}"
        try:
            self.build_cuda(wanted[0])
        except CompileError as error:
            if mode == "cuda":
                sys.exit(f"setup: FASTMETA_BUILD=cuda cannot be met: {error}")
            remove_extension(self.folder, "_cuda")
            self.extensions = [e for e in self.extensions if e is not wanted[0]]
            if nvcc():
                self.warn(f"fastmeta will run without its CUDA kernels: {error}")
            return f"no CUDA kernels were built at installation ({error})"
        return ""

    def build_cuda(self, extension: Extension) -> None:
        """Compile and link the CUDA kernels."""
        compiler = nvcc()
        if not compiler:
            raise CompileError("nvcc was not found; NVCC or CUDA_HOME can name it")
        target, temporary = Path(self.get_ext_fullpath(extension.name)), Path(self.build_temp) / "cuda"
        for folder in (target.parent, temporary):
            folder.mkdir(parents=True, exist_ok=True)
        includes = [f"-I{folder}" for folder in (*self.compiler.include_dirs, *extension.include_dirs)]

        def compile_one(source: str) -> str:
            made = str(temporary / f"{Path(source).parent.name}_{Path(source).name}.o")
            call(compiler, *NVCC_FLAGS, *includes, "-c", source, "-o", made)
            return made

        with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
            objects = list(pool.map(compile_one, extension.sources))
        call(compiler, "-shared", "-cudart", "static", *objects, "-o", str(target), "-Xlinker", "--strip-all")

    def flags(self) -> list[str]:
        """Options for every file."""
        if self.compiler.compiler_type == "msvc":
            return MSVC_FLAGS
        asked = [word for word in os.environ.get("CXXFLAGS", "").split() if word.startswith("-O")]
        return [*UNIX_FLAGS, *(asked or ["-O3"])]

    def contraction(self, source: str) -> list[str]:
        """Whether products and sums of ``source`` may become fused multiply-adds, as an option."""
        if self.compiler.compiler_type == "msvc":
            return []
        return ["-ffp-contract=off" if Path(source).parent.name in SAME_BITS else "-ffp-contract=fast"]

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
        """Compile and link the CPU kernels."""
        if extension.name == "fastmeta._cuda":
            return  # cuda_fault has built it
        msvc = self.compiler.compiler_type == "msvc"
        flags = self.flags()
        x86 = platform.machine().lower() in ("x86_64", "amd64") and not msvc
        levels = [level for level in X86_LEVELS if x86 and not self.fault("", [f"-march=x86-64-{level}"])]
        macros: list[Any] = [(f"FASTMETA_HAVE_{level.upper()}", "1") for level in levels]
        aligned = [] if msvc or self.fault("", ["-Werror", ALIGNED]) else [ALIGNED]
        jobs: list[tuple[str, str, list[str]]] = []
        for source in extension.sources:
            own = [*flags, *self.contraction(source)]
            if Path(source).name == "cpu.cpp":
                own += aligned
                jobs += [(source, level, [*own, f"-march=x86-64-{level}"]) for level in levels]
            jobs.append((source, "", own))

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

        jobs.sort(key=lambda job: size_of(job[0]), reverse=True)  # a long one that began last would keep cores idle
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
    """What is to be compiled."""
    mode = build_mode()
    if mode == "none":
        return []
    import pybind11

    csrc = ROOT / "csrc"
    of_cuda = {path.parent for path in csrc.rglob("*.cu")}

    def extension(name: str, *patterns: str, cuda: bool) -> Extension:
        found = sorted(path for pattern in patterns for path in csrc.rglob(pattern))
        sources = [path for path in found if cuda == (path.parent in of_cuda or path == CUDA_MODULE)]
        headers = sorted(str(p.relative_to(ROOT)) for pattern in ("*.h", "*.cuh") for p in csrc.rglob(pattern))
        return Extension(
            name,
            sources=[str(path.relative_to(ROOT)) for path in sources],
            include_dirs=[pybind11.get_include()],
            depends=[*headers, "setup.py"],
            language="c++",
        )

    wanted = [extension("fastmeta._C", "*.cpp", cuda=False)]
    if mode in ("auto", "cuda"):
        wanted.append(extension("fastmeta._cuda", "*.cpp", "*.cu", cuda=True))
    return wanted


setup(ext_modules=extensions(), cmdclass={"build_py": BuildPython, "build_ext": BuildExtension})
