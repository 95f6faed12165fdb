"""GGUFVocabulary: the tokenizer's part of a GGUF file's metadata, and what it says about generating.

Files name few of their special tokens, and give some the wrong type; which texts mark a special token all the same
follows llama.cpp (llama-vocab.cpp).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from types import MappingProxyType
from typing import Any, Final

import numpy as np

from puna.checkpoints.gguf_file import GGUFFile
from puna.config import GenerationConfig

_PREFIX: Final = "tokenizer.ggml."

# Texts of tokens that end an answer. U+FF5C is DeepSeek's full-width bar.
_ENDS: Final = (
    "<|eot_id|> <|im_end|> <|end|> <|return|> <|call|> <end_of_turn> <|endoftext|> </s> <|eom_id|> <EOT> _<EOT> [EOT] "
    "[EOS] <|end_of_text|> <end_of_utterance> <eos> <\uff5cend▁of▁sentence\uff5c>"
)
# Those of models that fill in the middle of code: the ones that end the answer as well, and the others.
_MIDDLE_ENDS: Final = (
    "<|fim_pad|> <fim-pad> <fim_pad> <PAD> [PAD] <|fim_repo|> <|repo_name|> <fim-repo> <REPO> <reponame> <|file_sep|>"
)
_MIDDLE: Final = (
    "<|fim_prefix|> <fim-prefix> <fim_prefix> <\uff5cfim▁begin\uff5c> <PRE> ▁<PRE> <|code_prefix|> <|prefix|> "
    "<|fim_suffix|> <fim-suffix> <fim_suffix> <\uff5cfim▁hole\uff5c> <SUF> ▁<SUF> <|code_suffix|> <|suffix|> "
    "<|fim_middle|> <fim-middle> <fim_middle> <\uff5cfim▁end\uff5c> <MID> ▁<MID> <|code_middle|> <|middle|>"
)
_END_TEXTS: Final = frozenset((*_ENDS.split(), *_MIDDLE_ENDS.split()))
_CONTROL_TEXTS: Final = frozenset((*_END_TEXTS, *_MIDDLE.split()))
_NAMED_IDS: Final = MappingProxyType(
    {
        "bos_token": "bos_token_id",
        "eos_token": "eos_token_id",
        "unk_token": "unknown_token_id",
        "sep_token": "seperator_token_id",  # spelled so in the specification
        "pad_token": "padding_token_id",
        "mask_token": "mask_token_id",
    }
)
# What they are in a vocabulary of sentencepiece's where the file does not say.
_SENTENCEPIECE_IDS: Final = MappingProxyType({"unk_token": 0, "bos_token": 1, "eos_token": 2})
_SAMPLING: Final = MappingProxyType(
    {
        "temperature": "temp",
        "top_k": "top_k",
        "top_p": "top_p",
        "min_p": "min_p",
        "repetition_penalty": "penalty_repeat",
    }
)


class TokenType(IntEnum):
    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True)
class GGUFVocabulary:
    """`model` is "llama" (sentencepiece's BPE, by scores) or "gpt2" (byte-level BPE, by merges; `pre` says how text is
    cut before). None in `add_bos`, `add_eos` and `add_space_prefix`: the file does not say.

    `types` are the file's but for tokens whose text marks them as control tokens. `end_ids` end an answer.
    """

    model: str
    pre: str
    tokens: tuple[str, ...]
    types: tuple[TokenType, ...]
    scores: tuple[float, ...]
    merges: tuple[str, ...]
    named_ids: Mapping[str, int]
    end_ids: tuple[int, ...]
    add_bos: bool | None
    add_eos: bool | None
    add_space_prefix: bool | None
    chat_templates: Mapping[str, str]


def read_vocabulary(file: GGUFFile) -> GGUFVocabulary:
    """Raises ValueError, naming the file, where there is no vocabulary or its parts do not fit together."""
    model = file.value(f"{_PREFIX}model")
    if model not in ("llama", "gpt2"):
        raise ValueError(
            f"{file.path}: the tokenizer is {model!r}, and puna reads 'llama' (sentencepiece) and 'gpt2' (BPE)"
            if model is not None
            else f"no tokenizer in {file.path}: convert the model again, with its tokenizer"
        )
    tokens = tuple(file.value(f"{_PREFIX}tokens", []))
    if not tokens or any(not isinstance(token, str) for token in tokens):
        raise ValueError(f"{file.path}: {_PREFIX}tokens is not a list of tokens: fetch the file again")
    # llama.cpp's name for a token without text, so that no text becomes it.
    tokens = tuple(token or f"[EMPTY_{number}]" for number, token in enumerate(tokens))
    scores = tuple(float(score) for score in _numbers(file, "scores", len(tokens), "fi"))
    numbers = _numbers(file, "token_type", len(tokens), "i")
    known = {int(kind): kind for kind in TokenType}
    types = [known.get(number, TokenType.NORMAL) for number in numbers] or [TokenType.NORMAL] * len(tokens)
    for number, token in enumerate(tokens):
        if token in _CONTROL_TEXTS:
            types[number] = TokenType.CONTROL
    merges = file.value(f"{_PREFIX}merges", [])
    if model == "gpt2" and f"{_PREFIX}merges" not in file:
        raise ValueError(f"{file.path} has no {_PREFIX}merges, without which its tokens can't be found in text")
    if model == "llama" and not scores:
        raise ValueError(f"{file.path} has no {_PREFIX}scores, without which its tokens can't be found in text")
    return GGUFVocabulary(
        model=model,
        pre=_text(file, "pre", "default"),
        tokens=tokens,
        types=tuple(types),
        scores=scores,
        merges=tuple(merges),
        named_ids=_read_named_ids(file, model, len(tokens)),
        end_ids=_read_end_ids(file, tokens),
        add_bos=_flag(file, "add_bos_token"),
        add_eos=_flag(file, "add_eos_token"),
        add_space_prefix=_flag(file, "add_space_prefix"),
        chat_templates=_read_chat_templates(file),
    )


def read_generation_config(file: GGUFFile) -> GenerationConfig:
    """The ids of special tokens, and the sampling that the model's makers recommend where the file has it."""
    tokens = file.value(f"{_PREFIX}tokens", [])
    ids = _read_named_ids(file, file.value(f"{_PREFIX}model", ""), len(tokens))
    eos = ids.get("eos_token")
    ends = (() if eos is None else (eos,)) + tuple(i for i in _read_end_ids(file, tokens) if i != eos)
    sampling = {name: file.value(f"general.sampling.{theirs}") for name, theirs in _SAMPLING.items()}
    given = {name: value for name, value in sampling.items() if value is not None}
    for name, value in given.items():
        if type(value) not in (int, float):
            raise ValueError(f"{file.path}: general.sampling.{_SAMPLING[name]} is {value!r}: it must be a number")
    return GenerationConfig(
        bos_token_id=ids.get("bos_token"),
        eos_token_ids=ends,
        pad_token_id=ids.get("pad_token"),
        do_sample=given.get("temperature", 0) > 0,
        **given,
    )


def _numbers(file: GGUFFile, name: str, count: int, kinds: str) -> list[Any]:
    """An array with a value for each token, empty where the file has none."""
    values = file.value(f"{_PREFIX}{name}")
    if values is None:
        return []
    if not isinstance(values, np.ndarray) or values.dtype.kind not in kinds or len(values) < count:
        raise ValueError(f"{file.path}: {_PREFIX}{name} does not have a number for each of {count} tokens")
    listed: list[Any] = values[:count].tolist()
    return listed


def _text(file: GGUFFile, name: str, default: str) -> str:
    value = file.value(f"{_PREFIX}{name}", default)
    if not isinstance(value, str):
        raise ValueError(f"{file.path}: {_PREFIX}{name} is {value!r}: it must be a string")
    return value


def _flag(file: GGUFFile, name: str) -> bool | None:
    value = file.value(f"{_PREFIX}{name}")
    if value is not None and not isinstance(value, bool):
        raise ValueError(f"{file.path}: {_PREFIX}{name} is {value!r}: it must be true or false")
    return value


def _id(file: GGUFFile, name: str, count: int) -> int | None:
    """A token's id; none where it is past the vocabulary, as some files have it."""
    value = file.value(f"{_PREFIX}{name}")
    if value is not None and type(value) is not int:
        raise ValueError(f"{file.path}: {_PREFIX}{name} is {value!r}: it must be a token's number")
    return value if value is not None and 0 <= value < count else None


def _read_named_ids(file: GGUFFile, model: str, count: int) -> dict[str, int]:
    ids: dict[str, int] = {}
    for name, theirs in _NAMED_IDS.items():
        token_id = _id(file, theirs, count)
        if token_id is None and model == "llama" and _SENTENCEPIECE_IDS.get(name, count) < count:
            token_id = _SENTENCEPIECE_IDS[name]
        if token_id is not None:
            ids[name] = token_id
    return ids


def _read_end_ids(file: GGUFFile, tokens: tuple[str, ...] | list[str]) -> tuple[int, ...]:
    named = (_id(file, name, len(tokens)) for name in ("eos_token_id", "eot_token_id", "eom_token_id"))
    by_text = (number for number, token in enumerate(tokens) if token in _END_TEXTS)
    return tuple(sorted({number for number in (*named, *by_text) if number is not None}))


def _read_chat_templates(file: GGUFFile) -> dict[str, str]:
    names = ["", *(f".{name}" for name in file.value("tokenizer.chat_templates", []))]
    found = {name: file.value(f"tokenizer.chat_template{name}") for name in names}
    return {name.removeprefix(".") or "default": text for name, text in found.items() if isinstance(text, str)}
