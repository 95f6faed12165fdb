"""Request, what a caller wants; and Sequence, one row of text on its way through the steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from puna.scheduling.beams import BeamParams
from puna.scheduling.pooling_params import PoolingParams
from puna.scheduling.sampling_params import SamplingParams

# "length": max_tokens, or the end of the context; "abort": cancelled; "deadline": out of time; "error": see the output.
FinishReason = Literal["stop", "length", "abort", "deadline", "error"]


@dataclass(frozen=True, kw_only=True)
class Request:
    """A prompt to continue. `max_tokens` is at most what the context has room for; lower `priority` goes first.

    `deadline` is a time of the engine's clock, in seconds. Prefixes are shared only between requests of one
    `cache_salt`. `beams` asks for beam search instead of `params`' sampling. `bad_word_ids` are `params.bad_words` as
    tokens. `pooling` asks for the prompt's embedding instead of a continuation; `max_tokens` is 0 then.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    max_tokens: int
    seed: int = 0
    eos_token_ids: frozenset[int] = frozenset()
    priority: int = 0
    deadline: float | None = None
    cache_salt: bytes = b""
    beams: BeamParams | None = None
    bad_word_ids: tuple[tuple[int, ...], ...] = ()
    pooling: PoolingParams | None = None

    @property
    def reads_cache(self) -> bool:
        """Whether it may take over cached blocks of its prompt: not where something is wanted of each token there."""
        return self.params.prompt_logprobs is None and (self.pooling is None or self.pooling.method != "mean")

    @property
    def num_sequences(self) -> int:
        """How many sequences this is at its widest."""
        return self.params.n if self.beams is None else self.beams.width


class Sequence:
    """The tokens of one sequence, and how far they are computed.

    `num_pending` tokens were chosen by a step whose result is not here yet; they count in `num_tokens`. `num_computed`
    positions are in the cache, or will be when the steps planned so far have run.

    `tables` are its blocks, one list for each window that layers have; none while it waits. Of these the first
    `num_published` are findable by others, and in each table the first `num_unseen` are given back. All of this is
    BlockManager's, which has something to do with it again once `settle_at` positions are computed.

    `started_at`: when it was first planned, in the clock of `Scheduler.plan`; `num_cached` of its tokens were found in
    the cache then. A preemption changes neither.
    """

    __slots__ = (
        "_block_ids",
        "finish_reason",
        "hashes",
        "index",
        "num_cached",
        "num_computed",
        "num_pending",
        "num_published",
        "num_unseen",
        "prompt_length",
        "request",
        "sequence_id",
        "settle_at",
        "started_at",
        "tables",
        "token_ids",
    )

    def __init__(self, sequence_id: int, request: Request, index: int = 0) -> None:
        self.sequence_id = sequence_id
        self.request = request
        self.index = index
        self.token_ids = list(request.prompt_token_ids)
        self.prompt_length = len(request.prompt_token_ids)
        self.num_pending = 0
        self.num_computed = 0
        self.num_published = 0
        self.settle_at = 0
        self.tables: list[list[int]] = []
        self.num_unseen: list[int] = []
        self.hashes: list[bytes] = []
        self.finish_reason: FinishReason | None = None
        self.started_at: float | None = None
        self.num_cached = 0
        self._block_ids: tuple[tuple[int, ...], ...] | None = None

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids) + self.num_pending

    @property
    def block_ids(self) -> tuple[tuple[int, ...], ...]:
        """The tables, as a plan keeps them; made anew only when they have changed."""
        if self._block_ids is None:
            self._block_ids = tuple(map(tuple, self.tables))
        return self._block_ids

    def tables_changed(self) -> None:
        self._block_ids = None

    def fork(self, sequence_id: int, index: int) -> Sequence:
        """A sequence with the same tokens, computed as far, in the same blocks; whose references the caller counts."""
        twin = Sequence(sequence_id, self.request, index)
        twin.token_ids = list(self.token_ids)
        twin.num_pending = self.num_pending
        twin.num_computed = self.num_computed
        twin.num_published = self.num_published
        twin.settle_at = self.settle_at
        twin.tables = [list(table) for table in self.tables]
        twin.num_unseen = list(self.num_unseen)
        twin.hashes = list(self.hashes)
        twin.started_at, twin.num_cached = self.started_at, self.num_cached
        return twin
