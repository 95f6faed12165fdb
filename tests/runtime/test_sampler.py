"""Sampler: each parameter against numpy and transformers, rows beside each other against rows alone, and its errors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor
from transformers.generation import logits_process as theirs

from puna.ops import cpu
from puna.runtime import sampling_ops as ops
from puna.runtime.logit_edits import edit, entries
from puna.runtime.sampler import SampleOutput, Sampler
from puna.runtime.sequence_state import SequenceState
from puna.scheduling.sampling_params import SamplingParams
from puna.scheduling.step_plan import NewSequence


@pytest.fixture(params=["kernels", "torch"], autouse=True)
def _ways(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything holds for the compiled kernels and for torch, which takes over where there are none."""
    if request.param == "torch":
        monkeypatch.setattr(cpu, "compiled", lambda: False)
    elif not cpu.compiled():
        pytest.skip("the compiled module is not built here")


CPU = torch.device("cpu")
# Short rows are sorted; long ones go by blocks and buckets, and this one's last block is not full.
WIDTHS = (50, 9001)


def sequence(
    sequence_id: int = 0,
    prompt: Sequence[int] = (1, 2, 3),
    seed: int = 0,
    eos: Sequence[int] = (),
    bad_words: Sequence[Sequence[int]] = (),
    **params: Any,
) -> NewSequence:
    words = tuple(tuple(word) for word in bad_words)
    return NewSequence(sequence_id, tuple(prompt), SamplingParams(**params), seed, frozenset(eos), words)


def normal(rows: int, width: int, seed: int = 0, scale: float = 2.0) -> Tensor:
    return scale * torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def sampler_of(width: int, *new: NewSequence, grammars: Any = None) -> Sampler:
    sampler = Sampler(width, grammars=grammars)
    for one in new:
        sampler.add(one)
    return sampler


def tokens_of(output: SampleOutput) -> dict[int, int]:
    return {token.sequence_id: token.token_id for token in output.tokens}


# ---- a second implementation: one row, float64, plain steps


def expected_uniform(seed: int, position: int) -> float:
    mask = (1 << 64) - 1

    def mix(x: int) -> int:
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & mask
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB & mask
        return x ^ (x >> 31)

    start = mix((seed * 0xD1342543DE82EF95 + 0x9E3779B97F4A7C15) & mask)
    return (mix((start + (position + 1) * 0x9E3779B97F4A7C15) & mask) >> 11) / 2**53


def expected_edits(row: NDArray[np.float64], new: NewSequence, output: list[int]) -> NDArray[np.float64]:
    params, context = new.params, [*new.prompt_token_ids, *output]
    x = row.copy()
    for token, bias in params.logit_bias.items():
        x[token] += bias
    for token in set(context):
        x[token] = x[token] * params.repetition_penalty if x[token] < 0 else x[token] / params.repetition_penalty
    for token in set(output):
        x[token] -= params.frequency_penalty * output.count(token) + params.presence_penalty
    if params.allowed_token_ids is not None:
        for token in range(len(x)):
            if token not in params.allowed_token_ids:
                x[token] = -np.inf
    for word in new.bad_word_ids:
        if tuple(context[len(context) - len(word) + 1 :]) == tuple(word[:-1]):
            x[word[-1]] = -np.inf
    n = params.no_repeat_ngram_size
    if n:
        for start in range(len(context) - n + 1):
            if context[start : start + n - 1] == context[len(context) - n + 1 :]:
                x[context[start + n - 1]] = -np.inf
    if len(output) < params.min_tokens:
        x[[*new.eos_token_ids, *params.stop_token_ids]] = -np.inf
    for processor in params.logits_processors:
        x = processor(context, torch.from_numpy(x)).numpy()
    return x


def expected_probabilities(x: NDArray[np.float64], params: SamplingParams) -> NDArray[np.float64]:
    def normalized(p: NDArray[np.float64]) -> NDArray[np.float64]:
        return p / p.sum()

    p = normalized(np.exp((x - x.max()) / params.temperature))
    if 0 < params.top_k < len(x):
        p = normalized(np.where(x < np.sort(x)[-params.top_k], 0, p))
    if params.top_p < 1:
        order = np.argsort(-p, kind="stable")
        kept = order[np.cumsum(p[order]) - p[order] < params.top_p]
        p = normalized(np.where(np.isin(np.arange(len(p)), kept), p, 0))
    p = normalized(np.where(p < params.min_p * p.max(), 0, p))
    if params.typical_p < 1:
        with np.errstate(divide="ignore"):
            surprise = -np.log(p)
        entropy = (p[p > 0] * surprise[p > 0]).sum()
        distance = np.abs(surprise - entropy)
        order = np.argsort(distance, kind="stable")
        last = min((np.cumsum(p[order]) < params.typical_p).sum(), len(p) - 1)
        p = normalized(np.where(distance > distance[order[last]], 0, p))
    return p


def agrees(token: int, row: Tensor, new: NewSequence, output: list[int]) -> bool:
    """Whether a sampler may choose this token, give or take the rounding of float32 at the edge of its share."""
    x = expected_edits(row.double().numpy(), new, output)
    if new.params.temperature == 0:
        return bool(x[token] >= x.max() - 1e-5)
    p = expected_probabilities(x, new.params)
    ends = np.cumsum(p)
    uniform = expected_uniform(new.seed, len(output))
    return bool(p[token] > 0 and ends[token] - p[token] - 1e-5 <= uniform <= ends[token] + 1e-5)


# ---- random numbers


def test_uniforms_equal_plain_integer_arithmetic() -> None:
    seeds = [0, 1, 2, 3, 2**63, 2**64 - 1, 1234567890123456789]
    positions = [0, 1, 2, 1000, 2**40]
    grid = [(seed, position) for seed in seeds for position in positions]
    found = ops.uniforms(np.array([s for s, _ in grid], np.uint64), np.array([p for _, p in grid], np.uint64))
    assert found.tolist() == [expected_uniform(seed, position) for seed, position in grid]


@pytest.mark.parametrize("along", ["seeds", "positions"])
def test_uniforms_are_uniform_and_neighbours_unrelated(along: str) -> None:
    count = np.arange(100_000, dtype=np.uint64)
    zeros = np.zeros_like(count)
    found = ops.uniforms(count, zeros) if along == "seeds" else ops.uniforms(zeros, count)
    assert found.min() >= 0
    assert found.max() < 1
    pairs = np.histogram2d(found[:-1], found[1:], bins=10)[0].ravel()
    chi_squared = ((pairs - pairs.mean()) ** 2 / pairs.mean()).sum()
    assert 99 - 6 * math.sqrt(198) < chi_squared < 99 + 6 * math.sqrt(198)


# ---- each step against transformers


def shares(logits: Tensor, params: SamplingParams, steps: int) -> Tensor:
    """How much of 0..1 each token of one row [V] has, in `steps` steps, going through the uniform numbers in order."""
    shaping = ops.Shaping(
        temperature=torch.full((steps, 1), params.temperature),
        top_k=torch.full((steps, 1), params.top_k) if params.top_k > 0 else None,
        top_p=torch.full((steps, 1), params.top_p, dtype=torch.float64) if params.top_p < 1 else None,
        min_p=torch.full((steps, 1), params.min_p) if params.min_p > 0 else None,
        typical_p=torch.full((steps, 1), params.typical_p, dtype=torch.float64) if params.typical_p < 1 else None,
        highest_top_k=max(params.top_k, 0),
        is_narrow=ops.is_narrow_top_k(params.top_k, len(logits)),
    )
    grid = (torch.arange(steps, dtype=torch.float64) + 0.5) / steps
    tokens, highest = ops.draw(logits.expand(steps, -1), shaping, grid)
    assert bool((highest == logits.max()).all())
    assert bool((tokens.diff() >= 0).all()), "tokens lie in the order of their ids"
    return torch.bincount(tokens, minlength=len(logits)) / steps


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize(
    ("params", "warpers"),
    [
        ({}, []),
        ({"temperature": 0.5}, [theirs.TemperatureLogitsWarper(0.5)]),
        ({"temperature": 3.0}, [theirs.TemperatureLogitsWarper(3.0)]),
        ({"top_k": 1}, [theirs.TopKLogitsWarper(1)]),
        ({"top_k": 12}, [theirs.TopKLogitsWarper(12)]),
        ({"top_k": 49}, [theirs.TopKLogitsWarper(49)]),
        ({"top_k": 5000}, [theirs.TopKLogitsWarper(5000)]),
        ({"top_p": 0.001}, [theirs.TopPLogitsWarper(0.001)]),
        ({"top_p": 0.5}, [theirs.TopPLogitsWarper(0.5)]),
        ({"top_p": 0.95}, [theirs.TopPLogitsWarper(0.95)]),
        ({"min_p": 0.05}, [theirs.MinPLogitsWarper(0.05)]),
        ({"min_p": 1.0}, [theirs.MinPLogitsWarper(1.0)]),
        ({"typical_p": 0.3}, [theirs.TypicalLogitsWarper(0.3)]),
        ({"typical_p": 0.9}, [theirs.TypicalLogitsWarper(0.9)]),
        (
            {"temperature": 0.7, "top_k": 30, "top_p": 0.9, "min_p": 0.02, "typical_p": 0.8},
            [
                theirs.TemperatureLogitsWarper(0.7),
                theirs.TopKLogitsWarper(30),
                theirs.TopPLogitsWarper(0.9),
                theirs.MinPLogitsWarper(0.02),
                theirs.TypicalLogitsWarper(0.8),
            ],
        ),
        (
            {"temperature": 1.5, "top_p": 0.8, "min_p": 0.1},
            [theirs.TemperatureLogitsWarper(1.5), theirs.TopPLogitsWarper(0.8), theirs.MinPLogitsWarper(0.1)],
        ),
    ],
)
def test_draws_have_the_probabilities_of_transformers(width: int, params: dict[str, Any], warpers: list[Any]) -> None:
    steps = 200 if width > 100 else 4000
    for seed in range(3):
        logits = normal(1, width, seed)
        expected = logits
        for warper in warpers:
            expected = warper(torch.zeros(1, 1, dtype=torch.long), expected)
        found = shares(logits[0], SamplingParams(**params), steps)
        # Where a token's share begins and ends is right to within one step of the grid.
        distance = (found.cumsum(0) - expected.softmax(dim=-1)[0].cumsum(0)).abs().max()
        assert distance <= 1.01 / steps
        assert bool((expected[0][found > 0] > -torch.inf).all())


def test_ties_with_the_kth_stay_and_the_nucleus_takes_the_lowest_ids() -> None:
    for width in WIDTHS:
        logits = torch.full((width,), -5.0)
        logits[torch.tensor([7, 20, 31, 44])] = torch.tensor([3.0, 2.0, 2.0, 2.0])
        found = shares(logits, SamplingParams(top_k=2), 200)
        assert found.nonzero().flatten().tolist() == [7, 20, 31, 44]
        logits[:] = -torch.inf
        logits[torch.tensor([7, 20, 31, 44])] = 1.0
        assert shares(logits, SamplingParams(top_p=0.5), 200).nonzero().flatten().tolist() == [7, 20]
        assert shares(logits, SamplingParams(top_p=0.51), 200).nonzero().flatten().tolist() == [7, 20, 31]
        drawn = shares(torch.zeros(width), SamplingParams(top_p=0.5), 50).nonzero()
        assert 0.95 * (width // 2) <= drawn.max() <= width // 2


@pytest.mark.parametrize("width", WIDTHS)
def test_a_ruled_out_token_is_never_drawn(width: int) -> None:
    """Also at both ends of 0..1, and where the ruled out tokens are the first and the last."""
    logits = normal(1, width)[0]
    logits[:5] = logits[-9:] = -torch.inf
    for params in (SamplingParams(), SamplingParams(top_k=3), SamplingParams(top_p=0.9), SamplingParams(top_k=40)):
        steps = 3
        row = logits.expand(steps, -1)
        shaping = ops.Shaping(temperature=torch.ones(steps, 1))
        if params.top_k:
            narrow = ops.is_narrow_top_k(params.top_k, width)
            top_k = torch.full((steps, 1), params.top_k)
            shaping = ops.Shaping(torch.ones(steps, 1), top_k, highest_top_k=params.top_k, is_narrow=narrow)
        elif params.top_p < 1:
            top_p = torch.full((steps, 1), params.top_p, dtype=torch.float64)
            shaping = ops.Shaping(torch.ones(steps, 1), top_p=top_p)
        tokens, _ = ops.draw(row, shaping, torch.tensor([0.0, 1 - 2.0**-53, 1.0], dtype=torch.float64))
        assert bool((logits[tokens] > -torch.inf).all())
        assert tokens[0] < tokens[1]


@pytest.mark.parametrize(
    ("params", "processors"),
    [
        ({"repetition_penalty": 1.7}, [theirs.RepetitionPenaltyLogitsProcessor(1.7)]),
        ({"repetition_penalty": 0.6}, [theirs.RepetitionPenaltyLogitsProcessor(0.6)]),
        ({"no_repeat_ngram_size": 1}, [theirs.NoRepeatNGramLogitsProcessor(1)]),
        ({"no_repeat_ngram_size": 2}, [theirs.NoRepeatNGramLogitsProcessor(2)]),
        ({"no_repeat_ngram_size": 3}, [theirs.NoRepeatNGramLogitsProcessor(3)]),
        ({"bad_words": [[4], [1, 2], [2, 1, 3], [0, 0, 0, 0]]}, None),
        ({"min_tokens": 4, "eos": [3, 4]}, [theirs.MinNewTokensLengthLogitsProcessor(6, 4, [3, 4], "cpu")]),
        ({"logit_bias": {2: 1.5, 4: -100.0}}, [theirs.SequenceBiasLogitsProcessor({(2,): 1.5, (4,): -100.0})]),
        (
            {"logit_bias": {2: 1.5}, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "min_tokens": 9, "eos": [5]},
            [
                theirs.SequenceBiasLogitsProcessor({(2,): 1.5}),
                theirs.RepetitionPenaltyLogitsProcessor(1.3),
                theirs.NoRepeatNGramLogitsProcessor(2),
                theirs.MinNewTokensLengthLogitsProcessor(6, 9, [5], "cpu"),
            ],
        ),
    ],
)
def test_edits_equal_transformers(params: dict[str, Any], processors: list[Any] | None) -> None:
    """Step after step, on texts of few different tokens, so that n-grams and words do come back."""
    options = {name: value for name, value in params.items() if name not in ("eos", "bad_words")}
    words = params.get("bad_words", ())
    if processors is None:
        processors = [theirs.NoBadWordsLogitsProcessor(words)]
    for seed in range(5):
        context = torch.randint(0, 7, (1, 6), generator=torch.Generator().manual_seed(seed))
        new = sequence(prompt=context[0].tolist(), eos=params.get("eos", ()), bad_words=words, **options)
        state = SequenceState(new, 7)
        for step in range(20):
            logits = normal(1, 7, seed=100 * seed + step)
            expected = logits
            for processor in processors:
                expected = processor(context, expected)
            found = logits.clone()
            assert edit(found, [state], entries([new.params.logit_bias], CPU), None) == {}
            assert torch.equal(found, expected)
            token = int(torch.randint(0, 7, (1,), generator=torch.Generator().manual_seed(1000 * seed + step)))
            state.append(token)
            context = torch.cat((context, torch.tensor([[token]])), dim=1)


def test_presence_and_frequency_count_the_output_alone() -> None:
    new = sequence(prompt=[0, 0, 1], presence_penalty=0.5, frequency_penalty=0.25)
    state = SequenceState(new, 6)
    x = torch.ones(1, 6)
    edit(x, [state], None, None)
    assert torch.equal(x, torch.ones(1, 6))
    for token in (1, 1, 4):
        state.append(token)
    edit(x, [state], None, None)
    assert x[0].tolist() == [1, 1 - 0.5 - 0.5, 1, 1, 1 - 0.5 - 0.25, 1]


def test_many_different_tokens_are_all_counted() -> None:
    new = sequence(prompt=list(range(100)), repetition_penalty=2.0, frequency_penalty=0.5)
    state = SequenceState(new, 1000)
    for token in [*range(50, 600), *range(0, 600, 2)]:
        state.append(token)
    logits = normal(1, 1000)
    found = logits.clone()
    edit(found, [state], None, None)
    expected = expected_edits(logits[0].double().numpy(), new, state.token_ids[100:])
    assert np.allclose(found[0].numpy(), expected, atol=1e-5)


def test_prompt_tokens_that_the_head_does_not_have() -> None:
    sampler = sampler_of(5, sequence(prompt=[1, 7, 9], eos=[8], repetition_penalty=1.5, min_tokens=2, temperature=0))
    assert tokens_of(sampler.sample(torch.tensor([[0.0, 3.0, 1.0, 2.5, 0.0]]), [0])) == {0: 3}


# ---- all of them mixed, rows beside each other


def halve_even(token_ids: Sequence[int], logits: Tensor) -> Tensor:
    logits[::2] /= 2
    return logits


def push_next(token_ids: Sequence[int], logits: Tensor) -> Tensor:
    bonus = torch.zeros_like(logits)
    bonus[(token_ids[-1] + 1) % len(logits)] = 3.0
    return logits + bonus


VOCAB = 24
MIXED = st.fixed_dictionaries(
    {"temperature": st.sampled_from([0.0, 0.3, 0.8, 1.0, 1.7])},
    optional={
        "top_k": st.sampled_from([-1, 1, 3, 10, 100]),
        "top_p": st.sampled_from([0.1, 0.6, 0.9, 0.99]),
        "min_p": st.sampled_from([0.02, 0.3]),
        "typical_p": st.sampled_from([0.3, 0.8]),
        "repetition_penalty": st.sampled_from([0.7, 1.3, 2.0]),
        "presence_penalty": st.sampled_from([-1.0, 0.5, 2.0]),
        "frequency_penalty": st.sampled_from([-0.5, 0.4]),
        "no_repeat_ngram_size": st.sampled_from([1, 2, 3]),
        "min_tokens": st.sampled_from([1, 3, 8]),
        "stop_token_ids": st.sampled_from([[5], [6, 7]]),
        "logit_bias": st.dictionaries(st.integers(0, VOCAB - 1), st.sampled_from([-100.0, -1.0, 0.5, 4.0]), max_size=4),
        "allowed_token_ids": st.lists(st.integers(0, VOCAB - 1), min_size=12, max_size=20),
        "logits_processors": st.sampled_from([[halve_even], [push_next], [push_next, halve_even]]),
        "logprobs": st.sampled_from([0, 1, 5]),
    },
)


@settings(max_examples=60, deadline=None)
@given(
    mixed=st.lists(MIXED, min_size=1, max_size=9),
    seed=st.integers(0, 2**32),
    words=st.lists(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=3), max_size=4),
)
def test_mixed_rows_equal_each_alone_and_numpy(mixed: list[dict[str, Any]], seed: int, words: list[list[int]]) -> None:
    generator = torch.Generator().manual_seed(seed)
    prompts = torch.randint(0, VOCAB, (len(mixed), 8), generator=generator).tolist()
    new = [
        sequence(row, prompts[row], seed + row, [3], words[: row % 3], **params, max_tokens=20)
        for row, params in enumerate(mixed)
    ]
    together = sampler_of(VOCAB, *new)
    alone = [sampler_of(VOCAB, one) for one in new]
    outputs: list[list[int]] = [[] for _ in new]
    for _ in range(4):
        logits = 2 * torch.randn(len(new), VOCAB, generator=generator)
        order = torch.randperm(len(new), generator=generator).tolist()
        found = together.sample(logits[order], order)
        by_id = {token.sequence_id: token for token in found.tokens}
        for row, one in enumerate(new):
            own = alone[row].sample(logits[row : row + 1], [row])
            assert own.errors.get(row) == found.errors.get(row)
            if row in found.errors:
                assert "ruled out" in found.errors[row]
                assert expected_edits(logits[row].double().numpy(), one, outputs[row]).max() == -np.inf
                continue
            assert own.tokens == (by_id[row],)
            assert agrees(by_id[row].token_id, logits[row], one, outputs[row])
            outputs[row].append(by_id[row].token_id)
        assert len(found.tokens) + len(found.errors) == len(new)
    settled = [row for row in range(len(new)) if outputs[row]]
    assert together.last_tokens(settled) == [outputs[row][-1] for row in settled]


WIDE = [
    {},
    {"temperature": 0.6},
    {"temperature": 0.0},
    {"top_k": 40},
    {"top_k": 5},
    {"top_k": 300, "top_p": 0.9},
    {"top_p": 0.9},
    {"top_p": 0.5, "temperature": 0.3},
    {"top_p": 0.95, "temperature": 1.5},
    {"min_p": 0.05},
    {"typical_p": 0.9},
    {"typical_p": 0.7, "top_k": 50, "top_p": 0.95, "min_p": 0.01},
    {"repetition_penalty": 1.3, "top_p": 0.8},
    {"logit_bias": {100: 5.0}},
]


@pytest.mark.parametrize("is_coarse", [False, True])
def test_a_row_draws_the_same_token_in_any_batch(is_coarse: bool) -> None:
    """To the bit, over the paths of a long row; `is_coarse` logits are rounded to bfloat16, and so full of ties."""
    width = 20_011
    generator = torch.Generator().manual_seed(5)
    logits = 3 * torch.randn(len(WIDE) * 3, width, generator=generator)
    if is_coarse:
        logits = logits.bfloat16().float()
    new = [sequence(row, prompt=[row, row + 1], seed=row // 2, **WIDE[row % len(WIDE)]) for row in range(len(logits))]
    expected = {
        row: tokens_of(sampler_of(width, one).sample(logits[row : row + 1], [row]))[row] for row, one in enumerate(new)
    }
    assert len(set(expected.values())) > len(WIDE)
    for attempt in range(12):
        rows = torch.randperm(len(logits), generator=generator)[: 1 + 4 * attempt].tolist()
        sampler = sampler_of(width, *(new[row] for row in rows))
        assert tokens_of(sampler.sample(logits[rows], rows)) == {row: expected[row] for row in rows}


@pytest.mark.parametrize("is_coarse", [False, True])
@pytest.mark.parametrize("scale", [0.3, 2.0, 6.0])
def test_long_and_short_paths_choose_the_same(scale: float, is_coarse: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sorting everything, the highest few, or the bucket in which a set ends; blocks, or the whole row, for top-k."""
    logits = normal(40, 9001, scale=scale)
    logits = logits.bfloat16().float() if is_coarse else logits
    uniform = torch.rand(40, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ones = torch.ones(40, 1)
    top_p = torch.linspace(0.05, 1, 40, dtype=torch.float64).unsqueeze(1)
    top_k = torch.arange(1, 41).unsqueeze(1)
    ways = (ops.Shaping(ones, top_p=top_p), ops.Shaping(ones, typical_p=top_p), ops.Shaping(ones, top_p=1 - top_p / 2))
    # One row at a time too, since a whole chunk goes by buckets once one of its rows has to.
    single = [
        torch.cat([ops.draw(logits[i : i + 1], row_of(way, i), uniform[i : i + 1])[0] for i in range(40)])
        for way in ways
    ]
    chunked = [ops.draw(logits, way, uniform)[0] for way in ways]
    narrow = ops.draw(logits, ops.Shaping(ones, top_k, top_p, highest_top_k=40, is_narrow=True), uniform)[0]
    monkeypatch.setattr(ops, "SORTED_COLUMNS", 10_000)
    for way, alone, together in zip(ways, single, chunked, strict=True):
        assert torch.equal(alone, together)
        assert torch.equal(alone, ops.draw(logits, way, uniform)[0])
    whole = ops.draw(logits, ops.Shaping(ones, top_k, top_p, highest_top_k=40), uniform)[0]
    assert torch.equal(narrow, whole)


def row_of(shaping: ops.Shaping, row: int) -> ops.Shaping:
    def part(values: Tensor | None) -> Tensor | None:
        return None if values is None else values[row : row + 1]

    return ops.Shaping(shaping.temperature[row : row + 1], top_p=part(shaping.top_p), typical_p=part(shaping.typical_p))


def test_equal_seeds_give_equal_texts_and_others_do_not() -> None:
    def text(seed: int, beside: int) -> list[int]:
        """20 tokens of a sequence that has some others beside it."""
        new = [sequence(row, seed=seed if row == beside else 77 + row) for row in range(beside + 1)]
        sampler, found = sampler_of(1000, *new), []
        for step in range(20):
            output = sampler.sample(normal(1, 1000, step).repeat(len(new), 1), range(len(new)))
            found.append(tokens_of(output)[beside])
        return found

    assert text(5, 0) == text(5, 3)
    assert text(5, 0) != text(6, 0)
    assert text(-1, 0) == text(2**64 - 1, 0)


@pytest.mark.parametrize(
    "params", [{}, {"temperature": 0.7, "top_k": 8}, {"top_p": 0.8}, {"min_p": 0.1, "repetition_penalty": 1.2}]
)
def test_sampled_frequencies_pass_a_chi_squared_test(params: dict[str, Any]) -> None:
    """Half over seeds, half over the positions of a text."""
    width, rows, steps = 40, 500, 40
    logits = normal(1, width, seed=3)
    new = [sequence(row, prompt=[0, 1], seed=row, **params) for row in range(rows)]
    is_penalized = "repetition_penalty" in params
    counts = np.zeros(width)
    sampler = sampler_of(width, *new)
    for _ in range(1 if is_penalized else steps):
        found = sampler.sample(logits.expand(rows, -1), range(rows))
        counts += np.bincount([token.token_id for token in found.tokens], minlength=width)
    x = expected_edits(logits[0].double().numpy(), new[0], [])
    expected = counts.sum() * expected_probabilities(x, new[0].params)
    assert counts[expected == 0].sum() == 0
    likely = expected >= 5
    rare, expected_rare = counts[~likely].sum(), expected[~likely].sum()
    statistic = ((counts - expected)[likely] ** 2 / expected[likely]).sum()
    statistic += (rare - expected_rare) ** 2 / max(expected_rare, 1)
    degrees = likely.sum() - 1
    assert statistic < degrees + 4.5 * math.sqrt(2 * degrees) + 5


# ---- greedy, extremes


@pytest.mark.parametrize("width", [1, 5, 63, 64, 65, 1000, 128_256])
def test_greedy_takes_the_lowest_id_of_equals(width: int) -> None:
    generator = torch.Generator().manual_seed(width)
    logits = torch.randint(-3, 3, (20, width), generator=generator).float()
    sampler = sampler_of(width, *(sequence(row, temperature=0) for row in range(20)))
    found = tokens_of(sampler.sample(logits, range(20)))
    assert [found[row] for row in range(20)] == np.argmax(logits.numpy(), axis=1).tolist()


@pytest.mark.parametrize("temperature", [1e-300, 1e-40, 1e-6])
def test_temperatures_near_zero_are_greedy(temperature: float) -> None:
    logits = normal(8, 300)
    sampler = sampler_of(300, *(sequence(row, seed=row, temperature=temperature) for row in range(8)))
    found = tokens_of(sampler.sample(logits, range(8)))
    assert [found[row] for row in range(8)] == logits.argmax(dim=1).tolist()


def test_huge_temperature_and_huge_logits() -> None:
    sampler = sampler_of(4, sequence(0, temperature=1e38), sequence(1, temperature=0.5))
    found = sampler.sample(torch.tensor([[3e38, -3e38, 0, 0], [3e38, -3e38, -1e38, 0]]), [0, 1])
    assert found.errors == {}
    assert tokens_of(found)[1] == 0


def test_logits_stay_as_they_are() -> None:
    every = {"repetition_penalty": 1.5, "logit_bias": {3: 1.0}, "allowed_token_ids": [1, 2, 3], "top_k": 2}
    logits = normal(4, 200)
    before = logits.clone()
    kinds: list[dict[str, Any]] = [{}, every, {**every, "temperature": 0}, {"logits_processors": [halve_even]}]
    sampler = sampler_of(200, *(sequence(row, **kinds[row]) for row in range(4)))
    for _ in range(3):
        assert len(sampler.sample(logits, range(4)).tokens) == 4
        assert torch.equal(logits, before)


def test_a_batch_is_not_remembered_past_a_change() -> None:
    sampler = sampler_of(50, sequence(0, temperature=0), sequence(1, temperature=0))
    logits = normal(2, 50)
    best = logits.argsort(dim=1, descending=True)
    assert tokens_of(sampler.sample(logits, [0, 1])) == {0: best[0, 0], 1: best[1, 0]}
    sampler.remove(1)
    sampler.remove(99)
    sampler.add(sequence(1, temperature=0, logit_bias={int(best[1, 0]): -100}))
    assert tokens_of(sampler.sample(logits, [0, 1])) == {0: best[0, 0], 1: best[1, 1]}
    # The other way round, each gets the other's row.
    biased = logits[0].clone()
    biased[best[1, 0]] -= 100
    assert tokens_of(sampler.sample(logits, [1, 0])) == {0: best[1, 0], 1: biased.argmax()}
