"""Batch norm's parameters and statistics, a row for each number of inner steps taken."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

STATISTICS = ("running_mean", "running_var")


class StepNorms(nn.Module):
    """Rows of what every batch norm of a model has, each a copy of its own at first.

    Args:
        model: the model.
        rows: how many.

    Attributes:
        names: by the model's names, where the rows are kept here.
    """

    def __init__(self, model: nn.Module, rows: int) -> None:
        super().__init__()
        self.names: dict[str, str] = {}
        for prefix, module in model.named_modules():
            if not isinstance(module, _BatchNorm):
                continue
            for part in ("weight", "bias", *STATISTICS):
                value = getattr(module, part)
                if value is None:
                    continue
                name = f"{prefix}.{part}" if prefix else part
                self.names[name] = name.replace(".", "/")
                each = torch.stack([value.detach()] * rows)
                if part in STATISTICS:
                    self.register_buffer(self.names[name], each)
                else:
                    self.register_parameter(self.names[name], nn.Parameter(each, requires_grad=value.requires_grad))

    def tensors(self, *, statistics: bool) -> dict[str, Tensor]:
        """The rows of statistics, or of parameters, by the model's names."""
        held = self._buffers if statistics else self._parameters
        return {name: getattr(self, place) for name, place in self.names.items() if place in held}
