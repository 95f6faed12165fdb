"""Tokenizers trained by the tests, in the formats that checkpoints have."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

CORPUS = [
    "The llama walked over the high grassland, and the wind walked with it.",
    "def walk(steps: int) -> list[str]:\n    return ['step'] * steps  # 12345 67890",
    "Über den Wolken, à la carte, señor; наука и жизнь; 你好，世界。 こんにちは世界 안녕하세요 नमस्ते",
    "She said: 'It's 3.14, isn't it?'  \t tabs\tand   spaces\n\n\nnew lines",
    "for (int i = 0; i < 10; ++i) { sum += values[i]; } aaaa bbbb abab the then there these",
    "user assistant system tool function name arguments content today date city weather",
] * 20

TRICKY_TEXTS = [
    "",
    " ",
    "   ",
    "Hello, world!",
    "  two leading and trailing  ",
    "a  b   c    d     e",
    "\t\ttabs\n\nnewlines\r\n",
    "def f(x):\n\treturn x  # ok",
    "<s> not special </s> <unk> <0x41> <pad>",
    "<|begin|><|end|><tool_call>",
    "▁▁mark ▁ here▁",
    "👩‍👩‍👧‍👦 🇩🇪 🧑🏽‍🚀 ❤️",
    "你好，世界。 안녕 नमस्ते שלום مرحبا ไทย",
    "e\u0301 é ﬁ ① ｶﾞ Å Ａ İ ß 각",
    "\x00\x01\x07\x1f\x7f\u200b\u200d\ufeff\ufffd\u00a0\u3000\u2028",
    "\U0001f600\U00020000\ue000\U0010ffff",
    "aaaaaaaaaaaa abababab aba",
    "1234567890 3.14 1e-5",
    "the" * 30,
]

# The splitting rule of the Llama 3 family in our own arrangement: words, up to three digits, punctuation, white space.
_WORDS = "|".join(
    [
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",
        r"[^\r\n\p{L}\p{N}]?\p{L}+",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)


def train_sentencepiece(**options: object) -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(line for text in CORPUS for line in text.split("\n")),
        model_writer=model,
        minloglevel=2,
        num_threads=1,
        hard_vocab_limit=False,
        **options,
    )
    return model.getvalue()


LLAMA_STYLE = {
    "model_type": "bpe",
    "vocab_size": 500,
    "byte_fallback": True,
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "split_digits": True,
    "allow_whitespace_only_pieces": True,
}


@pytest.fixture(scope="session")
def llama_model() -> bytes:
    return train_sentencepiece(**LLAMA_STYLE)


def byte_level_tokenizer() -> tokenizers.Tokenizer:
    """Llama 3 style: byte-level BPE with whole words looked up first, BOS from the post-processor."""
    tokenizer = tokenizers.Tokenizer(models.BPE(ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(_WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet))
    tokenizer.add_special_tokens(
        ["<|begin|>", "<|end|>", "<|header|>", "<|/header|>", "<|im_start|>", "<|im_end|>", "<s>", "</s>"]
    )
    tokenizer.add_special_tokens(["[INST]", "[/INST]", "[TOOLS]", "[/TOOLS]", "[CALLS]"])
    tokenizer.add_tokens(["<tool_call>", "</tool_call>"])
    begin = tokenizer.token_to_id("<|begin|>")
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(single="<|begin|> $A", special_tokens=[("<|begin|>", begin)]),
        ]
    )
    return tokenizer


def metaspace_bpe_tokenizer(normalizer: bool) -> tokenizers.Tokenizer:
    """Llama 2 style: byte-fallback BPE over text with space marks, from a normaliser or from a pre-tokeniser."""
    tokenizer = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if normalizer:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    specials = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    alphabet = sorted({character for text in CORPUS[:2] for character in text} | {"▁"})
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=specials, initial_alphabet=alphabet, limit_alphabet=len(alphabet)
    )
    words = [word for text in CORPUS for word in text.split()]
    tokenizer.train_from_iterator(words, trainer)
    state = json.loads(tokenizer.to_str())
    # Bytes are ordinary entries of the vocabulary, not added tokens.
    state["added_tokens"] = state["added_tokens"][:3]
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(state))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


SaveTokenizer = Callable[..., Path]


@pytest.fixture
def save_tokenizer(tmp_path: Path) -> SaveTokenizer:
    """Writes a checkpoint folder: a tokenizer (object, or the bytes of a tokenizer.model), a config and other files."""

    def save(tokenizer: tokenizers.Tokenizer | bytes, config: dict[str, object] | None = None, **files: object) -> Path:
        folder = tmp_path / f"checkpoint-{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        if isinstance(tokenizer, bytes):
            (folder / "tokenizer.model").write_bytes(tokenizer)
        else:
            tokenizer.save(str(folder / "tokenizer.json"))
        if config is not None:
            (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
        for name, content in files.items():
            text = content if isinstance(content, str) else json.dumps(content)
            suffix = ".jinja" if isinstance(content, str) else ".json"
            (folder / (name + suffix)).write_text(text, encoding="utf-8")
        return folder

    return save


@pytest.fixture(scope="session")
def byte_level() -> tokenizers.Tokenizer:
    return byte_level_tokenizer()


@pytest.fixture(scope="session", params=["normalizer", "pre_tokenizer"])
def byte_fallback(request: pytest.FixtureRequest) -> tokenizers.Tokenizer:
    return metaspace_bpe_tokenizer(request.param == "normalizer")
