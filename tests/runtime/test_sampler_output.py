"""What the sampler reports beside tokens: log-probabilities and ranks, errors of single sequences; and grammars."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from puna.runtime import logprobs as logprobs_module
from puna.runtime.sampler import Matcher, Sampler, candidates, token_logprobs, validate
from puna.scheduling.sampling_params import GuidedDecoding, SamplingParams
from puna.scheduling.step_plan import NewSequence, SampledToken

NAN, INF = float("nan"), float("inf")


def sequence(sequence_id: int = 0, eos: Sequence[int] = (), **params: Any) -> NewSequence:
    words = tuple((int(word),) for word in params.get("bad_words", ()))
    return NewSequence(sequence_id, (1, 2), SamplingParams(**params), 5, frozenset(eos), words)


def sampler_of(width: int, *new: NewSequence, grammars: Any = None) -> Sampler:
    sampler = Sampler(width, grammars=grammars)
    for one in new:
        sampler.add(one)
    return sampler


def normal(rows: int, width: int, seed: int = 0) -> Tensor:
    return 2 * torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


# ---- log-probabilities


@pytest.mark.parametrize(("width", "k"), [(30, 5), (30, 30), (30, 1000), (9001, 7), (9001, 1000)])
@pytest.mark.parametrize("is_coarse", [False, True])
def test_logprobs_equal_numpy(width: int, k: int, is_coarse: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """`is_coarse` rounds the logits to halves, so that there are ties everywhere, also at the k-th."""
    monkeypatch.setattr(logprobs_module, "MAX_ELEMENTS", 3 * width)
    logits = normal(8, width, seed=k)
    logits = (2 * logits).round() / 2 if is_coarse else logits
    chosen = torch.arange(8) * 3
    x = logits.double().numpy()
    expected = x - np.log(np.exp(x).sum(axis=1, keepdims=True))
    order = np.argsort(-x, axis=1, kind="stable")[:, :k]
    found = token_logprobs(logits, chosen, k)
    assert len(found) == 8
    for row, one in enumerate(found):
        token = 3 * row
        assert one.token_id == token
        assert one.logprob == pytest.approx(expected[row, token], abs=1e-5)
        assert one.rank == 1 + (x[row] > x[row, token]).sum()
        assert [other for other, _ in one.top] == order[row].tolist()
        assert [value for _, value in one.top] == pytest.approx(expected[row, order[row]], abs=1e-5)
    assert candidates(logits, k) == [one.top for one in found]


def test_candidates_leave_out_what_cannot_come() -> None:
    logits = torch.tensor([[0.0, -INF, 0.0, -INF], [NAN, 0, 0, 0], [-INF, -INF, -INF, 3]])
    assert [[token for token, _ in row] for row in candidates(logits, 3)] == [[0, 2], [], [3]]
    wide = torch.full((2, 9000), -INF)
    wide[0, 8999], wide[0, 70] = 1.0, 1.0
    wide[1] = NAN
    assert [[token for token, _ in row] for row in candidates(wide, 5)] == [[70, 8999], []]
    assert candidates(logits[:0], 3) == []
    assert token_logprobs(logits[:0], torch.zeros(0, dtype=torch.int64), 3) == []


def test_reported_logprobs_are_the_models_before_everything() -> None:
    logits = normal(4, 60)
    wanted = (None, 0, 3, 5)
    new = [
        sequence(row, logprobs=k, temperature=0.3, top_k=2, logit_bias={7: 50.0}, repetition_penalty=2.0)
        for row, k in enumerate(wanted)
    ]
    found = sampler_of(60, *new).sample(logits, range(4)).tokens
    assert [token.token_id for token in found] == [7] * 4
    assert found[0].logprobs is None
    everything = logits.log_softmax(dim=1)
    for row in (1, 2, 3):
        reported = found[row].logprobs
        assert reported is not None
        assert reported.token_id == 7
        assert reported.logprob == pytest.approx(float(everything[row, 7]), abs=1e-6)
        assert reported.rank == int((logits[row] > logits[row, 7]).sum()) + 1
        likeliest = everything[row].topk(wanted[row] or 0)
        assert [token for token, _ in reported.top] == likeliest.indices.tolist()


# ---- errors

WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "plain": {},
    "top_k": {"top_k": 3},
    "top_p": {"top_p": 0.9},
    "typical_p": {"typical_p": 0.9, "min_p": 0.1},
    "edited": {"repetition_penalty": 1.2, "top_p": 0.5},
    "edited_greedy": {"logit_bias": {3: 1.0}, "temperature": 0, "logprobs": 2},
}
BAD = {
    "nan": ([NAN], "NaN or infinite"),
    "inf": ([INF], "NaN or infinite"),
    "all nan": (slice(None), "NaN or infinite"),
    "all -inf": (slice(None), "all -inf"),
}


@pytest.mark.parametrize("width", [40, 9001])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("bad", BAD)
def test_bad_logits_are_the_error_of_their_sequence_alone(width: int, way: str, bad: str) -> None:
    logits = normal(3, width)
    new = [sequence(row, **WAYS[way]) for row in range(3)]
    expected = sampler_of(width, *new).sample(logits, range(3)).tokens
    if bad.startswith("all"):
        logits[1] = float(bad.removeprefix("all "))
    else:
        logits[1, 30] = float(bad)
    sampler = sampler_of(width, *new)
    found = sampler.sample(logits, range(3))
    assert found.tokens == (expected[0], expected[2])
    assert found.errors.keys() == {1}
    assert BAD[bad][1] in found.errors[1]
    assert sampler.last_tokens([1]) == [2]


def test_nan_beneath_a_mask_is_still_an_error() -> None:
    found = sampler_of(4, sequence(allowed_token_ids=[0])).sample(torch.tensor([[0, NAN, 0, 0]]), [0])
    assert found.tokens == ()
    assert "NaN" in found.errors[0]


@pytest.mark.parametrize("temperature", [0, 1])
def test_everything_ruled_out_names_what_did_it(temperature: float) -> None:
    new = sequence(
        0, eos=[0], temperature=temperature, allowed_token_ids=[0, 3], bad_words=["3"], min_tokens=1, max_tokens=9
    )
    found = sampler_of(5, new, sequence(1, temperature=0)).sample(normal(2, 5), [0, 1])
    assert found.errors == {0: "every token is ruled out by allowed_token_ids, bad_words, min_tokens: loosen them"}
    assert [token.sequence_id for token in found.tokens] == [1]


def raises(token_ids: Sequence[int], logits: Tensor) -> Tensor:
    raise KeyError("no such word")


def returns_nothing(token_ids: Sequence[int], logits: Tensor) -> None:
    logits += 1


def returns_less(token_ids: Sequence[int], logits: Tensor) -> Tensor:
    return logits[1:]


def returns_nan(token_ids: Sequence[int], logits: Tensor) -> Tensor:
    return logits * NAN


def forbids_all(token_ids: Sequence[int], logits: Tensor) -> Tensor:
    return torch.full_like(logits, -INF)


@pytest.mark.parametrize(
    ("processor", "reason"),
    [
        (raises, "raises.*KeyError: 'no such word'"),
        (returns_nothing, "returns_nothing.*returned None"),
        (returns_less, "returns_less.*returned"),
        (returns_nan, "logits processors returned logits that are NaN"),
        (forbids_all, "ruled out by logits_processors"),
    ],
)
@pytest.mark.parametrize("temperature", [0, 1])
def test_a_failing_logits_processor_ends_its_sequence_alone(processor: Any, reason: str, temperature: float) -> None:
    new = [sequence(row, temperature=temperature, logits_processors=[processor] * (row == 1)) for row in range(3)]
    found = sampler_of(20, *new).sample(normal(3, 20), range(3))
    assert [token.sequence_id for token in found.tokens] == [0, 2]
    with pytest.raises(ValueError, match=reason):
        raise ValueError(found.errors[1])


def test_a_logits_processor_gets_prompt_and_output_and_may_keep_them() -> None:
    calls = []

    def note(token_ids: Sequence[int], logits: Tensor) -> Tensor:
        calls.append((token_ids, logits))
        return torch.full_like(logits, -INF).index_fill(0, torch.tensor([len(calls) + 10]), 0.0)

    sampler = sampler_of(20, sequence(logits_processors=[note]))
    for step in range(3):
        sampler.sample(normal(1, 20, step), [0])
    assert [token_ids for token_ids, _ in calls] == [[1, 2], [1, 2, 11], [1, 2, 11, 12]]
    assert torch.equal(calls[0][1], normal(1, 20, 0)[0])


def test_logits_of_another_shape_are_refused() -> None:
    sampler = sampler_of(20, sequence())
    for shape in ((1, 21), (2, 20), (20,)):
        with pytest.raises(ValueError, match="logits are"):
            sampler.sample(torch.zeros(shape), [0])


@pytest.mark.parametrize(
    ("params", "reason"),
    [
        ({"logit_bias": {10: 1.0}}, "logit_bias has the token id 10"),
        ({"logit_bias": {"3": 1.0}}, "logit_bias has the token id '3'"),
        ({"allowed_token_ids": [1, -1]}, "allowed_token_ids has the token id -1"),
        ({"stop_token_ids": [10]}, "stop_token_ids has the token id 10"),
        ({"logits_processors": ["no"]}, "must be a function"),
    ],
)
def test_validate(params: dict[str, Any], reason: str) -> None:
    validate(SamplingParams(logit_bias={0: 1.0}, allowed_token_ids=[9], stop_token_ids=[3]), 10)
    with pytest.raises(ValueError, match=reason):
        validate(SamplingParams(**params), 10)


# ---- grammars


class Repeat:
    """The text is the given tokens, again and again, each or the one above it; it ends after `length` tokens."""

    def __init__(self, pattern: list[int], length: int = 100) -> None:
        self.pattern, self.length, self.at = pattern, length, 0

    def fill_bitmask(self, row: Tensor) -> None:
        if self.at >= self.length:
            raise ValueError("the grammar has ended")
        row.zero_()
        for token in self._next():
            # Bit 31 makes the number negative.
            row[token // 32] |= np.array(1 << (token % 32), np.uint32).view(np.int32).item()

    def advance(self, token_id: int) -> None:
        if token_id not in self._next():
            raise ValueError(f"{token_id} can't come here")
        self.at += 1

    def _next(self) -> tuple[int, int]:
        token = self.pattern[self.at % len(self.pattern)]
        return token, token + 1


class Grammars:
    def matcher(self, guided: GuidedDecoding) -> Matcher:
        if guided.regex == "bad":
            raise ValueError("no such regex")
        return Repeat([int(word) for word in guided.choice or ()])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_guided_rows_keep_to_their_grammar_and_others_are_free(temperature: float) -> None:
    width = 100
    new = [
        sequence(0, temperature=temperature, guided=GuidedDecoding(choice=["31", "63", "98"])),
        sequence(1, temperature=temperature),
        sequence(2, temperature=temperature, guided=GuidedDecoding(choice=["0"])),
    ]
    sampler, free = sampler_of(width, *new, grammars=Grammars()), sampler_of(width, new[1])
    texts: list[list[int]] = [[], [], []]
    for step in range(12):
        logits = normal(3, width, step)
        found = sampler.sample(logits, [0, 1, 2])
        assert found.errors == {}
        assert found.tokens[1] == free.sample(logits[1:2], [1]).tokens[0]
        for token in found.tokens:
            texts[token.sequence_id].append(token.token_id)
        allowed = [(31, 32), (63, 64), (98, 99)][step % 3]
        assert texts[0][-1] in allowed
        assert texts[2][-1] in (0, 1)
        if temperature == 0:
            assert logits[0, texts[0][-1]] == max(logits[0, token] for token in allowed)
    assert len({token % 2 for token in texts[0]}) == 2


def test_a_grammar_that_fails_is_the_error_of_its_sequence_alone() -> None:
    def elsewhere(token_ids: Sequence[int], logits: Tensor) -> Tensor:
        return torch.full_like(logits, -INF).index_fill(0, torch.tensor([9]), 0.0)

    new = [
        sequence(0, guided=GuidedDecoding(regex="bad")),
        sequence(1),
        sequence(2, guided=GuidedDecoding(choice=["3"]), logits_processors=[elsewhere]),
        sequence(3, guided=GuidedDecoding(choice=["3"])),
    ]
    sampler = sampler_of(40, *new, grammars=Grammars())
    found = sampler.sample(normal(4, 40), range(4))
    assert [token.sequence_id for token in found.tokens] == [1, 3]
    assert found.errors == {
        0: "guided decoding can't start: no such regex",
        2: "every token is ruled out by logits_processors, guided: loosen them",
    }
    without = sampler_of(40, new[0]).sample(normal(1, 40), [0])
    assert without.errors == {0: "guided decoding can't start: this engine has no grammars"}


def test_a_grammar_at_its_end() -> None:
    class Short:
        def matcher(self, guided: GuidedDecoding) -> Matcher:
            return Repeat([3], length=1)

    new = sequence(0, guided=GuidedDecoding(regex="x"))
    sampler = sampler_of(40, new, grammars=Short())
    assert isinstance(sampler.sample(normal(1, 40), [0]).tokens[0], SampledToken)
    assert sampler.sample(normal(1, 40), [0]).errors == {0: "guided decoding can't go on: the grammar has ended"}
