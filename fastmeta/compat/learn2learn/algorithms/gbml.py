"""Gradient-based meta-learning with learned transforms of the inner gradients."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fastmeta.compat.learn2learn.gradients import gradients
from fastmeta.compat.learn2learn.optim import DifferentiableSGD, ParameterUpdate
from fastmeta.compat.learn2learn.optim.parameter_update import Transform
from fastmeta.compat.learn2learn.utils import clone_module


class GBML(nn.Module):
    """Adaptation by transformed gradients, ``p <- p - lr * transform_p(d loss/d p)``, with transforms that are learned.

    A transform that scales makes it Meta-SGD, or with ``adapt_transform`` Alpha MAML (H. S. Behl et al., 2019); a
    Kronecker-factored one KFO (S. Arnold, S. Iqbal, F. Sha, 2019); :class:`MetaCurvatureTransform` Meta-Curvature
    (E. Park, J. Oliva, 2019).

    Args:
        module: the module to wrap.
        transform: makes the transform, a module, of a parameter, or ``None`` to leave its gradient as it is.
        lr: the rate of the module's parameters, and of the transforms' where they adapt.
        adapt_transform: let the transforms' parameters adapt too: at each step but the first, by the gradient of the
            loss that is handed to :meth:`adapt`.
        first_order: take inner gradients as constants.
        allow_unused: let parameters that a loss does not use stay.
        allow_nograd: let parameters that do not require grad stay.
        **kwargs: ``compute_update``, the :class:`ParameterUpdate` to use instead of one that is made of ``transform``.

    Raises:
        TypeError: an unknown keyword.
    """

    def __init__(
        self,
        module: nn.Module,
        transform: Transform,
        lr: float | Tensor = 1.0,
        adapt_transform: bool = False,
        first_order: bool = False,
        allow_unused: bool = False,
        allow_nograd: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        if unknown := set(kwargs) - {"compute_update"}:
            raise TypeError(f"GBML: further keywords must be compute_update alone, got {', '.join(sorted(unknown))}")
        self.module = module
        self.transform = transform
        self.adapt_transform = adapt_transform
        self.lr = lr
        self.first_order = first_order
        self.allow_unused = allow_unused
        self.allow_nograd = allow_nograd
        if "compute_update" in kwargs:
            self.compute_update = kwargs["compute_update"]
        else:
            self.compute_update = ParameterUpdate(parameters=module.parameters(), transform=transform)
        self.diff_sgd = DifferentiableSGD(lr=lr)
        self._params_updated = False  # whether the parameters depend on the transforms' by now

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the module returns."""
        return self.module(*args, **kwargs)

    def clone(
        self,
        first_order: bool | None = None,
        allow_unused: bool | None = None,
        allow_nograd: bool | None = None,
        adapt_transform: bool | None = None,
    ) -> GBML:
        """A learner whose module and transforms are :func:`clone_module` of this one's.

        Args:
            first_order: another than this learner's.
            allow_unused: likewise.
            allow_nograd: likewise.
            adapt_transform: likewise.
        """
        return GBML(
            module=clone_module(self.module),
            transform=self.transform,
            lr=self.lr,
            adapt_transform=self.adapt_transform if adapt_transform is None else adapt_transform,
            first_order=self.first_order if first_order is None else first_order,
            allow_unused=self.allow_unused if allow_unused is None else allow_unused,
            allow_nograd=self.allow_nograd if allow_nograd is None else allow_nograd,
            compute_update=clone_module(self.compute_update),
        )

    def adapt(
        self,
        loss: Tensor,
        first_order: bool | None = None,
        allow_nograd: bool | None = None,
        allow_unused: bool | None = None,
    ) -> None:
        """One inner step along the transformed gradient of ``loss``, in place.

        Mind the order of the last two, which is not that of :meth:`MAML.adapt`.

        Args:
            loss: a scalar made by this learner.
            first_order: for this step, another than the learner's.
            allow_nograd: likewise.
            allow_unused: likewise.

        Raises:
            RuntimeError: a parameter is unused by the loss or does not require grad, and that is not allowed.
        """
        second_order = not (self.first_order if first_order is None else first_order)
        allow_unused = self.allow_unused if allow_unused is None else allow_unused
        allow_nograd = self.allow_nograd if allow_nograd is None else allow_nograd
        if self.adapt_transform and self._params_updated:
            found = gradients(
                "GBML.adapt (adapt_transform)",
                loss,
                self.compute_update.parameters(),
                create_graph=second_order,
                retain_graph=True,  # for the gradient to the module's parameters below
                allow_unused=allow_unused,
                names=lambda: [name for name, _ in self.compute_update.named_parameters()],
            )
            self.diff_sgd(self.compute_update, found)
            self._params_updated = False
        connected = second_order or self.adapt_transform
        updates = self.compute_update(
            loss,
            self.module.parameters(),
            create_graph=connected,
            retain_graph=connected,
            allow_unused=allow_unused,
            allow_nograd=allow_nograd,
        )
        self.diff_sgd(self.module, updates)
        self._params_updated = True
