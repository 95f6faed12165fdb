"""Training a byte-level BPE tokenizer, as the files that puna and transformers read."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from puna.checkpoints.writer import json_bytes

# Separates documents in a text file, on a line of its own, and in the token stream, where it begins and ends each.
END_OF_TEXT: Final = "<|endoftext|>"
SMALLEST_VOCABULARY: Final = 256 + 1  # the bytes and END_OF_TEXT


def train_tokenizer(documents: Iterable[str], vocab_size: int, context: int) -> dict[str, bytes]:
    """tokenizer.json and tokenizer_config.json of a byte-level BPE (Sennrich et al., 2016; bytes as in GPT-2).

    Any text can be encoded. END_OF_TEXT has the id 0; it is put before every prompt, and generation ends with it. Text
    too short for `vocab_size` tokens gives fewer. Raises ValueError for a vocabulary too small for the bytes.
    """
    if vocab_size < SMALLEST_VOCABULARY:
        raise ValueError(f"vocab_size is {vocab_size}: the 256 bytes and {END_OF_TEXT} need {SMALLEST_VOCABULARY}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        show_progress=False,
        special_tokens=[AddedToken(END_OF_TEXT, special=True, normalized=False)],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(documents, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{END_OF_TEXT} $A", pair=f"{END_OF_TEXT} $A {END_OF_TEXT} $B", special_tokens=[(END_OF_TEXT, 0)]
    )
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "pad_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": False,
        "model_max_length": context,
    }
    return {"tokenizer.json": tokenizer.to_str(pretty=False).encode(), "tokenizer_config.json": json_bytes(config)}
