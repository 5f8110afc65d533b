"""Checks of what a caller hands to an algorithm, before anything runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fastmeta.engine.compiler import Programs
from fastmeta.engine.objective import BATCH_NORM, norms_of
from fastmeta.engine.work import Plan, Work, require_finite
from fastmeta.inner.early_stop import EarlyStop

Engine = Literal["auto", "program", "autodiff"]
Executor = Literal["auto", "native", "reference"]
Form = Literal["auto", "dense", "factored"]
BatchNorm = Literal["transductive", "followed", "running", "per_task", "per_step"]


def check_runner(engine: str, executor: str, memory_budget: int | None) -> None:
    """Raise ``ValueError`` unless there is such an engine and such an executor, and a budget can be kept."""
    if engine not in ("auto", "program", "autodiff"):
        raise ValueError(f"MAML: engine must be 'auto', 'program' or 'autodiff', got {engine!r}")
    if executor not in ("auto", "native", "reference"):
        raise ValueError(f"MAML: executor must be 'auto', 'native' or 'reference', got {executor!r}")
    if engine == "autodiff" and memory_budget is not None:
        raise ValueError(f"MAML: memory_budget must be None with engine='autodiff', got {memory_budget}")


def checked_steps(steps: int) -> int:
    """The number of inner steps, if it is one."""
    if isinstance(steps, bool) or not isinstance(steps, int):
        raise TypeError(f"MAML: steps must be an int, got {type(steps).__name__}")
    if steps < 0:
        raise ValueError(f"MAML: steps must not be negative, got {steps}")
    return steps


def checked_count(name: str, count: int | None) -> int | None:
    """A number of tasks or bytes, if it is one."""
    if count is None:
        return None
    if isinstance(count, bool) or not isinstance(count, int):
        raise TypeError(f"MAML: {name} must be an int or None, got {type(count).__name__}")
    if count < 1:
        raise ValueError(f"MAML: {name} must be at least 1, got {count}")
    return count


def checked_norm(norm: float | None) -> float | None:
    """A largest norm, if it is one."""
    if norm is None:
        return None
    if isinstance(norm, bool) or not isinstance(norm, (int, float)):
        raise TypeError(f"MAML: clip_norm must be a number or None, got {type(norm).__name__}")
    if not 0 < norm < float("inf"):
        raise ValueError(f"MAML: clip_norm must be positive and finite, got {norm}")
    return norm


def checked_stop(stop: Any) -> EarlyStop | None:
    """When tasks stop, if it is that."""
    if stop is not None and not isinstance(stop, EarlyStop):
        raise TypeError(f"MAML: stop must be a fastmeta.inner.EarlyStop or None, got {type(stop).__name__}")
    return stop


def check_formed(plan: Any, asked: Mapping[str, bool]) -> None:
    """Raise ``ValueError`` where factors are asked for beside what needs each task's gradient formed."""
    if "factored" in (plan.values() if isinstance(plan, Mapping) else (plan,)):
        for name in (name for name, is_asked in asked.items() if is_asked):
            raise ValueError(f"MAML: plan must not be 'factored' with {name}, which needs each task's gradient formed")


def check_batch_norm(name: str | None, known: Iterable[str], root: nn.Module, *, follows: bool) -> None:
    """Raise ``ValueError`` unless a mode of batch norm goes with the model and with ``update_running_stats``.

    Args:
        name: the mode.
        known: those that the algorithm has.
        root: the model and its loss.
        follows: whether running statistics are to be updated.
    """
    if name is None:
        return
    if name not in BATCH_NORM:
        raise ValueError(f"MAML: batch_norm must be None or one of {BATCH_NORM}, got {name!r}")
    if name not in known:
        mend = "; MAMLPlusPlus has rows a step" if name == "per_step" else ""
        raise ValueError(f"MAML: batch_norm must be one of {tuple(known)} with this algorithm, got {name!r}{mend}")
    if follows and name not in ("followed", "per_step"):
        raise ValueError(
            f"MAML: update_running_stats must be False with batch_norm {name!r}, which leaves the running statistics "
            "as they are; batch_norm='followed' updates them"
        )
    untracked = [n.removeprefix("model.") for n, m in norms_of(root) if m.running_mean is None]
    if untracked and name in ("followed", "running", "per_task"):
        raise ValueError(
            f"MAML: batch_norm {name!r} needs running statistics, got track_running_stats=False for {untracked}"
        )


def check_micro_batches(work: Work) -> None:
    """Raise ``ValueError`` unless the support set can be cut into equal parts along its samples."""
    count, sizes = work.micro_batches, set()
    if isinstance(work.support, tuple) and len(work.support) == 3:
        raise ValueError("MAML: micro_batches must be 1 for support sets with weights, whose mean is not the parts'")
    for leaf in pytree.tree_leaves(work.support):
        if not isinstance(leaf, Tensor) or leaf.dim() < 2:
            raise ValueError("MAML: micro_batches needs support tensors of [T, N, ...], got one without samples")
        sizes.add(leaf.shape[1])
    if len(sizes) > 1:
        raise ValueError(f"MAML: micro_batches needs support tensors [T, N, ...] of one N, got {sorted(sizes)}")
    if min(sizes) % count or min(sizes) < count:
        raise ValueError(f"MAML: micro_batches must divide the support samples, got {count} for {min(sizes)}")


def checked_plan(plan: Any, names: Iterable[str]) -> Plan:
    """How fast weights are to be held, if it is known how."""
    forms = ("auto", "dense", "factored")
    pairs = tuple(plan.items()) if isinstance(plan, Mapping) else (("*", plan),)
    wrong = [form for _, form in pairs if form not in forms]
    if wrong:
        raise ValueError(f"MAML: plan must be 'auto', 'dense' or 'factored', or map names to these, got {wrong[0]!r}")
    known = list(names)
    unmatched = [pattern for pattern, _ in pairs if not any(fnmatchcase(name, pattern) for name in known)]
    if unmatched:
        raise ValueError(f"MAML: plan must name parameters of the model, got {unmatched}; known: {known}")
    return pairs if isinstance(plan, Mapping) else plan


def select_parameters(
    parameters: Mapping[str, Tensor], selection: Iterable[str] | Callable[[str, Any], bool] | None
) -> list[str]:
    """Names of the parameters that adapt, by names, ``fnmatch`` patterns or a predicate."""
    if selection is None:
        return [n for n, p in parameters.items() if p.requires_grad and not n.startswith("loss.")]
    if callable(selection):
        return [n for n, p in parameters.items() if selection(n, p)]
    patterns = [selection] if isinstance(selection, str) else list(selection)
    unmatched = [s for s in patterns if not any(fnmatchcase(name, s) for name in parameters)]
    if unmatched:
        raise ValueError(
            f"MAML: parameters must name parameters of the model, got {unmatched}; known: {list(parameters)}"
        )
    return [name for name in parameters if any(fnmatchcase(name, s) for s in patterns)]


def check_tensors(work: Work, engine: str) -> None:
    """Device, dtype, grad and finiteness of what comes in."""
    dtypes = {p.dtype for p in work.parameters.values() if p.is_floating_point()}
    device = work.theta[0].device
    for name, tree in (("support", work.support), ("query", work.query)):
        for leaf in pytree.tree_leaves(tree):
            if not isinstance(leaf, Tensor):
                continue
            if leaf.device != device:
                raise ValueError(
                    f"MAML: {name} must be on the model's device {device}, got {leaf.device}; use tasks.to"
                )
            if leaf.is_floating_point() and len(dtypes) == 1 and leaf.dtype not in dtypes:
                raise TypeError(
                    f"MAML: {name} must have the model's dtype {dtypes.pop()}, got {leaf.dtype}; "
                    "use tasks.to(dtype=...)"
                )
            if leaf.requires_grad and engine != "autodiff" and torch.is_grad_enabled():
                raise ValueError(
                    f"MAML: {name} must not require grad, because the program gives no gradient to a task's data; "
                    "detach it, or use engine='autodiff'"
                )
            if work.check_finite and leaf.is_floating_point():
                bad = torch.where(torch.isfinite(leaf).flatten(1).all(1), 0.0, torch.nan)
                require_finite(bad, f"values of {name}")


def check_masks(work: Work, programs: Programs) -> None:
    """Batch norm sees padded samples, weights or not: zero weights would be silently wrong."""
    for name, tree, program in (("support", work.support, programs.support), ("query", work.query, programs.query)):
        weighted = isinstance(tree, tuple) and len(tree) == 3
        if weighted and program is not None and program.batch_statistics and bool((tree[2] == 0).any()):
            raise ValueError(
                f"MAML: {name} has zero weights, but batch norm would count the masked samples in its statistics; "
                "use tasks of equal size, or layer or group norm"
            )
