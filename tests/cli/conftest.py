"""Models for the command line's tests: tiny folders whose text is known in advance, and ways to run the program."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest
import tokenizers
import torch

from puna.cli import main
from puna.config import GenerationConfig, LLaMAConfig
from puna.models.llama import LLaMAForCausalLM
from puna.models.loading import save_model

ROOT: Final = Path(__file__).resolve().parent.parent.parent
SPECIAL: Final = ("<s>", "</s>", "<|user|>", "<|assistant|>", "<|system|>")
TEMPLATE: Final = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def byte_tokenizer(bos: bool) -> tokenizers.Tokenizer:
    """Every byte is a token, after the special ones; with `bos`, <s> is put before a text."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *alphabet])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL))
    if bos:
        tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", vocabulary["<s>"])]
        )
    return tokenizer


@dataclass(frozen=True)
class Folder:
    """A model's folder, and its tokenizer as the library that made it reads it."""

    path: Path
    tokenizer: tokenizers.Tokenizer

    def __str__(self) -> str:
        return str(self.path)

    def ids(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)


def write_json(file: Path, fields: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(fields), encoding="utf-8")


def edit_json(file: Path, **fields: Any) -> None:
    write_json(file, {**json.loads(file.read_text(encoding="utf-8")), **fields})


@pytest.fixture(scope="session")
def build_chain() -> Callable[..., Folder]:
    """Makes a model that says known text: each token of a chain is followed by the next one.

    Hidden states are one-hot: the layers add nothing, and the head holds for each token the one that follows. A chain
    is given as text with special tokens, and each token may stand in it only once (but to close a circle). Tokens in
    no chain are followed by </s>.
    """

    def build(
        folder: Path, *chains: str, context: int = 100_000, bos: bool = True, template: str | None = TEMPLATE
    ) -> Folder:
        tokenizer = byte_tokenizer(bos)
        size = tokenizer.get_vocab_size()
        config = LLaMAConfig(
            num_layers=1,
            num_heads=1,
            num_kv_heads=1,
            head_size=4,
            hidden_size=size,
            mlp_hidden_size=4,
            vocab_size=size,
            max_position_embeddings=context,
        )
        model = LLaMAForCausalLM(config)
        follower = torch.full((size,), tokenizer.token_to_id("</s>"))
        for chain in chains:
            ids = tokenizer.encode(chain, add_special_tokens=False).ids
            assert len(set(ids[:-1])) == len(ids) - 1, f"a token stands twice in {chain!r}"
            follower[torch.tensor(ids[:-1])] = torch.tensor(ids[1:])
        with torch.no_grad():
            for parameter in model.layers.parameters():
                parameter.zero_()
            assert model.vocab_embedding is not None
            assert model.lm_head is not None
            model.vocab_embedding.weight.copy_(torch.eye(size))
            model.lm_head.weight.zero_()
            model.lm_head.weight[follower, torch.arange(size)] = 1.0
        model.generation_config = GenerationConfig(bos_token_id=0, eos_token_ids=(1,))
        special = {"bos_token": "<s>", "eos_token": "</s>"}
        settings = special if template is None else {**special, "chat_template": template}
        save_model(
            model,
            folder,
            {"tokenizer.json": tokenizer.to_str().encode(), "tokenizer_config.json": json.dumps(settings).encode()},
        )
        return Folder(folder, tokenizer)

    return build


@pytest.fixture(scope="session")
def chain(build_chain: Callable[..., Folder], tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """After `!` comes text in characters of one to four bytes; 'x' goes on without end; an answer is '0123456789'."""
    folder = tmp_path_factory.mktemp("chain")
    return build_chain(folder, "!aé€😀b</s>", "xyzx", "<|assistant|>0123456789</s>")


@pytest.fixture(scope="session")
def random_model(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """An ordinary little model with a BPE tokenizer that was trained on a few lines."""
    folder = tmp_path_factory.mktemp("random")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(
        ["the llama grazes on the high grassland", "das Alpaka steht über den Wolken"], trainer
    )
    torch.manual_seed(0)
    size = tokenizer.get_vocab_size()
    config = LLaMAConfig(
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_size=8,
        hidden_size=32,
        mlp_hidden_size=48,
        vocab_size=size,
        max_position_embeddings=64,
    )
    model = LLaMAForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    model.generation_config = GenerationConfig(eos_token_ids=(1,))
    special = {"bos_token": "<s>", "eos_token": "</s>"}
    files = {"tokenizer.json": tokenizer.to_str().encode(), "tokenizer_config.json": json.dumps(special).encode()}
    save_model(model, folder, files)
    return Folder(folder, tokenizer)


@dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str

    @property
    def message(self) -> str:
        """The only line on standard error, of a run that was refused."""
        assert self.err.endswith("\n"), self.err
        assert self.err.count("\n") == 1, self.err
        assert self.err.startswith("puna: error: "), self.err
        assert self.out == ""
        assert self.code == 2
        return self.err.removeprefix("puna: error: ").removesuffix("\n")


@pytest.fixture
def puna(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Done]:
    """Runs the command line in this process; `stdin` are the bytes of a pipe."""

    def run(*words: object, stdin: bytes = b"") -> Done:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"))
        capsys.readouterr()
        code = main([str(word) for word in words])
        out, err = capsys.readouterr()
        return Done(code, out, err)

    return run


def program(*words: object) -> list[str]:
    return [sys.executable, "-m", "puna", *map(str, words)]


def environment() -> dict[str, str]:
    """Finds the package also where it is not installed."""
    return {**os.environ, "PYTHONPATH": str(ROOT / "src"), "PYTHONUTF8": "1"}


@pytest.fixture
def run_program() -> Callable[..., subprocess.CompletedProcess[bytes]]:
    """Runs the program as a process of its own, with its output as bytes."""

    def run(*words: object, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(program(*words), input=stdin, capture_output=True, env=environment(), check=False)

    return run


@pytest.fixture
def start_program() -> Callable[..., subprocess.Popen[bytes]]:
    """Starts it, with the given arguments of Popen."""

    def start(*words: object, **arguments: Any) -> subprocess.Popen[bytes]:
        return subprocess.Popen(program(*words), env=environment(), **arguments)

    return start
