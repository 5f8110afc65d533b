"""Which tables of embeddings keep their gradient apart, as the cotangents of the rows that a task reads."""

from __future__ import annotations

from typing import Any


def with_tables_apart(support: dict[str, Any], query: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Both programs with that form of those that do not adapt, where a task's sets name fewer rows than there are.

    Args:
        support: an objective's lowered program at the support's shapes.
        query: the same at the query's.
    """
    outer = range(support["adapted"], support["differentiated"])
    pairs = zip(support["operations"], query["operations"], strict=True)
    apart = [
        s["operation"] == "embedding" and s["w"][0] in outer and s["count"] + q["count"] < s["rows"] for s, q in pairs
    ]

    def rewritten(program: dict[str, Any]) -> dict[str, Any]:
        operations = [
            {**operation, "apart": True} if kept else operation
            for operation, kept in zip(program["operations"], apart, strict=True)
        ]
        return {**program, "operations": operations}

    return rewritten(support), rewritten(query)
