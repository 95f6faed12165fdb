"""The measurements as a page of tables, and as a plot."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any


def page(found: Mapping[str, Any]) -> str:
    """Markdown of everything that was measured so far; what failed says why."""
    about = found.get("about", {})
    lines = [
        f"# {about.get('shape', '?')} on {about.get('device', '?')}",
        "",
        f"Random weights; torch {about.get('torch', '?')}, triton {about.get('triton', '?')}, commit "
        f"{about.get('commit', '?')}.",
    ]
    if about.get("dry_run"):
        lines.append("**A dry run: a tiny model on the CPU, whose numbers mean nothing.**")
    parts = {name: part for name, part in found.items() if name != "about"}
    for name, part in parts.items():
        lines += ["", f"## {name}", ""]
        if "failed" in part:
            lines += [f"Failed: `{part['failed']}`"]
            continue
        for result in part.get("results", []):
            if "kernels" in result:
                lines += _kernels(result)
        rows = [flat(result) for result in part.get("results", []) if "kernels" not in result]
        if rows:
            lines += table(rows)
    return "\n".join(lines) + "\n"


def flat(result: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested results in one row."""
    row: dict[str, Any] = {}
    for key, value in result.items():
        if isinstance(value, Mapping):
            row |= flat(value, f"{prefix}{key} ")
        else:
            row[prefix + key.replace("_", " ")] = value
    return row


def table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    columns: dict[str, None] = {}
    for row in rows:
        columns |= dict.fromkeys(row)
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(shown(row.get(column)) for column in columns) + " |" for row in rows]
    return lines


def shown(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        if abs(value) >= 1e9:
            return f"{value:.3g}"
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _kernels(result: Mapping[str, Any]) -> Iterable[str]:
    # Of kernels that wait inside, times and shares have the waiting in them.
    how = ", kernels overlapping" if result.get("overlap") else ""
    yield (
        f"{result['weights']}, {result['batch']} at once{how}: {result['milliseconds_per_step']:.2f} ms a step, "
        f"{result['steps']} steps, idle {result['idle_percent']:.1f} % of the time."
    )
    yield ""
    yield from table(result["kernels"])
    yield ""


def plot(found: Mapping[str, Any], path: Path) -> None:
    """Rows of the yardstick: published, measured and the floor. Raises ValueError where no row was measured."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in found.get("offline", {}).get("results", []) if "tokens_per_second" in row]
    if not rows:
        raise ValueError("no row of offline throughput was measured")
    figure, axes = plt.subplots(figsize=(9, 4.5))
    places = range(len(rows))
    axes.bar([at - 0.2 for at in places], [row["published"] or 0 for row in rows], 0.4, label="TensorRT-LLM, published")
    axes.bar([at + 0.2 for at in places], [row["tokens_per_second"] for row in rows], 0.4, label="puna")
    axes.plot(places, [row["floor"] for row in rows], "k_", markersize=28, label="limit of bandwidth and arithmetic")
    axes.set_xticks(list(places), [row["row"] for row in rows])
    axes.set_xlabel("tokens of prompt / output")
    axes.set_ylabel("output tokens a second")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)
