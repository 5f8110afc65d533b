"""The native executor: a whole meta-step in one call, tasks over threads or threads within tasks."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from fastmeta.core import native
from fastmeta.engine.evaluation import Cotangents, Evaluation, MetaGradient
from fastmeta.engine.lower import NotLowered, in_gram_form, lower, with_gram
from fastmeta.engine.profile import collecting
from fastmeta.engine.program import Instruction, Program
from fastmeta.engine.work import Work, leaves, require_finite

_NONE = torch.empty(0)


class NativeStep:
    """A meta-step that csrc/executor runs.

    Raises:
        NotLowered: the programs have an operation without native kernels, or the extension is missing.
    """

    def __init__(self, support: Program, query: Program) -> None:
        extension = native.extension()
        if extension is None:
            raise NotLowered(native.missing_reason())
        graph = query.graph
        if graph.values[graph.loss].dtype not in (torch.float32, torch.float64):
            raise NotLowered(f"the loss is of {graph.values[graph.loss].dtype}")
        lowered = [lower(program, query.outer) for program in (support, query)]
        self._lowered = lowered[1]
        if lowered[0].buffers != lowered[1].buffers:
            raise NotLowered("support and query do not read the same buffers")
        double = graph.values[graph.loss].dtype == torch.float64
        self._type = extension.MetaGradient64 if double else extension.MetaGradient32
        self._programs = lowered[0].program, lowered[1].program
        self._operands = [one.operands for one in lowered]
        self._isa = extension.instruction_set
        self._steps: dict[Any, Any] = {}  # by the operations in Gram form, and the instruction set
        self._forms: dict[tuple[int, bool], tuple[bool, ...]] = {}
        try:
            self._step_of(self._dense())
        except ValueError as error:
            raise NotLowered(str(error)) from error
        self._wanted = len(query.adapted), len(query.adapted) + len(query.outer)
        self._outputs = [graph.values[slot] for slot in graph.outputs]
        sets = [[p.graph.values[slot] for slot in p.graph.data] for p in (support, query)]
        self._bytes = [[math.prod(v.shape) * v.dtype.itemsize for v in values] for values in sets]
        self._mutates = bool(graph.mutations)

    @property
    def instruction_set(self) -> str:
        """The one its kernels are compiled for."""
        return self._isa()

    def kept(self, work: Work, *, learned: bool) -> dict[str, int]:
        """Named bytes kept per inner step for the adjoint of each task at work."""
        return self._step(work, learned).kept_bytes(not work.first_order and work.steps > 0, learned)

    def sharing(self, work: Work, *, learned: bool) -> tuple[int, int]:
        """How many tasks are at work at once, and how many threads on each."""
        return self._step(work, learned).sharing(work.tasks, *self._kind(work, learned), torch.get_num_threads())

    def workspace_bytes(self, work: Work, *, learned: bool) -> int:
        """Bytes each of the tasks at work holds."""
        _, threads = self.sharing(work, learned=learned)
        return self._step(work, learned).workspace_bytes(*self._kind(work, learned), threads)

    def gram(self, work: Work, *, learned: bool) -> tuple[bool, ...]:
        """For each operation, whether its weight is held as products with the task's data and formed for no task."""
        if learned or work.alpha.shape[1] > 1:
            return self._dense()
        key = work.steps, work.first_order
        form = self._forms.get(key)
        if form is None:
            form = with_gram(*self._programs, work.steps, second_order=not work.first_order)
            self._forms[key] = form
        return form

    def collected(self, work: Work, *, learned: bool) -> list[Instruction]:
        """The support program's instructions whose weight is in that form."""
        operands = self._operands[0]
        form = self.gram(work, learned=learned)
        return [o.instruction for o, gram in zip(operands, form, strict=True) if gram and o.instruction is not None]

    def _dense(self) -> tuple[bool, ...]:
        return (False,) * len(self._programs[0]["operations"])

    def _step(self, work: Work, learned: bool) -> Any:
        return self._step_of(self.gram(work, learned=learned))

    def _step_of(self, form: tuple[bool, ...]) -> Any:
        key = form, self._isa()  # another instruction set may be asked for at any time
        step = self._steps.get(key)
        if step is None:
            step = self._steps[key] = self._type(*in_gram_form(*self._programs, form))
        return step

    @staticmethod
    def _kind(work: Work, learned: bool) -> tuple[int, bool, bool, bool]:
        return work.steps, not work.first_order, learned, work.alpha.shape[1] > 1

    def refusal(self, work: Work, cotangents: Cotangents | None, *, outputs: bool) -> str:
        """Why this work cannot run here; empty where it can."""
        if not work.alpha.is_cpu:
            return f"the parameters are on {work.alpha.device}"
        if work.alpha.shape[1] > 1 and work.segments is None:
            return "there is one inner rate an element"
        if cotangents is not None and any(d is not None for d in cotangents.outputs):
            return "an objective on the query outputs is differentiated"
        if outputs and self._outputs and self._lowered.output is None:
            return "the query outputs are not one value of the program"
        if self._mutates and work.keep_mutations:
            return "running statistics are wanted"
        return ""

    def run(self, work: Work, cotangents: Cotangents | None, *, learned: bool, outputs: bool) -> Evaluation:
        """Run the meta-step; see :func:`fastmeta.engine.meta_step.evaluate`.

        Inside :func:`fastmeta.engine.profile.collect` it is profiled.
        """
        step = self._step(work, learned)
        steps, alpha = work.steps, work.alpha
        if alpha.requires_grad or not alpha.is_contiguous():
            alpha = alpha.detach().contiguous()
        parameters = [work.parameters[name] for name in self._lowered.parameters]
        parameters += [work.buffers[name] for name in self._lowered.buffers]
        if not all(map(Tensor.is_contiguous, parameters)):
            parameters = [p.detach().contiguous() for p in parameters]
        support, query = leaves(work.support), leaves(work.query)
        copies: list[Tensor] = []  # hold what the kernels read
        tasks = support[0].shape[0]
        d_losses = None if cotangents is None or cotangents.losses is None else cotangents.losses.contiguous()
        loss, losses, support_losses = alpha.new_empty(()), _NONE, _NONE
        if outputs or work.check_finite:
            losses, support_losses = alpha.new_empty(tasks), alpha.new_empty((steps, tasks))
        adapted, wanted = self._wanted
        gradients = [] if cotangents is None else [torch.empty_like(p) for p in parameters[:wanted]]
        d_alpha = torch.zeros_like(alpha) if learned and cotangents is not None else None
        rows, features = self._lowered.output or (0, 0)
        results = [alpha.new_empty((tasks, *value.shape)) for value in self._outputs] if outputs else []
        profile = collecting()
        step.run(
            tasks,
            steps,
            work.first_order,
            alpha.data_ptr(),
            alpha.shape[0] > 1,
            alpha.shape[1] > 1,
            list(map(Tensor.data_ptr, parameters)),
            _by_task(support, self._bytes[0], copies),
            _by_task(query, self._bytes[1], copies),
            cotangents is not None,
            0 if d_losses is None else d_losses.data_ptr(),
            list(map(Tensor.data_ptr, gradients)),
            0 if d_alpha is None else d_alpha.data_ptr(),
            loss.data_ptr(),
            losses.data_ptr(),  # 0 where there are none
            support_losses.data_ptr(),
            results[0].data_ptr() if results else 0,
            rows,
            features,
            torch.get_num_threads(),
            None if profile is None else profile.part(step, *self._operands),
        )
        if work.check_finite:
            for k in range(steps):
                require_finite(support_losses[k], f"support loss at inner step {k}")
            require_finite(losses, "query loss")
        outer: list[Tensor | None] = list(gradients[adapted:])
        gradient = None if cotangents is None else MetaGradient(gradients[:adapted], outer, d_alpha)
        return Evaluation(loss, losses, support_losses, results, gradient, [])


def _by_task(leaves: Iterable[Tensor], sizes: list[int], copies: list[Tensor]) -> list[tuple[int, int]]:
    """Address of each leaf's first task, and bytes to the next one's; tasks may lie anywhere, each contiguous."""
    found = []
    for leaf, size in zip(leaves, sizes, strict=True):
        if leaf.is_contiguous():
            found.append((leaf.data_ptr(), size))
            continue
        if not leaf[0].is_contiguous():
            leaf = leaf.contiguous()
            copies.append(leaf)
        found.append((leaf.data_ptr(), leaf.stride(0) * leaf.element_size()))
    return found
