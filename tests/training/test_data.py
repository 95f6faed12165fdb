"""Documents, what is held out of them, the token stream and its windows."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from puna.engine.tokenizer import Tokenizer
from puna.training.data import TokenStream, TrainingWindows, hold_out, read_documents
from puna.training.tokenizer import train_tokenizer


def stream_of(count: int) -> TokenStream:
    return TokenStream(torch.arange(count), num_bytes=count)


def test_documents_are_what_stands_between_the_markers(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("<|endoftext|>\nOne.\n\nStill one.\n<|endoftext|>\n\n<|endoftext|>\nA <|endoftext|> within.\n")
    assert read_documents(file) == ["One.\n\nStill one.", "A <|endoftext|> within."]


@pytest.mark.parametrize(
    ("content", "message"), [(b" \n", "no text"), (b"\xff\xfe", "not UTF-8"), (b"<|endoftext|>\n", "no text")]
)
def test_files_without_text_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_documents(file)


@pytest.mark.parametrize("count", [1, 2, 9, 10, 57])
def test_hold_out_parts_the_text(count: int) -> None:
    documents = [f"document {number} " + "x" * number for number in range(count)]
    training, held_out = hold_out(documents, 0.1)
    assert sorted("".join(training + held_out)) == sorted("".join(documents))
    assert not set(training) & set(held_out)
    part = sum(map(len, held_out)) / sum(map(len, documents))
    assert 0.04 < part < 0.16


def test_stream_has_the_special_tokens_once(tmp_path: Path) -> None:
    documents = ["One.", "Two <|endoftext|> two.", "Three."]
    for name, content in train_tokenizer(documents, 300, 64).items():
        (tmp_path / name).write_bytes(content)
    tokenizer = Tokenizer.from_pretrained(tmp_path)
    stream = TokenStream.from_documents(documents, tokenizer)
    ids = stream.ids.tolist()
    ends = [place for place, token in enumerate(ids) if token == tokenizer.eos_token_id]
    assert len(ends) == 4, "one before each document and one at the end; the one in the text is plain text"
    assert ends[0] == 0
    assert ends[-1] == len(ids) - 1
    assert [tokenizer.decode(ids[a + 1 : b]) for a, b in itertools.pairwise(ends)] == documents
    assert stream.num_bytes == sum(len(document) for document in documents)


def test_an_epoch_sees_each_window_once() -> None:
    windows = TrainingWindows(stream_of(1000), context=10, seed=1)
    for epoch in range(3):
        inputs, targets = windows.batch(epoch * windows.per_epoch, windows.per_epoch)
        assert torch.equal(targets, inputs + 1)
        starts = sorted(inputs[:, 0].tolist())
        assert {b - a for a, b in itertools.pairwise(starts)} == {10}
        assert starts[0] >= 0
        assert int(targets.max()) <= 999
        assert inputs.numel() >= 980


def test_a_window_depends_on_its_number_alone() -> None:
    windows = TrainingWindows(stream_of(500), context=8, seed=1)
    straight = torch.cat([windows.batch(first, 4)[0] for first in range(0, 200, 4)])
    again = TrainingWindows(stream_of(500), context=8, seed=1)
    jumping = {first: again.batch(first, 2)[0] for first in (198, 0, 130, 60, 62)}
    for first, inputs in jumping.items():
        assert torch.equal(inputs, straight[first : first + 2])
    assert not torch.equal(straight[:60], straight[60:120]), "epochs differ in their order"
    other = TrainingWindows(stream_of(500), context=8, seed=2)
    assert not torch.equal(other.batch(0, 60)[0], straight[:60])


@pytest.mark.parametrize("length", [9, 10, 16, 17])
def test_shortest_streams(length: int) -> None:
    inputs, targets = TrainingWindows(stream_of(length), context=8, seed=0).batch(0, 5)
    assert inputs.shape == targets.shape == (5, 8)
    with pytest.raises(ValueError, match=r"context is 8 tokens.*only 8"):
        TrainingWindows(stream_of(8), context=8, seed=0)


@pytest.mark.parametrize("length", [1, 2, 8, 9, 10, 25, 26])
def test_held_out_windows_have_every_target_once(length: int) -> None:
    parts = list(stream_of(length).windows_in_order(8, 2))
    assert torch.cat([targets.flatten() for _, targets in parts] + [torch.empty(0)]).tolist() == list(range(1, length))
    for inputs, targets in parts:
        assert torch.equal(inputs + 1, targets)
        assert inputs.shape[0] <= 2
        assert inputs.shape[1] <= 8
