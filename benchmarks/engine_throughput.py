"""Throughput of the engine beside transformers' generate, on the same random models, in turns in one run.

Requests have prompts and outputs of different lengths, as real ones do. transformers gets them in static batches,
padded on the left and run until the longest output is done; puna gets them all at once. Both are greedy, float32,
with the same threads, and their tokens are compared.

Run: python benchmarks/engine_throughput.py [--repeat 5] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from pathlib import Path

import tokenizers
import torch
import transformers

from puna import LLaMAConfig
from puna.llm import LLM
from puna.models import LLaMAForCausalLM
from puna.models.loading import save_model
from puna.scheduling.sampling_params import SamplingParams

SHAPES = {
    "tiny (0.8 M)": {"hidden_size": 128, "num_layers": 4, "num_heads": 4, "mlp_hidden_size": 352},
    "small (26 M)": {"hidden_size": 512, "num_layers": 8, "num_heads": 8, "mlp_hidden_size": 1408},
}
VOCAB_SIZE = 1024


def make_model(folder: Path, shape: dict[str, int]) -> None:
    size = shape["hidden_size"] // shape["num_heads"]
    kv_heads = shape["num_heads"] // 2
    config = LLaMAConfig(
        **shape, num_kv_heads=kv_heads, head_size=size, vocab_size=VOCAB_SIZE, max_position_embeddings=1024
    )
    torch.manual_seed(0)
    save_model(LLaMAForCausalLM(config), folder)
    vocabulary = {f"<{i}>": i for i in range(VOCAB_SIZE)}
    tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<0>")).save(str(folder / "tokenizer.json"))


def make_requests(count: int) -> list[tuple[list[int], int]]:
    """(prompt, output length) of each."""
    chooser = random.Random(count)
    return [
        ([chooser.randrange(VOCAB_SIZE) for _ in range(chooser.randint(16, 192))], chooser.randint(8, 96))
        for _ in range(count)
    ]


def run_puna(llm: LLM, requests: list[tuple[list[int], int]]) -> list[list[int]]:
    prompts = [{"prompt_token_ids": prompt} for prompt, _ in requests]
    params = [SamplingParams(temperature=0, max_tokens=length, ignore_eos=True) for _, length in requests]
    return [output.outputs[0].token_ids for output in llm.generate(prompts, params, show_progress=False)]


def run_transformers(model: transformers.LlamaForCausalLM, requests: list[tuple[list[int], int]]) -> list[list[int]]:
    longest = max(len(prompt) for prompt, _ in requests)
    tokens = torch.zeros(len(requests), longest, dtype=torch.long)
    mask = torch.zeros_like(tokens)
    for row, (prompt, _) in enumerate(requests):
        tokens[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    new = max(length for _, length in requests)
    found = model.generate(
        tokens, attention_mask=mask, max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0
    )
    return [row[longest : longest + length].tolist() for row, (_, length) in zip(found, requests, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    results = []
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, transformers {transformers.__version__}")
    print(f"{'model':>14} {'requests':>8} {'puna tok/s':>10} {'hf tok/s':>9} {'ratio':>6} {'range':>13} {'same':>5}")
    for name, shape in SHAPES.items():
        with tempfile.TemporaryDirectory() as temporary:
            make_model(Path(temporary), shape)
            theirs = transformers.LlamaForCausalLM.from_pretrained(temporary)
            for count in (1, 8, 64):
                requests = make_requests(count)
                total = sum(length for _, length in requests)
                pairs, same = [], 0
                with LLM(temporary, enable_prefix_caching=False) as llm:
                    for repeat in range(arguments.repeat + 1):
                        start = time.perf_counter()
                        ours = run_puna(llm, requests)
                        middle = time.perf_counter()
                        expected = run_transformers(theirs, requests)
                        end = time.perf_counter()
                        if repeat > 0:  # the first pair warms up
                            pairs.append((total / (middle - start), total / (end - middle)))
                        same = sum(a == b for a, b in zip(ours, expected, strict=True))
                ratios = [a / b for a, b in pairs]
                row = {
                    "model": name,
                    "requests": count,
                    "puna_tokens_per_second": statistics.median(a for a, _ in pairs),
                    "transformers_tokens_per_second": statistics.median(b for _, b in pairs),
                    "ratio": statistics.median(ratios),
                    "ratio_range": [min(ratios), max(ratios)],
                    "same_outputs": same,
                }
                results.append(row)
                print(
                    f"{name:>14} {count:8} {row['puna_tokens_per_second']:10.0f} "
                    f"{row['transformers_tokens_per_second']:9.0f} {row['ratio']:6.2f} "
                    f"{min(ratios):6.2f}-{max(ratios):.2f} {same:2}/{count}"
                )
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
