"""The resident executor on a CPU: builds it with tests/csrc/cuda_shim.h and calls it with plain tensors."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import shutil
import subprocess
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pybind11
import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[2]
ACTIVATIONS = ("identity", "relu", "leaky_relu", "tanh", "sigmoid", "silu", "gelu")
LOSSES = ("squared_error", "cross_entropy", "binary_cross_entropy")
LARGEST = 227 << 10  # bytes of shared memory, as a Hopper GPU's block has


def build(
    folder: Path, sources: Path = ROOT, level: str = "-O1", *, name: str = "resident_shim", flags: Sequence[str] = ()
) -> Path:
    """Compile a source of ``tests/csrc``, with the ``csrc`` and ``tests`` below ``sources``."""
    target = folder / f"{name}.so"
    words = ["g++", "-std=c++17", level, "-fPIC", "-shared", *flags]
    words += ["-Wall", "-Wextra", "-Wno-clobbered", "-Wno-unknown-pragmas"]
    words += [f"-I{sources / 'csrc'}", f"-I{sources / 'tests' / 'csrc'}"]
    words += [str(sources / "tests" / "csrc" / f"{name}.cpp"), "-o", str(target)]
    answer = subprocess.run(words, capture_output=True, text=True, check=False)
    if answer.returncode or "warning" in answer.stderr:
        raise RuntimeError(answer.stderr)
    return target


def built(name: str, *, flags: Sequence[str] = ()) -> Path:
    """A library of this tree, which the processes of one run of tests have in common: the first to ask compiles it."""
    import fcntl  # where there is a compiler there is this

    folder = Path(os.environ["FASTMETA_TEST_BUILDS"])
    with (folder / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        target = folder / f"{name}.so"
        return target if target.exists() else build(folder, name=name, flags=flags)


@functools.cache
def extension() -> ModuleType:
    """The extension module ``_cuda`` of this tree, whose kernels run on tensors of the CPU."""
    flags = ["-fvisibility=hidden", f"-I{sysconfig.get_path('include')}", f"-I{pybind11.get_include()}"]
    spec = importlib.util.spec_from_file_location("_cuda", built("cuda_module_shim", flags=flags))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def library() -> ctypes.CDLL:
    """The library of this tree."""
    return ctypes.CDLL(str(built("resident_shim")))


def compiler() -> bool:
    """Whether there is one."""
    return shutil.which("g++") is not None and os.name == "posix"


@dataclass(frozen=True)
class Net:
    """A chain of linear layers: widths, and one activation and whether there is a bias for each."""

    widths: tuple[int, ...]
    activations: tuple[str, ...]
    biases: tuple[bool, ...]
    loss: str = "squared_error"
    mean: bool = True
    ignored: int = -100
    negative_slope: float = 0.1

    def module(self, dtype: torch.dtype) -> nn.Sequential:
        """The same as a module."""
        made = {
            "identity": nn.Identity,
            "relu": nn.ReLU,
            "leaky_relu": lambda: nn.LeakyReLU(self.negative_slope),
            "tanh": nn.Tanh,
            "sigmoid": nn.Sigmoid,
            "silu": nn.SiLU,
            "gelu": nn.GELU,
        }
        parts: list[nn.Module] = []
        for i, (activation, bias) in enumerate(zip(self.activations, self.biases, strict=True)):
            parts += [nn.Linear(self.widths[i], self.widths[i + 1], bias=bias, dtype=dtype), made[activation]()]
        return nn.Sequential(*parts)

    def criterion(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Its loss."""
        reduction = "mean" if self.mean else "sum"
        if self.loss == "cross_entropy":
            return F.cross_entropy(outputs, targets, reduction=reduction, ignore_index=self.ignored)
        of = F.mse_loss if self.loss == "squared_error" else F.binary_cross_entropy_with_logits
        return of(outputs, targets, reduction=reduction)

    def numbers(self) -> list[tuple[int, int]]:
        """Of each layer's weight and bias among the module's parameters; -1 where there is none."""
        found, at = [], 0
        for bias in self.biases:
            found.append((at, at + 1 if bias else -1))
            at += 1 + bias
        return found

    def data(self, tasks: int, n: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Random inputs and targets."""
        x = torch.randn(tasks, n, self.widths[0], dtype=torch.float64)
        if self.loss == "cross_entropy":
            y = torch.randint(self.widths[-1], (tasks, n))
            if self.ignored >= 0:
                y[:, 0] = (self.ignored + 1) % self.widths[-1]  # one that counts
            return x.to(dtype), y
        draw = torch.rand if self.loss == "binary_cross_entropy" else torch.randn
        y = draw(tasks, n, self.widths[-1], dtype=torch.float64)
        return x.to(dtype), y.to(dtype)


@dataclass
class Result:
    """Everything that a meta-step gives."""

    loss: Tensor
    losses: Tensor
    support_losses: Tensor
    outputs: Tensor
    gradient: Tensor
    d_alpha: Tensor
    spilled: bool = field(default=False)

    def tensors(self) -> list[Tensor]:
        return [self.loss, self.losses, self.support_losses, self.outputs, self.gradient, self.d_alpha]


def run(
    net: Net,
    parameters: list[Tensor],
    support: tuple[Tensor, Tensor],
    query: tuple[Tensor, Tensor],
    alpha: Tensor,  # [1 or K, 1 or S]
    steps: int,
    *,
    second_order: bool = True,
    learned: bool = True,
    gradient: bool = True,
    adapted: int | None = None,
    d_losses: Tensor | None = None,
    factored: bool = False,
    limit: int = LARGEST,
    threads: int = 0,
    seed: int = 0,
    of: ctypes.CDLL | None = None,
) -> Result:
    """One meta-step; results begin as NaN."""
    dtype, tasks, out = parameters[0].dtype, support[0].shape[0], net.widths[-1]
    nan: Any = float("nan")
    first: list[Tensor] = []
    data = support[0], query[0]
    if factored:
        bases = [x @ parameters[0].detach().t() for x in data]
        first = [*bases, *(torch.full_like(base, nan) for base in bases)]
        support, query = ((x @ data[0].transpose(1, 2), y) for x, y in (support, query))
    result = Result(
        torch.full((), nan, dtype=dtype),
        torch.full((tasks,), nan, dtype=dtype),
        torch.full((steps, tasks), nan, dtype=dtype),
        torch.full((tasks, query[0].shape[1], out), nan, dtype=dtype),
        torch.full((sum(p.numel() for p in parameters[factored:]),), nan, dtype=dtype),
        torch.full(alpha.shape, nan, dtype=dtype),
    )
    layers = []
    for i, (weight, bias) in enumerate(net.numbers()):
        layers += [net.widths[i], net.widths[i + 1], ACTIVATIONS.index(net.activations[i]), weight, bias]
    kind = [steps, gradient, second_order, learned, *alpha.shape, len(parameters) if adapted is None else adapted]
    given = [support[0], query[0], support[1], query[1], alpha, d_losses, *result.tensors()]
    if not (learned and gradient and steps):
        given[11] = None  # d_alpha
    given = [None if t is None else t.contiguous() for t in [*given, *(p.detach() for p in parameters)]]
    pointers = (ctypes.c_void_p * len(given))(*(None if t is None else t.data_ptr() for t in given))
    entry = getattr(of or library(), "run64" if dtype == torch.float64 else "run32")
    spilled = entry(
        (ctypes.c_int * len(layers))(*layers),
        (ctypes.c_double * len(net.activations))(*([net.negative_slope] * len(net.activations))),
        len(net.activations),
        (ctypes.c_int64 * 3)(LOSSES.index(net.loss), net.mean, net.ignored),
        support[0].shape[1],
        query[0].shape[1],
        (ctypes.c_int * 8)(*kind, len(parameters)),
        ctypes.c_int64(tasks),
        pointers,
        (ctypes.c_void_p * 4)(*(t.data_ptr() for t in first)) if first else None,
        limit,
        threads,
        seed,
    )
    if spilled < 0:
        raise ValueError(f"resident: the plan must fit into {limit} bytes of shared memory")
    result.spilled = bool(spilled)
    if factored:
        d_weight = sum(c.flatten(0, 1).t() @ x.flatten(0, 1) for c, x in zip(first[2:], data, strict=True))
        result.gradient = torch.cat([torch.as_tensor(d_weight).reshape(-1), result.gradient])
    return result
