"""The plot of `puna bench`: rates of prefill and decode for each batch, beside what the machine allows."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from puna.cli.bench_run import Report


def draw(report: Report, title: str, file: Path) -> None:
    """Writes the plot in the format that the file's name says."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    places = range(len(report.results))
    names = [str(one.batch) for one in report.results]
    for axes, name, rates, shares in zip(
        figure.subplots(1, 2),
        ("prefill", "decode"),
        (
            [one.prefill_tokens_per_second for one in report.results],
            [one.decode_tokens_per_second for one in report.results],
        ),
        ([one.prefill_percent for one in report.results], [one.decode_percent for one in report.results]),
        strict=True,
    ):
        allowed = [100 * rate / share for rate, share in zip(rates, shares, strict=True)]
        axes.bar(places, allowed, color="lightgray", label="what memory and cores allow")
        bars = axes.bar(places, rates, width=0.6, label="measured")
        axes.bar_label(bars, [f"{rate:,.0f}\n{share:.0f} %" for rate, share in zip(rates, shares, strict=True)])
        axes.set_xticks(list(places), names)
        axes.margins(y=0.15)
        axes.set(title=name, xlabel="sequences at once", ylabel="tokens per second")
        axes.legend(loc="upper left", fontsize="small")
    figure.suptitle(f"{title}, {report.settings.threads} threads", fontsize="medium", parse_math=False)
    figure.savefig(file, dpi=150)
