"""sentencepiece models: ids and text equal to the sentencepiece package's, and refusals."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import sentencepiece
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2

from puna.engine.detokenizer import Detokenizer
from puna.engine.sentencepiece_model import SentencePieceModel
from puna.engine.tokenizer import Tokenizer

from .conftest import CORPUS, LLAMA_STYLE, TRICKY_TEXTS, train_sentencepiece

SYMBOLS = ["<mask>", "the th", "ab", "aba", "▁▁"]
VARIANTS = {
    "bpe, as Llama": LLAMA_STYLE,
    "bpe, no bytes, nmt_nfkc": {"model_type": "bpe", "vocab_size": 400, "control_symbols": ["<pad>"]},
    "bpe, symbols": {"model_type": "bpe", "vocab_size": 400, "user_defined_symbols": SYMBOLS},
    "bpe, pieces across words": {"model_type": "bpe", "vocab_size": 400, "split_by_whitespace": False},
    "bpe, no prefix": {**LLAMA_STYLE, "add_dummy_prefix": False},
    "unigram, nmt_nfkc": {"model_type": "unigram", "vocab_size": 250, "control_symbols": ["<pad>"]},
    "unigram, bytes": {"model_type": "unigram", "vocab_size": 500, "byte_fallback": True},
    "unigram, symbols": {"model_type": "unigram", "vocab_size": 250, "user_defined_symbols": SYMBOLS},
    "unigram, case folded": {
        "model_type": "unigram",
        "vocab_size": 250,
        "normalization_rule_name": "nfkc_cf",
        "remove_extra_whitespaces": False,
    },
}
text_strategy = st.lists(
    st.one_of(
        st.text(max_size=6),
        st.text(" \tabhtekn▁é́<>\n", max_size=8),
        st.sampled_from([*SYMBOLS, "<s>", "</s>", "<0x0A>", "<unk>", " the", "walk", "你好", "👩‍👧"]),
    ),
    max_size=8,
).map("".join)


@pytest.fixture(scope="module", params=VARIANTS.values(), ids=VARIANTS.keys())
def model_file(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "tokenizer.model"
    path.write_bytes(train_sentencepiece(**request.param))
    return path


def test_ids_equal_sentencepiece(model_file: Path) -> None:
    oracle = sentencepiece.SentencePieceProcessor(model_file=str(model_file))
    model = SentencePieceModel.from_file(model_file)
    for text in [*TRICKY_TEXTS, *CORPUS[:6], "\n".join(CORPUS), " ".join(TRICKY_TEXTS)]:
        assert model.encode(text) == oracle.encode(text), text


def test_ids_and_text_equal_sentencepiece_on_any_text(model_file: Path) -> None:
    oracle = sentencepiece.SentencePieceProcessor(model_file=str(model_file))
    tokenizer = Tokenizer.from_pretrained(model_file.parent)
    all_ids = st.lists(st.integers(0, oracle.get_piece_size() - 1), max_size=20)

    @settings(max_examples=150, deadline=None, derandomize=True)
    @given(text=text_strategy, ids=all_ids)
    def check(text: str, ids: list[int]) -> None:
        encoded = oracle.encode(text)
        assert tokenizer.encode(text, add_special_tokens=False) == encoded
        assert tokenizer.decode(encoded) == oracle.decode(encoded)
        assert tokenizer.decode(ids) == oracle.decode(ids)
        stream = Detokenizer(tokenizer)
        assert "".join(map(stream.push, ids)) + stream.flush() == oracle.decode(ids)

    check()


def test_special_ids_and_bos_follow_the_model(llama_model: bytes, save_tokenizer: Callable[..., Path]) -> None:
    oracle = sentencepiece.SentencePieceProcessor(model_proto=llama_model)
    tokenizer = Tokenizer.from_pretrained(save_tokenizer(llama_model))
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, None)
    assert tokenizer.special_ids == {1, 2}
    assert tokenizer.vocab_size == oracle.get_piece_size()
    assert tokenizer.encode("Hello") == [1, *oracle.encode("Hello")]
    assert tokenizer.encode("</s>", add_special_tokens=False) == oracle.encode("</s>")
    assert tokenizer.encode("</s>", add_special_tokens=False, parse_special=True) == [2]
    assert all(tokenizer.id_to_token(i) == oracle.id_to_piece(i) for i in range(oracle.get_piece_size()))
    assert tokenizer.decode([1, *oracle.encode("Hello"), 2], skip_special_tokens=False) == "<s> Hello</s>"


def test_config_adds_tokens_and_chooses_bos_and_eos(llama_model: bytes, save_tokenizer: Callable[..., Path]) -> None:
    size = sentencepiece.SentencePieceProcessor(model_proto=llama_model).get_piece_size()
    config = {
        "add_bos_token": False,
        "add_eos_token": True,
        "pad_token": "<pad>",
        "added_tokens_decoder": {
            str(size): {"content": "<pad>", "special": True},
            str(size + 1): {"content": "<note>", "special": False},
        },
    }
    tokenizer = Tokenizer.from_pretrained(save_tokenizer(llama_model, config))
    assert tokenizer.vocab_size == size + 2
    assert tokenizer.pad_token_id == size
    plain = tokenizer.encode("<pad><note>")
    assert size not in plain
    assert plain[-2:] == [size + 1, tokenizer.eos_token_id]
    assert tokenizer.encode("<pad><note>", parse_special=True) == [size, size + 1, 2]
    assert tokenizer.decode([size, size + 1]) == "<note>"


@pytest.mark.parametrize("legacy", [True, False])
def test_text_after_special_tokens_as_transformers(
    llama_model: bytes, save_tokenizer: Callable[..., Path], legacy: bool
) -> None:
    """legacy=false gives the dummy prefix to the start of the text only, otherwise each text between tokens has it."""
    config = {"tokenizer_class": "LlamaTokenizer", "legacy": legacy, "bos_token": "<s>", "eos_token": "</s>"}
    folder = save_tokenizer(llama_model, config)
    oracle = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer = Tokenizer.from_pretrained(folder)
    for text in ("<s>the llama</s><s>walked", "the</s>the", "<s>"):
        assert tokenizer.encode(text, add_special_tokens=False, parse_special=True) == oracle.encode(
            text, add_special_tokens=False
        )


def test_equal_scores_are_merged_leftmost_first(llama_model: bytes) -> None:
    """Vocabularies merged from two models give the pieces of the second one score."""
    proto = sentencepiece_model_pb2.ModelProto.FromString(llama_model)
    for piece in proto.pieces[300:]:
        piece.score = 0.0
    data = proto.SerializeToString()
    oracle, model = sentencepiece.SentencePieceProcessor(model_proto=data), SentencePieceModel(data)
    for text in [*CORPUS[:6], *TRICKY_TEXTS, "thethenthesetherethe hethe walwalked"]:
        assert model.encode(text) == oracle.encode(text)


def _change(data: bytes, change: Callable[[sentencepiece_model_pb2.ModelProto], object]) -> bytes:
    proto = sentencepiece_model_pb2.ModelProto.FromString(data)
    change(proto)
    return proto.SerializeToString()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda proto: setattr(proto.trainer_spec, "model_type", 3), "WORD"),
        (lambda proto: setattr(proto.trainer_spec, "model_type", 4), "CHAR"),
        (lambda proto: setattr(proto.trainer_spec, "treat_whitespace_as_suffix", True), "treat_whitespace_as_suffix"),
        (lambda proto: setattr(proto.normalizer_spec, "escape_whitespaces", False), "escape_whitespaces"),
        (lambda proto: setattr(proto.normalizer_spec, "precompiled_charsmap", b"\x10\0\0\0ab"), "charsmap"),
        (lambda proto: setattr(proto.denormalizer_spec, "precompiled_charsmap", b"x"), "denormalizer"),
        (lambda proto: setattr(proto.pieces[300], "type", 5), "unused"),
        (lambda proto: setattr(proto.pieces[0], "type", 1), "unknown pieces"),
        (lambda proto: setattr(proto.pieces[5], "piece", "x"), "lacks 1 byte pieces"),
    ],
)
def test_what_cannot_be_exact_is_refused(
    llama_model: bytes,
    save_tokenizer: Callable[..., Path],
    change: Callable[[sentencepiece_model_pb2.ModelProto], object],
    message: str,
) -> None:
    folder = save_tokenizer(_change(llama_model, change))
    with pytest.raises(ValueError, match=message) as error:
        Tokenizer.from_pretrained(folder)
    assert str(folder / "tokenizer.model") in str(error.value)


def test_truncated_files_are_refused(llama_model: bytes, save_tokenizer: Callable[..., Path]) -> None:
    folder = save_tokenizer(llama_model)
    path = folder / "tokenizer.model"
    for size in (0, 1, 7, 100, len(llama_model) // 2, len(llama_model) - 1):
        path.write_bytes(llama_model[:size])
        with pytest.raises(ValueError, match=r"tokenizer\.model"):
            Tokenizer.from_pretrained(folder)
    path.write_text("IQ== 0\nIg== 1\n" * 50)
    with pytest.raises(ValueError, match=r"tokenizer\.model"):
        Tokenizer.from_pretrained(folder)
