"""From text files to token ids: documents, the held-out ones, the token stream, and the windows of each batch."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from puna.engine.tokenizer import Tokenizer
from puna.training.tokenizer import END_OF_TEXT


def read_documents(file: Path) -> list[str]:
    """The documents of a UTF-8 text file: what stands between lines that are END_OF_TEXT, without surrounding space.

    Raises FileNotFoundError for no file, ValueError for one without text or in another encoding.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file} is not a file: give text files in UTF-8")
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text ({error}): convert it first") from error
    documents = [part.strip() for part in f"\n{text}\n".split(f"\n{END_OF_TEXT}\n")]
    documents = [document for document in documents if document]
    if not documents:
        raise ValueError(f"{file} has no text in it")
    return documents


def hold_out(documents: Sequence[str], fraction: float) -> tuple[list[str], list[str]]:
    """Splits documents into those to train on and those held out: one in every 1 / fraction, evenly spread.

    Where there are fewer documents than that, the end of the last one is held out instead.
    """
    every = max(2, round(1 / fraction))
    if len(documents) >= every:
        training = [document for place, document in enumerate(documents, 1) if place % every]
        return training, list(documents[every - 1 :: every])
    last = documents[-1]
    cut = max(1, len(last) - max(1, int(sum(map(len, documents)) * fraction)))
    return [*documents[:-1], last[:cut]], [last[cut:]]


@dataclass(frozen=True)
class TokenStream:
    """Documents one after another as token ids int64 [N], each begun and ended by the tokenizer's special tokens.

    `num_bytes` counts the documents' UTF-8 bytes.
    """

    ids: Tensor
    num_bytes: int

    @classmethod
    def from_documents(cls, documents: Sequence[str], tokenizer: Tokenizer) -> TokenStream:
        ids: list[int] = []
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        for document in documents:
            encoded = tokenizer.encode(document)
            # Where the same token begins and ends a document, the next document's is the end of this one.
            ids += encoded if encoded[:1] == end else [*encoded, *end]
        if ids[-1:] != end:
            ids += end
        return cls(torch.tensor(ids, dtype=torch.long), sum(len(document.encode()) for document in documents))

    def fingerprint(self) -> str:
        """Tells this stream from others, for a run that is resumed."""
        return hashlib.sha256(self.ids.numpy().tobytes()).hexdigest()[:16]

    def windows_in_order(self, context: int, count: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Every token after the first once as a target: inputs and targets [up to count, context], then [1, rest]."""
        whole = (len(self.ids) - 1) // context * context
        inputs, targets = self.ids[:whole].view(-1, context), self.ids[1 : whole + 1].view(-1, context)
        yield from zip(torch.split(inputs, count), torch.split(targets, count), strict=True)
        if whole < len(self.ids) - 1:
            yield self.ids[None, whole:-1], self.ids[None, whole + 1 :]


class TrainingWindows:
    """Endless windows of `context` tokens; which one is number i depends on the stream, the context and the seed.

    So neither resuming nor the number of processes changes what a step sees. Every epoch visits the stream's windows
    once in a new order, and cuts them at a new offset. Raises ValueError for a stream shorter than one window.
    """

    def __init__(self, stream: TokenStream, context: int, seed: int) -> None:
        self.ids, self.context, self.seed = stream.ids, context, seed
        whole = (len(self.ids) - 1) // context
        if whole < 1:
            raise ValueError(
                f"the context is {context} tokens, but the text to train on has only {len(self.ids)}: give more text "
                "or a shorter context"
            )
        self.per_epoch = max(1, whole - 1)  # one fewer than fit, which leaves room for the offset
        self._slack = len(self.ids) - 1 - self.per_epoch * context
        self._epoch = -1
        self._starts = torch.empty(0, dtype=torch.long)

    def batch(self, first: int, count: int) -> tuple[Tensor, Tensor]:
        """Windows number `first` and the `count` - 1 after it: inputs and targets int64 [count, context]."""
        windows = torch.stack([self._window(index) for index in range(first, first + count)])
        return windows[:, :-1], windows[:, 1:]

    def _window(self, index: int) -> Tensor:
        epoch, place = divmod(index, self.per_epoch)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            offset = torch.randint(0, self._slack + 1, (), generator=generator)
            self._starts = offset + self.context * torch.randperm(self.per_epoch, generator=generator)
            self._epoch = epoch
        start = int(self._starts[place])
        return self.ids[start : start + self.context + 1]
