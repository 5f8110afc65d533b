"""``python -m benchmarks.published``: the README's tables and docs/performance.md, from the runs that are kept."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from benchmarks import scaling
from benchmarks.gpu.report import MAIN
from fastmeta.core import files

ROOT = Path(__file__).resolve().parents[1]
README, RESULTS = ROOT / "README.md", ROOT / "benchmarks" / "results"
TITLES = {
    "sinusoid_k1": "sinusoid, 25 tasks, K = 1",
    "sinusoid_k5": "sinusoid, 25 tasks, K = 5",
    "sinusoid_tanh": "sinusoid, tanh 1-64-64-1, 100 tasks, K = 5",
    "mlp784": "MLP 784-256-128-64-5, 32 tasks, K = 5",
    "omniglot_5way": "Omniglot Conv4, 5-way 1-shot, 32 tasks, K = 1",
    "omniglot_20way": "Omniglot Conv4, 20-way 1-shot, 4 tasks, K = 5",
    "conv4_84": "Conv4 with 32 filters, 84x84, 4 tasks, K = 5",
}
PEERS = {"hand-written loop": "loop", "torch.func": "torch.func", "torch.compile": "torch.compile", "jitted JAX": "jax"}
GRAPH, OURS_GRAPH = "torch.func, graph", "fastmeta, graph"


def on_a_processor(run: dict[str, Any]) -> str:
    """The table of meta_step.json: each peer's best form."""
    lines = [["workload", *PEERS, "fastmeta"], ["---", *["---:"] * (len(PEERS) + 1)]]
    for workload in run["workloads"]:
        outcomes = workload["outcomes"]
        cells = [_best([o for o in outcomes if o["peer"] == peer]) for peer in PEERS.values()]
        ours = next(o for o in outcomes if o["name"] == "fastmeta")
        lines.append([TITLES[workload["workload"]], *cells, f"**{_ms(ours['median_ms'])}**"])
    return _markdown(lines)


def on_a_gpu(run: dict[str, Any]) -> str:
    """The table of gpu.json: fastmeta's own call, and captured as the first peer is."""
    lines = [["workload", GRAPH, "jitted JAX", "fastmeta", "graph", "error of a task"], ["---", *["---:"] * 5]]
    for name in TITLES:
        step = run.get(f"step {name}", {"rows": []})
        rows = {row["variant"]: row for row in step["rows"]}
        if not {GRAPH, MAIN, OURS_GRAPH} <= rows.keys():
            continue
        ours, jax = rows[MAIN], run.get(f"jax {name}", {}).get("ms")
        times = [_ms(rows[GRAPH]["ms"]), "" if jax is None else _ms(jax)]
        times += [f"**{_ms(rows[which]['ms'])}**" for which in (MAIN, OURS_GRAPH)]
        lines.append([step["title"], *times, f"{_error(ours['task_error'])} ({_error(ours['task_bound'])})"])
    return _markdown(lines)


def readme(text: str) -> str:
    """The README with both tables as they are in the runs."""
    for name, table in (("meta_step", on_a_processor), ("gpu", on_a_gpu)):
        run = json.loads((RESULTS / f"{name}.json").read_text())
        begin, end = f"<!-- table of {name}.json: python -m benchmarks.published -->\n", "<!-- end -->"
        pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
        if len(pattern.findall(text)) != 1:
            raise RuntimeError(f"published: README.md must have the marker {begin.strip()!r} once, with an end")
        before, after = pattern.split(text)
        text = before + begin + table(run) + end + after
    return text


def main() -> None:
    """Write both."""
    files.write_text(README, readme(README.read_text()))
    data = json.loads((RESULTS / "scaling.json").read_text())
    files.write_text(scaling.DOCUMENT, scaling.document(data))


def _best(outcomes: list[dict[str, Any]]) -> str:
    """The quickest form's time; where none has one, what became of the peer."""
    times = [o["median_ms"] for o in outcomes if o["median_ms"] is not None]
    if times:
        return _ms(min(times))
    return "wrong" if any(o["status"] == "wrong" for o in outcomes) else "none"


def _ms(value: float) -> str:
    return f"{value:#.3g}" if value < 100 else f"{value:.0f}"


def _error(value: float) -> str:
    return re.sub(r"e-0(\d)", r"e-\1", f"{value:.1e}")


def _markdown(lines: list[list[str]]) -> str:
    heads, rule, *rows = lines
    shown = [f"| {' | '.join(heads)} |", f"|{'|'.join(rule)}|", *(f"| {' | '.join(row)} |" for row in rows)]
    return "\n".join(shown) + "\n"


if __name__ == "__main__":
    main()
