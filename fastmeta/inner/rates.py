"""Inner learning rates: one for all, one a step, or each parameter its own of any shape; fixed or learned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod

import torch
from torch import Tensor, nn

from fastmeta.core.packing import Packing

Rate = float | Tensor | Mapping[str, float | Tensor]
Shapes = tuple[tuple[int, ...], ...]


class Rates:
    """The inner learning rates of a MAML and how they meet the packed parameters.

    Args:
        lr: a number; a tensor ``[]`` or ``[K]`` (one rate a step); or a mapping from the name of every adapting
            parameter to a number, a tensor ``[]``, or a tensor that broadcasts to the parameter's shape.
        packing: the adapting parameters.
        of: what has the rates, for messages.

    Attributes:
        shapes: of each parameter's own rates, where not every parameter has a single one: ``[]``, or as many axes as
            the parameter has, those of length 1 where they share a rate. ``None`` otherwise.

    Raises:
        TypeError: a rate is not a number or a floating-point tensor.
        ValueError: names are missing or unknown, or a shape does not broadcast.
    """

    def __init__(self, lr: Rate, packing: Packing, of: str = "") -> None:
        self.lr = lr
        self.packing = packing
        self.name = f"{of}lr"
        if isinstance(lr, Mapping):
            missing = [name for name in packing.names if name not in lr]
            unknown = [name for name in lr if name not in packing.names]
            if missing or unknown:
                raise ValueError(
                    f"MAML: {self.name} must have one entry for every adapting parameter, got none for {missing} "
                    f"and entries for unknown {unknown}"
                )
            for name, shape in zip(packing.names, packing.shapes, strict=True):
                check_rate("MAML", f"{self.name}[{name!r}]", lr[name])
                value = lr[name]
                if isinstance(value, Tensor) and _broadcast(value.shape, shape) != tuple(shape):
                    raise ValueError(
                        f"MAML: {self.name}[{name!r}] must broadcast to the parameter's shape {tuple(shape)}, "
                        f"got {tuple(value.shape)}"
                    )
            own = tuple(_own_shape(lr[n], shape) for n, shape in zip(packing.names, packing.shapes, strict=True))
            self.kind = "tensor" if not any(own) else "mixed"
            self.shapes: Shapes | None = own if any(own) else None
        else:
            check_rate("MAML", self.name, lr)
            if isinstance(lr, Tensor) and lr.dim() > 1:
                raise ValueError(
                    f"MAML: {self.name} must have shape [] or [steps], got {tuple(lr.shape)}; use a mapping"
                )
            self.kind, self.shapes = "scalar", None

    def segments(self, device: torch.device) -> Tensor | None:
        """Offsets ``[S + 1]`` of the packed parameters where there is one rate a parameter."""
        return self.packing.segments(device) if self.kind == "tensor" else None

    def tensors(self) -> list[Tensor]:
        """The rates that require grad."""
        values = self.lr.values() if isinstance(self.lr, Mapping) else [self.lr]
        return [v for v in values if isinstance(v, Tensor) and v.requires_grad]

    def alpha(self, like: Tensor, steps: int, trained: int) -> Tensor:
        """The rates as one tensor ``[1 or K, R]`` in ``like``'s dtype and device, differentiable.

        R is 1, or S, or the number of all parameters' own rates one after the other.

        Args:
            like: a tensor.
            steps: how many there are; those beyond the rates take the last one.
            trained: how many must have a rate, where each has one.

        Raises:
            ValueError: one rate a step was given, and fewer than steps and ``trained`` ask for.
        """
        if isinstance(self.lr, Mapping):
            return torch.cat([as_tensor(self.lr[name], like).reshape(-1) for name in self.packing.names])[None]
        value = as_tensor(self.lr, like)
        if value.dim() == 0:
            return value.reshape(1, 1)
        needed = min(steps, max(trained, 1))
        if value.shape[0] < needed:
            raise ValueError(
                f"MAML: {self.name} with one rate a step must have at least {needed} rates for {needed} steps, "
                f"got {value.shape[0]}"
            )
        return prolonged(value.unsqueeze(1), steps)


def prolonged(rates: Tensor, steps: int) -> Tensor:
    """Rates of each step, ``[K, ...]``, for so many steps at least: those beyond K have the last ones."""
    more = steps - rates.shape[0]
    return torch.cat([rates, rates[-1:].expand(more, *rates.shape[1:])]) if more > 0 else rates


def check_rate(op: str, name: str, value: object) -> None:
    """Raise ``TypeError`` unless ``value`` is a number or a floating-point tensor."""
    if isinstance(value, Tensor):
        if not value.is_floating_point():
            raise TypeError(f"{op}: {name} must be a floating-point tensor, got {value.dtype}")
    elif isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{op}: {name} must be a number or a tensor, got {type(value).__name__}")


def rates_of(alpha: Tensor, shapes: Shapes | None, count: int) -> list[Tensor]:
    """Each of ``count`` parameters' own rates at one step, of ``alpha`` ``[R]``; see :attr:`Rates.shapes`."""
    if shapes is not None:
        pieces = alpha.split([prod(shape) for shape in shapes])
        return [piece.reshape(shape) for piece, shape in zip(pieces, shapes, strict=True)]
    return [alpha.reshape(())] * count if alpha.numel() == 1 else list(alpha.unbind())


def collected(d: Tensor, of_parameters: Sequence[tuple[int, ...]], shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
    """Sums of one number an element, ``[P]``, to the shapes of the rates of parameters of these shapes."""
    pieces = d.split([prod(shape) for shape in of_parameters])
    return [piece.reshape(of).sum_to_size(own) for piece, of, own in zip(pieces, of_parameters, shapes, strict=True)]


def _own_shape(value: float | Tensor, shape: tuple[int, ...]) -> tuple[int, ...]:
    if not isinstance(value, Tensor) or value.numel() == 1:
        return ()
    return (1,) * (len(shape) - value.dim()) + tuple(value.shape)


def _broadcast(a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, ...] | None:
    try:
        return tuple(torch.broadcast_shapes(a, b))
    except RuntimeError:
        return None


def as_tensor(value: float | Tensor, like: Tensor) -> Tensor:
    """A number or a tensor in ``like``'s dtype and device."""
    if isinstance(value, Tensor):
        return value.to(dtype=like.dtype, device=like.device)
    return torch.full((), value, dtype=like.dtype, device=like.device)  # no copy to a GPU, which a graph cannot have


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


def registered(lr: Rate) -> float | Tensor | RateTable:
    """Rates as an attribute of a module, which then knows the parameters among them."""
    return RateTable(lr) if isinstance(lr, Mapping) else lr


def given(lr: float | Tensor | RateTable) -> Rate:
    """The rates of such an attribute."""
    return lr.as_mapping() if isinstance(lr, RateTable) else lr
