"""transformers in bfloat16: the model called step by step, without generate's own work between the steps."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from protocol import serve
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache


class Transformers:
    """`cache` is "dynamic", which grows, or "static", which is masked; attention is torch's own."""

    def __init__(self, settings: dict[str, Any]) -> None:
        torch.set_num_threads(settings["threads"])
        self._model = AutoModelForCausalLM.from_pretrained(settings["file"], dtype=torch.bfloat16).eval()
        self._context = settings["context"]
        self._is_static = settings.get("cache") == "static"

    @torch.inference_mode()
    def run(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> tuple[float, float]:
        config = self._model.config
        cache = StaticCache(config=config, max_cache_len=self._context) if self._is_static else DynamicCache()
        start = time.perf_counter()
        tokens = self._step(torch.tensor(prompts), cache)
        middle = time.perf_counter()
        for _ in range(new_tokens - 1):
            tokens = self._step(tokens, cache)
        return middle - start, (time.perf_counter() - middle) / max(1, new_tokens - 1)

    @torch.inference_mode()
    def score(self, tokens: Sequence[int]) -> list[float]:
        logprobs = self._model(torch.tensor([tokens[:-1]])).logits[0].double().log_softmax(-1)
        return [float(row[token]) for row, token in zip(logprobs, tokens[1:], strict=True)]

    def _step(self, tokens: torch.Tensor, cache: DynamicCache | StaticCache) -> torch.Tensor:
        logits = self._model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        return logits[:, -1].argmax(-1, keepdim=True)


if __name__ == "__main__":
    serve(Transformers)
