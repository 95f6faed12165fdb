"""A small random model with a byte tokenizer, and engines on it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch

from puna.config import GenerationConfig, LLaMAConfig
from puna.llm import LLM
from puna.models import MODELS, LLaMAForCausalLM, load_model
from puna.models.loading import save_model

SMALL: dict[str, Any] = {
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_size": 8,
    "hidden_size": 32,
    "mlp_hidden_size": 48,
    "max_position_embeddings": 256,
}
TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[a]{% endif %}"
)


def write_tokenizer(folder: Path) -> int:
    """A tokenizer of single bytes after <s> and </s>; returns the vocabulary's size."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<s>", "</s>", *alphabet])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return len(vocabulary)


@pytest.fixture(scope="session")
def make_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A model's folder; options are LLaMAConfig's. Weights are large enough that texts differ, and end now and then."""

    def make(**options: Any) -> Path:
        folder = tmp_path_factory.mktemp("model")
        config = LLaMAConfig(**(SMALL | {"vocab_size": write_tokenizer(folder)} | options))
        torch.manual_seed(3)
        model = MODELS[config.architecture](config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "norm" not in name:
                    parameter.normal_(std=1.3 * parameter.shape[-1] ** -0.5)
        model.generation_config = GenerationConfig(bos_token_id=0, eos_token_ids=(1, 40, 90))
        save_model(model, folder)
        return folder

    return make


@pytest.fixture(scope="session")
def folder(make_folder: Callable[..., Path]) -> Path:
    return make_folder()


@pytest.fixture(scope="session")
def dense(folder: Path) -> LLaMAForCausalLM:
    """The same model on the dense path: the oracle."""
    return load_model(folder)


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[LLM]:
    """An engine with room for everything."""
    with LLM(folder) as it:
        yield it


@pytest.fixture
def tight_llm(folder: Path) -> Iterator[LLM]:
    """An engine that must cut prompts into chunks and preempt: 36 blocks of 4 tokens, 7 tokens a step."""
    per_block = 2 * 2 * 2 * 8 * 4 * 4
    limits = {"max_model_len": 100, "max_num_seqs": 6, "max_num_batched_tokens": 7}
    with LLM(folder, kv_cache_memory=36 * per_block, block_size=4, **limits) as it:
        yield it
