"""The whole engine on a GPU, with the demo model: it agrees with the CPU, with itself, and to the bit where it must."""

from __future__ import annotations

from typing import Any, Final

import pytest
import torch

from puna import LLM, RequestOutput, SamplingParams

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")

PROMPTS: Final = (
    "Once upon a time, there was a little girl named Lily. She had a",
    "Tom and his dog went to the park. It was a sunny day, and",
    "The cat",
    "One day, a boy found a big box in the garden. He opened it and saw a",
    "It was raining. Anna wanted to play outside, but her mom said",
)
TEXT: Final = (
    "Once upon a time, there was a little girl named Lily. She liked to play outside with her friends. One day, she "
    "found a small bird on the ground. The bird was sad because it could not fly. Lily took it home to her mom."
)


def run(device: torch.device, params: SamplingParams, prompts: tuple[str, ...] = PROMPTS, **more: Any) -> list[Any]:
    with LLM("demo", device=device, max_model_len=256, **more) as llm:
        return llm.generate(list(prompts), params)


def greedy(device: torch.device, prompts: tuple[str, ...] = PROMPTS, **more: Any) -> list[RequestOutput]:
    return run(device, SamplingParams(temperature=0, max_tokens=48, ignore_eos=True, logprobs=2), prompts, **more)


def told(outputs: list[RequestOutput]) -> list[Any]:
    """Tokens and log-probabilities, to compare in all bits."""
    return [(output.outputs[0].token_ids, output.outputs[0].logprobs) for output in outputs]


def test_float32_says_what_the_cpu_says(device: torch.device) -> None:
    found, expected = greedy(device, dtype="float32"), greedy(torch.device("cpu"), dtype="float32")
    assert [one.outputs[0].token_ids for one in found] == [one.outputs[0].token_ids for one in expected]


def test_bfloat16_differs_only_where_two_tokens_are_as_likely(device: torch.device) -> None:
    found, expected = greedy(device, dtype="bfloat16"), greedy(torch.device("cpu"), dtype="bfloat16")
    for one, other in zip(found, expected, strict=True):
        pair = one.outputs[0], other.outputs[0]
        tokens = list(zip(pair[0].token_ids, pair[1].token_ids, strict=True))
        at = next((i for i, (a, b) in enumerate(tokens) if a != b), None)
        if at is None:
            continue
        likeliest = [sorted((entry.logprob for entry in part.logprobs[at].values()), reverse=True) for part in pair]
        gaps = [values[0] - values[1] for values in likeliest]
        assert max(gaps) < 0.1, f"token {at} is {tokens[at]}; log-probabilities of the two likeliest: {likeliest}"


# Mean difference of a token's log-probability from float32 on the CPU, in nats; of weights, and of the cache beside.
WEIGHTS: Final = {None: 0.02, "int8": 0.03, "int4": 0.3, "fp8": 0.15}
CACHE: Final = {"auto": 0.0, "int8": 0.03, "fp8": 0.1}


@pytest.fixture(scope="module")
def exact() -> list[float]:
    return scores(torch.device("cpu"), dtype="float32")


def scores(device: torch.device, **more: Any) -> list[float]:
    with LLM("demo", device=device, max_model_len=256, max_num_batched_tokens=24, **more) as llm:
        (score,) = llm.score([TEXT[:20]], [TEXT[20:]])
    return score.token_logprobs


@pytest.mark.parametrize("kv_cache_dtype", list(CACHE))
@pytest.mark.parametrize("quantization", list(WEIGHTS))
def test_every_format_knows_the_text(
    device: torch.device, exact: list[float], quantization: str | None, kv_cache_dtype: Any
) -> None:
    found = scores(device, quantization=quantization, kv_cache_dtype=kv_cache_dtype)
    mean = sum(abs(one - other) for one, other in zip(found, exact, strict=True)) / len(exact)
    assert mean < WEIGHTS[quantization] + CACHE[kv_cache_dtype]


@pytest.mark.parametrize("quantization", [None, "fp8", "int4"])
def test_deterministic_mode_does_not_depend_on_anything_else(device: torch.device, quantization: str | None) -> None:
    mode: dict[str, Any] = {"deterministic": True, "quantization": quantization}
    together = told(greedy(device, **mode))
    alone = [told(greedy(device, (prompt,), **mode))[0] for prompt in PROMPTS[:2]]
    assert alone == together[:2]
    assert told(greedy(device, max_num_batched_tokens=8, max_num_seqs=8, **mode)) == together  # prompts in pieces
    assert told(greedy(device, enforce_eager=True, **mode)) == together
    assert told(greedy(device, capture="eager", **mode)) == together
    assert told(greedy(device, (*PROMPTS, *PROMPTS), max_num_seqs=2, **mode)) == together * 2  # with prefix hits


def test_captured_steps_choose_as_others_do(device: torch.device) -> None:
    params = SamplingParams(temperature=0.8, top_p=0.9, top_k=50, min_p=0.01, max_tokens=40, seed=3, ignore_eos=True)
    found = [one.outputs[0].token_ids for one in run(device, params, deterministic=True)]
    assert found == [one.outputs[0].token_ids for one in run(device, params, deterministic=True, enforce_eager=True)]
    assert len({token for tokens in found for token in tokens}) > 20


def test_draws_are_the_cpus(device: torch.device) -> None:
    """In float32, where logits differ in their last bits alone."""
    params = SamplingParams(temperature=1.0, top_p=0.95, max_tokens=1, n=64, seed=5)
    found, expected = (run(where, params, PROMPTS[:1], dtype="float32") for where in (device, torch.device("cpu")))
    pairs = zip(found[0].outputs, expected[0].outputs, strict=True)
    assert sum(one.token_ids == other.token_ids for one, other in pairs) >= 63


def test_rows_of_all_kinds_go_together(device: torch.device) -> None:
    """What the device chooses, what the host edits first, and log-probabilities, in the same steps."""
    kinds: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 0.9, "top_k": 20},
        {"temperature": 0.0, "repetition_penalty": 1.3},
        {"temperature": 0.7, "logprobs": 3},
    ]
    params = [SamplingParams(max_tokens=20, seed=i, **kind) for i, kind in enumerate(kinds)]
    with LLM("demo", device=device, max_model_len=256, deterministic=True) as llm:
        together = llm.generate(list(PROMPTS[:4]), params)
        for prompt, own, expected in zip(PROMPTS, params, together, strict=False):
            (alone,) = llm.generate([prompt], [own])
            assert alone.outputs[0].token_ids == expected.outputs[0].token_ids
            assert alone.outputs[0].logprobs == expected.outputs[0].logprobs
