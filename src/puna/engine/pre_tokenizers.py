"""PRE_TOKENIZERS: how a byte-level BPE cuts text before it merges, by the names in GGUF files (tokenizer.ggml.pre).

Sources: the tokenizer.json files of the models, and llama.cpp (llama-vocab.cpp) for which name means which rule. Where
llama.cpp's rule is not quite the model's own (tekken, gpt-4o), this is llama.cpp's: ids are the same as there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

import tokenizers
from tokenizers import pre_tokenizers


@dataclass(frozen=True)
class PreTokenizer:
    """Text is cut at the matches of each of `patterns` in turn; a match is a piece, and so is what lies between two.

    `ignore_merges`: a piece that is a token as a whole is that token, whether merges lead to it or not. `adds_bos`:
    texts start with BOS where the file does not say.
    """

    patterns: tuple[str, ...]
    ignore_merges: bool = False
    adds_bos: bool = False

    def build(self) -> pre_tokenizers.PreTokenizer:
        """The same for the `tokenizers` library, bytes written as its printable characters."""
        splits = [pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated") for pattern in self.patterns]
        return pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


_ENDINGS: Final = "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_SPACES: Final = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2: Final = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"


def _llama3(digits: str) -> str:
    return rf"{_ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"


def _cased(ending: str, digits: str) -> str:
    """Words are cut where a capital follows a small letter; only ASCII letters count as either."""
    capitals, small = r"(?:(?=\p{L})[^a-z])", r"(?:(?=\p{L})[^A-Z])"
    start = r"[^\r\n\p{L}\p{N}]?"
    words = rf"{start}{capitals}*{small}+{ending}|{start}{capitals}+{small}*{ending}"
    return rf"{words}|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"


_BLOOM: Final = r" ?[^(\s|.,!?…。，、।۔،)]+"  # noqa: RUF001 (punctuation of several scripts)

_THREE_DIGITS: Final = _llama3(r"\p{N}{1,3}")
_ONE_DIGIT: Final = _llama3(r"\p{N}")

# A rule, and the names of it.
_GROUPS: Final = (
    (
        PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
        "default",
    ),
    (
        PreTokenizer((_THREE_DIGITS,), ignore_merges=True, adds_bos=True),
        "llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2",
    ),
    (PreTokenizer((_THREE_DIGITS,)), "smaug-bpe dbrx chatglm-bpe"),
    (PreTokenizer((_THREE_DIGITS,), ignore_merges=True), "glm4"),
    (
        PreTokenizer((_ONE_DIGIT,)),
        "qwen2 deepseek-r1-qwen kormo stablelm2 megrez hunyuan solar-open grok-2",
    ),
    (
        PreTokenizer((_GPT2,)),
        "gpt-2 phi-2 mpt olmo jais trillion granite-docling exaone4 gigachat a.x-4.0 mellum",
    ),
    (
        PreTokenizer((r"\p{N}", _GPT2)),
        "smollm starcoder refact command-r codeshell exaone minerva-7b",
    ),
    (PreTokenizer((_cased("", r"\p{N}"),), ignore_merges=True, adds_bos=True), "tekken"),
    (PreTokenizer((_cased(f"{_ENDINGS}?", r"\p{N}{1,3}"),)), "gpt-4o llama4 kanana2"),
    (
        PreTokenizer((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", r"\p{N}")),
        "deepseek-coder",
    ),
    (PreTokenizer((r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, "[0-9][0-9][0-9]")), "falcon"),
    (PreTokenizer((_BLOOM,)), "bloom poro-chat gpt3-finnish"),
    (PreTokenizer((_BLOOM, r"\p{N}")), "viking"),
    (
        PreTokenizer(
            (rf"{_ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_SPACES}",),
        ),
        "seed-coder",
    ),
    (PreTokenizer((r"\p{N}{1,3}", _llama3(r"\p{N}+")), ignore_merges=True), "minicpm5"),
)

PRE_TOKENIZERS: Final[Mapping[str, PreTokenizer]] = MappingProxyType(
    {name: rule for rule, names in _GROUPS for name in names.split()}
)
