"""The meta-steps whose costs are counted: small ones, that run every kind of kernel the large ones do."""

from __future__ import annotations

import marshal
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastmeta as fm
from fastmeta.bench.networks import Encoder
from fastmeta.engine.lower import in_gram_form
from fastmeta.engine.native import NativeStep
from fastmeta.learner.models import conv_net, mlp


def learner(name: str, **options: Any) -> tuple[fm.MAML, fm.TaskBatch]:
    """A learner and its tasks, the same every time."""
    torch.manual_seed(0)
    if name == "perceptron":
        x, y = torch.randn(2, 8, 10, 1), torch.randn(2, 8, 10, 1)
        return fm.MAML(mlp((1, 40, 40, 1)), F.mse_loss, 0.01, 3, **options), fm.TaskBatch((x[0], y[0]), (x[1], y[1]))
    if name == "convolution":
        x, y = torch.randn(2, 2, 5, 1, 14, 14), torch.arange(5).expand(2, 2, 5).contiguous()
        model = conv_net(1, 5, 32, 14, blocks=2)
        return fm.MAML(model, F.cross_entropy, 0.1, 2, **options), fm.TaskBatch((x[0], y[0]), (x[1], y[1]))
    x, y = torch.randint(20, (2, 2, 3, 6)), torch.randint(5, (2, 2, 3))
    model = Encoder(20, 16, 2, 5).eval()
    return fm.MAML(model, F.cross_entropy, 0.1, 2, **options), fm.TaskBatch((x[0], y[0]), (x[1], y[1]))


class _Recorder:
    """Stands in for a compiled meta-step, and notes what it is asked to do."""

    def __init__(self, step: Any, programs: Any) -> None:
        self._step, self.programs, self.call_arguments, self.arguments = step, programs, (), ()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._step, name)

    def call(self, *arguments: Any) -> Any:
        self.call_arguments, self._call = arguments, self._step.call(*arguments)
        return self

    def run(self, *arguments: Any) -> Any:
        self.arguments = arguments
        return self._call.run(*arguments)


def write(name: str, path: Path) -> None:
    """Record one meta-step of a case for ``driver.py``."""
    maml, tasks = learner(name, executor="native")
    _, programs = maml.prepare(tasks)
    step = programs.native
    assert isinstance(step, NativeStep)
    recorders = []

    def recording(form: tuple[bool, ...]) -> _Recorder:
        lowered = in_gram_form(*step._programs, form)
        recorders.append(_Recorder(step._type(*lowered), lowered))
        return recorders[-1]

    step._step_of = recording
    maml.value_and_grad(tasks)
    recorder = next(r for r in recorders if r.arguments)

    def stored(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.detach().contiguous().numpy().tobytes()
        return [stored(each) for each in value] if isinstance(value, (list, tuple)) else value

    content = recorder.programs, recorder.call_arguments, stored(recorder.arguments)
    path.write_bytes(marshal.dumps(content))  # the driver reads it with little ado


def backward(maml: fm.MAML, tasks: fm.TaskBatch) -> None:
    """A training step's gradient, as most users ask for it."""
    for p in maml.parameters():
        p.grad = None
    maml(tasks).loss.backward()
