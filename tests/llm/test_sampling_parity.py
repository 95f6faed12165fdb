"""LLM.generate against transformers' generate, option by option: token by token, or by the frequencies of draws."""

from __future__ import annotations

import dataclasses
import math
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from puna.llm import LLM
from puna.models import load_model
from puna.models.loading import save_model
from puna.scheduling.sampling_params import SamplingParams

EOS = [1, 40, 90]
# Greedily the first three come to an end of sequence, and the second repeats itself.
PROMPTS = [[237, 202, 214, 79] * 2, [216, 182, 136, 72] * 2, [249, 143] * 2, [44]]
NUM_NEW = 24
ALLOWED = [3, 9, 30, 31, 60, 61, 90, 140, 200, 201]


@pytest.fixture(scope="module")
def sharp(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model with larger logits, so that some tokens are likely and others are not."""
    model = load_model(folder)
    with torch.no_grad():
        model.lm_head.weight.mul_(8)
    where = tmp_path_factory.mktemp("sharp")
    save_model(model, where)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folder / name, where / name)
    return where


@pytest.fixture(scope="module")
def llm(sharp: Path) -> Iterator[LLM]:
    with LLM(sharp) as it:
        yield it


@pytest.fixture(scope="module")
def theirs(sharp: Path) -> transformers.LlamaForCausalLM:
    model = transformers.LlamaForCausalLM.from_pretrained(sharp, dtype=torch.float32).eval()
    # Nothing of its own beside the ends of sequence.
    model.generation_config = transformers.GenerationConfig(bos_token_id=0, eos_token_id=EOS, pad_token_id=0)
    return model


def their_tokens(model: transformers.LlamaForCausalLM, prompt: Sequence[int], **options: Any) -> list[int]:
    chosen = {"do_sample": False, "max_new_tokens": NUM_NEW} | options
    ids = torch.tensor([list(prompt)])
    found = model.generate(ids, attention_mask=torch.ones_like(ids), **chosen)
    return found[0, len(prompt) :].tolist()


def our_tokens(llm: LLM, **params: Any) -> list[list[int]]:
    chosen = SamplingParams(**({"temperature": 0, "max_tokens": NUM_NEW} | params))
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in PROMPTS], chosen)
    return [output.outputs[0].token_ids for output in outputs]


class Reversed(transformers.LogitsProcessor):
    """Prefers what the model likes least; the end of sequence stays out of it."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores = -scores
        scores[:, EOS] = -math.inf
        return scores


def reversed_logits(token_ids: Sequence[int], logits: Tensor) -> Tensor:
    logits = -logits
    logits[EOS] = -math.inf
    return logits


def words(llm: LLM, *texts: str) -> list[list[int]]:
    """As the engine spells bad words: at a text's start, and after a space."""
    return [llm.encode(form, add_special_tokens=False) for text in texts for form in (text, f" {text}")]


DETERMINISTIC: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "ignore_eos": ({"ignore_eos": True}, {"eos_token_id": None}),
    "repetition_penalty": ({"repetition_penalty": 1.6}, {"repetition_penalty": 1.6}),
    "repetition_reward": ({"repetition_penalty": 0.7}, {"repetition_penalty": 0.7}),
    "no_repeat_1": ({"no_repeat_ngram_size": 1}, {"no_repeat_ngram_size": 1}),
    "no_repeat_2": ({"no_repeat_ngram_size": 2}, {"no_repeat_ngram_size": 2}),
    "no_repeat_3": (
        {"no_repeat_ngram_size": 3, "repetition_penalty": 0.6},
        {"no_repeat_ngram_size": 3, "repetition_penalty": 0.6},
    ),
    "min_tokens": ({"min_tokens": 15}, {"min_new_tokens": 15}),
    "logit_bias": (
        {"logit_bias": {20: 6.0, 21: 5.5, 40: -100.0, 90: 3.0}},
        {"sequence_bias": [[[20], 6.0], [[21], 5.5], [[40], -100.0], [[90], 3.0]]},
    ),
    "allowed_token_ids": (
        {"allowed_token_ids": ALLOWED},
        {"prefix_allowed_tokens_fn": lambda batch, ids: ALLOWED},
    ),
    "stop_token_ids": ({"stop_token_ids": list(range(100, 150))}, {"eos_token_id": EOS + list(range(100, 150))}),
    "logits_processors": (
        {"logits_processors": [reversed_logits]},
        {"logits_processor": transformers.LogitsProcessorList([Reversed()])},
    ),
    "together": (
        {
            "logit_bias": {20: 4.0, 30: 4.0},
            "repetition_penalty": 1.3,
            "no_repeat_ngram_size": 2,
            "min_tokens": 12,
            "stop_token_ids": [60],
        },
        {
            "sequence_bias": [[[20], 4.0], [[30], 4.0]],
            "repetition_penalty": 1.3,
            "no_repeat_ngram_size": 2,
            "min_new_tokens": 12,
            "eos_token_id": [*EOS, 60],
        },
    ),
}


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_greedy(llm: LLM, theirs: transformers.LlamaForCausalLM, name: str) -> None:
    ours, their_options = DETERMINISTIC[name]
    found = our_tokens(llm, **ours)
    assert found == [their_tokens(theirs, prompt, **their_options) for prompt in PROMPTS]
    if name != "plain":  # the option did something here
        assert found != our_tokens(llm)


def test_bad_words(llm: LLM, theirs: transformers.LlamaForCausalLM) -> None:
    plain = our_tokens(llm, ignore_eos=True)
    # What the model would write, taken away from it again and again: one letter, then two, then three.
    texts = [llm.decode(tokens) for tokens in plain]
    taken = []
    for text, length in zip(texts, (1, 2, 3), strict=False):
        pieces = [text[i : i + length] for i in range(0, 9, length)]
        taken += [piece for piece in pieces if piece.isascii() and piece.strip()]
    assert len(taken) >= 3
    found = our_tokens(llm, ignore_eos=True, bad_words=taken)
    banned = words(llm, *taken)
    expected = [their_tokens(theirs, prompt, eos_token_id=None, bad_words_ids=banned) for prompt in PROMPTS]
    assert found == expected
    assert found != plain


def test_stop_strings(llm: LLM, theirs: transformers.LlamaForCausalLM, folder: Path) -> None:
    texts = [llm.decode(tokens) for tokens in our_tokens(llm, ignore_eos=True)]
    stops = [piece for piece in (text[6:8] for text in texts) if piece.isascii()]
    assert stops
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    found = our_tokens(llm, ignore_eos=True, stop=stops)
    expected = [
        their_tokens(theirs, prompt, eos_token_id=None, stop_strings=stops, tokenizer=tokenizer) for prompt in PROMPTS
    ]
    assert found == expected
    assert any(len(tokens) < NUM_NEW for tokens in found)


def test_logprobs_are_their_logits(llm: LLM, theirs: transformers.LlamaForCausalLM) -> None:
    """Reported ones are the model's own, whatever penalties and temperature did to the choice."""
    params = SamplingParams(temperature=0, max_tokens=8, repetition_penalty=1.6, logprobs=5, ignore_eos=True)
    for prompt in PROMPTS:
        (output,) = llm.generate({"prompt_token_ids": prompt}, params)
        ids = torch.tensor([prompt])
        expected = theirs.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=8,
            repetition_penalty=1.6,
            eos_token_id=None,
            output_logits=True,
            return_dict_in_generate=True,
        )
        assert output.outputs[0].logprobs is not None
        for position, logits in zip(output.outputs[0].logprobs, expected.logits, strict=True):
            row = logits[0].log_softmax(-1)
            assert set(row.topk(5).indices.tolist()) <= set(position)
            for token, found in position.items():
                assert found.logprob == pytest.approx(row[token].item(), abs=1e-4)


# ---- by distribution

NUM_DRAWS = 4096
SAMPLED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "temperature_high": ({"temperature": 1.7}, {"temperature": 1.7}),
    "temperature_low": ({"temperature": 0.4}, {"temperature": 0.4}),
    "top_k": ({"top_k": 12}, {"top_k": 12}),
    "top_p": ({"top_p": 0.7}, {"top_p": 0.7}),
    "min_p": ({"min_p": 0.08}, {"min_p": 0.08}),
    "typical_p": ({"typical_p": 0.5}, {"typical_p": 0.5}),
    "repetition_penalty": (
        {"repetition_penalty": 2.5, "temperature": 0.8},
        {"repetition_penalty": 2.5, "temperature": 0.8},
    ),
    "logit_bias": ({"logit_bias": {164: -2.0, 163: 1.5}}, {"sequence_bias": [[[164], -2.0], [[163], 1.5]]}),
    "together": (
        {"temperature": 1.3, "top_k": 60, "top_p": 0.9, "min_p": 0.02, "typical_p": 0.9},
        {"temperature": 1.3, "top_k": 60, "top_p": 0.9, "min_p": 0.02, "typical_p": 0.9},
    ),
}


def their_probabilities(model: transformers.LlamaForCausalLM, prompt: Sequence[int], **options: Any) -> Tensor:
    """Of the next token, after all their processors and warpers: float64 [V]."""
    ids = torch.tensor([list(prompt)])
    found = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=True,
        max_new_tokens=1,
        output_scores=True,
        return_dict_in_generate=True,
        **({"top_k": 0, "top_p": 1.0} | options),
    )
    return found.scores[0][0].double().softmax(-1)


def first_tokens(llm: LLM, prompt: Sequence[int], **params: Any) -> Counter[int]:
    """Of NUM_DRAWS outputs: half as n = 16 of one request each, half as requests by themselves, all seeds different."""
    several = [SamplingParams(max_tokens=1, n=16, seed=16 * i, **params) for i in range(NUM_DRAWS // 32)]
    single = [SamplingParams(max_tokens=1, seed=10**6 + 7 * i, **params) for i in range(NUM_DRAWS // 2)]
    outputs = llm.generate([{"prompt_token_ids": list(prompt)}] * len(several + single), several + single)
    return Counter(completion.token_ids[0] for output in outputs for completion in output.outputs)


def chi_squared_z(counts: Counter[int], probabilities: Tensor) -> float:
    """How many standard deviations too badly the counts fit; infinite where something impossible was drawn.

    Pearson's sum over tokens expected at least five times, the others together, as a normal deviate after Wilson and
    Hilferty (1931).
    """
    total = sum(counts.values())
    expected = (probabilities * total).tolist()
    if any(expected[token] == 0 for token in counts):
        return math.inf
    common = [token for token, count in enumerate(expected) if count >= 5]
    cells = [(counts[token], expected[token]) for token in common]
    rest = total - sum(count for _, count in cells)
    if rest > 5:
        cells.append((total - sum(count for count, _ in cells), rest))
    degrees = len(cells) - 1
    assert degrees >= 2, "too few tokens to tell anything"
    statistic = sum((found - wanted) ** 2 / wanted for found, wanted in cells)
    return ((statistic / degrees) ** (1 / 3) - (1 - 2 / (9 * degrees))) / math.sqrt(2 / (9 * degrees))


@pytest.mark.parametrize("name", SAMPLED)
def test_sampled_frequencies(llm: LLM, theirs: transformers.LlamaForCausalLM, name: str) -> None:
    ours, their_options = SAMPLED[name]
    prompt = PROMPTS[1]
    counts = first_tokens(llm, prompt, **ours)
    assert sum(counts.values()) == NUM_DRAWS
    assert abs(chi_squared_z(counts, their_probabilities(theirs, prompt, **their_options))) < 4
    # The test tells: the draws do not fit what transformers does without the option, or at another temperature.
    assert chi_squared_z(counts, their_probabilities(theirs, prompt)) > 4
    slightly = their_options | {"temperature": 1.15 * their_options.get("temperature", 1.0)}
    assert chi_squared_z(counts, their_probabilities(theirs, prompt, **slightly)) > 4


def test_plain_sampling(llm: LLM, theirs: transformers.LlamaForCausalLM) -> None:
    counts = first_tokens(llm, PROMPTS[0])
    assert abs(chi_squared_z(counts, their_probabilities(theirs, PROMPTS[0]))) < 4
    assert chi_squared_z(counts, their_probabilities(theirs, PROMPTS[1])) > 4


def test_the_second_token_is_independent_of_the_first_draw(llm: LLM, theirs: transformers.LlamaForCausalLM) -> None:
    """Pairs of tokens have the product of their probabilities: draws of one sequence don't depend on one another."""
    options = {"top_k": 4, "temperature": 1.5}
    prompt = PROMPTS[2]
    params = [SamplingParams(max_tokens=2, ignore_eos=True, n=16, seed=16 * i, **options) for i in range(128)]
    outputs = llm.generate([{"prompt_token_ids": prompt}] * len(params), params)
    pairs = Counter(tuple(completion.token_ids) for output in outputs for completion in output.outputs)
    first = their_probabilities(theirs, prompt, **options)
    joint: dict[tuple[int, int], float] = {}
    for token in first.nonzero().flatten().tolist():
        second = their_probabilities(theirs, [*prompt, token], **options)
        for following in second.nonzero().flatten().tolist():
            joint[token, following] = (first[token] * second[following]).item()
    assert sum(joint.values()) == pytest.approx(1)
    assert set(pairs) <= set(joint)
    names = list(joint)
    counts = Counter({number: pairs[pair] for number, pair in enumerate(names)})
    assert abs(chi_squared_z(counts, torch.tensor([joint[pair] for pair in names]))) < 4


def test_every_field_is_documented() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "sampling.md").read_text()
    table = page.split("## Fields")[1].split("## Order")[0]
    rows = [line.split("|")[1].strip().strip("`") for line in table.splitlines() if line.startswith("| `")]
    assert sorted(rows) == sorted(field.name for field in dataclasses.fields(SamplingParams))


@pytest.mark.parametrize("width", [2, 3, 8])
@pytest.mark.parametrize(("length_penalty", "early_stopping"), [(1.0, False), (0.0, True), (2.0, "never")])
def test_beam_search(
    llm: LLM, theirs: transformers.LlamaForCausalLM, width: int, length_penalty: float, early_stopping: bool | str
) -> None:
    found = llm.beam_search(
        [{"prompt_token_ids": prompt} for prompt in PROMPTS],
        width,
        14,
        length_penalty,
        early_stopping,  # type: ignore[arg-type]
    )
    for prompt, output in zip(PROMPTS, found, strict=True):
        ids = torch.tensor([prompt])
        expected = theirs.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            num_beams=width,
            num_return_sequences=width,
            max_new_tokens=14,
            length_penalty=length_penalty,
            early_stopping=early_stopping,
            output_scores=True,
            return_dict_in_generate=True,
        )
        for beam, row, score in zip(output.sequences, expected.sequences, expected.sequences_scores, strict=True):
            whole = row[len(prompt) :].tolist()
            ends = [place for place, token in enumerate(whole) if token in EOS]
            assert beam.token_ids == (whole[: ends[0] + 1] if ends else whole)
            assert beam.score == pytest.approx(score.item(), abs=1e-4)
