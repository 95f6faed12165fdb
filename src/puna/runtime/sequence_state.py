"""SequenceState: what the sampler knows of one sequence, its tokens so far and what they forbid or penalise."""

from __future__ import annotations

from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from puna.scheduling.sampling_params import GuidedDecoding
from puna.scheduling.step_plan import NewSequence

_SEED_MASK: Final = (1 << 64) - 1


class Matcher(Protocol):
    """Where one sequence stands in its grammar."""

    def fill_bitmask(self, row: Tensor) -> None:
        """Writes which tokens may come next: bit t % 32 of row[t // 32] is 1 for token t (int32, on CPU).

        Raises ValueError where nothing can come next.
        """

    def advance(self, token_id: int) -> None:
        """Takes over the chosen token, which may be the end of sequence. Raises ValueError for one that can't come."""


class GrammarSource(Protocol):
    """Compiled grammars."""

    def matcher(self, guided: GuidedDecoding) -> Matcher:
        """A matcher at the grammar's start, for one sequence. Raises ValueError for what can't be compiled."""


class SeenTokens:
    """The different tokens of a sequence, and how often each is in the output: `token_ids` and `counts`, int64 [N].

    Both are views of arrays that grow; they hold until the next `add`.
    """

    def __init__(self, prompt_token_ids: list[int]) -> None:
        ids = np.unique(np.array(prompt_token_ids, dtype=np.int64))
        self._size = len(ids)
        self._slots = {token_id: slot for slot, token_id in enumerate(ids.tolist())}
        self._arrays = np.zeros((2, self._size + 64), dtype=np.int64)
        self._arrays[0, : self._size] = ids

    @property
    def token_ids(self) -> NDArray[np.int64]:
        return self._arrays[0, : self._size]

    @property
    def counts(self) -> NDArray[np.int64]:
        return self._arrays[1, : self._size]

    def add(self, token_id: int) -> None:
        slot = self._slots.setdefault(token_id, self._size)
        if slot == self._size:
            if self._size == self._arrays.shape[1]:
                self._arrays = np.concatenate((self._arrays, np.zeros_like(self._arrays)), axis=1)
            self._arrays[0, slot] = token_id
            self._size += 1
        self._arrays[1, slot] += 1


class SequenceState:
    """One sequence in the sampler.

    `token_ids`: prompt and output. `seen`: None unless a penalty needs it; it holds the prompt's tokens only for the
    repetition penalty, the other two count the output alone. `matcher`: its place in its grammar. `failure`: why it
    can't be continued at all. `is_edited`: its params may change its logits before temperature. `can_ban`: `banned` is
    not always empty.
    """

    def __init__(self, new: NewSequence, vocab_size: int) -> None:
        params = new.params
        self.sequence_id = new.sequence_id
        self.params = params
        self.seed = new.seed & _SEED_MASK
        self.token_ids = list(new.prompt_token_ids)
        self.num_prompt_tokens = len(new.prompt_token_ids)
        self.matcher: Matcher | None = None
        self.failure: str | None = None

        repeats = params.repetition_penalty != 1
        self.seen: SeenTokens | None = None
        if repeats or params.presence_penalty != 0 or params.frequency_penalty != 0:
            self.seen = SeenTokens([token for token in self.token_ids if token < vocab_size] if repeats else [])

        self._ending_ids = [t for t in {*new.eos_token_ids, *params.stop_token_ids} if 0 <= t < vocab_size]
        # By the token before the last, so that only words are compared whose next to last token has just come.
        self._bad_words: dict[int | None, list[tuple[list[int], int]]] = {}
        for *head, last in (word for word in new.bad_word_ids if word):
            self._bad_words.setdefault(head[-1] if head else None, []).append((head, last))
        self.can_ban = bool(self._bad_words or params.no_repeat_ngram_size or params.min_tokens)
        self.is_edited = (
            self.seen is not None
            or self.can_ban
            or bool(params.logit_bias or params.logits_processors)
            or params.allowed_token_ids is not None
            or params.guided is not None
        )
        # What followed each run of n - 1 tokens.
        self._followers: dict[tuple[int, ...], list[int]] = {}
        for end in range(1, len(self.token_ids) + 1):
            self._note_ngram(end)

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    def banned(self) -> list[int]:
        """Tokens that must not come next: the last of a bad word or of an n-gram that was there, and ends too early.

        Bad words and n-grams are looked for in prompt and output, as transformers does.
        """
        banned: list[int] = []
        if self.num_output_tokens < self.params.min_tokens:
            banned += self._ending_ids
        if self._bad_words:
            for latest in (None, self.token_ids[-1]):
                for head, last in self._bad_words.get(latest, ()):
                    if not head or self.token_ids[-len(head) :] == head:
                        banned.append(last)
        size = self.params.no_repeat_ngram_size
        if size and len(self.token_ids) >= size:
            banned += self._followers.get(tuple(self.token_ids[len(self.token_ids) - size + 1 :]), ())
        return banned

    def append(self, token_id: int) -> None:
        self.token_ids.append(token_id)
        if self.seen is not None:
            self.seen.add(token_id)
        self._note_ngram(len(self.token_ids))

    def _note_ngram(self, end: int) -> None:
        """The n-gram whose last token is the one before `end`."""
        size = self.params.no_repeat_ngram_size
        if 0 < size <= end:
            self._followers.setdefault(tuple(self.token_ids[end - size : end - 1]), []).append(self.token_ids[end - 1])
