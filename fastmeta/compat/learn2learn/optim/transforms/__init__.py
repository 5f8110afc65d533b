"""Transforms: modules that take a gradient and give an update, made of the parameter whose gradient it is."""

from fastmeta.compat.learn2learn.optim.transforms.kronecker_transform import KroneckerTransform
from fastmeta.compat.learn2learn.optim.transforms.metacurvature_transform import MetaCurvatureTransform
from fastmeta.compat.learn2learn.optim.transforms.module_transform import ModuleTransform, ReshapedTransform
from fastmeta.compat.learn2learn.optim.transforms.transform_dictionary import TransformDictionary

__all__ = [
    "KroneckerTransform",
    "MetaCurvatureTransform",
    "ModuleTransform",
    "ReshapedTransform",
    "TransformDictionary",
]
