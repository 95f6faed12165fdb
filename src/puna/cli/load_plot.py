"""The plot of `puna bench serve`: how each latency is spread, with its percentiles and the limits of goodput."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from puna.cli.load_report import LATENCIES, LoadReport


def draw(report: LoadReport, title: str, file: Path) -> None:
    """Writes the plot in the format that the file's name says."""
    figure = Figure(figsize=(10, 6), layout="constrained")
    for axes, (name, meaning) in zip(figure.subplots(2, 2).flat, LATENCIES, strict=True):
        latency = report.latencies[name]
        if len(latency.values):
            share = np.arange(1, len(latency.values) + 1) / len(latency.values)
            axes.plot(latency.values, share, drawstyle="steps-post")
            for percent, style in ((50, "-"), (99, "--")):
                value = latency.percentile(percent)
                axes.axvline(value, color="gray", linestyle=style, linewidth=1, label=f"p{percent} {value:,.1f} ms")
        if name in report.limits:
            limit = report.limits[name]
            axes.axvline(limit, color="tab:red", linewidth=1, label=f"limit {limit:,.0f} ms")
        axes.set(title=f"{meaning} ({name.upper()})", xlabel="milliseconds", ylabel="share at or below", ylim=(0, 1.02))
        if axes.get_legend_handles_labels()[0]:
            axes.legend(loc="lower right", fontsize="small")
    figure.suptitle(title, fontsize="medium", parse_math=False)
    figure.savefig(file, dpi=150)
