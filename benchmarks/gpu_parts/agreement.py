"""Whether a GPU says what the CPU says: greedy tokens of the demo model on both, and the odds where they part."""

from __future__ import annotations

from typing import Any, Final

import torch

from puna.engine.outputs import CompletionOutput
from puna.llm import LLM
from puna.scheduling.sampling_params import SamplingParams

PROMPTS: Final = (
    "Once upon a time, there was a little girl named Lily. She had a",
    "Tom and his dog went to the park. It was a sunny day, and",
    "The cat",
    "One day, a boy found a big box in the garden. He opened it and saw a",
)


def agreement(device: torch.device, dtype: str, new_tokens: int) -> dict[str, Any]:
    """How many of the prompts go on alike on both, and the first place where one does not: the token's number, and the
    two likeliest tokens with their log-probabilities, whose differences are those of the logits."""
    params = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True, logprobs=2)
    found: list[list[CompletionOutput]] = []
    for where in (torch.device("cpu"), device):
        with LLM("demo", dtype=dtype, device=where, max_model_len=256) as llm:
            found.append([output.outputs[0] for output in llm.generate(list(PROMPTS), params)])
    partings = [parting(*pair) for pair in zip(*found, strict=True)]
    first = min((at for at in partings if at is not None), default=None)
    result: dict[str, Any] = {
        "dtype": dtype,
        "prompts": len(PROMPTS),
        "new_tokens": new_tokens,
        "alike": partings.count(None),
    }
    if first is None:
        return result
    prompt = partings.index(first)
    for name, outputs in zip(("cpu", str(device)), found, strict=True):
        logprobs = outputs[prompt].logprobs
        assert logprobs is not None
        odds = ", ".join(f"{token} {entry.logprob:.6f}" for token, entry in logprobs[first].items())
        result[f"token {first} of prompt {prompt} on {name}"] = odds
    return result


def parting(one: CompletionOutput, other: CompletionOutput) -> int | None:
    """The first place where two outputs have different tokens."""
    pairs = enumerate(zip(one.token_ids, other.token_ids, strict=True))
    return next((place for place, (token, another) in pairs if token != another), None)
