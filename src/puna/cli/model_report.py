"""ModelReport: what a checkpoint's config, tensor headers and tokenizer files say, for `puna info`.

A checkpoint that puna does not run still gets what can be read of it, and the reason.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import torch

from puna.checkpoints import Checkpoint, EngineDirectory, open_checkpoint, resolve_path
from puna.config import EngineConfig, GenerationConfig, LLaMAConfig, read_json_object
from puna.distributed import NullCommunicator
from puna.engine.tokenizer import Tokenizer
from puna.engine.weights import in_words, op_choices, weights_loader
from puna.models import MODELS, model_loader
from puna.models.loading import check_tensors, resolved_config
from puna.planning.memory import DTYPE_BYTES, key_value_bytes_per_token, parameter_counts
from puna.runtime.cuda import usable_device

# Bytes of one element, by the names that safetensors and Checkpoint.dtype use.
_ELEMENT_BYTES: Final = MappingProxyType(
    {**DTYPE_BYTES, "F64": 8, "I64": 8, "U64": 8, "I32": 4, "U32": 4, "I16": 2, "U16": 2}
)

# Parts by what is in a tensor's name, in the checkpoints of most model families; the first that fits counts.
_PART_OF_NAME: Final = (
    ("norms", ("norm", "ln_")),
    ("embedding", ("embed_tokens", "wte", "word_embeddings", "tok_embeddings")),
    ("head", ("lm_head", "embed_out", "output.weight")),
    ("experts", (".experts.", ".shared_expert")),
    ("router", (".gate.weight", "router")),
    ("attention", ("attn", "attention")),
    ("mlp", ("mlp", "feed_forward", "ffn")),
)
_ORDER: Final = ("embedding", "attention", "mlp", "router", "experts", "norms", "head", "other")


@dataclass(kw_only=True)
class ModelReport:
    """`rows` are for reading, `fields` for --json. `parameters` and `memory` go by part, with a "total".

    `problem` says why puna does not run the model, None if it does. `dtype` is what the memory is for; None means the
    bytes as stored.
    """

    source: str
    problem: str | None = None
    dtype: str | None = None
    context: int | None = None
    key_value_bytes_per_token: int | None = None
    rows: list[tuple[str, str]] = field(default_factory=list)
    fields: dict[str, Any] = field(default_factory=dict)
    parameters: dict[str, int] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)

    def add(self, name: str, shown: str, value: object) -> None:
        self.rows.append((name, shown))
        self.fields[name.replace(" ", "_")] = value

    def as_json(self) -> dict[str, Any]:
        return {
            **self.fields,
            "supported": self.problem is None,
            "problem": self.problem,
            "dtype": self.dtype,
            "parameters": self.parameters,
            "memory_bytes": self.memory,
            "key_value_bytes_per_token": self.key_value_bytes_per_token,
            "key_value_bytes_full_context": None
            if self.key_value_bytes_per_token is None or self.context is None
            else self.key_value_bytes_per_token * self.context,
        }


def report_on(path: str, dtype: str | None = None) -> ModelReport:
    """Reads headers only. Raises FileNotFoundError or ValueError where there is no config to read at all."""
    folder = resolve_path(path)
    try:
        checkpoint: Checkpoint | None = open_checkpoint(folder)
        problem = None
    except (FileNotFoundError, ValueError) as error:
        if not (folder / "config.json").is_file():
            raise
        checkpoint, problem = None, str(error)
    raw = checkpoint.config_fields if checkpoint else read_json_object(folder / "config.json")
    report = ModelReport(source=path, problem=problem)
    report.add("model", path if path == str(folder) else f"{path} ({folder})", path)

    config, refusal = _config(raw, checkpoint, folder, dtype)
    report.problem = refusal or report.problem
    if config is None:
        _describe_raw(report, raw)
    else:
        _describe(report, config)
    if isinstance(checkpoint, EngineDirectory):
        _describe_engine(report, checkpoint)
    elif checkpoint:
        _describe_tensors(report, checkpoint, None if refusal else config)
    if config is not None and not refusal:
        counts = parameter_counts(config)
        report.dtype = config.dtype
        report.parameters = {**counts.by_part, "total": counts.total}
        if isinstance(checkpoint, EngineDirectory):
            report.memory = {"total": report.fields["stored_bytes"]}
        else:
            report.memory = {part: n * DTYPE_BYTES[config.dtype] for part, n in report.parameters.items()}
        if config.num_experts:
            report.parameters["active"] = counts.active
    _describe_text(report, folder, checkpoint)
    if checkpoint and config is not None and report.problem is None:
        _describe_ops(report, checkpoint, config)
    return report


def _config(
    raw: Mapping[str, Any], checkpoint: Checkpoint | None, folder: Path, dtype: str | None
) -> tuple[LLaMAConfig | None, str | None]:
    """The config as far as it can be read, and the reason why puna refuses it, if it does."""
    source = checkpoint.config_source if checkpoint else str(folder / "config.json")
    try:
        if checkpoint:
            return resolved_config(checkpoint, dtype), None
        return LLaMAConfig.from_fields({**raw, "dtype": dtype or raw.get("dtype")}, source), None
    except ValueError as error:
        refusal = str(error)
    try:  # what is quantised still has the architecture of the original
        without = {name: value for name, value in raw.items() if name != "quantization_config"}
        return LLaMAConfig.from_fields(without, source), refusal
    except ValueError:
        return None, refusal


def _describe(report: ModelReport, config: LLaMAConfig) -> None:
    report.context = config.context_length
    report.key_value_bytes_per_token = key_value_bytes_per_token(config)
    report.add("architecture", config.architecture, config.architecture)
    report.add("layers", str(config.num_layers), config.num_layers)
    report.add("hidden size", str(config.hidden_size), config.hidden_size)
    kind = f"{config.mlp_hidden_size} ({config.hidden_act})"
    report.add("mlp size", kind, config.mlp_hidden_size)
    heads = {"heads": config.num_heads, "key_value_heads": config.num_kv_heads, "head_size": config.head_size}
    shown = f"{config.num_heads} heads of {config.head_size}, {config.num_kv_heads} for keys and values"
    report.add("attention", shown, heads)
    if config.num_experts:
        experts = {"experts": config.num_experts, "experts_per_token": config.experts_per_token}
        report.add("experts", f"{config.num_experts}, of which a token uses {config.experts_per_token}", experts)
    report.add("context", f"{config.context_length} tokens", config.context_length)
    tied = ", head tied to the embedding" if config.tie_embeddings else ""
    report.add("vocabulary", f"{config.vocab_size} tokens{tied}", config.vocab_size)
    report.fields["tied_embeddings"] = config.tie_embeddings
    scaling = config.rotary_scaling
    rotary = "default" if scaling is None else scaling.type
    factor = "" if scaling is None or scaling.factor is None else f", factor {scaling.factor:g}"
    report.add("rotary", f"{rotary}{factor}, base {config.rotary_base:g}", rotary)
    layers = [layer for layer in range(config.num_layers) if config.layer_window(layer) is not None]
    if layers:
        where = "all layers" if len(layers) == config.num_layers else f"{len(layers)} of {config.num_layers} layers"
        report.add("sliding window", f"{config.sliding_window} tokens in {where}", config.sliding_window)
    else:
        report.add("sliding window", "none", None)


def _describe_raw(report: ModelReport, raw: Mapping[str, Any]) -> None:
    """What files of many architectures have under the same names."""
    named = raw.get("architectures")
    name = named[0] if isinstance(named, list) and named else raw.get("model_type")
    report.add("architecture", str(name), name)
    for title, key in (
        ("layers", "num_hidden_layers"),
        ("hidden size", "hidden_size"),
        ("context", "max_position_embeddings"),
        ("vocabulary", "vocab_size"),
    ):
        if type(raw.get(key)) is int:
            report.add(title, str(raw[key]), raw[key])


def _describe_tensors(report: ModelReport, checkpoint: Checkpoint, config: LLaMAConfig | None) -> None:
    """The stored types, and what is wrong with the tensors; without a config also the sizes, as they are stored."""
    dtypes = sorted({checkpoint.dtype(name) for name in checkpoint.names})
    stored: dict[str, int] = {}
    elements: dict[str, int] = {}
    for name in checkpoint.names:
        count = 1
        for length in checkpoint.shape(name):
            count *= length
        part = part_of(name)
        elements[part] = elements.get(part, 0) + count
        size = checkpoint.stored_bytes(name)
        size = count * _ELEMENT_BYTES.get(checkpoint.dtype(name), 1) if size is None else size
        stored[part] = stored.get(part, 0) + size
    total = sum(stored.values())
    report.add("weights", f"{', '.join(dtypes)}; {len(checkpoint.names)} tensors, {total / 2**20:.1f} MiB", dtypes)
    report.fields["stored_bytes"] = total
    if config is None:
        order = [part for part in _ORDER if part in stored]
        report.memory = {**{part: stored[part] for part in order}, "total": total}
        if set(dtypes) <= set(DTYPE_BYTES):  # elements of packed integers are not parameters
            report.parameters = {**{part: elements[part] for part in order}, "total": sum(elements.values())}
        return
    try:
        with torch.device("meta"):
            pieces = dict(MODELS[config.architecture](config).pieces())
        check_tensors(checkpoint, pieces, config)
    except ValueError as error:
        report.problem = str(error)


def _describe_engine(report: ModelReport, engine: EngineDirectory) -> None:
    size = sum(engine.stored_bytes(name) for name in engine.names)
    formats = sorted({engine.description.quantization, *engine.description.weight_formats.values()})
    report.add("weights", f"{', '.join(formats)}; an engine of {size / 2**20:.1f} MiB", formats)
    report.add("built from", engine.description.source, engine.description.source)
    report.fields["stored_bytes"] = size
    try:
        model_loader(engine)
    except ValueError as error:
        report.problem = str(error)


def _describe_ops(report: ModelReport, checkpoint: Checkpoint, config: LLaMAConfig) -> None:
    """What would compute each op here: on the CPU, and on the GPU if there is one. It is a problem if neither can."""
    refusals = []
    devices = tuple(dict.fromkeys(("cpu", usable_device("auto").type)))
    for device in devices:
        comm, limits = NullCommunicator(device), EngineConfig()
        try:
            loader = weights_loader(checkpoint, config, comm, None, limits)
        except ValueError as error:
            refusals.append(str(error))
            report.add(f"ops on {device}", f"none: {error}", {})
            continue
        choices = op_choices(loader, comm, limits, reports_prompts=device != "cpu")
        report.add(f"ops on {device}", in_words(choices), {one.op: one.backend for one in choices})
    if len(refusals) == len(devices):
        report.problem = refusals[0]


def part_of(name: str) -> str:
    """The part of the model that a tensor of this name belongs to, "other" if it tells nothing."""
    for part, marks in _PART_OF_NAME:
        if any(mark in name for mark in marks):
            return part
    return "other"


def _describe_text(report: ModelReport, folder: Path, checkpoint: Checkpoint | None) -> None:
    try:
        tokenizer = Tokenizer.from_pretrained(folder)
    except (FileNotFoundError, ValueError) as error:
        report.add("tokenizer", f"no ({error})", None)
        report.problem = report.problem or str(error)
    else:
        report.add("tokenizer", f"yes, {tokenizer.vocab_size} tokens", tokenizer.vocab_size)
        has_template = tokenizer.chat_template is not None
        report.add("chat template", "yes" if has_template else "no", has_template)
    try:
        recommended = checkpoint.generation_config if checkpoint else GenerationConfig.from_hugging_face(folder)
    except ValueError as error:
        report.problem = report.problem or str(error)
        return
    names = ("temperature", "top_k", "top_p", "min_p") if recommended.do_sample else ()
    values = {name: getattr(recommended, name) for name in (*names, "repetition_penalty")}
    off = GenerationConfig(top_k=0)
    shown = [f"{name} {value:g}" for name, value in values.items() if value != getattr(off, name)]
    kind = "sampled" if recommended.do_sample else "greedy"
    report.add("generation", ", ".join([kind, *shown]), {"do_sample": recommended.do_sample, **values})
