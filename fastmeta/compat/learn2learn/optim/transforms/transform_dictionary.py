"""Transforms chosen by parameter."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn


class TransformDictionary:
    """Makes of a parameter what the transform for it makes, or ``None`` where there is none.

    Args:
        dictionary: transforms by the module whose parameters they are for, or by the parameter. Later entries
            override earlier ones.

    Raises:
        ValueError: a key is neither.
    """

    def __init__(self, dictionary: Mapping[nn.Module | nn.Parameter, Callable[..., nn.Module | None]]) -> None:
        self.param_to_transform: dict[Tensor, Callable[..., nn.Module | None]] = {}
        for key, transform in dictionary.items():
            if isinstance(key, nn.Module):
                self.param_to_transform.update(dict.fromkeys(key.parameters(), transform))
            elif isinstance(key, nn.Parameter):
                self.param_to_transform[key] = transform
            else:
                raise ValueError(
                    f"TransformDictionary: keys must be Modules or Parameters, got {type(key).__name__}; "
                    "for a name, model.get_submodule(name) or model.get_parameter(name)"
                )

    def __call__(self, param: Tensor, *args: Any, **kwargs: Any) -> nn.Module | None:
        """The transform for a parameter; further arguments are handed on."""
        transform = self.param_to_transform.get(param)
        return None if transform is None else transform(param, *args, **kwargs)
