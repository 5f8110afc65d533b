"""What this machine and this installation offer: versions, processor, native build, threads, GPU."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import sys
from pathlib import Path
from typing import Any

from fastmeta.core import native

PACKAGES = ("fastmeta", "torch", "numpy", "triton")


def gather() -> dict[str, Any]:
    """Everything below by name, as JSON can hold it."""
    return {
        "versions": versions(),
        "machine": machine(),
        "native": native_build(),
        "threads": threads(),
        "gpu": gpu(),
        "cuda": cuda_build(),
    }


def versions() -> dict[str, str | None]:
    """Versions of Python and of the packages that matter; ``None`` for one that is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    if found["fastmeta"] is None:  # in a checkout that is not installed
        found["fastmeta"] = sys.modules["fastmeta"].__version__
    return found


def machine() -> dict[str, Any]:
    """Operating system, processor and the number of cores this process may use."""
    return {"system": f"{platform.system()} {platform.machine()}", "processor": processor(), "cores": cores()}


def cores() -> int:
    """Processor cores this process may run on."""
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@functools.cache
def processor() -> str:
    """The processor's own name where the system tells it, else its architecture."""
    return _of_cpuinfo("model name", "Model") or platform.processor() or platform.machine()


@functools.cache
def vendor() -> str:
    """The processor's maker as it names itself, such as ``GenuineIntel``; empty where the system does not tell."""
    return _of_cpuinfo("vendor_id")


def _of_cpuinfo(*keys: str) -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() in keys and value.strip():
                return value.strip()
    return ""


def native_build() -> dict[str, Any]:
    """The compiled extension: whether it loads, why not, and its instruction sets."""
    record = native.build_record()
    found: dict[str, Any] = {
        "available": False,
        "reason": native.missing_reason(),
        "build_mode": record.get("mode"),
        "instruction_set": None,
        "compiled": [],
        "supported": [],
    }
    extension = native.extension()
    if extension is None:
        return found
    found["compiled"] = extension.compiled_instruction_sets()
    found["supported"] = extension.supported_instruction_sets()
    try:
        found["instruction_set"] = extension.instruction_set()
        found["available"] = True
    except RuntimeError as error:  # FASTMETA_ISA asks for what cannot be
        found["reason"] = str(error)
    return found


def cuda_build() -> dict[str, Any]:
    """The CUDA kernels: whether they can run, why not, and the compute capabilities they are compiled for."""
    compiled = native.build_record().get("cuda", {}).get("capabilities", [])
    reason = native.cuda_missing_reason()
    return {"available": not reason, "reason": reason, "compiled": [f"sm_{name}" for name in compiled]}


def threads() -> dict[str, Any]:
    """Threads torch and the native kernels use, and the environment variable that limits them."""
    import torch

    return {"torch": torch.get_num_threads(), "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS")}


def gpu() -> dict[str, Any]:
    """CUDA devices by name and compute capability, or the reason there is none."""
    import torch

    if torch.version.cuda is None:
        return {"devices": [], "reason": f"torch {torch.__version__} is built without CUDA"}
    if not torch.cuda.is_available():
        return {"devices": [], "reason": f"torch is built for CUDA {torch.version.cuda}, but no device is visible"}
    devices = []
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        devices.append({"name": torch.cuda.get_device_name(index), "capability": f"sm_{major}{minor}"})
    return {"devices": devices, "reason": ""}


def machine_line() -> str:
    """One line that says where a measurement was taken."""
    found, build, devices = versions(), native_build(), gpu()["devices"]
    parts = [
        processor(),
        f"{cores()} cores",
        *(device["name"] for device in devices),
        f"{threads()['torch']} threads",
        f"native {build['instruction_set']}" if build["available"] else "no native kernels",
        f"Python {found['python']}",
        f"torch {found['torch']}",
        f"fastmeta {found['fastmeta']}",
    ]
    return ", ".join(parts)
