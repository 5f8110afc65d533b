"""Differentiable optimisation: updates through transforms of gradients that are themselves learned."""

from fastmeta.compat.learn2learn.optim import transforms
from fastmeta.compat.learn2learn.optim.differentiable_sgd import DifferentiableSGD
from fastmeta.compat.learn2learn.optim.learnable_optimizer import LearnableOptimizer
from fastmeta.compat.learn2learn.optim.parameter_update import ParameterUpdate
from fastmeta.compat.learn2learn.optim.transforms import (
    KroneckerTransform,
    MetaCurvatureTransform,
    ModuleTransform,
    ReshapedTransform,
    TransformDictionary,
)

__all__ = [
    "DifferentiableSGD",
    "KroneckerTransform",
    "LearnableOptimizer",
    "MetaCurvatureTransform",
    "ModuleTransform",
    "ParameterUpdate",
    "ReshapedTransform",
    "TransformDictionary",
    "transforms",
]
