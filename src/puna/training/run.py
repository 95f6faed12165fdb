"""From files to a Trainer that is ready to run: what a user asked for, checked, read and built in that order."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch

from puna.checkpoints import open_checkpoint, resolve_path
from puna.config import GenerationConfig, LLaMAConfig
from puna.distributed import NullCommunicator
from puna.engine.tokenizer import Tokenizer
from puna.layers.linear import RowLinear
from puna.models import load_model
from puna.models.llama import LLaMAForCausalLM
from puna.training.data import TokenStream, TrainingWindows, hold_out, read_documents
from puna.training.replicas import Replicas
from puna.training.state import has_state, write_file
from puna.training.tokenizer import SMALLEST_VOCABULARY, train_tokenizer
from puna.training.trainer import Trainer, TrainingOptions

_TOKENIZER_FILES: Final = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """A new LLaMA's sizes, with tied embeddings. Raises ValueError for sizes that don't fit each other."""

    hidden_size: int = 256
    num_layers: int = 4
    num_heads: int = 8
    num_kv_heads: int = 4
    mlp_hidden_size: int = 640
    vocab_size: int = 2048

    def __post_init__(self) -> None:
        if self.num_heads < 1 or self.hidden_size % (2 * self.num_heads) != 0:
            raise ValueError(
                f"hidden_size is {self.hidden_size}: it must be a multiple of {2 * self.num_heads}, so that each of "
                f"the {self.num_heads} heads gets an even share"
            )
        if self.vocab_size < SMALLEST_VOCABULARY:
            raise ValueError(f"vocab_size is {self.vocab_size}: it must be at least {SMALLEST_VOCABULARY}")

    def config(self, vocab_size: int, context: int) -> LLaMAConfig:
        """The config of a model with these sizes, whose tokenizer has `vocab_size` tokens."""
        return LLaMAConfig(
            num_layers=self.num_layers,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_size=self.hidden_size // self.num_heads,
            hidden_size=self.hidden_size,
            mlp_hidden_size=self.mlp_hidden_size,
            vocab_size=vocab_size,
            max_position_embeddings=context,
            tie_embeddings=True,
        )


@dataclass(frozen=True, kw_only=True)
class Sources:
    """The files of a run. `held_out` are texts for the held-out loss; without them, `eval_fraction` of `data` is.

    `tokenizer` and `init` are folders (or hub ids, or "demo"); None for a tokenizer trained on the data, or that of
    `init`, and for a model from scratch. `resume` goes on with what is in `out`, if there is anything.
    """

    data: Sequence[Path]
    out: Path
    held_out: Sequence[Path] = ()
    eval_fraction: float = 0.02
    tokenizer: str | None = None
    init: str | None = None
    resume: bool = False


def prepare(
    sources: Sources,
    shape: ModelShape,
    options: TrainingOptions,
    device: torch.device | str = "cpu",
    replicas: Replicas | None = None,
) -> Trainer:
    """A trainer for these files, resumed if asked for; its model is `init`'s, or a new one of this shape.

    Raises FileNotFoundError for missing files, and ValueError naming the value and the remedy, before the model is
    built; nothing is written into `out` before the data is read.
    """
    replicas = Replicas() if replicas is None else replicas
    options.check_share(replicas)
    _check_device(device)
    if not 0 < sources.eval_fraction <= 0.5:
        raise ValueError(f"eval_fraction is {sources.eval_fraction}: it must be above 0 and at most 0.5")
    shape.config(shape.vocab_size, options.context)  # refuses sizes that no model can have
    if sources.init is not None:
        _check_init(sources.init, options.context)
    resumed = _check_out(sources)
    training, held_out = _documents(sources)

    files = _tokenizer_files(sources, shape, options.context, training, replicas, resumed)
    tokenizer = Tokenizer.from_pretrained(sources.out)
    text = TokenStream.from_documents(training, tokenizer)
    streams = {name: TokenStream.from_documents(documents, tokenizer) for name, documents in held_out.items()}
    TrainingWindows(text, options.context, options.seed)  # refuses a text that is too short
    model = _build_model(sources, shape, tokenizer, options, device)
    trainer = Trainer(model, text, streams, options, sources.out, files, replicas)
    if resumed:
        trainer.resume()
    return trainer


def _check_device(device: torch.device | str) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # for an unknown name, and for a build without this kind of device
        reason = str(error).splitlines()[0]
        raise ValueError(f"device is {str(device)!r}, which this torch can't use ({reason}): try cpu") from error


def _check_out(sources: Sources) -> bool:
    """Whether there is a run to go on with. Raises ValueError for a folder with another model in it."""
    if sources.out.exists() and not sources.out.is_dir():
        raise ValueError(f"{sources.out} is a file: name a folder for the model")
    there_is_a_run = has_state(sources.out)
    if there_is_a_run and not sources.resume:
        raise ValueError(f"{sources.out} holds another run: add --resume to go on with it, or name another folder")
    if not there_is_a_run and (sources.out / "model.safetensors").exists():
        raise ValueError(f"{sources.out} holds a model, which would be overwritten: name another folder")
    return there_is_a_run


def _check_init(init: str, context: int) -> None:
    checkpoint = open_checkpoint(init)
    config = LLaMAConfig.from_fields(checkpoint.config_fields, checkpoint.config_source)
    if context > config.context_length:
        raise ValueError(
            f"the context is {context} tokens, but {init} was made for {config.context_length}: choose at most that"
        )


def _documents(sources: Sources) -> tuple[list[str], dict[str, list[str]]]:
    """The documents to train on, and the held-out ones by the name of their file."""
    data = _read_all(sources.data)
    if sources.held_out:
        return [document for documents in data.values() for document in documents], _read_all(sources.held_out)
    training: list[str] = []
    held_out = {}
    for name, documents in data.items():
        kept, held_out[name] = hold_out(documents, sources.eval_fraction)
        training += kept
    return training, held_out


def _read_all(files: Sequence[Path]) -> dict[str, list[str]]:
    """The documents by the name of their file, or its path where several have that name."""
    names = [file.name for file in files]
    return {file.name if names.count(file.name) == 1 else str(file): read_documents(file) for file in files}


def _tokenizer_files(
    sources: Sources, shape: ModelShape, context: int, documents: list[str], replicas: Replicas, resumed: bool
) -> dict[str, bytes]:
    """The run's tokenizer files, also put into `out`, so that all processes and a resumed run have the same."""
    if not resumed and replicas.is_first:
        given = sources.tokenizer if sources.tokenizer is not None else sources.init
        if given is None:
            files = train_tokenizer(documents, shape.vocab_size, context)
        else:
            folder = resolve_path(given)
            if folder.is_file():
                raise ValueError(
                    f"{given} has its tokenizer inside: name a folder with tokenizer.json as the tokenizer"
                )
            Tokenizer.from_pretrained(folder)  # refuses a folder without one
            files = _read_tokenizer(folder)
        sources.out.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            write_file(sources.out / name, content)
    replicas.wait()
    return _read_tokenizer(sources.out)


def _read_tokenizer(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in _TOKENIZER_FILES if (folder / name).is_file()}


def _build_model(
    sources: Sources, shape: ModelShape, tokenizer: Tokenizer, options: TrainingOptions, device: torch.device | str
) -> LLaMAForCausalLM:
    if sources.init is not None:
        model = load_model(sources.init, dtype="float32", device=device)
        if tokenizer.vocab_size > model.config.vocab_size:
            raise ValueError(
                f"the tokenizer has {tokenizer.vocab_size} tokens and {sources.init} {model.config.vocab_size}: use "
                "the tokenizer that the model was made with"
            )
        return model
    torch.manual_seed(options.seed)
    config = shape.config(tokenizer.vocab_size, options.context)
    model = LLaMAForCausalLM(config, NullCommunicator(device)).to(device)
    with torch.no_grad():
        # What a layer adds to the residual stream starts small, so that the sum over the layers keeps its size (GPT-2).
        for module in model.modules():
            if isinstance(module, RowLinear):
                module.get_parameter("weight").div_(math.sqrt(2 * shape.num_layers))
    eos = () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_ids=eos, pad_token_id=tokenizer.pad_token_id
    )
    return model
