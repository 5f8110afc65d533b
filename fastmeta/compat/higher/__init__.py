"""The interface of `higher <https://github.com/facebookresearch/higher>`_ (E. Grefenstette et al., arXiv:1910.01727).

``import fastmeta.compat.higher as higher`` is the whole change. Signatures and results are those of higher; these
differ, where it gives wrong numbers, or none:

* Steps have the values of ``torch.optim`` in every part: Adam's ``eps`` where torch has it (higher 0.2.1 divides it by
  the square root of the second bias correction), ASGD's average, ``maximize``, ``decoupled_weight_decay``; AdamW.
* Gradients through RMSprop, centred or not, and through every second moment of zero are exact and finite (see
  ``core/optimizer_steps.py``); no warning is given.
* A learned hyper-parameter has its gradient also where its value is 0. Betas, eps and all others may be learned.
* A frozen parameter stays frozen without ``track_higher_grads``, and no graph is kept through the optimizer's state.
* A module that is registered twice stays one, with one set of buffers; ``None`` may be registered as a module;
  containers may be sliced; attributes that hold modules or bound methods of the model hold the patched ones.
* ``create_diff_optim`` takes groups of parameters.
* ``apply_trainable_opt_params`` does not cut a learned value to an int where the default was one (``momentum=0``), and
  flags are not among the learned hyper-parameters.
* These raise: a loss that depends on no fast weight (it was computed with the original module), an override of a
  hyper-parameter that the optimizer does not have, another number of parameters than the model's, a complex gradient,
  and a module that would go on with its original weights (parameters in attributes outside its registry, weight norm
  made of hooks).

The gradient of a perceptron's loss is one node of the graph (``compat/perceptron.py``), and so is a step of plain SGD.
It calls hooks of parameters and modules, but none on a result that an activation is applied to or on a cross entropy's
argument, nor does it retain their gradients.

As there, hooks of the original are not carried over, ``parameters(recurse=False)`` warns and gives everything, a call
with ``params=`` and every step lengthen the history, and an override at a step holds from then on.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from fastmeta.compat.higher import optim as optim
from fastmeta.compat.higher import patch as patch
from fastmeta.compat.higher import utils as utils
from fastmeta.compat.higher.optim import (
    DifferentiableOptimizer,
    Override,
    apply_trainable_opt_params,
    create_diff_optim,
    get_diff_optim,
    get_trainable_opt_params,
    register_optim,
)
from fastmeta.compat.higher.patch import PatchedModule, make_functional, monkeypatch
from fastmeta.compat.higher.utils import flatten, get_func_params

__all__ = [
    "apply_trainable_opt_params",
    "create_diff_optim",
    "flatten",
    "get_diff_optim",
    "get_func_params",
    "get_trainable_opt_params",
    "innerloop_ctx",
    "make_functional",
    "monkeypatch",
    "optim",
    "patch",
    "register_optim",
    "utils",
]


@contextmanager
def innerloop_ctx(
    model: nn.Module,
    opt: torch.optim.Optimizer,
    device: torch.device | None = None,
    copy_initial_weights: bool = True,
    override: Override | None = None,
    track_higher_grads: bool = True,
) -> Iterator[tuple[PatchedModule, DifferentiableOptimizer]]:
    """A patched copy of ``model`` and the differentiable form of ``opt`` for an inner loop.

    Args:
        model: any module.
        opt: an optimizer made with parameters of ``model``.
        device: where weights, buffers and the optimizer's state are put.
        copy_initial_weights: start from copies, and not from ``model``'s own parameters, which then get no gradient;
            MAML needs ``False``.
        override: hyper-parameters of ``opt`` by name, each a list of one value or of one for each param group.
        track_higher_grads: keep every step in the graph; ``False`` for evaluation, whose memory does not grow.

    Yields:
        ``(fmodel, diffopt)``: call ``fmodel`` for a loss and ``diffopt.step(loss)`` for a step.

    Raises:
        ValueError: see :func:`monkeypatch` and :func:`get_diff_optim`.
    """
    fmodel = monkeypatch(
        model, device, copy_initial_weights=copy_initial_weights, track_higher_grads=track_higher_grads
    )
    diffopt = get_diff_optim(
        opt,
        model.parameters(),
        fmodel=fmodel,
        device=device,
        override=override,
        track_higher_grads=track_higher_grads,
    )
    yield fmodel, diffopt
