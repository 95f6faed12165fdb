"""How long the sampler takes to choose a token for each row of a batch, by what the rows ask for.

Run: python benchmarks/sampler.py [--threads N] [--device cuda]
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch

from puna.runtime.sampler import Sampler
from puna.scheduling.sampling_params import SamplingParams
from puna.scheduling.step_plan import NewSequence

CASES: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "temperature": {"temperature": 0.8},
    "top-k 50": {"top_k": 50},
    "top-p 0.9": {"top_p": 0.9},
    "top-p 0.9, temp. 1.5": {"top_p": 0.9, "temperature": 1.5},  # 40,000 tokens of 128k
    "top-k 50, top-p 0.9": {"top_k": 50, "top_p": 0.9},
    "min-p 0.05": {"min_p": 0.05},
    "penalties, greedy": {"temperature": 0.0, "repetition_penalty": 1.1, "presence_penalty": 0.2},
    "penalties, top-k, top-p": {"repetition_penalty": 1.1, "presence_penalty": 0.2, "top_k": 50, "top_p": 0.9},
    "typical-p 0.9": {"typical_p": 0.9},
    "greedy, 5 logprobs": {"temperature": 0.0, "logprobs": 5},
}
PROMPT_LENGTH = 512


def measure(rows: int, vocab_size: int, cases: list[dict[str, Any]], device: str) -> float:
    """Median seconds of a step in which row i has the params of case i modulo their number."""
    generator = torch.Generator().manual_seed(0)
    # Probabilities fall with the rank to the power of 1.5, as a language model's do: 60 tokens hold 0.9.
    by_rank = -1.5 * torch.arange(1, vocab_size + 1).log()
    logits = torch.stack([by_rank[torch.randperm(vocab_size, generator=generator)] for _ in range(rows)]).to(device)
    prompt = torch.randint(0, vocab_size, (PROMPT_LENGTH,), generator=generator)
    sampler = Sampler(vocab_size, device)
    for row in range(rows):
        params = SamplingParams(max_tokens=None, **cases[row % len(cases)])
        sampler.add(NewSequence(row, tuple(prompt.tolist()), params, row, frozenset()))
    times: list[float] = []
    while len(times) < 3 or (len(times) < 30 and sum(times) < 1.0):
        start = time.perf_counter()
        output = sampler.sample(logits, range(rows))
        times.append(time.perf_counter() - start)
        if len(output.tokens) != rows:
            raise RuntimeError(f"errors: {output.errors}")
    return statistics.median(times[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    shapes = [(rows, vocab_size) for vocab_size in (32_000, 128_256) for rows in (1, 32, 256)]
    print(f"milliseconds a step, {options.device}, {options.threads} threads")
    print(f"{'rows x vocabulary':>26}", *(f"{f'{rows} x {vocab_size // 1000}k':>10}" for rows, vocab_size in shapes))
    groups = [*((name, [params]) for name, params in CASES.items()), ("all of them, mixed", list(CASES.values()))]
    for name, cases in groups:
        found = (measure(rows, vocab_size, cases, options.device) for rows, vocab_size in shapes)
        print(f"{name:>26}", *(f"{seconds * 1e3:10.2f}" for seconds in found), flush=True)


if __name__ == "__main__":
    main()
