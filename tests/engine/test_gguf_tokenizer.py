"""Tokenizers of GGUF files: ids as llama.cpp's where llama-cpp-python is installed, and as the original tokenizer's."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers
from tokenizers import models, pre_tokenizers, trainers

from gguf_writer import tokenizer_metadata, write_vocabulary
from puna.checkpoints.gguf_file import GGUFFile
from puna.checkpoints.gguf_vocabulary import read_generation_config
from puna.engine.detokenizer import Detokenizer
from puna.engine.pre_tokenizers import PRE_TOKENIZERS
from puna.engine.token_bytes import TokenBytes
from puna.engine.tokenizer import Tokenizer

from .conftest import CORPUS, TRICKY_TEXTS

SaveTokenizer = Callable[..., Path]
Values = dict[str, Any]
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)

# In the manner of llama.cpp's own list: scripts, runs of white space and digits, endings, code, emoji, marks.
TEXTS = [
    *TRICKY_TEXTS,
    *CORPUS[:6],
    "\n\n\n a b\t\tc \n \n\r\n\r\n \r\n x \n\n",
    "Hello's WE'LL don't I'M 'S x'S 'll'LL'Re ' s",
    "É éÉa aÉb ÀÉÎ fooBarBAZ ABCdefGHIjkl ǅ ſ 'ſ",
    "１２３ ①②③ ½ ٣٤٥ 12345678 3.141592 1,000,000",
    "def f(x):\n    return {'a': [1,2,3]}  # ok\n\n\n\tpass",
    "$x^2+y~z|w`q`=<a> http://www.example.com/a?b=c&d=%20 ...!!! --- ___ ***/// ／",
    "3 33 333 3333 33333 333333 3333333 33333333 333333333",
    "Cửa Việt, tiếng Việt; ნუსხა ქართული; 🚀 (normal) 😶‍🌫️ (multiple) ✅🦙🦙",
    "\u0085x\u00a0y\u3000z\u2028w\x1cv\x0bu \u200b",
]


def random_texts(count: int, seed: int = 0) -> list[str]:
    generator = random.Random(seed)
    pool = "abcdeABCDE éÉßſ  \n\r\t'sSlLveE0123456789.,!?$^~|<>_-/\\\"(){}`=+👍🏽日本語한ไ\u0301\u200d\u00a0½。，"
    return ["".join(generator.choice(pool) for _ in range(generator.randint(1, 50))) for _ in range(count)]


@pytest.fixture
def sentencepiece_values(llama_model: bytes, save_tokenizer: SaveTokenizer) -> Values:
    return _bare(tokenizer_metadata(save_tokenizer(llama_model)))


@pytest.fixture(scope="session")
def byte_level_values(tmp_path_factory: pytest.TempPathFactory) -> Values:
    """Byte-level BPE whose merges cross every boundary, so that each cut of a pre-tokenizer shows in the ids."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    texts = [*CORPUS, *TEXTS * 3, *random_texts(300, seed=5)]
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=1500, initial_alphabet=alphabet))
    tokenizer.add_special_tokens(["<|begin|>", "<|end|>", "<|eot_id|>"])
    tokenizer.add_tokens(["<tool>", "  "])
    folder = tmp_path_factory.mktemp("byte_level")
    tokenizer.save(str(folder / "tokenizer.json"))
    values = _bare(tokenizer_metadata(folder))
    del values["add_bos_token"]
    ids = {name: values["tokens"].index(f"<|{name}|>") for name in ("begin", "end")}
    return {**values, "bos_token_id": ids["begin"], "eos_token_id": ids["end"]}


def _bare(metadata: Values) -> Values:
    return {name.removeprefix("tokenizer.ggml."): value for name, value in metadata.items()}


def load(folder: Path, values: Values) -> Tokenizer:
    return Tokenizer.from_pretrained(write_vocabulary(folder / "vocabulary.gguf", values))


# ---- beside llama.cpp


class LlamaCpp:
    """llama.cpp's tokenizer on the same file."""

    def __init__(self, path: Path) -> None:
        self.library = pytest.importorskip("llama_cpp")
        self.model = self.library.Llama(str(path), vocab_only=True, verbose=False)

    def encode(self, text: str, add_special_tokens: bool, parse_special: bool) -> list[int]:
        ids: list[int] = self.model.tokenize(text.encode(), add_bos=add_special_tokens, special=parse_special)
        return ids

    def end_ids(self, count: int) -> set[int]:
        vocabulary = self.library.llama_model_get_vocab(self.model._model.model)
        return {number for number in range(count) if self.library.llama_vocab_is_eog(vocabulary, number)}

    def token_bytes(self, token_id: int, special: bool) -> bytes:
        buffer = self.library.ctypes.create_string_buffer(256)
        vocabulary = self.library.llama_model_get_vocab(self.model._model.model)
        size = self.library.llama_token_to_piece(vocabulary, token_id, buffer, 256, 0, special)
        return buffer.raw[:size]


def assert_equals_llama_cpp(path: Path, num_random: int = 150) -> None:
    """But for a second BOS, which llama.cpp adds (with a warning) to a parsed text that starts with one."""
    ours, theirs = Tokenizer.from_pretrained(path), LlamaCpp(path)
    for text in [*TEXTS, *random_texts(num_random)]:
        for add_special_tokens in (False, True):
            for parse_special in (False, True):
                ids = theirs.encode(text, add_special_tokens, parse_special)
                ids = ids[1:] if ids[:2] == [ours.bos_token_id] * 2 else ids
                assert ours.encode(text, add_special_tokens, parse_special) == ids, (text, parse_special)
    pieces = TokenBytes(ours)
    for token_id in range(ours.vocab_size):
        assert (pieces[token_id] or b"") == theirs.token_bytes(token_id, special=False)


def test_sentencepiece_equals_llama_cpp(sentencepiece_values: Values, tmp_path: Path) -> None:
    assert_equals_llama_cpp(write_vocabulary(tmp_path / "x.gguf", sentencepiece_values))


@pytest.mark.parametrize("add_space_prefix", [True, False])
def test_sentencepiece_with_tokens_of_every_type_equals_llama_cpp(
    add_space_prefix: bool, sentencepiece_values: Values, tmp_path: Path
) -> None:
    values = sentencepiece_values
    added = {"<tool_call>": USER_DEFINED, "  ": USER_DEFINED, "[INST]": CONTROL, "<|im_end|>": NORMAL, "ab ": UNUSED}
    values = {
        **values,
        "tokens": [*values["tokens"], *added],
        "scores": [*values["scores"], *(0.0 for _ in added)],
        "token_type": [*values["token_type"], *added.values()],
        "add_space_prefix": add_space_prefix,
        "add_eos_token": True,
    }
    path = write_vocabulary(tmp_path / "x.gguf", values)
    assert_equals_llama_cpp(path)
    ours, theirs = Tokenizer.from_pretrained(path), LlamaCpp(path)
    for text in ("x[INST]y  z<tool_call>[INST] [INST]", "<|im_end|><tool_call> a", "[INST]", "  <tool_call>  "):
        for parse_special in (False, True):
            assert ours.encode(text, False, parse_special) == theirs.encode(text, False, parse_special)


FIRST_NAMES = tuple({rule: name for name, rule in reversed(PRE_TOKENIZERS.items())}.values())


@pytest.mark.parametrize("pre", [*PRE_TOKENIZERS, None])
def test_every_pre_tokenizer_equals_llama_cpp(pre: str | None, byte_level_values: Values, tmp_path: Path) -> None:
    path = write_vocabulary(tmp_path / "x.gguf", {**byte_level_values, "pre": pre})
    assert_equals_llama_cpp(path, num_random=150 if pre in FIRST_NAMES else 5)


def test_end_ids_equal_llama_cpp(byte_level_values: Values, tmp_path: Path) -> None:
    added = ["<|im_end|>", "</s>", "<|fim_pad|>", "<|fim_prefix|>", "<|file_sep|>", "<EOT>", "</x>"]
    tokens, types = [*byte_level_values["tokens"], *added], [*byte_level_values["token_type"], *[NORMAL] * len(added)]
    path = write_vocabulary(tmp_path / "x.gguf", {**byte_level_values, "tokens": tokens, "token_type": types})
    assert set(read_generation_config(GGUFFile(path)).eos_token_ids) == LlamaCpp(path).end_ids(len(tokens))


# ---- beside the tokenizers that the files are made of


def test_sentencepiece_equals_the_library(llama_model: bytes, sentencepiece_values: Values, tmp_path: Path) -> None:
    ours = load(tmp_path, sentencepiece_values)
    library = sentencepiece.SentencePieceProcessor(model_proto=llama_model)
    for text in [*TEXTS, *random_texts(100)]:
        ids = library.encode(text)
        assert ours.encode(text, add_special_tokens=False) == ids
        assert ours.encode(text) == [library.bos_id(), *ids]
        assert ours.decode(ids) == library.decode(ids)


def test_byte_level_equals_tokenizers(
    byte_level: tokenizers.Tokenizer, save_tokenizer: SaveTokenizer, tmp_path: Path
) -> None:
    folder = save_tokenizer(byte_level, {"bos_token": "<|begin|>", "eos_token": "<|end|>", "pad_token": "<|end|>"})
    ours, original = load(tmp_path, _bare(tokenizer_metadata(folder, "llama-bpe"))), Tokenizer.from_pretrained(folder)
    for text in [*TEXTS, *random_texts(100), "<|begin|>x<tool_call> y<|end|> <|header|>"]:
        for add_special_tokens in (False, True):
            for parse_special in (False, True):
                ids = original.encode(text, add_special_tokens, parse_special)
                assert ours.encode(text, add_special_tokens, parse_special) == ids
                for skip in (False, True):
                    assert ours.decode(ids, skip) == original.decode(ids, skip)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id", "vocab_size", "special_ids"):
        assert getattr(ours, name) == getattr(original, name)
    assert list(TokenBytes(ours)) == list(TokenBytes(original))
    assert all(ours.id_to_token(i) == original.id_to_token(i) for i in range(-1, ours.vocab_size + 1))


# ---- special tokens


def small(**changes: object) -> Values:
    """A sentencepiece vocabulary small enough to count in."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "ab", "▁ab", "▁a"]
    types = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * 6]
    scores = [0.0] * 259 + [-10.0, -11.0, -12.0, -1.0, -2.0, -3.0]
    return {"model": "llama", "tokens": tokens, "token_type": types, "scores": scores, **changes}


def test_named_ids_of_sentencepiece_where_the_file_says_nothing(tmp_path: Path) -> None:
    tokenizer = load(tmp_path, small())
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, None)
    assert tokenizer.special_ids == {0, 1, 2}
    assert tokenizer.encode("ab") == [1, 263]
    assert tokenizer.encode("") == [1]
    assert tokenizer.encode("é") == [1, 259, 3 + 0xC3, 3 + 0xA9]


@pytest.mark.parametrize(
    ("add_bos", "add_eos", "expected"),
    [(None, None, [1, 264]), (True, True, [1, 264, 2]), (False, False, [264]), (False, True, [264, 2])],
)
def test_bos_and_eos_as_the_file_says(
    add_bos: bool | None, add_eos: bool | None, expected: list[int], tmp_path: Path
) -> None:
    tokenizer = load(tmp_path, small(add_bos_token=add_bos, add_eos_token=add_eos))
    assert tokenizer.encode("a") == expected
    assert tokenizer.encode("a", add_special_tokens=False) == [264]


def test_control_tokens_are_text_unless_parsed(tmp_path: Path) -> None:
    tokenizer = load(tmp_path, small())
    assert 2 not in tokenizer.encode("a</s>b")
    assert tokenizer.decode(tokenizer.encode("a</s>b")) == "a</s>b"
    assert tokenizer.encode("<s>a</s>b", parse_special=True) == [1, 264, 2, 259, 261]
    assert tokenizer.decode([1, 264, 2, 261], skip_special_tokens=False) == "<s> a</s>b"


def test_text_that_merges_could_make_a_control_token_of(tmp_path: Path) -> None:
    """Where llama.cpp would take it for the token."""
    values = small()
    tokens, types, scores = values["tokens"], values["token_type"], values["scores"]
    values |= {"tokens": [*tokens, "<", "<a"], "token_type": [*types, NORMAL, CONTROL], "scores": [*scores, -1.0, 0.0]}
    assert load(tmp_path, values).encode("<ab", add_special_tokens=False) == [259, 265, 262]


def test_merges_to_a_control_token_or_to_none_are_left_out(tmp_path: Path) -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, "ab", "abc", "bc"]
    types = [NORMAL] * (len(tokens) - 2) + [CONTROL, NORMAL]
    values = {"model": "gpt2", "tokens": tokens, "token_type": types, "merges": ["x y", "a b", "ab c", "b c"]}
    tokenizer = load(tmp_path, values)
    assert tokenizer.encode("abc xy") == [256, *(alphabet.index(character) for character in "cĠxy")]
    assert tokenizer.encode("bc") == [258]
    assert tokenizer.encode("abc", parse_special=True) == [257]


def test_token_types_that_files_have_wrong(tmp_path: Path) -> None:
    tokenizer = load(tmp_path, small(tokens=[*small()["tokens"][:-1], "<|im_end|>"]))
    assert 264 in tokenizer.special_ids
    assert tokenizer.encode("<|im_end|>", add_special_tokens=False, parse_special=True) == [264]


def test_chat_templates(tmp_path: Path) -> None:
    template = "{{ bos_token }}{% for m in messages %}[{{ m.content }}]{% endfor %}"
    tokenizer = load(tmp_path, small(**{"tokenizer.chat_template": template}))
    assert tokenizer.render_chat([{"role": "user", "content": "ab"}]) == "<s>[ab]"
    assert tokenizer.encode_chat([{"role": "user", "content": "ab"}])[0] == 1
    several = {"tokenizer.chat_templates": ["tool_use"], "tokenizer.chat_template.tool_use": "tools"}
    tokenizer = load(tmp_path, small(**{"tokenizer.chat_template": template}, **several))
    assert tokenizer.render_chat([{"role": "user", "content": "ab"}], tools=[{}]) == "tools"
    assert load(tmp_path, small()).chat_template is None


def test_a_stream_of_bytes(tmp_path: Path) -> None:
    tokenizer = load(tmp_path, small())
    stream = Detokenizer(tokenizer)
    parts = [stream.push(token_id) for token_id in tokenizer.encode("ab é👍")]
    assert "".join(parts) + stream.flush() == "ab é👍"
    assert parts[-1] == "👍"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (small(model="bert"), "the tokenizer is 'bert', and puna reads 'llama'"),
        (small(model=None), "no tokenizer in "),
        (small(tokens=None), "tokens is not a list of tokens"),
        (small(scores=None), r"has no tokenizer\.ggml\.scores"),
        (small(scores=[1.0]), "scores does not have a number for each of 265 tokens"),
        (small(token_type=["x"]), "token_type does not have a number for each"),
        (small(bos_token_id="<s>"), "bos_token_id is '<s>': it must be a token's number"),
        (small(add_bos_token=1), "add_bos_token is 1: it must be true or false"),
        (small(model="gpt2"), r"has no tokenizer\.ggml\.merges"),
        (small(model="gpt2", merges=["a b"], pre="new-model"), "the pre-tokenizer 'new-model' is not supported"),
        (small(**{"tokenizer.chat_template": "{% if %}"}), "the chat template 'default' does not compile"),
    ],
)
def test_refusals_name_the_file(values: Values, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message) as refusal:
        load(tmp_path, values)
    assert "vocabulary.gguf" in str(refusal.value)
