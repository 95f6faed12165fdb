"""Tokenizer on tokenizer.json folders: ids equal transformers', special tokens only where asked, clear refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import tokenizers
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from puna.engine.tokenizer import Tokenizer

from .conftest import CORPUS, TRICKY_TEXTS

SaveTokenizer = Callable[..., Path]
BYTE_LEVEL_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": "<|begin|>",
    "eos_token": {"__type": "AddedToken", "content": "<|end|>", "special": True},
    "pad_token": "<|end|>",
}
LLAMA_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
}


def assert_equals_transformers(folder: Path) -> None:
    """Without special tokens in the text, plain encoding is what transformers gives; parsed encoding always is."""
    ours, theirs = Tokenizer.from_pretrained(folder), transformers.AutoTokenizer.from_pretrained(folder)
    specials = [str(token) for token in theirs.added_tokens_decoder.values() if token.special]
    for text in [*TRICKY_TEXTS, *CORPUS[:6]]:
        assert ours.encode(text, add_special_tokens=False, parse_special=True) == theirs.encode(
            text, add_special_tokens=False
        )
        if not any(special in text for special in specials):
            assert ours.encode(text, add_special_tokens=False) == theirs.encode(text, add_special_tokens=False)
            assert ours.encode(text) == theirs.encode(text)
        ids = theirs.encode(text)
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
        assert ours.decode(ids, skip_special_tokens=False) == theirs.decode(ids)
    assert (ours.bos_token_id, ours.eos_token_id) == (theirs.bos_token_id, theirs.eos_token_id)
    assert ours.pad_token_id == theirs.pad_token_id
    assert ours.vocab_size == len(theirs)
    assert set(theirs.all_special_ids) <= ours.special_ids
    assert all(ours.id_to_token(i) == theirs.convert_ids_to_tokens(i) for i in range(len(theirs)))


def test_byte_level_equals_transformers(byte_level: tokenizers.Tokenizer, save_tokenizer: SaveTokenizer) -> None:
    assert_equals_transformers(save_tokenizer(byte_level, BYTE_LEVEL_CONFIG))


def test_byte_fallback_equals_transformers(byte_fallback: tokenizers.Tokenizer, save_tokenizer: SaveTokenizer) -> None:
    assert_equals_transformers(save_tokenizer(byte_fallback, LLAMA_CONFIG))


def test_story_model_equals_transformers(shared_data: Path) -> None:
    assert_equals_transformers(shared_data / "stories260k")


def test_no_config_gives_the_files_post_processor(
    byte_level: tokenizers.Tokenizer, save_tokenizer: SaveTokenizer
) -> None:
    tokenizer = Tokenizer.from_pretrained(str(save_tokenizer(byte_level)))
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (None, None, None)
    assert tokenizer.encode("Hi") == byte_level.encode("Hi").ids
    assert tokenizer.token_to_id("<|begin|>") == byte_level.token_to_id("<|begin|>")
    assert (tokenizer.token_to_id("nowhere"), tokenizer.id_to_token(10**6), tokenizer.id_to_token(-1)) == (None,) * 3


@pytest.mark.parametrize("add_bos", [True, False])
@pytest.mark.parametrize("tokenizer_class", ["PreTrainedTokenizerFast", "LlamaTokenizer"])
def test_bos_without_post_processor_as_transformers(
    byte_level: tokenizers.Tokenizer, save_tokenizer: SaveTokenizer, add_bos: bool, tokenizer_class: str
) -> None:
    bare = tokenizers.Tokenizer(byte_level.model)
    bare.pre_tokenizer, bare.decoder = byte_level.pre_tokenizer, byte_level.decoder
    bare.add_special_tokens(["<|begin|>", "<|end|>"])
    config = {**BYTE_LEVEL_CONFIG, "tokenizer_class": tokenizer_class, "add_bos_token": add_bos}
    folder = save_tokenizer(bare, config)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    assert Tokenizer.from_pretrained(folder).encode("the llama") == theirs.encode("the llama")


def test_special_tokens_of_older_checkpoints(byte_level: tokenizers.Tokenizer, save_tokenizer: SaveTokenizer) -> None:
    special = {"eos_token": {"content": "<|im_end|>"}, "pad_token": "<s>", "additional_special_tokens": ["<tool_call>"]}
    folder = save_tokenizer(byte_level, BYTE_LEVEL_CONFIG, special_tokens_map=special)
    tokenizer, theirs = Tokenizer.from_pretrained(folder), transformers.AutoTokenizer.from_pretrained(folder)
    assert tokenizer.eos_token_id == theirs.eos_token_id == byte_level.token_to_id("<|im_end|>")
    assert tokenizer.pad_token_id == theirs.pad_token_id == byte_level.token_to_id("<s>")
    assert tokenizer.bos_token_id == theirs.bos_token_id
    call = byte_level.token_to_id("<tool_call>")
    assert call in tokenizer.special_ids
    assert call not in tokenizer.encode("<tool_call>")


def test_special_tokens_are_text_unless_asked(byte_level: tokenizers.Tokenizer, save_tokenizer: SaveTokenizer) -> None:
    tokenizer = Tokenizer.from_pretrained(save_tokenizer(byte_level, BYTE_LEVEL_CONFIG))
    text = "a<|end|><|header|> </s>[INST]"
    plain = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.special_ids.isdisjoint(plain)
    assert tokenizer.decode(plain) == text
    parsed = tokenizer.encode(text, add_special_tokens=False, parse_special=True)
    assert tokenizer.token_to_id("<|header|>") in parsed
    assert tokenizer.decode(parsed) == "a "
    assert tokenizer.decode(parsed, skip_special_tokens=False) == text
    # Not a special token, so transformers finds it in any text, and so does this.
    assert tokenizer.encode("<tool_call>", add_special_tokens=False) == [tokenizer.token_to_id("<tool_call>")]


def test_no_second_bos(byte_level: tokenizers.Tokenizer, save_tokenizer: SaveTokenizer) -> None:
    tokenizer = Tokenizer.from_pretrained(save_tokenizer(byte_level, BYTE_LEVEL_CONFIG))
    bos = tokenizer.bos_token_id
    assert tokenizer.encode("<|begin|>the", parse_special=True) == tokenizer.encode("the")
    assert tokenizer.encode("<|begin|>the").count(bos) == 1
    assert tokenizer.encode("the", parse_special=True)[0] == bos


def test_a_model_that_can_spell_its_special_tokens(save_tokenizer: SaveTokenizer) -> None:
    """A Unigram vocabulary lists its special tokens like any piece, so the model itself finds them in text."""
    letters = [(character, -3.0) for character in "abcsk/<>▁"]
    model = models.Unigram([("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), *letters], unk_id=0)
    unigram = tokenizers.Tokenizer(model)
    unigram.pre_tokenizer, unigram.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    unigram.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer = Tokenizer.from_pretrained(save_tokenizer(unigram, LLAMA_CONFIG))
    ids = tokenizer.encode("a</s>b<s>", add_special_tokens=False)
    assert tokenizer.special_ids.isdisjoint(ids)
    assert tokenizer.decode(ids).replace(" ", "") == "a</s>b<s>"


def test_threads_do_not_disturb_each_other(byte_level: tokenizers.Tokenizer, save_tokenizer: SaveTokenizer) -> None:
    tokenizer = Tokenizer.from_pretrained(save_tokenizer(byte_level, BYTE_LEVEL_CONFIG))
    text = "<|begin|>the llama<|end|>" * 5
    expected = {flag: tokenizer.encode(text, parse_special=flag) for flag in (True, False)}
    flags = [i % 2 == 0 for i in range(400)]
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda flag: tokenizer.encode(text, parse_special=flag), flags))
    assert results == [expected[flag] for flag in flags]


def test_truncation_and_padding_of_the_file_are_off(save_tokenizer: SaveTokenizer, byte_level: tokenizers.Tokenizer):
    limited = tokenizers.Tokenizer.from_str(byte_level.to_str())
    limited.enable_truncation(4)
    limited.enable_padding(length=8)
    tokenizer = Tokenizer.from_pretrained(save_tokenizer(limited, BYTE_LEVEL_CONFIG))
    assert tokenizer.encode(CORPUS[0]) == byte_level.encode(CORPUS[0]).ids
    assert tokenizer.encode("a") == byte_level.encode("a").ids


def test_any_text_survives(byte_level: tokenizers.Tokenizer, save_tokenizer: SaveTokenizer) -> None:
    tokenizer = Tokenizer.from_pretrained(save_tokenizer(byte_level, BYTE_LEVEL_CONFIG))

    @settings(max_examples=200, deadline=None, derandomize=True)
    @given(st.text())
    def check(text: str) -> None:
        ids = tokenizer.encode(text)
        assert ids == byte_level.encode(text).ids
        assert tokenizer.decode(ids) == text

    check()
    with pytest.raises(ValueError, match="surrogate"):
        tokenizer.encode("a\ud800b")


def test_unknown_special_tokens_are_named(byte_level: tokenizers.Tokenizer, save_tokenizer: SaveTokenizer) -> None:
    config = {**BYTE_LEVEL_CONFIG, "pad_token": "[PAD]", "additional_special_tokens": ["<x>"]}
    with pytest.raises(ValueError, match=r"pad_token '\[PAD\]', special token '<x>'"):
        Tokenizer.from_pretrained(save_tokenizer(byte_level, config))
    config = {**BYTE_LEVEL_CONFIG, "added_tokens_decoder": {"99999": {"content": "<x>", "special": True}}}
    with pytest.raises(ValueError, match="'<x>'"):
        Tokenizer.from_pretrained(save_tokenizer(byte_level, config))


def test_a_folder_without_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"looked for tokenizer\.json and tokenizer\.model; copy") as error:
        Tokenizer.from_pretrained(tmp_path)
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe{}", None])
def test_damaged_files_are_named(
    byte_level: tokenizers.Tokenizer, save_tokenizer: SaveTokenizer, name: str, content: bytes | None
) -> None:
    folder = save_tokenizer(byte_level, BYTE_LEVEL_CONFIG, special_tokens_map={"eos_token": "<|end|>"})
    path = folder / name
    path.write_bytes(path.read_bytes()[:-2] if content is None else content)
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        Tokenizer.from_pretrained(folder)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"bos_token": 3}, "3 is no token"),
        ({"add_bos_token": "yes"}, "add_bos_token"),
        ({"chat_template": 5}, "chat_template"),
        ({"chat_template": [{"name": "default"}]}, "chat_template"),
    ],
)
def test_config_values_of_wrong_types(
    byte_level: tokenizers.Tokenizer, save_tokenizer: SaveTokenizer, config: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Tokenizer.from_pretrained(save_tokenizer(byte_level, config))


def test_unsupported_decoder_is_named(byte_level: tokenizers.Tokenizer, save_tokenizer: SaveTokenizer) -> None:
    state = json.loads(byte_level.to_str())
    state["decoder"] = {"type": "WordPiece", "prefix": "##", "cleanup": True}
    with pytest.raises(ValueError, match=r"tokenizer\.json: its decoder WordPiece is not supported"):
        Tokenizer.from_pretrained(save_tokenizer(tokenizers.Tokenizer.from_str(json.dumps(state))))
