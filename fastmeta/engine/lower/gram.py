"""Which linear layers hold their weight as products with a task's data, eq. (12), instead of forming it."""

from __future__ import annotations

from typing import Any


def with_gram(support: dict[str, Any], query: dict[str, Any], steps: int, *, second_order: bool) -> tuple[bool, ...]:
    """For each operation, whether the Gram form takes fewer operations than a weight of each task's own.

    Args:
        support: an objective's lowered program at the support's shapes.
        query: the same at the query's.
        steps: K.
        second_order: whether Hessian-vector products are taken.
    """
    adapted = support["adapted"]
    pairs = zip(support["operations"], query["operations"], strict=True)
    return tuple(
        s["operation"] == "linear_block"
        and s["x"][0][0]
        and s["w"][0] < adapted
        and _gram_products(s, q["n"], steps, second_order) < _dense_products(s, q["n"], steps, second_order)
        for s, q in pairs
    )


def in_gram_form(
    support: dict[str, Any], query: dict[str, Any], chosen: tuple[bool, ...]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Both programs with the chosen operations in that form."""
    rows = [(s.get("n"), q.get("n")) for s, q in zip(support["operations"], query["operations"], strict=True)]

    def rewritten(program: dict[str, Any], asks: bool) -> dict[str, Any]:
        operations = [
            {**operation, "gram": True, "support": n[0], "query": n[1], "asks": asks} if gram else operation
            for operation, gram, n in zip(program["operations"], chosen, rows, strict=True)
        ]
        return {**program, "operations": operations}

    return rewritten(support, False), rewritten(query, True)


def _dense_products(layer: dict[str, Any], query: int, steps: int, second_order: bool) -> int:
    """Multiply-adds of one task: forward, the weight's gradient, and both again in each Hessian-vector product."""
    passes = steps * layer["n"] * (4 if second_order else 2) + 2 * query
    return passes * layer["in"] * layer["out"]


def _gram_products(layer: dict[str, Any], query: int, steps: int, second_order: bool) -> int:
    """The same, where each row meets the weight once, and rows meet the support set's rows in every step."""
    n, fan_in, fan_out = layer["n"], layer["in"], layer["out"]
    rows = n + query
    whole = rows + (rows if second_order else query)
    small = rows * n * fan_in + steps * rows * n * fan_out * (2 if second_order else 1)
    return whole * fan_in * fan_out + small
