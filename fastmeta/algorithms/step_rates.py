"""One inner rate for every step and parameter, learned: what MAML++ calls per-layer per-step rates."""

from __future__ import annotations

from torch import Tensor

from fastmeta.algorithms.inner_rule import InnerRule
from fastmeta.core.packing import Packing
from fastmeta.inner.configuration import Configuration, Parts
from fastmeta.inner.groups import Groups
from fastmeta.inner.rates import RateTable, as_tensor, prolonged
from fastmeta.inner.sgd_rule import PLAIN


class StepRates(InnerRule):
    """An inner rule whose rates are a table ``[K, S]``, a row a step and a column an adapting parameter.

    Steps beyond K take the last row.

    Args:
        table: the rates where there is no ``inner``; else ``None``.
        inner: a rule whose own ``lr`` is such a table.
    """

    def __init__(self, table: float | Tensor | RateTable | None, inner: Configuration | Groups | None) -> None:
        super().__init__(table, inner)
        rates = table if self._inner is None else self._inner.lr
        if not isinstance(rates, Tensor) or rates.dim() != 2:
            raise ValueError(f"MAMLPlusPlus: lr must be the table of rates [K, S], got {type(rates).__name__}")
        self._table = rates

    def check(self, packing: Packing) -> None:
        """Raise ``ValueError`` unless there is a column for each parameter."""
        if self._table.shape[1] != len(packing.names):
            raise ValueError(
                f"MAMLPlusPlus: lr must have a column for each of {len(packing.names)} adapting parameters, "
                f"got {tuple(self._table.shape)}"
            )

    def parts(self, packing: Packing, like: Tensor, steps: int, trained: int) -> Parts:
        """As it is for the parameters packed so, in ``like``'s dtype and device."""
        self.check(packing)
        table = prolonged(as_tensor(self._table, like), steps)
        kind, hyper = (PLAIN, None) if self._inner is None else (self._inner.kind(), self._inner.values(like))
        return Parts(table, packing.segments(like.device), None, kind, hyper)
