"""Meta-Curvature: inner gradients are transformed by learned matrices."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from fastmeta.algorithms.inner_rule import DEFAULT
from fastmeta.algorithms.inputs import select_parameters
from fastmeta.algorithms.maml import MAML
from fastmeta.inner.curvature import Curvature
from fastmeta.inner.rates import Rate


class MetaCurvature(MAML):
    """Meta-Curvature: initial weights are learned together with how their gradients are bent.

    ``phi_{k+1} = phi_k - alpha_k * C(grad ls(phi_k))``, where C multiplies each axis of a parameter's gradient by a
    matrix of its own (docs/maths.md, eq. 27): of a linear layer's weight ``C(G) = M_out G M_in^T``; of a convolution's
    also the pixels of its kernel, taken as one axis, by ``M_kernel``; of a vector, such as a bias, each element by a
    number. All start as the identity, where this is MAML, and get their exact meta-gradient.

    The matrices are parameters of ``learner.inner``; :meth:`value_and_grad` has their gradients under
    ``inner.<parameter's name>.out``, ``.in``, ``.kernel`` and ``.scale``. Weights are formed for each task by the
    task-batched executor.

    Args:
        model, loss, lr, steps: as :class:`fastmeta.MAML` has them. The model must be one that can be traced.
        parameters: which parameters adapt, as :class:`fastmeta.MAML` has it.
        options: the other arguments of :class:`fastmeta.MAML` but ``inner``, ``plan`` and ``engine``.

    Raises:
        TypeError: one of these is given.
        RuntimeError: the model cannot be traced.

    Source: E. Park, J. Oliva, NeurIPS 2019.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[..., Any],
        lr: Rate | None = None,
        steps: int = 1,
        *,
        parameters: Iterable[str] | Callable[[str, nn.Parameter], bool] | None = None,
        **options: Any,
    ) -> None:
        refused = {"inner", "plan", "engine"} & options.keys()
        if refused:
            raise TypeError(f"MetaCurvature: {sorted(refused)} must be left out, because the inner rule is its own")
        known = dict(model.named_parameters())
        if isinstance(loss, nn.Module):
            known |= {f"loss.{name}": p for name, p in loss.named_parameters()}
        names = select_parameters(known, parameters)
        rule = Curvature(DEFAULT if lr is None else lr, {name: known[name] for name in names})
        super().__init__(
            model, loss, steps=steps, inner=rule, parameters=names, plan="dense", engine="program", **options
        )
