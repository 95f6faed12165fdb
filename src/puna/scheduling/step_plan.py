"""StepPlan and StepResult: what one step computes, as ids and counts, and what comes out of it."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from puna.scheduling.pooling_params import PoolingParams
from puna.scheduling.sampling_params import SamplingParams

# In a row's token_ids: the token that the step before chose for this sequence, which is not known when this is planned.
PENDING_TOKEN: Final = -1


class BlockCopy(NamedTuple):
    """The content of a block goes into another one, in the layers of one of `LLaMAConfig.windows`."""

    window_idx: int
    source: int
    target: int


class StepRow(NamedTuple):
    """The newest tokens of one sequence: a chunk of its prompt, or the one token that was chosen last.

    `first_position` is the position of the first of `token_ids`; everything before it is in the cache. `block_ids` are,
    for each of `LLaMAConfig.windows`, the cache blocks of the whole sequence, in order, with room for these tokens; the
    dummy block where a window has left all of a block's tokens behind. `prompt_length` is the prompt's.
    `sampled_ids`: the sequences that get a next token from the last row's logits: none within a prompt, several where
    one prompt is continued several times. `num_candidates`: with beams, that many likeliest tokens are wanted instead.
    `logprob_targets`: where the prompt's log-probabilities are wanted, the prompt's tokens that these ones predict.
    `pooling`: where the prompt's embedding is wanted, and no logits.
    """

    sequence_id: int
    first_position: int
    token_ids: tuple[int, ...]
    block_ids: tuple[tuple[int, ...], ...]
    prompt_length: int
    sampled_ids: tuple[int, ...] = ()
    num_candidates: int = 0
    logprob_targets: tuple[int, ...] = ()
    num_logprobs: int = 0
    pooling: PoolingParams | None = None

    @property
    def wants_logits(self) -> bool:
        return bool(self.sampled_ids or self.num_candidates or self.logprob_targets)

    @property
    def sequence_length(self) -> int:
        """Tokens of the sequence once this step has run."""
        return self.first_position + len(self.token_ids)


@dataclass(frozen=True, slots=True)
class NewSequence:
    """What the sampler must know of a sequence from its first step on.

    `eos_token_ids` are not chosen before `params.min_tokens`. `bad_word_ids` are `params.bad_words` as tokens.
    """

    sequence_id: int
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    seed: int
    eos_token_ids: frozenset[int]
    bad_word_ids: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True, slots=True)
class StepPlan:
    """The rows of a step. Chunks of prompts and single tokens mix freely; there is no phase.

    `copies` are done before the rows run. `new_sequences` come with the first step that samples for them;
    `ended_sequences` will not be seen again. A plan without rows only says what has ended.
    """

    rows: tuple[StepRow, ...]
    copies: tuple[BlockCopy, ...] = ()
    new_sequences: tuple[NewSequence, ...] = ()
    ended_sequences: tuple[int, ...] = ()

    @property
    def num_tokens(self) -> int:
        return sum(len(row.token_ids) for row in self.rows)


class TokenLogprobs(NamedTuple):
    """The chosen (or given) token's log-probability and rank (1 is the likeliest), and the likeliest tokens."""

    token_id: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...]


class SampledToken(NamedTuple):
    sequence_id: int
    token_id: int
    logprobs: TokenLogprobs | None = None


class PromptLogprobs(NamedTuple):
    """Those of the prompt's tokens from `first_position` on; after a preemption they may come a second time."""

    first_position: int
    tokens: tuple[TokenLogprobs, ...]


class Unsatisfiable(str):
    """Why a sequence can't go on, where the fault is its request's: what that asks for leaves no token to choose."""


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step chose. `candidates`: for rows with beams, the likeliest next tokens, best first.

    `prompt_logprobs` by sequence, for the tokens that a row predicts. `errors`: sequences that can't go on, and why.
    `embeddings`: float32 [E], of sequences whose prompts were pooled to their ends.
    """

    tokens: tuple[SampledToken, ...]
    candidates: dict[int, tuple[tuple[int, float], ...]]
    prompt_logprobs: dict[int, PromptLogprobs]
    errors: dict[int, str]
    embeddings: dict[int, array[float]] = field(default_factory=dict)
