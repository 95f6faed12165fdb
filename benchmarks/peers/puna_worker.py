"""puna through LLM, as `puna bench` measures it: tokens are sampled (greedily) and turned into text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from protocol import serve

from puna import LLM
from puna.cli.bench_run import run_batch


class Puna:
    def __init__(self, settings: dict[str, Any]) -> None:
        torch.set_num_threads(settings["threads"])
        self._llm = LLM(
            settings["file"],
            dtype="bfloat16",
            quantization=settings.get("quantization"),
            max_model_len=settings["context"],
            max_num_seqs=settings["batch"],
            enable_prefix_caching=False,
        )

    def run(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> tuple[float, float]:
        times = run_batch(self._llm.engine, prompts, new_tokens)
        return times.prefill_seconds, times.decode_seconds / max(1, times.decode_steps)

    def score(self, tokens: Sequence[int]) -> list[float]:
        return self._llm.score({"prompt_token_ids": tokens[:1]}, tokens[1:]).token_logprobs


if __name__ == "__main__":
    serve(Puna)
