"""The plot of `puna eval compare`: how the divergence is spread, and which tokens became more or less likely."""

from __future__ import annotations

from pathlib import Path

import torch
from matplotlib.figure import Figure

from puna.evaluation.compare import Comparison

# Below this the float64 sums are noise; a logarithmic axis needs a floor.
_SMALLEST_KL = 1e-12


def draw(found: Comparison, name_a: str, name_b: str, file: Path) -> None:
    """Writes the plot in the format that the file's name says."""
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    spread, scatter = figure.subplots(1, 2)

    kl = found.kl.clamp(min=_SMALLEST_KL).sort().values
    share = 1 - torch.arange(len(kl)) / len(kl)
    spread.plot(kl.numpy(), share.numpy(), drawstyle="steps-post")
    spread.axvline(max(found.mean_kl, _SMALLEST_KL), linestyle="--", color="gray", label=f"mean {found.mean_kl:.2e}")
    spread.set(xscale="log", yscale="log", xlabel="KL(A || B) in nats", ylabel="share of tokens at or above it")
    spread.legend()

    scatter.hexbin((-found.nats_a).numpy(), (-found.nats_b).numpy(), gridsize=60, bins="log", mincnt=1)
    lowest = -float(torch.maximum(found.nats_a, found.nats_b).max())
    scatter.plot([lowest, 0], [lowest, 0], color="gray", linewidth=1)
    scatter.set(xlabel="ln p of the text's token, A", ylabel="the same, B")
    scatter.set_title(f"same likeliest token: {found.agreement:.2%}", fontsize="medium")

    figure.suptitle(f"A: {name_a}    B: {name_b}", fontsize="medium", parse_math=False)
    figure.savefig(file, dpi=150)
