"""The table and the plot of benchmarks/cpu_peers.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

BEGIN, END = "<!-- measured: benchmarks/cpu_peers.py writes from here -->", "<!-- to here -->"
TITLES = {
    "decode": "decode, 1 sequence",
    "prefill": "prefill of 512",
    "decode of 8": "decode, 8 sequences",
}


def markdown(results: dict[str, Any]) -> str:
    """Two tables: rates with ratios, and load time with memory."""
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    limit = results["limit"]
    giga = {name: f"{count / 1e9:,.0f}" for name, count in limit.items()}
    lines = [
        f"{results['date']}, {results['machine']}, {results['threads']} threads; shape {results['shape']}, random "
        f"weights; {versions}. This machine reads {limit['read_bytes_per_second'] / 1e9:.1f} GB/s and does "
        f"{giga['int8']} (int8), {giga['bfloat16']} (bfloat16) and {giga['float32']} (float32) billion operations a "
        "second.",
        "",
        f"Tokens per second, medians of {results['pairs']} rounds; in brackets the share of what memory and cores "
        "allow. puna / peer is the median of the rounds' ratios, and their range.",
        "",
        "| weights | work | puna | peer | | puna / peer (range) |",
        "|---|---|---|---|---|---|",
    ]
    for form, found in results["formats"].items():
        for name, measured in found["measurements"].items():
            ours = _rate(measured, "puna")
            for peer, (ratio, low, high) in measured["ratios"].items():
                lines.append(
                    f"| {form} | {TITLES[name]} | {ours} | {_rate(measured, peer)} | {peer} | "
                    f"**{ratio:.2f}** ({low:.2f}-{high:.2f}) |"
                )
    lines += [
        "",
        "A fresh process with one sequence of up to 1,024 tokens, after a prefill of 512; the file is in the page "
        "cache.",
        "",
        "| weights | engine | ready for tokens | peak memory |",
        "|---|---|---|---|",
    ]
    for form, found in results["formats"].items():
        for engine, used in found["resources"].items():
            memory = f"{used['peak_memory_bytes'] / 2**20:,.0f} MiB"
            lines.append(f"| {form} | {engine} | {used['ready_seconds']:.2f} s | {memory} |")
    worst = {
        name: max(found["differences"].get(name, 0.0) for found in results["formats"].values())
        for found in results["formats"].values()
        for name in found["differences"]
    }
    if worst:
        shown = ", ".join(f"{name} {value:.3f}" for name, value in worst.items())
        lines += ["", f"Largest difference from puna in the log-probability of a token (nats, 63 tokens): {shown}."]
    return "\n".join(lines)


def _rate(measured: dict[str, Any], engine: str) -> str:
    rate, share = measured["tokens_per_second"][engine], measured["percent_of_limit"][engine]
    return f"{rate:,.1f} ({share:.0f} %)"


def write_section(page: Path, text: str) -> None:
    """Puts the text between the page's marks; a page without them gets them at its end."""
    old = page.read_text(encoding="utf-8") if page.is_file() else "# puna beside other engines on a processor\n"
    if BEGIN not in old or END not in old:
        old = f"{old.rstrip()}\n\n{BEGIN}\n{END}\n"
    head, _, rest = old.partition(BEGIN)
    page.write_text(f"{head}{BEGIN}\n{text}\n{END}{rest.partition(END)[2]}", encoding="utf-8")


def draw(results: dict[str, Any], file: Path) -> None:
    """Bars of tokens per second: a row for each measurement, a column for each format."""
    formats = results["formats"]
    figure = Figure(figsize=(3.4 * len(formats) + 1.2, 6.6), layout="constrained")
    colors = {"puna": "tab:blue", "llama.cpp": "tab:orange", "transformers": "tab:green", "OpenVINO GenAI": "tab:red"}
    grid = figure.subplots(len(TITLES), len(formats), squeeze=False)
    for column, (form, found) in enumerate(formats.items()):
        for row, (name, title) in enumerate(TITLES.items()):
            axes, measured = grid[row][column], found["measurements"][name]
            rates = measured["tokens_per_second"]
            bars = axes.barh(list(rates), list(rates.values()), color=[colors[one] for one in rates])
            labels = [
                f"{rate:,.0f}" if one == "puna" else f"{rate:,.0f}  (puna {measured['ratios'][one][0]:.2f}x)"
                for one, rate in rates.items()
            ]
            axes.bar_label(bars, labels, padding=3, fontsize="small")
            axes.invert_yaxis()
            axes.set_xlim(0, 1.6 * max(rates.values()))
            axes.xaxis.set_major_locator(MaxNLocator(4))
            axes.tick_params(labelsize="small")
            axes.spines[["top", "right"]].set_visible(False)
            if row == 0:
                axes.set_title(form)
            axes.set_xlabel(f"{title}, tokens/s", fontsize="small")
    figure.suptitle(f"{results['shape']}, {results['threads']} threads, {results['machine']}", fontsize="medium")
    figure.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None)
