"""Exact, task-batched second-order meta-learning for PyTorch.

Every public name is loaded when it is first used (PEP 562), so that ``import fastmeta`` costs next to nothing and a
command that needs only a part of the package loads only that part.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    import fastmeta.learner.models as models
    from fastmeta import algorithms as algorithms
    from fastmeta import compat as compat
    from fastmeta import inner as inner
    from fastmeta import learner as learner
    from fastmeta import ops as ops
    from fastmeta import tasks as tasks
    from fastmeta.algorithms.anil import ANIL as ANIL
    from fastmeta.algorithms.anil import BOIL as BOIL
    from fastmeta.algorithms.cavia import CAVIA as CAVIA
    from fastmeta.algorithms.fomaml import FOMAML as FOMAML
    from fastmeta.algorithms.imaml import IMAML as IMAML
    from fastmeta.algorithms.maml import MAML as MAML
    from fastmeta.algorithms.maml_plus_plus import MAMLPlusPlus as MAMLPlusPlus
    from fastmeta.algorithms.meta_curvature import MetaCurvature as MetaCurvature
    from fastmeta.algorithms.meta_sgd import MetaSGD as MetaSGD
    from fastmeta.algorithms.output import MetaOutput as MetaOutput
    from fastmeta.algorithms.proto_maml import ProtoMAML as ProtoMAML
    from fastmeta.algorithms.reptile import Reptile as Reptile
    from fastmeta.learner.callbacks import Callback as Callback
    from fastmeta.learner.callbacks import Checkpoint as Checkpoint
    from fastmeta.learner.callbacks import EarlyStopping as EarlyStopping
    from fastmeta.learner.estimator import MetaLearner as MetaLearner
    from fastmeta.learner.loggers import MLflow as MLflow
    from fastmeta.learner.loggers import TensorBoard as TensorBoard
    from fastmeta.ops.inner_update.op import inner_update as inner_update
    from fastmeta.profiling.session import profile as profile
    from fastmeta.tasks.batch import TaskBatch as TaskBatch

_ATTRIBUTES = {
    "ANIL": "fastmeta.algorithms.anil",
    "BOIL": "fastmeta.algorithms.anil",
    "CAVIA": "fastmeta.algorithms.cavia",
    "Callback": "fastmeta.learner.callbacks",
    "Checkpoint": "fastmeta.learner.callbacks",
    "EarlyStopping": "fastmeta.learner.callbacks",
    "FOMAML": "fastmeta.algorithms.fomaml",
    "IMAML": "fastmeta.algorithms.imaml",
    "MAML": "fastmeta.algorithms.maml",
    "MAMLPlusPlus": "fastmeta.algorithms.maml_plus_plus",
    "MLflow": "fastmeta.learner.loggers",
    "MetaCurvature": "fastmeta.algorithms.meta_curvature",
    "MetaLearner": "fastmeta.learner.estimator",
    "MetaOutput": "fastmeta.algorithms.output",
    "MetaSGD": "fastmeta.algorithms.meta_sgd",
    "ProtoMAML": "fastmeta.algorithms.proto_maml",
    "Reptile": "fastmeta.algorithms.reptile",
    "TaskBatch": "fastmeta.tasks.batch",
    "TensorBoard": "fastmeta.learner.loggers",
    "inner_update": "fastmeta.ops.inner_update",
    "profile": "fastmeta.profiling.session",
}
_MODULES = {
    "algorithms": "fastmeta.algorithms",
    "compat": "fastmeta.compat",
    "inner": "fastmeta.inner",
    "learner": "fastmeta.learner",
    "models": "fastmeta.learner.models",
    "ops": "fastmeta.ops",
    "tasks": "fastmeta.tasks",
}

__all__ = [
    "ANIL",
    "BOIL",
    "CAVIA",
    "FOMAML",
    "IMAML",
    "MAML",
    "Callback",
    "Checkpoint",
    "EarlyStopping",
    "MAMLPlusPlus",
    "MLflow",
    "MetaCurvature",
    "MetaLearner",
    "MetaOutput",
    "MetaSGD",
    "ProtoMAML",
    "Reptile",
    "TaskBatch",
    "TensorBoard",
    "__version__",
    "algorithms",
    "compat",
    "inner",
    "inner_update",
    "learner",
    "models",
    "ops",
    "profile",
    "tasks",
]


def __getattr__(name: str) -> Any:
    if name in _ATTRIBUTES:
        value = getattr(importlib.import_module(_ATTRIBUTES[name]), name)
    elif name in _MODULES:
        value = importlib.import_module(_MODULES[name])
    else:
        raise AttributeError(f"module 'fastmeta' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


if "FASTMETA_PROFILE" in os.environ:  # by `fastmeta profile`, for the processes of its command
    from fastmeta.profiling import launched

    launched.begin(launched.Order.found())
