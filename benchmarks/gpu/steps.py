"""Whole meta-steps on a GPU: fastmeta and its peers on the same tasks, in the same run, with their errors."""

from __future__ import annotations

import functools
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gate import FACTOR, open_gate
from benchmarks.ours import learner
from benchmarks.peers import torch_compile, torch_func, torch_loop
from benchmarks.workloads import Problem, mini84, mlp784, omniglot, sinusoid
from fastmeta.bench.gpu_timing import graphed, interleaved, once
from tests.oracle import total_error

Gradients = dict[str, Tensor]
Call = Callable[[], Any]

WORKLOADS: dict[str, tuple[str, Callable[[], Problem]]] = {
    "sinusoid_k1": ("sinusoid, 1-40-40-1, T = 25, K = 1", lambda: sinusoid(1)),
    "sinusoid_k5": ("sinusoid, 1-40-40-1, T = 25, K = 5", lambda: sinusoid(5)),
    "sinusoid_tanh": (
        "sinusoid, 1-64-64-1, tanh, T = 100, K = 5",
        lambda: sinusoid(5, tasks=100, width=64, activation=nn.Tanh),
    ),
    "mlp784": ("MLP 784-256-128-64-5, T = 32, K = 5", mlp784),
    "mlp784_narrow": ("MLP 784-64-64-5, T = 32, K = 5", lambda: mlp784(64, 64)),
    "omniglot_5way": ("Conv4-64 28x28, 5-way 1-shot, T = 32, K = 1", lambda: omniglot(32, 5, 1, 0.4)),
    "omniglot_20way": ("Conv4-64 28x28, 20-way 1-shot, T = 16, K = 5", lambda: omniglot(16, 20, 5, 0.1)),
    "conv4_84": ("Conv4-32 84x84, T = 4, 5 + 75, K = 5", mini84),
}
SLOW = ("loop",)  # timed once
BY_TASK = ("fastmeta",)  # judged by the median of single tasks too, where no flip can hide a fault
SOME_TASKS = 2  # that a batch of one task repeated has there
NUDGES = 2  # copies with nudged weights that float32's own error is measured on
JAX_SECONDS = 60  # that JAX has to compile and run a workload
TF32 = ("omniglot_5way", "omniglot_20way", "conv4_84")  # compared with tf32 too
WITH_COMPILE = ("sinusoid_k1",)  # compiling takes minutes elsewhere


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Products and convolutions of float32 in tf32, or as precisely as the hardware can, for everyone alike."""
    matmul, conv = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    torch.backends.cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(matmul)
        torch.backends.cudnn.allow_tf32 = conv


def value_and_grad(problem: Problem, **options: Any) -> Call:
    """fastmeta without autograd."""
    maml, tasks = learner(problem, **options)
    return lambda: maml.value_and_grad(tasks)[1]


def backward(problem: Problem) -> Call:
    """fastmeta as in a training loop."""
    maml, tasks = learner(problem)
    parameters = dict(problem.model.named_parameters())

    def run() -> Gradients:
        for p in parameters.values():
            p.grad = None
        maml(tasks).loss.backward()
        return {n: p.grad for n, p in parameters.items() if p.grad is not None}

    return run


def vmapped(problem: Problem) -> Call:
    return torch_func.prepare(problem).run


def channels_last(problem: Problem) -> Problem:
    """The same images, channels last in memory."""

    def last(x: Tensor) -> Tensor:
        if x.dim() != 5:
            return x
        return x.flatten(0, 1).contiguous(memory_format=torch.channels_last).unflatten(0, x.shape[:2])

    (xs, ys), (xq, yq) = problem.support, problem.query
    model = problem.model.to(memory_format=torch.channels_last)
    return Problem(model, problem.loss, (last(xs), ys), (last(xq), yq), problem.lr, problem.steps)


VARIANTS: dict[str, Callable[[Problem], Call]] = {
    "fastmeta": value_and_grad,
    "fastmeta, backward()": backward,
    "fastmeta, graph": lambda p: graphed(value_and_grad(p)),
    "fastmeta, eager": functools.partial(value_and_grad, cuda_graph=False),
    "loop": lambda p: torch_loop.prepare(p).run,
    "torch.func": vmapped,
    "torch.func, graph": lambda p: graphed(vmapped(p)),
    "torch.func, graph, channels last": lambda p: graphed(vmapped(channels_last(p))),
    "torch.compile": lambda p: torch_compile.prepare_vmap(p).run,
}
OURS = ("fastmeta", "fastmeta, backward()", "fastmeta, graph", "fastmeta, eager")


def compare(name: str, variants: list[str], say: Callable[[str], None], *, with_tf32: bool = False) -> dict[str, Any]:
    """Time and check one workload; a peer that cannot do it is listed with its reason."""
    title, build = WORKLOADS[name]
    torch.backends.cudnn.benchmark = True
    images = any(isinstance(m, nn.Conv2d) for m in build().model.modules())
    calls: dict[str, Call] = {}
    errors: dict[str, dict[str, float]] = {}
    reasons: dict[str, str] = {}
    explained = ""
    with tf32(with_tf32):
        gate = open_gate(build().on("cuda"), NUDGES)
        bound = FACTOR * gate.float32.total
        for variant in variants:
            if "channels last" in variant and not images:
                continue
            try:
                call = VARIANTS[variant](build().on("cuda"))
                for _ in range(1 if variant in SLOW else 3):
                    result = call()
                errors[variant] = {"error": total_error(result, gate.truth), "bound": bound}
                if variant in BY_TASK:
                    once_more = functools.partial(_run, VARIANTS[variant])
                    error, most = gate.of_a_task(SOME_TASKS, once_more)
                    errors[variant] |= {"task_error": error, "task_bound": most}
                calls[variant] = call
            except Exception as error:  # a failure is a row of the table, anyone's
                reasons[variant] = reason_of(error)
        fast = {v: c for v, c in calls.items() if v not in SLOW}
        times = interleaved(fast) | {v: once(c) for v, c in calls.items() if v in SLOW}
        memory = {v: peak(c) for v, c in calls.items()}
        maml, tasks = learner(build().on("cuda"))
        explained = str(maml.explain(tasks))
    rows = [
        {
            "variant": v,
            "ms": times[v].median,
            "low": times[v].low,
            "high": times[v].high,
            **errors[v],
            "mib": memory[v],
        }
        for v in calls
    ]
    say(f"{name}{' tf32' if with_tf32 else ''}: " + ", ".join(f"{r['variant']} {r['ms']:.3f} ms" for r in rows))
    del calls, fast
    gc.collect()
    torch.cuda.empty_cache()
    return {
        "workload": name,
        "title": title,
        "precision": "tf32" if with_tf32 else "float32",
        "rows": rows,
        "reasons": reasons,
        "explain": explained,
    }


def reason_of(error: Exception) -> str:
    """An error in one line."""
    words = str(error).splitlines() or ["it says nothing"]
    return f"{type(error).__name__}: {words[0][:160]}"


def variants_of(name: str, wanted: Sequence[str] = ()) -> list[str]:
    """The ways to a workload's meta-step that are timed, or those of them that are ``wanted``."""
    return [v for v in wanted or VARIANTS if v != "torch.compile" or name in WITH_COMPILE]


def compile_all(name: str) -> None:
    """Run what :func:`compare` will have compiled, once."""
    build = WORKLOADS[name][1]
    for allowed in (False, True) if name in TF32 else (False,):
        with tf32(allowed):
            for problem in (build(), build().repeated(SOME_TASKS)):
                _run(value_and_grad, problem)
    if name in WITH_COMPILE:
        _run(VARIANTS["torch.compile"], build())


def _run(prepare: Callable[[Problem], Call], problem: Problem) -> Gradients:
    """Gradients of another problem; its parameters are its own."""
    return prepare(problem.on("cuda"))()


def peak(call: Call) -> float:
    """MiB that a call allocates at the most beyond what is held before; nothing of a graph that is replayed."""
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def jax_row(name: str) -> dict[str, Any]:
    """JAX's row, from a process of its own, which takes no more memory than it needs."""
    environment = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    command = [sys.executable, "-m", "benchmarks.gpu.jax_step", name]
    try:
        ran = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=JAX_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return {"variant": "jax", "reason": f"was not ready within {JAX_SECONDS} s"}
    if ran.returncode:
        return {"variant": "jax", "reason": (ran.stderr.strip().splitlines() or ["no output"])[-1][:200]}
    return json.loads(ran.stdout.splitlines()[-1])
