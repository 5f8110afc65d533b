"""The differentiable optimizers of `TorchOpt <https://github.com/metaopt/torchopt>`_ (J. Ren et al., JMLR 24, 2023).

``import fastmeta.compat.torchopt as torchopt`` is the whole change for code that uses the meta-optimizers, the
functional optimizers, and snapshots. Signatures and results are those of TorchOpt 0.7; these differ, where it gives
wrong numbers, or none:

* Gradients through second moments of zero are exact and finite, with ``eps_root=0`` too (see
  ``core/optimizer_steps.py``); TorchOpt's are NaN.
* Every hyper-parameter may be a tensor that requires grad.
* Parameters that stand in several places stay one after a step and in a snapshot; TorchOpt's come apart.
* Frozen parameters stay as they are; TorchOpt raises.
* Dampening begins after a parameter's first gradient; TorchOpt's transformation remembers its first call, and not its
  state, so that dampening begins at once when an optimizer goes back to its start.
* ``clip_grad_norm`` is differentiated as it is; TorchOpt takes the norm for a constant.
* ``FuncOptimizer`` takes any tree of parameters. The clone of a meta-optimizer optimizes the same modules, and not
  copies that no module reads.
* These raise: a loss that depends on none of the parameters, and a snapshot of another module.
* Transformations never write gradients or states in place; states are to be handed on as they are.

The gradient of a perceptron's loss is one node of the graph (``compat/perceptron.py``), and so is a step of plain SGD.
It calls hooks of parameters and modules, but none on a result that an activation is applied to or on a cross entropy's
argument, nor does it retain their gradients.

As there, ``MetaOptimizer.step`` leaves tensors in a module where parameters were, and the first state is made at the
first step, so that a snapshot before it leads back to no state. ``use_accelerated_op`` is taken and without effect.
"""

from fastmeta.compat.torchopt import optim as optim
from fastmeta.compat.torchopt import transform as transform
from fastmeta.compat.torchopt import utils as utils
from fastmeta.compat.torchopt.optim import (
    FuncOptimizer,
    MetaAdaDelta,
    MetaAdadelta,
    MetaAdaGrad,
    MetaAdagrad,
    MetaAdam,
    MetaAdaMax,
    MetaAdamax,
    MetaAdamW,
    MetaOptimizer,
    MetaRAdam,
    MetaRMSProp,
    MetaRMSprop,
    MetaSGD,
)
from fastmeta.compat.torchopt.transform import (
    adadelta,
    adagrad,
    adam,
    adamax,
    adamw,
    apply_updates,
    chain,
    clip_grad_norm,
    radam,
    rmsprop,
    sgd,
)
from fastmeta.compat.torchopt.utils import (
    extract_state_dict,
    module_clone,
    module_detach_,
    recover_state_dict,
    stop_gradient,
)

__all__ = [
    "FuncOptimizer",
    "MetaAdaDelta",
    "MetaAdaGrad",
    "MetaAdaMax",
    "MetaAdadelta",
    "MetaAdagrad",
    "MetaAdam",
    "MetaAdamW",
    "MetaAdamax",
    "MetaOptimizer",
    "MetaRAdam",
    "MetaRMSProp",
    "MetaRMSprop",
    "MetaSGD",
    "adadelta",
    "adagrad",
    "adam",
    "adamax",
    "adamw",
    "apply_updates",
    "chain",
    "clip_grad_norm",
    "extract_state_dict",
    "module_clone",
    "module_detach_",
    "optim",
    "radam",
    "recover_state_dict",
    "rmsprop",
    "sgd",
    "stop_gradient",
    "transform",
    "utils",
]
