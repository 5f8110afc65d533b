"""Inner rules by parameter group: which parameter has which rule, and what a meta-step holds of all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from fastmeta.core.packing import Packing
from fastmeta.inner.configuration import Configuration, Parts
from fastmeta.inner.curvature import Curvature
from fastmeta.inner.group_rule import GroupKind
from fastmeta.inner.rates import Rates, given, prolonged
from fastmeta.inner.rule import Group
from fastmeta.inner.sgd_rule import PLAIN


class Groups(nn.Module):
    """Inner rules by parameter group, each with its own rates and hyper-parameters.

    ``MAML(inner={"head.*": Adam(1e-2), "*": SGD(0.1, momentum=0.9)})`` makes one of the mapping. Each adapting
    parameter takes the steps of the first entry that fits its name. Gradients to what is learned come as
    ``inner.<pattern>.lr``, ``inner.<pattern>.momentum`` and so on; parameters among it are parameters of this module.

    Args:
        rules: from parameter names or ``fnmatch`` patterns to rules. A rule's ``lr`` may be a mapping too, from the
            names of its group's parameters.

    Raises:
        TypeError: it is no mapping from strings to rules of ``fastmeta.inner``.
        ValueError: it is empty, or a name is one of ``nn.Module``'s own; or, from a learner: an adapting parameter that
            no entry fits, an entry that fits none or is left without one.
    """

    def __init__(self, rules: Mapping[str, Configuration]) -> None:
        super().__init__()
        if not isinstance(rules, Mapping):
            raise TypeError(f"Groups: rules must be a mapping from names to rules, got {type(rules).__name__}")
        if not rules:
            raise ValueError("Groups: rules must have an entry for some parameter, got none")
        self._places: dict[str, str] = {}
        for pattern, rule in rules.items():
            if not isinstance(pattern, str):
                raise TypeError(f"Groups: names must be strings, got {type(pattern).__name__}")
            if not isinstance(rule, Configuration) or isinstance(rule, Curvature):
                got = type(rule).__name__
                raise TypeError(f"Groups: rules[{pattern!r}] must be a rule of fastmeta.inner, such as SGD, got {got}")
            place = pattern.replace(".", "/")  # a module's name has no dots
            if not place or hasattr(self, place):
                raise ValueError(f"Groups: names must be free for modules, got {pattern!r}; write it as a pattern")
            self._places[pattern] = place
            self.add_module(place, rule)

    def __getitem__(self, pattern: str) -> Configuration:
        """The rule of an entry, whose attributes may be set at any time."""
        rule: Configuration = getattr(self, self._places[pattern])
        return rule

    def items(self) -> list[tuple[str, Configuration]]:
        """The entries in their order."""
        return [(pattern, self[pattern]) for pattern in self._places]

    def rule_of(self, name: str) -> Configuration | None:
        """The rule of a parameter, that of the first entry that fits its name; ``None`` if there is none."""
        return next((rule for pattern, rule in self.items() if fnmatchcase(name, pattern)), None)

    def shared_out(self, names: Sequence[str]) -> dict[str, list[str]]:
        """Which of the adapting parameters each entry has.

        Raises:
            ValueError: there is a parameter without an entry, or an entry without a parameter.
        """
        found: dict[str, list[str]] = {pattern: [] for pattern in self._places}
        rest = list[str]()
        for name in names:
            pattern = next((p for p in self._places if fnmatchcase(name, p)), None)
            (rest if pattern is None else found[pattern]).append(name)
        if rest:
            raise ValueError(
                f"MAML: inner must have a rule for every adapting parameter, got none for {rest}; a last entry '*' is "
                "for all others"
            )
        for pattern in (p for p, own in found.items() if not own):
            taken = [name for name in names if fnmatchcase(name, pattern)]
            if not taken:
                raise ValueError(f"MAML: inner must name adapting parameters, got {pattern!r}; known: {list(names)}")
            before = [p for p, own in found.items() if set(own) & set(taken)]
            raise ValueError(
                f"MAML: inner must leave {pattern!r} a parameter, got {before} before it, which have {taken}; the "
                "first entry that fits a name holds"
            )
        return found

    def rates(self, packing: Packing) -> list[Rates]:
        """The rates of each group, checked."""
        found, start = [], 0
        for pattern, own in self.shared_out(packing.names).items():
            part = slice(start, start + len(own))
            of_group = Packing(packing.names[part], packing.shapes[part])
            found.append(Rates(given(self[pattern].lr), of_group, of=f"inner[{pattern!r}]."))
            start = part.stop
        return found

    def parts(self, packing: Packing, like: Tensor, steps: int, trained: int) -> Parts:
        """What a meta-step holds, for parameters that are packed group by group, in ``like``'s dtype and device.

        Raises:
            ValueError: as :meth:`Rates.alpha`.
        """
        alphas, shapes, hyper, groups = list[Tensor](), list[tuple[int, ...]](), list[Tensor](), list[Group]()
        parameter = column = 0
        for (pattern, rule), rates in zip(self.items(), self.rates(packing), strict=True):
            count = len(rates.packing.names)
            alpha = rates.alpha(like, steps, trained)
            alphas.append(alpha.expand(-1, count) if rates.kind == "scalar" else alpha)
            shapes += rates.shapes or ((),) * count
            values = rule.values(like)
            hyper += [] if values is None else [values]
            width = alphas[-1].shape[1]
            groups.append(
                Group(
                    pattern,
                    rule.kind(),
                    bool(rule.learned()),
                    None if values is None else values.dtype,
                    range(parameter, parameter + count),
                    range(column, column + width),
                )
            )
            parameter, column = parameter + count, column + width
        rows = max(len(alpha) for alpha in alphas)
        kind = GroupKind(tuple(groups))
        differ = any(shapes)
        return Parts(
            torch.cat([prolonged(alpha, rows) for alpha in alphas], 1),
            None if differ else packing.segments(like.device),
            tuple(shapes) if differ else None,
            PLAIN if kind.plain else kind,
            torch.cat(hyper) if hyper else None,
        )

    def kind(self) -> tuple[Any, ...]:
        """The rules without values, from their attributes as they are, checked."""
        return tuple((pattern, rule.kind()) for pattern, rule in self.items())

    def learned(self) -> dict[str, Tensor]:
        """The tensors that require grad, by ``<pattern>.<name>``."""
        return {f"{pattern}.{name}": v for pattern, rule in self.items() for name, v in rule.learned().items()}

    def numbers(self) -> tuple[float | None, ...]:
        """The hyper-parameters, the rates among them; ``None`` for what is no number."""
        return tuple(number for _, rule in self.items() for number in rule.numbers())
