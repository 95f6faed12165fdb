"""A runner without a model: its cache holds tokens, and the next token is a hash of those that are visible there."""

from __future__ import annotations

import hashlib
from array import array
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from puna.scheduling.block_allocator import DUMMY_BLOCK
from puna.scheduling.block_manager import BlockManager
from puna.scheduling.events import BeamEvent, Event, SequenceEvent
from puna.scheduling.sampling_params import SamplingParams
from puna.scheduling.scheduler import Scheduler, SchedulerLimits
from puna.scheduling.sequence import Request
from puna.scheduling.step_plan import PENDING_TOKEN, SampledToken, StepPlan, StepResult, StepRow

Windows = tuple[int | None, ...]
# What the last token sees through each of the windows.
Seen = tuple[tuple[int, ...], ...]

VOCAB_SIZE = 50
EOS = 7


class FakeRunner:
    """Reads every row's tokens back from the cache blocks, so that a wrong block shows as a wrong token.

    What it sees is what each of `windows` shows of the tokens, read through the blocks of that window.
    """

    def __init__(self, block_size: int, windows: Windows = (None,)) -> None:
        self.block_size = block_size
        self.windows = windows
        self.caches: list[dict[tuple[int, int], tuple[int, int]]] = [{} for _ in windows]
        self.last: dict[int, int] = {}
        self.seeds: dict[int, int] = {}
        # What a mean is taken of, token by token, of the prompts that are not at their ends.
        self.sums: dict[int, list[int]] = {}
        self.num_rows = self.num_tokens = 0

    def run(self, plan: StepPlan) -> StepResult:
        for ended in plan.ended_sequences:
            self.seeds.pop(ended, None)
            self.sums.pop(ended, None)
        for new in plan.new_sequences:
            self.seeds[new.sequence_id] = new.seed
        for window_idx, source, target in plan.copies:
            cache = self.caches[window_idx]
            for offset in range(self.block_size):
                if (source, offset) in cache:
                    cache[target, offset] = cache[source, offset]
        tokens, candidates = [], {}
        for row in plan.rows:
            for i, token in enumerate(row.token_ids):
                position = row.first_position + i
                known = self.last[row.sequence_id] if token == PENDING_TOKEN else token
                for cache, table in zip(self.caches, row.block_ids, strict=True):
                    cache[self._slot(table, position)] = (position, known)
            self.num_tokens += len(row.token_ids)
        for row in plan.rows:
            if row.sampled_ids:
                seen = self._visible(row)
                for sequence_id in row.sampled_ids:
                    token = next_token(seen, self.seeds[sequence_id])
                    self.last[sequence_id] = token
                    tokens.append(SampledToken(sequence_id, token))
            elif row.num_candidates:
                seen = self._visible(row)
                candidates[row.sequence_id] = next_candidates(seen, row.num_candidates)
        self.num_rows = max(self.num_rows, len(plan.rows))
        return StepResult(tuple(tokens), candidates, {}, {}, self._embeddings(plan))

    def _embeddings(self, plan: StepPlan) -> dict[int, array[float]]:
        """Of a mean the tokens that came by, of a last token what it sees."""
        found = {}
        for row in plan.rows:
            if row.pooling is None:
                continue
            assert not row.wants_logits
            if row.pooling.method == "mean":
                if row.first_position == 0:
                    self.sums[row.sequence_id] = []
                self.sums[row.sequence_id] += row.token_ids
            if row.sequence_length == row.prompt_length:
                is_mean = row.pooling.method == "mean"
                seen = self._visible(row)[0]
                found[row.sequence_id] = array("f", self.sums.pop(row.sequence_id) if is_mean else seen)
        return found

    def _slot(self, block_ids: tuple[int, ...], position: int) -> tuple[int, int]:
        block = block_ids[position // self.block_size]
        assert block != DUMMY_BLOCK
        return block, position % self.block_size

    def _visible(self, row: StepRow) -> Seen:
        """Everything that a token of the row sees, from the first one on; of that, what the last one does."""
        parts = []
        for window, cache, table in zip(self.windows, self.caches, row.block_ids, strict=True):
            first = 0 if window is None else max(0, row.first_position + 1 - window)
            tokens = []
            for position in range(first, row.sequence_length):
                stored_position, token = cache[self._slot(table, position)]
                assert stored_position == position
                tokens.append(token)
            parts.append(tuple(tokens if window is None else tokens[-window:]))
        return tuple(parts)


def visible(tokens: Sequence[int], windows: Windows) -> Seen:
    """What each window shows of the tokens."""
    return tuple(tuple(tokens if window is None else tokens[-window:]) for window in windows)


def _digest(seen: Seen, seed: int) -> int:
    return int.from_bytes(hashlib.blake2b(repr((seen, seed)).encode(), digest_size=8).digest(), "little")


def next_token(seen: Seen, seed: int) -> int:
    return _digest(seen, seed) % VOCAB_SIZE


def next_candidates(seen: Seen, count: int) -> tuple[tuple[int, float], ...]:
    scores = [(token, -(_digest(seen, token) % 10_000) / 1000) for token in range(VOCAB_SIZE)]
    return tuple(sorted(scores, key=lambda scored: -scored[1])[:count])


def alone(request: Request, index: int = 0, windows: Windows = (None,)) -> tuple[list[int], str]:
    """What one sequence of a request gets without any scheduler."""
    tokens = list(request.prompt_token_ids)
    for _ in range(request.max_tokens):
        tokens.append(next_token(visible(tokens, windows), request.seed + index))
        if tokens[-1] in request.eos_token_ids:
            return tokens[len(request.prompt_token_ids) :], "stop"
    return tokens[len(request.prompt_token_ids) :], "length"


class Harness:
    """A scheduler and a fake runner, one step ahead of each other as in the engine, or in turns."""

    def __init__(self, limits: SchedulerLimits, blocks: BlockManager, overlap: bool) -> None:
        self.scheduler = Scheduler(limits, blocks)
        self.runner = FakeRunner(blocks.block_size, blocks.windows)
        self.overlap = overlap
        self.outputs: dict[tuple[str, int], list[int]] = {}
        self.reasons: dict[tuple[str, int], str] = {}
        self.beams: dict[str, Any] = {}
        self.embeddings: dict[str, list[float]] = {}
        self.num_plans = 0
        self._in_flight: deque[StepResult] = deque()

    def step(self, now: float = 0.0) -> list[Event]:
        """One plan; returns the events of the step before it (or of itself, in turns)."""
        plan = self.scheduler.plan(now)
        self.num_plans += 1
        self.scheduler.check_integrity()
        if plan is not None:
            assert plan.num_tokens <= self.scheduler.limits.max_num_batched_tokens
            assert len(plan.rows) <= self.scheduler.limits.max_num_seqs
            self._in_flight.append(self.runner.run(plan))
        if not self._in_flight:
            return self._take(self.scheduler.commit(StepResult((), {}, {}, {})))
        if self.overlap and plan is not None and len(self._in_flight) < 2:
            return []
        events = self._take(self.scheduler.commit(self._in_flight.popleft()))
        self.scheduler.check_integrity()
        return events

    def run(self, max_plans: int = 20_000) -> None:
        while self.scheduler.has_work or self._in_flight:
            self.step()
            assert self.num_plans < max_plans, "the scheduler does not come to an end"

    def _take(self, events: list[Event]) -> list[Event]:
        for event in events:
            if isinstance(event, BeamEvent):
                assert event.request.request_id not in self.beams, "an event after the end"
                self.beams[event.request.request_id] = event
            elif isinstance(event, SequenceEvent):
                key = (event.sequence.request.request_id, event.sequence.index)
                assert key not in self.reasons, "an event after the end"
                if event.token_id is not None:
                    self.outputs.setdefault(key, []).append(event.token_id)
                if event.finish_reason is not None:
                    self.reasons[key] = event.finish_reason
                if event.embedding is not None:
                    self.embeddings[event.request.request_id] = event.embedding.tolist()
        return events


@pytest.fixture
def harness() -> Callable[..., Harness]:
    """A harness with 40 blocks of 4 tokens, 8 sequences and 32 tokens a step unless told otherwise."""

    def make(
        num_blocks: tuple[int, ...] = (41,),
        windows: Windows = (None,),
        block_size: int = 4,
        caching: bool = True,
        overlap: bool = True,
        **limits: Any,
    ) -> Harness:
        chosen = {"max_num_seqs": 8, "max_num_batched_tokens": 32} | limits
        return Harness(SchedulerLimits(**chosen), BlockManager(num_blocks, block_size, windows, caching), overlap)

    return make


def _request(name: str, prompt: tuple[int, ...], max_tokens: int = 8, **fields: Any) -> Request:
    chosen: dict[str, Any] = {"eos_token_ids": frozenset({EOS}), "params": SamplingParams(max_tokens=max_tokens or 1)}
    return Request(request_id=name, prompt_token_ids=prompt, max_tokens=max_tokens, **(chosen | fields))


@pytest.fixture
def request_of() -> Callable[..., Request]:
    return _request


@pytest.fixture
def tokens_alone() -> Callable[..., tuple[list[int], str]]:
    return alone


@pytest.fixture
def tokens_seen() -> Callable[..., Seen]:
    return visible


@pytest.fixture
def candidates_of() -> Callable[..., tuple[tuple[int, float], ...]]:
    return next_candidates
