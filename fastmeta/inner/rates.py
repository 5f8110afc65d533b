"""Inner learning rates: one for all, one a step, one a parameter or one an element; fixed or learned."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fastmeta.core.packing import Packing

Rate = float | Tensor | Mapping[str, float | Tensor]


class Rates:
    """The inner learning rates of a MAML and how they meet the packed parameters.

    Args:
        lr: a number; a tensor ``[]`` or ``[K]`` (one rate a step); or a mapping from the name of every adapting
            parameter to a number, a tensor ``[]``, or a tensor that broadcasts to the parameter's shape.
        packing: the adapting parameters.

    Raises:
        TypeError: a rate is not a number or a floating-point tensor.
        ValueError: names are missing or unknown, or a shape does not broadcast.
    """

    def __init__(self, lr: Rate, packing: Packing) -> None:
        self.lr = lr
        self.packing = packing
        if isinstance(lr, Mapping):
            missing = [name for name in packing.names if name not in lr]
            unknown = [name for name in lr if name not in packing.names]
            if missing or unknown:
                raise ValueError(
                    f"MAML: lr must have one entry for every adapting parameter, got none for {missing} "
                    f"and entries for unknown {unknown}"
                )
            for name, shape in zip(packing.names, packing.shapes, strict=True):
                _check_rate(f"lr[{name!r}]", lr[name])
                value = lr[name]
                if isinstance(value, Tensor) and _broadcast(value.shape, shape) != tuple(shape):
                    raise ValueError(
                        f"MAML: lr[{name!r}] must broadcast to the parameter's shape {tuple(shape)}, "
                        f"got {tuple(value.shape)}"
                    )
            self.kind = "element" if any(_is_wide(value) for value in lr.values()) else "tensor"
        else:
            _check_rate("lr", lr)
            if isinstance(lr, Tensor) and lr.dim() > 1:
                raise ValueError(f"MAML: lr must have shape [] or [steps], got {tuple(lr.shape)}; use a mapping")
            self.kind = "scalar"

    def segments(self, device: torch.device) -> Tensor | None:
        """Offsets ``[S + 1]`` of the packed parameters where there is one rate a parameter."""
        return self.packing.segments(device) if self.kind == "tensor" else None

    def tensors(self) -> list[Tensor]:
        """The rates that require grad."""
        values = self.lr.values() if isinstance(self.lr, Mapping) else [self.lr]
        return [v for v in values if isinstance(v, Tensor) and v.requires_grad]

    def alpha(self, like: Tensor, steps: int) -> Tensor:
        """The rates as one tensor ``[1 or K, 1 or S or P]`` in ``like``'s dtype and device, differentiable.

        Raises:
            ValueError: one rate a step was given, and for fewer steps than ``steps``.
        """
        if isinstance(self.lr, Mapping):
            rows = []
            for name, shape in zip(self.packing.names, self.packing.shapes, strict=True):
                value = _as_tensor(self.lr[name], like)
                rows.append(value.expand(shape).reshape(-1) if self.kind == "element" else value.reshape(1))
            return torch.cat(rows)[None]
        value = _as_tensor(self.lr, like)
        if value.dim() == 1 and value.shape[0] < steps:
            raise ValueError(
                f"MAML: lr with one rate a step must have at least {steps} rates for {steps} steps, "
                f"got {value.shape[0]}"
            )
        return value.reshape(-1, 1)


def _check_rate(name: str, value: object) -> None:
    if isinstance(value, Tensor):
        if not value.is_floating_point():
            raise TypeError(f"MAML: {name} must be a floating-point tensor, got {value.dtype}")
    elif isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"MAML: {name} must be a number or a tensor, got {type(value).__name__}")


def _is_wide(value: object) -> bool:
    return isinstance(value, Tensor) and value.numel() != 1


def _broadcast(a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, ...] | None:
    try:
        return tuple(torch.broadcast_shapes(a, b))
    except RuntimeError:
        return None


def _as_tensor(value: float | Tensor, like: Tensor) -> Tensor:
    if isinstance(value, Tensor):
        return value.to(dtype=like.dtype, device=like.device)
    return torch.tensor(value, dtype=like.dtype, device=like.device)


class RateTable(nn.Module):
    """Rates by parameter name, as a module: those that are parameters are registered, under names without dots."""

    def __init__(self, rates: Mapping[str, float | Tensor]) -> None:
        super().__init__()
        self._names = {name: name.replace(".", "/") for name in rates}
        for name, value in rates.items():
            if isinstance(value, nn.Parameter):
                self.register_parameter(self._names[name], value)
            elif isinstance(value, Tensor) and not value.requires_grad:
                self.register_buffer(self._names[name], value)
            else:
                self.__dict__[self._names[name]] = value

    def as_mapping(self) -> dict[str, float | Tensor]:
        """Rates by the parameters' own names."""
        return {name: getattr(self, key) for name, key in self._names.items()}
