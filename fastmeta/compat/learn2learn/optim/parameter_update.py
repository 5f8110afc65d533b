"""Gradients of a loss, each through a transform of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import Tensor, nn

from fastmeta.compat.learn2learn.gradients import gradients
from fastmeta.core.checks import fail

Transform = Callable[[Tensor], nn.Module | None]


class ParameterUpdate(nn.Module):
    """A stand-in for ``torch.autograd.grad`` that returns ``transform_p(d loss/d p)`` for every parameter ``p``.

    Args:
        parameters: the parameters.
        transform: makes of a parameter the module that its gradient goes through, or ``None`` for no transform.

    Raises:
        ValueError: ``transform`` makes something else.
    """

    def __init__(self, parameters: Iterable[Tensor], transform: Transform) -> None:
        super().__init__()
        made = [transform(p) for p in parameters]
        for t in made:
            if not (t is None or isinstance(t, nn.Module)):
                mend = "pass a callable that makes it of the parameter"
                fail(ValueError, "ParameterUpdate", "a transform", "a Module or None", type(t).__name__, mend)
        modules = [t for t in made if t is not None]
        places = iter(range(len(modules)))
        self.transforms_modules = nn.ModuleList(modules)
        self.transforms_indices = [None if t is None else next(places) for t in made]

    def forward(
        self,
        loss: Tensor,
        parameters: Iterable[Tensor],
        create_graph: bool = False,
        retain_graph: bool = False,
        allow_unused: bool = False,
        allow_nograd: bool = False,
    ) -> list[Tensor | None]:
        """The updates, of which a step subtracts a multiple.

        Args:
            loss: what is differentiated.
            parameters: with respect to what; as many as were given at first, in the same order.
            create_graph: let the gradients be differentiated; keeps the loss's graph.
            retain_graph: keep the loss's graph.
            allow_unused: let parameters be unused by the loss.
            allow_nograd: let parameters not require grad.

        Returns:
            One update a parameter, ``None`` where there is no gradient.

        Raises:
            RuntimeError: a parameter has no gradient and may not be without one.
            ValueError: another number of parameters.
        """
        parameters = list(parameters)
        if len(parameters) != len(self.transforms_indices):
            expected = f"{len(self.transforms_indices)}, as many as there are transforms for"
            fail(ValueError, "ParameterUpdate", "parameters", expected, len(parameters))
        found = gradients(
            "ParameterUpdate",
            loss,
            parameters,
            create_graph=create_graph,
            retain_graph=retain_graph,
            allow_unused=allow_unused,
            allow_nograd=allow_nograd,
        )
        return [
            g if t is None or g is None else self.transforms_modules[t](g)
            for g, t in zip(found, self.transforms_indices, strict=True)
        ]
