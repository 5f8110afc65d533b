"""Running statistics after a meta-step: what a loop over tasks would have left in them."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from fastmeta.engine.program import Program


def updated(
    program: Program,
    buffers: dict[str, Tensor],
    mutations: list[dict[str, Tensor]],
    stepwise: Collection[str] = (),
) -> dict[str, Tensor]:
    """New values of the buffers that the forward pass updates.

    Every pass of every task started from the same ``r_0``; its new value ``a r_0 + b_i`` tells its contribution
    ``b_i``. The result is the recurrence ``r <- a r + b_i`` over tasks, and within a task over its inner steps and the
    query pass, as a loop over tasks runs it. Counters advance by one a pass.

    Args:
        program: of the passes.
        buffers: values before the meta-step.
        mutations: for each pass the new values ``[T, ...]``.
        stepwise: names of buffers of which the k-th pass has row k, or the last one.

    Raises:
        RuntimeError: a buffer is updated by something else than batch norm, so that the order of tasks would matter to
            the result.
    """
    result = {}
    for name in mutations[0] if mutations else ():
        before = buffers[name]
        if name in stepwise:
            rows = []
            for i, row in enumerate(before):
                own = [{name: m[name]} for m in (mutations[i : i + 1] if i < len(before) - 1 else mutations[i:])]
                rows.append(updated(program, {name: row}, own).get(name, row))
            result[name] = torch.stack(rows)
            continue
        values = torch.stack([m[name] for m in mutations], dim=1)  # [T, K + 1, ...]: task-major, as a loop goes
        values = values.flatten(0, 1)
        if not before.is_floating_point():
            result[name] = before + (values - before).sum(0)
            continue
        decay = _decay(program, name)
        count = values.shape[0]
        powers = decay ** torch.arange(count - 1, -1, -1, dtype=torch.float64, device=values.device)
        contributions = (values - decay * before).to(torch.float64)
        total = torch.tensordot(powers, contributions, dims=1) + decay**count * before
        result[name] = total.to(before.dtype)
    return result


def _decay(program: Program, name: str) -> float:
    slot = program.graph.mutations[name]
    for instruction in program.instructions:
        if slot in instruction.outputs and instruction.op.name in ("batch_norm", "conv_block"):
            return 1.0 - float(instruction.op.momentum)  # type: ignore[attr-defined]
    raise RuntimeError(
        f"MAML: update_running_stats can only follow batch norm, but buffer {name} is updated by something else; "
        "use engine='autodiff'"
    )
