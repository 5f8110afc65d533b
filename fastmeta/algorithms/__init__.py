"""Meta-learning algorithms: configuration and meta-parameters over one engine. Names are loaded when first used."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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

_PLACES = {
    "ANIL": "anil",
    "BOIL": "anil",
    "CAVIA": "cavia",
    "FOMAML": "fomaml",
    "IMAML": "imaml",
    "MAML": "maml",
    "MAMLPlusPlus": "maml_plus_plus",
    "MetaCurvature": "meta_curvature",
    "MetaOutput": "output",
    "MetaSGD": "meta_sgd",
    "ProtoMAML": "proto_maml",
    "Reptile": "reptile",
}

__all__ = [
    "ANIL",
    "BOIL",
    "CAVIA",
    "FOMAML",
    "IMAML",
    "MAML",
    "MAMLPlusPlus",
    "MetaCurvature",
    "MetaOutput",
    "MetaSGD",
    "ProtoMAML",
    "Reptile",
]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'fastmeta.algorithms' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"fastmeta.algorithms.{_PLACES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
