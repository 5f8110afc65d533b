"""Inner rules of parameter groups, each by itself: together one rule, and its adjoint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastmeta.inner.rule import Back, Forth, Group, Rule, RuleKind, Space, V


@dataclass(frozen=True)
class GroupKind(RuleKind):
    """Which rule each group has; their hyper-parameters come one group's after the other's.

    Attributes:
        groups: all adapting parameters, in the packing's order.
    """

    groups: tuple[Group, ...]

    @property
    def entrywise(self) -> bool:
        """Whether a group's is."""
        return any(group.kind.entrywise for group in self.groups)

    @property
    def plain(self) -> bool:
        """Whether each one is eq. (3)."""
        return all(group.kind.plain for group in self.groups)

    @property
    def names(self) -> tuple[str, ...]:
        """Of the hyper-parameters beside the rates."""
        return tuple(f"{group.pattern}.{name}" for group in self.groups for name in group.kind.names)

    @property
    def records(self) -> frozenset[str]:
        """Vectors kept of a step, of some group at least; of which ones, :meth:`of` says."""
        return frozenset().union(*(group.kind.records for group in self.groups))

    def rule(self, values: Tensor | None) -> Rule:
        """With its hyper-parameters."""
        if values is None:
            raise RuntimeError(f"inner rule: values must be those of {self.names}, got None")
        pairs = zip(self.groups, self._pieces(values), strict=True)
        return GroupRule(self.groups, [group.kind.rule(piece) for group, piece in pairs], values)

    def of(self, place: int, values: Tensor | None = None) -> tuple[RuleKind, Tensor | None]:
        """The rule of the group that a parameter is in, and its values."""
        index = next(i for i, group in enumerate(self.groups) if place in group.parameters)
        return self.groups[index].kind, None if values is None else self._pieces(values)[index]

    def explicit(self, phi: Tensor, state: Any, g: Tensor, rate: Tensor, values: Tensor | None) -> tuple[Tensor, Any]:
        """There is none: the step of a parameter is its own rule's."""
        raise RuntimeError("inner rule: explicit must be asked of what RuleKind.of gives, got groups")

    def described(self) -> str:
        """What they have beside eq. (3), and where."""
        return ", ".join(f"{g.kind.described()} for {g.pattern!r}" for g in self.groups if not g.kind.plain)

    def _pieces(self, values: Tensor) -> list[Tensor | None]:
        """Each group's values in its own dtype."""
        pieces = values.split([len(group.kind.names) for group in self.groups])
        pairs = zip(self.groups, pieces, strict=True)
        return [None if group.dtype is None else piece.to(group.dtype) for group, piece in pairs]


class GroupRule(Rule):
    """A step of each group by its own rule, and the adjoint of each.

    Args:
        groups: all adapting parameters.
        rules: of each group, with its hyper-parameters.
        values: of all hyper-parameters, ``[H]``.
    """

    def __init__(self, groups: Sequence[Group], rules: Sequence[Rule], values: Tensor) -> None:
        self._groups, self._rules = groups, rules
        self._zeros = [values.new_zeros(len(group.kind.names)) for group in groups]

    def step(self, space: Space[V], phi: V, state: Any, g: Sequence[Any], k: int, *, keep: bool) -> Forth[V]:
        """Each group's step."""
        forths = [
            rule.step(space.part(group), own, before, g[group.parameters.start : group.parameters.stop], k, keep=kept)
            for group, rule, own, before, kept in zip(
                self._groups,
                self._rules,
                space.split(phi, self._groups),
                state or [None] * len(self._groups),
                [keep and (group.learned or group.kind.entrywise) for group in self._groups],
                strict=True,
            )
        ]
        records = [forth.record for forth in forths] if keep else None
        return Forth(space.joined([forth.phi for forth in forths]), [forth.state for forth in forths], records)

    def adjoint(self, space: Space[V], lam: V, state: Any, record: Any, k: int) -> Back[V]:
        """Each group's adjoint."""
        nothing = [None] * len(self._groups)
        every = zip(
            self._groups,
            self._rules,
            space.split(lam, self._groups),
            state or nothing,
            record or nothing,
            strict=True,
        )
        backs = [rule.adjoint(space.part(group), own, s, r, k) for group, rule, own, s, r in every]
        states = [back.state for back in backs]
        return Back(
            space.joined([back.lam for back in backs]),
            None if all(own is None for own in states) else states,
            space.joined([back.u for back in backs]),
            self._to_rates([back.d_alpha for back in backs]),
            self._to_hyper([back.d_hyper for back in backs]),
        )

    def _to_rates(self, found: Sequence[Tensor | None]) -> Tensor | None:
        """One gradient of what the groups have; zero where rates are fixed."""
        some = next((d for d in found if d is not None), None)
        if some is None:
            return None
        pairs = zip(self._groups, found, strict=True)
        return torch.cat([some.new_zeros(len(g.rates)) if d is None else d.reshape(-1) for g, d in pairs])

    def _to_hyper(self, found: Sequence[Tensor | None]) -> Tensor | None:
        if all(d is None for d in found):
            return None
        return torch.cat([zero if d is None else d.to(zero.dtype) for zero, d in zip(self._zeros, found, strict=True)])
