"""Running statistics after a meta-step: what a loop over tasks would have left in them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fastmeta.engine.program import Program
from fastmeta.engine.work import Work


def updated(
    program: Program, work: Work, mutations: list[dict[str, Tensor]], taken: Tensor | None = None
) -> dict[str, Tensor]:
    """New values of the buffers that the forward pass updates.

    Every pass of every task started from the same ``r_0``; its new value ``a r_0 + b_i`` tells its contribution
    ``b_i``. The result is the recurrence ``r <- a r + b_i`` over tasks, and within a task over its inner steps and the
    query pass, as a loop over tasks runs it. Counters advance by one a pass.

    Args:
        program: of the passes.
        work: the meta-step, with the values before it. Of what comes stepwise passes after k steps have row k, or the
            last one.
        mutations: for each pass the new values ``[T, ...]``.
        taken: how many steps each task took, ``[T]``, where it may be fewer than all: it has one support pass more.

    Raises:
        RuntimeError: a buffer is updated by something else than batch norm, so that the order of tasks would matter to
            the result.
    """
    steps = [i // work.micro_batches for i in range(len(mutations) - 1)] + [work.steps] * bool(mutations)
    result = {}
    for name in mutations[0] if mutations else ():
        before = work.buffers[name]
        if name not in work.stepwise:
            result[name] = _after(program, name, before, mutations, steps, work.steps, taken)
            continue
        rows = []
        for i, row in enumerate(before):
            own = [j for j, k in enumerate(steps) if work.row(name, k) == i]
            passes = [mutations[j] for j in own]
            at = [steps[j] for j in own]
            rows.append(_after(program, name, row, passes, at, work.steps, taken) if own else row)
        result[name] = torch.stack(rows)
    return result


def write(buffers: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Put values in place."""
    for name, value in values.items():
        buffers[name].copy_(value)


def start(work: Work) -> dict[str, Tensor]:
    """The shared statistics for every task, ``[T, ...]``; nothing where tasks have none of their own."""
    return {name: work.buffers[name].expand(work.tasks, *work.buffers[name].shape) for name in work.own_statistics}


def followed(
    program: Program,
    shared: dict[str, Tensor],
    own: dict[str, Tensor],
    mutations: list[dict[str, Tensor]],
    going: Tensor | None,
) -> dict[str, Tensor]:
    """Each task's own statistics after some of its passes, ``r <- a r + b``, ``[T, ...]``.

    Args:
        program: of the passes.
        shared: the statistics that the passes were given.
        own: each task's before.
        mutations: what each pass made of the shared ones.
        going: which tasks had these passes, ``[T, 1]``; ``None`` for all.
    """
    after = dict(own)
    for mutation in mutations:
        for name in own.keys() & mutation.keys():
            decay = _decay(program, name) if shared[name].is_floating_point() else 1
            after[name] = decay * after[name] + (mutation[name] - decay * shared[name])
    if going is not None:
        after = {name: torch.where(going.view(-1, *[1] * (r.dim() - 1)), r, own[name]) for name, r in after.items()}
    return after


def _after(
    program: Program,
    name: str,
    before: Tensor,
    mutations: list[dict[str, Tensor]],
    steps: list[int],
    query: int,
    taken: Tensor | None,
) -> Tensor:
    """A buffer after passes at these steps, of which ``query`` is the query's."""
    values = torch.stack([m[name] for m in mutations], dim=1)  # [T, passes, ...]: task-major, as a loop goes
    if taken is None:
        values = values.flatten(0, 1)
    else:
        at = torch.tensor(steps, device=taken.device)
        values = values[(at <= taken.unsqueeze(1)) | (at == query)]
    if not before.is_floating_point():
        return before + (values - before).sum(0)
    decay = _decay(program, name)
    count = values.shape[0]
    powers = decay ** torch.arange(count - 1, -1, -1, dtype=torch.float64, device=values.device)
    contributions = (values - decay * before).to(torch.float64)
    total = torch.tensordot(powers, contributions, dims=1) + decay**count * before
    return total.to(before.dtype)


def _decay(program: Program, name: str) -> float:
    slot = program.graph.mutations[name]
    for instruction in program.instructions:
        if slot in instruction.outputs and instruction.op.name in ("batch_norm", "conv_block"):
            return 1.0 - float(instruction.op.momentum)  # type: ignore[attr-defined]
    raise RuntimeError(
        f"MAML: running statistics can only be followed of batch norm, but buffer {name} is updated by something else; "
        "use engine='autodiff'"
    )
