"""/v1/completions through OpenAI's client, against the dense model."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from puna.models import LLaMAForCausalLM

GREEDY: dict[str, Any] = {"model": "small", "temperature": 0, "extra_body": {"ignore_eos": True}}


def tokens_of(text: str) -> list[int]:
    """The small model's tokenizer: <s>, then a token for each byte."""
    return [0, *(_BYTE_IDS[byte] for byte in text.encode())]


def _byte_ids() -> dict[int, int]:
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    characters = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    order = sorted(characters.values())
    return {byte: 2 + order.index(character) for byte, character in characters.items()}


_BYTE_IDS = _byte_ids()


def continued(dense: LLaMAForCausalLM, prompt: list[int], count: int) -> list[int]:
    return dense.generate(torch.tensor([prompt]), max_new_tokens=count, eos_token_id=[])[0, len(prompt) :].tolist()


@pytest.mark.parametrize("prompt", ["abc", "hé"])
def test_every_kind_of_prompt(server: Any, dense: LLaMAForCausalLM, prompt: str) -> None:
    ids = tokens_of(prompt)
    expected = continued(dense, ids, 8)
    options = {**GREEDY, "max_tokens": 8, "extra_body": {"ignore_eos": True, "return_token_ids": True}}
    for one in (prompt, [prompt], ids, [ids]):
        answer = server.client.completions.create(prompt=one, **options)
        assert answer.choices[0].token_ids == expected
        assert answer.choices[0].prompt_token_ids == ids
        assert answer.choices[0].finish_reason == "length"
        assert answer.usage.model_dump(exclude_none=True) == {
            "prompt_tokens": len(ids),
            "completion_tokens": 8,
            "total_tokens": len(ids) + 8,
            "prompt_tokens_details": {"cached_tokens": 0},
        }
    several = server.client.completions.create(prompt=[ids, ids[:2]], **options)
    assert [choice.index for choice in several.choices] == [0, 1]
    assert several.choices[1].token_ids == continued(dense, ids[:2], 8)


def test_stream_joins_to_the_whole(server: Any) -> None:
    options = {**GREEDY, "prompt": ["one", "two"], "max_tokens": 20, "logprobs": 2}
    whole = server.client.completions.create(**options)
    chunks = list(server.client.completions.create(stream=True, stream_options={"include_usage": True}, **options))
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert len({chunk.id for chunk in chunks}) == 1
    for index in (0, 1):
        parts = [choice for chunk in chunks for choice in chunk.choices if choice.index == index]
        assert "".join(part.text for part in parts) == whole.choices[index].text
        assert [part.finish_reason for part in parts] == [None] * (len(parts) - 1) + ["length"]
        for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
            joined = [entry for part in parts for entry in getattr(part.logprobs, name)]
            assert joined == getattr(whole.choices[index].logprobs, name)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("max_tokens", [0, 2])
def test_echo_has_the_exact_log_probabilities_of_the_prompt(
    server: Any, dense: LLaMAForCausalLM, stream: bool, max_tokens: int
) -> None:
    answer: Any = server.client.completions.create(
        prompt="hello", echo=True, logprobs=3, max_tokens=max_tokens, stream=stream, **GREEDY
    )
    parts = [choice for chunk in answer for choice in chunk.choices] if stream else answer.choices
    assert "".join(part.text for part in parts).startswith("hello")
    values = [value for part in parts for value in part.logprobs.token_logprobs]
    top = [position for part in parts for position in part.logprobs.top_logprobs]
    assert len(values) == len(top) == 6 + max_tokens
    assert values[0] is None
    ids = tokens_of("hello")
    expected = dense(torch.tensor([ids])).detach().float().log_softmax(-1)[0]
    torch.testing.assert_close(
        torch.tensor(values[1:6]), expected[torch.arange(5), torch.tensor(ids[1:])], atol=1e-4, rtol=1e-4
    )
    for position, row in zip(top[1:6], expected, strict=False):
        assert max(position.values()) == pytest.approx(float(row.max()), abs=1e-4)
    offsets = [offset for part in parts for offset in part.logprobs.text_offset]
    assert offsets[:6] == [0, 0, 1, 2, 3, 4]


def test_best_of_gives_the_likeliest(server: Any) -> None:
    options: dict[str, Any] = {"model": "small", "prompt": "abc", "max_tokens": 6, "seed": 5, "logprobs": 0}
    everyone = server.client.completions.create(n=4, **options)
    best = server.client.completions.create(n=2, best_of=4, **options)
    means = {
        choice.text: sum(choice.logprobs.token_logprobs) / len(choice.logprobs.token_logprobs)
        for choice in everyone.choices
    }
    assert [choice.text for choice in best.choices] == sorted(means, key=means.__getitem__, reverse=True)[:2]
    assert best.usage.completion_tokens == everyone.usage.completion_tokens


def test_seed_stop_and_bias_are_honoured(server: Any) -> None:
    options: dict[str, Any] = {"model": "small", "prompt": "abc", "max_tokens": 12}
    same = {server.client.completions.create(seed=7, **options).choices[0].text for _ in range(2)}
    assert len(same) == 1
    bias = {str(_BYTE_IDS[ord("x")]): 100}
    answer = server.client.completions.create(logit_bias=bias, **options)
    assert answer.choices[0].text == "x" * 12
    cut = server.client.completions.create(logit_bias=bias, stop=["xxx"], **options).choices[0]
    assert (cut.text, cut.finish_reason, cut.stop_reason) == ("", "stop", "xxx")
    ended = server.client.completions.create(
        logit_bias=bias, extra_body={"stop_token_ids": [_BYTE_IDS[ord("x")]], "min_tokens": 3}, **options
    ).choices[0]
    assert ended.finish_reason == "stop"
    assert ended.stop_reason == _BYTE_IDS[ord("x")]


def test_guided_and_prompt_logprobs(server: Any) -> None:
    options: dict[str, Any] = {"model": "small", "prompt": "abc", "max_tokens": 30}
    choice = server.client.completions.create(extra_body={"guided_choice": ["yes", "no"]}, **options).choices[0]
    assert choice.text in ("yes", "no")
    digits = server.client.completions.create(extra_body={"guided_regex": "[0-9]{4}"}, **options).choices[0]
    assert digits.text.isdigit()
    assert len(digits.text) == 4
    scored = server.client.completions.create(extra_body={"prompt_logprobs": 1}, **options).choices[0]
    assert scored.prompt_logprobs[0] is None
    assert [
        str(token) in position for token, position in zip(tokens_of("abc")[1:], scored.prompt_logprobs[1:], strict=True)
    ]
