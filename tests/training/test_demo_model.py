"""The demo model in the package: it is what transformers makes of the same files, writes stories, and is small."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from puna.checkpoints import resolve_path
from puna.engine.tokenizer import Tokenizer
from puna.models import LLaMAForCausalLM, load_model


@pytest.fixture(scope="module")
def folder() -> Path:
    return resolve_path("demo")


@pytest.fixture(scope="module")
def model() -> LLaMAForCausalLM:
    return load_model("demo", dtype="float32")


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.from_pretrained(folder)


def test_package_is_small(folder: Path) -> None:
    files = [file for file in folder.rglob("*") if file.is_file()]
    assert {file.name for file in files} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert sum(file.stat().st_size for file in files) <= 8_000_000


@pytest.mark.parametrize("repetition_penalty", [1.0, 1.1])
@pytest.mark.parametrize("prompt", ["", "Once upon a time", "The king said, 'I"])
def test_greedy_tokens_are_those_of_transformers(
    folder: Path, model: LLaMAForCausalLM, tokenizer: Tokenizer, prompt: str, repetition_penalty: float
) -> None:
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = AutoTokenizer.from_pretrained(folder)(prompt, return_tensors="pt").input_ids
    assert ids[0].tolist() == tokenizer.encode(prompt)
    settings = {"max_new_tokens": 96, "repetition_penalty": repetition_penalty}
    expected = theirs.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, **settings)
    assert model.generate(ids, **settings)[0].tolist() == expected[0].tolist()


def test_stories_are_of_words_and_end(model: LLaMAForCausalLM, tokenizer: Tokenizer) -> None:
    recommended = model.generation_config
    assert recommended.do_sample
    prompts = torch.tensor([tokenizer.encode("Once upon a time, there was a")] * 8)
    room = model.config.context_length - prompts.shape[1]
    rows = model.generate(
        prompts,
        max_new_tokens=room,
        temperature=recommended.temperature,
        top_p=recommended.top_p,
        repetition_penalty=recommended.repetition_penalty,
        seed=1,
    )
    ended = [row for row in rows.tolist() if tokenizer.eos_token_id in row[1:]]
    assert len(ended) >= 6
    for row in ended:
        story = tokenizer.decode(row)
        assert len(story) > 200
        assert story.isascii()
        assert story.count(".") >= 4
        assert "there" in story


def test_held_out_loss_is_about_what_the_card_says(model: LLaMAForCausalLM, tokenizer: Tokenizer) -> None:
    """Sentences made up here, in the words of the stories: far below the loss of a model that knows letters only."""
    text = "Tom had a big red ball. He wanted to play with his friends in the park. They were very happy."
    ids = torch.tensor([tokenizer.encode(text)])
    with torch.no_grad():
        losses = torch.nn.functional.cross_entropy(model(ids)[0, :-1], ids[0, 1:])
    assert float(losses) < 3.0
    assert len(text) / ids.shape[1] > 3.5, "common words are single tokens"


def test_chat_takes_the_last_message_as_a_beginning(folder: Path, tokenizer: Tokenizer) -> None:
    messages = [
        {"role": "user", "content": "A bird sang."},
        {"role": "assistant", "content": "It flew away."},
        {"role": "user", "content": " Once upon a time "},
    ]
    assert tokenizer.encode_chat(messages) == tokenizer.encode("Once upon a time")
    theirs = AutoTokenizer.from_pretrained(folder)
    assert theirs.apply_chat_template(messages, tokenize=False) == tokenizer.render_chat(messages)
    for refused in (messages[:2], [{"role": "system", "content": "Be kind."}, messages[0]]):
        with pytest.raises(ValueError, match="the demo model"):
            tokenizer.encode_chat(refused)
