"""GenerationMixin against transformers: beams token for token, processed logits, padding, end of sequence, seeds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor

from puna.models import load_model, logits

EOS = [7, 19]


@pytest.fixture(scope="module")
def pair(make_oracle: Callable[[str], Any]) -> tuple[Any, Any]:
    """The same small model in transformers and in puna."""
    oracle = make_oracle("llama_gqa")
    return type(oracle.model).from_pretrained(oracle.folder), load_model(oracle.folder)


def prompts(rows: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 131, (rows, length), generator=torch.Generator().manual_seed(seed))


def trimmed(row: Tensor, start: int) -> list[int]:
    """What was generated, up to and including the first end of sequence."""
    tokens = row[start:].tolist()
    ends = [i for i, token in enumerate(tokens) if token in EOS]
    return tokens[: ends[0] + 1] if ends else tokens


@pytest.mark.parametrize("early_stopping", [False, True, "never"])
@pytest.mark.parametrize("length_penalty", [1.0, 0.0, -1.5, 2.0])
@pytest.mark.parametrize("num_beams", [2, 3, 5, 8])
def test_beams(pair: tuple[Any, Any], num_beams: int, length_penalty: float, early_stopping: bool | str) -> None:
    theirs, ours = pair
    input_ids = prompts(3, 9, seed=num_beams)
    options = {
        "max_new_tokens": 12,
        "num_beams": num_beams,
        "num_return_sequences": min(3, num_beams),
        "length_penalty": length_penalty,
        "early_stopping": early_stopping,
        # Many tokens end the text, so that beams finish at all lengths.
        "eos_token_id": list(range(0, 131, 9)),
    }
    mask = torch.ones_like(input_ids)
    expected = theirs.generate(input_ids, attention_mask=mask, do_sample=False, pad_token_id=0, **options)
    found = ours.generate(input_ids, pad_token_id=0, **options)
    assert torch.equal(found, expected)


def test_beams_finish_at_different_lengths(pair: tuple[Any, Any]) -> None:
    """The parameters of the test above do end some beams early; without that it would prove little."""
    _, ours = pair
    ends = set(range(0, 131, 9))
    lengths = set()
    for width in (2, 3, 5, 8):
        found = ours.generate(prompts(3, 9, width), max_new_tokens=12, num_beams=width, eos_token_id=sorted(ends))
        for row in found[:, 9:].tolist():
            lengths.add(next((i for i, token in enumerate(row) if token in ends), 12))
    assert len(lengths) >= 3


def test_beams_with_repetition_penalty_and_no_eos(pair: tuple[Any, Any]) -> None:
    theirs, ours = pair
    input_ids = prompts(2, 6)
    options = {"max_new_tokens": 10, "num_beams": 4, "num_return_sequences": 4, "repetition_penalty": 1.4}
    expected = theirs.generate(input_ids, attention_mask=torch.ones_like(input_ids), do_sample=False, **options)
    assert torch.equal(ours.generate(input_ids, **options), expected)


def test_one_beam_of_one_token(pair: tuple[Any, Any]) -> None:
    theirs, ours = pair
    expected = theirs.generate(prompts(1, 4), attention_mask=torch.ones(1, 4), max_new_tokens=1, num_beams=6)
    assert torch.equal(ours.generate(prompts(1, 4), max_new_tokens=1, num_beams=6), expected)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("num_beams", [1, 3])
def test_padded_batch_gives_what_each_prompt_gives_alone(pair: tuple[Any, Any], side: str, num_beams: int) -> None:
    _, ours = pair
    alone = [prompts(1, length, seed=length) for length in (3, 11, 7)]
    input_ids, mask = torch.zeros(3, 11, dtype=torch.long), torch.zeros(3, 11, dtype=torch.long)
    for row, prompt in enumerate(alone):
        place = slice(11 - prompt.shape[1], 11) if side == "left" else slice(0, prompt.shape[1])
        input_ids[row, place], mask[row, place] = prompt[0], 1
    options = {"max_new_tokens": 14, "num_beams": num_beams, "eos_token_id": EOS}
    found = ours.generate(input_ids, mask, **options)
    assert torch.equal(found[:, :11], input_ids)
    for row, prompt in zip(found, alone, strict=True):
        assert trimmed(row, 11) == trimmed(ours.generate(prompt, **options)[0], prompt.shape[1])


def test_left_padded_batch_equals_transformers(pair: tuple[Any, Any]) -> None:
    theirs, ours = pair
    input_ids, mask = prompts(2, 8), torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1], [1] * 8])
    expected = theirs.generate(input_ids, attention_mask=mask, max_new_tokens=20, do_sample=False)
    assert torch.equal(ours.generate(input_ids, mask, max_new_tokens=20), expected)


def test_eos_ends_each_row_and_pads_it(pair: tuple[Any, Any]) -> None:
    theirs, ours = pair
    input_ids = prompts(4, 5)
    first = ours.generate(input_ids, max_new_tokens=12)
    eos = [int(first[0, 5 + 3]), int(first[1, 5 + 6])]
    options = {"max_new_tokens": 12, "eos_token_id": eos, "pad_token_id": 3}
    expected = theirs.generate(input_ids, attention_mask=torch.ones_like(input_ids), do_sample=False, **options)
    found = ours.generate(input_ids, **options)
    assert torch.equal(found, expected)
    assert (found[0, 5 + 4 :] == 3).all()


def test_checkpoint_eos_is_the_default_and_an_empty_list_turns_it_off(make_oracle: Callable[[str], Any]) -> None:
    oracle = make_oracle("llama_gqa")
    model = load_model(oracle.folder)
    second = int(model.generate(prompts(1, 5), max_new_tokens=4)[0, 6])
    object.__setattr__(model.generation_config, "eos_token_ids", (second,))
    assert model.generate(prompts(1, 5), max_new_tokens=4).shape[1] < 9
    assert model.generate(prompts(1, 5), max_new_tokens=4, eos_token_id=[]).shape[1] == 9


def test_repetition_penalty(pair: tuple[Any, Any]) -> None:
    theirs, ours = pair
    input_ids = prompts(3, 10)
    options = {"max_new_tokens": 24, "repetition_penalty": 1.3}
    expected = theirs.generate(input_ids, attention_mask=torch.ones_like(input_ids), do_sample=False, **options)
    assert torch.equal(ours.generate(input_ids, **options), expected)


def test_repetition_penalty_does_not_count_padding(pair: tuple[Any, Any]) -> None:
    _, ours = pair
    wanted = int(ours.generate(prompts(1, 6), max_new_tokens=1)[0, -1])
    padded = torch.cat((torch.full((1, 3), wanted), prompts(1, 6)), dim=1)
    mask = torch.tensor([[0] * 3 + [1] * 6])
    found = ours.generate(padded, mask, max_new_tokens=1, repetition_penalty=50.0)
    alone = ours.generate(prompts(1, 6), max_new_tokens=1, repetition_penalty=50.0)
    assert int(found[0, -1]) == int(alone[0, -1])


@pytest.mark.parametrize("k", [1, 2, 50, 1000])
def test_top_k(k: int) -> None:
    scores = torch.randn(5, 200, generator=torch.Generator().manual_seed(k))
    expected = transformers.TopKLogitsWarper(k)(None, scores)
    assert torch.equal(logits.keep_top_k(scores, k), expected)


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9, 0.999])
def test_top_p(p: float) -> None:
    scores = 3 * torch.randn(5, 200, generator=torch.Generator().manual_seed(1))
    expected = transformers.TopPLogitsWarper(p)(None, scores)
    assert torch.equal(logits.keep_top_p(scores, p), expected)


@pytest.mark.parametrize("p", [0.01, 0.2, 1.0])
def test_min_p(p: float) -> None:
    scores = 3 * torch.randn(5, 200, generator=torch.Generator().manual_seed(2))
    expected = transformers.MinPLogitsWarper(p)(None, scores)
    assert torch.equal(logits.keep_min_p(scores, p), expected)


def test_draws_follow_the_probabilities() -> None:
    """Chi-squared with 6 degrees of freedom is above 32.9 once in 100,000."""
    probabilities = np.array([0.4, 0.25, 0.15, 0.1, 0.05, 0.03, 0.02])
    scores = torch.log(torch.tensor(probabilities, dtype=torch.float32)).expand(20_000, -1)
    drawn = logits.draw(scores, torch.Generator().manual_seed(5)).numpy()
    expected = probabilities * len(drawn)
    counts = np.bincount(drawn, minlength=7)
    assert ((counts - expected) ** 2 / expected).sum() < 32.9


def test_the_seed_decides(pair: tuple[Any, Any]) -> None:
    _, ours = pair
    options = {"max_new_tokens": 20, "temperature": 1.5, "top_k": 50, "top_p": 0.95, "min_p": 0.01}
    one, same, other = (ours.generate(prompts(2, 4), seed=seed, **options) for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_a_temperature_near_zero_is_greedy(pair: tuple[Any, Any]) -> None:
    _, ours = pair
    sampled = ours.generate(prompts(2, 4), max_new_tokens=20, temperature=1e-4, seed=0)
    assert torch.equal(sampled, ours.generate(prompts(2, 4), max_new_tokens=20))


def test_stream_yields_what_generate_returns(pair: tuple[Any, Any]) -> None:
    _, ours = pair
    whole = ours.generate(prompts(2, 4), max_new_tokens=9)
    assert torch.equal(torch.stack(list(ours.stream(prompts(2, 4), max_new_tokens=9)), dim=1), whole[:, 4:])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_k": -1}, "top_k is -1"),
        ({"min_p": 1.5}, "min_p is 1.5"),
        ({"num_beams": 0}, "num_beams is 0"),
        ({"num_beams": 2, "num_return_sequences": 3}, "num_return_sequences is 3"),
        ({"num_beams": 2, "temperature": 0.5}, "beam search does not sample"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"max_new_tokens": 125}, "ask for at most 124 tokens"),
        ({"early_stopping": "soon", "num_beams": 2}, "early_stopping is 'soon'"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0"),
        ({"do_sample": True}, "do_sample is not an option"),
    ],
)
def test_bad_options(pair: tuple[Any, Any], options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        pair[1].generate(prompts(1, 4), **options)


@pytest.mark.parametrize(
    ("input_ids", "mask", "words"),
    [
        (torch.zeros(1, 0, dtype=torch.long), None, "at least one token"),
        (torch.zeros(3, dtype=torch.long), None, "must be \\[batch"),
        (torch.zeros(2, 3, dtype=torch.long), torch.ones(2, 4), "attention_mask has the shape"),
        (torch.zeros(2, 3, dtype=torch.long), torch.tensor([[1, 1, 1], [0, 0, 0]]), "without a real token"),
    ],
)
def test_bad_inputs(pair: tuple[Any, Any], input_ids: Tensor, mask: Tensor | None, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        pair[1].generate(input_ids, mask, max_new_tokens=1)


def test_known_story(shared_data: Any) -> None:
    """The 260K story model's greedy text from the BOS token alone."""
    tokenizers = pytest.importorskip("tokenizers")
    folder = shared_data / "stories260k"
    tokens = load_model(folder).generate(torch.tensor([[1]]), max_new_tokens=200)[0]
    text = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).decode(tokens.tolist())
    assert text.startswith(
        "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. "
        "One day, she saw a big, red ball. She wanted to play with it, but it was too high."
    )
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder)
    expected = reference.generate(torch.tensor([[1]]), attention_mask=torch.ones(1, 1), max_new_tokens=200)[0]
    assert tokens.tolist() == expected.tolist()
