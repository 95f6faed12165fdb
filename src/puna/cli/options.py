"""The options that commands share, as bundles: typed dataclasses whose fields `unbundle` makes options of a command."""

from __future__ import annotations

import dataclasses
import enum
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, get_type_hints

import typer

_SAMPLING: Final = "Sampling"
_STOPPING: Final = "Length and end"
_GUIDED: Final = "Guided decoding (one of these)"
_BEAMS: Final = "Beam search"
_MODEL: Final = "Model and machine"


class DtypeName(str, enum.Enum):
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class CacheDtypeName(str, enum.Enum):
    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"
    int8 = "int8"
    fp8 = "fp8"


class Quantization(str, enum.Enum):
    bf16 = "bf16"
    int8 = "int8"
    int4 = "int4"
    fp8 = "fp8"


class Capture(str, enum.Enum):
    lazy = "lazy"
    eager = "eager"


class EarlyStopping(str, enum.Enum):
    true = "true"
    false = "false"
    never = "never"


@dataclass(frozen=True, kw_only=True)
class ModelFlags:
    """Which model, and what it runs on."""

    model: Annotated[
        str,
        typer.Option(
            "--model",
            "-m",
            metavar="MODEL",
            help="A checkpoint's folder, a GGUF file, an engine directory, a hub id (owner/name), or 'demo'.",
            rich_help_panel=_MODEL,
        ),
    ]
    dtype: Annotated[
        DtypeName | None,
        typer.Option(help="Number type to run in; the checkpoint's if not given.", rich_help_panel=_MODEL),
    ] = None
    quantization: Annotated[
        Quantization | None,
        typer.Option(help="Format of the weights; as they are stored if not given.", rich_help_panel=_MODEL),
    ] = None
    device: Annotated[
        str,
        typer.Option(
            help="Where to run: cpu, cuda, cuda:1 ...; auto is a GPU where there is one.", rich_help_panel=_MODEL
        ),
    ] = "cpu"
    threads: Annotated[
        int | None,
        typer.Option(min=1, help="CPU threads; what this process may use if not given.", rich_help_panel=_MODEL),
    ] = None


@dataclass(frozen=True, kw_only=True)
class EngineFlags:
    """How much the engine holds."""

    max_model_len: Annotated[
        int | None,
        typer.Option(min=1, help="Most tokens of prompt and output; as the model has if less.", rich_help_panel=_MODEL),
    ] = None
    kv_cache_memory: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Memory for keys and values, such as 2GiB.", rich_help_panel=_MODEL),
    ] = None
    kv_cache_dtype: Annotated[
        CacheDtypeName,
        typer.Option(
            help="Number type of keys and values; auto is the model's, or on GPUs the checkpoint's fp8.",
            rich_help_panel=_MODEL,
        ),
    ] = CacheDtypeName.auto
    no_prefix_caching: Annotated[
        bool,
        typer.Option("--no-prefix-caching", help="Compute every prompt from its start.", rich_help_panel=_MODEL),
    ] = False
    gpu_memory_utilization: Annotated[
        float,
        typer.Option(min=0.01, max=1, help="Part of a GPU's memory that may be used.", rich_help_panel=_MODEL),
    ] = 0.9
    capture: Annotated[
        Capture,
        typer.Option(
            help="On GPUs, record decode steps when they first come (lazy), or all at the start (eager).",
            rich_help_panel=_MODEL,
        ),
    ] = Capture.lazy
    deterministic: Annotated[
        bool,
        typer.Option(
            "--deterministic",
            help="On GPUs, the same bits whatever runs beside; costs time. The CPU's kernels always do that.",
            rich_help_panel=_MODEL,
        ),
    ] = False
    overlap_kernels: Annotated[
        bool,
        typer.Option(
            "--overlap-kernels",
            help="On Hopper GPUs, start kernels before the ones ahead of them have ended. Not tried on a GPU yet.",
            rich_help_panel=_MODEL,
        ),
    ] = False


@dataclass(frozen=True, kw_only=True)
class SamplingFlags:
    """How tokens are chosen. What is not given is what the checkpoint's generation_config.json recommends."""

    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Most tokens to generate.", rich_help_panel=_STOPPING)
    ] = None
    temperature: Annotated[
        float | None,
        typer.Option(
            help="Randomness; 0 takes the likeliest token. Default: as the checkpoint recommends, else 0.",
            rich_help_panel=_SAMPLING,
        ),
    ] = None
    top_k: Annotated[
        int | None, typer.Option(help="Choose among the k likeliest tokens; 0 is off.", rich_help_panel=_SAMPLING)
    ] = None
    top_p: Annotated[
        float | None,
        typer.Option(help="Choose among the likeliest tokens that hold this probability.", rich_help_panel=_SAMPLING),
    ] = None
    min_p: Annotated[
        float | None,
        typer.Option(help="Drop tokens less likely than this times the likeliest.", rich_help_panel=_SAMPLING),
    ] = None
    typical_p: Annotated[
        float | None,
        typer.Option(
            help="Choose among the most typical tokens that hold this probability.", rich_help_panel=_SAMPLING
        ),
    ] = None
    repetition_penalty: Annotated[
        float | None,
        typer.Option(help="Above 1 makes tokens of prompt and output less likely.", rich_help_panel=_SAMPLING),
    ] = None
    presence_penalty: Annotated[
        float | None, typer.Option(help="Taken from the logit of every token in the output.", rich_help_panel=_SAMPLING)
    ] = None
    frequency_penalty: Annotated[
        float | None, typer.Option(help="The same, for every time that it stands there.", rich_help_panel=_SAMPLING)
    ] = None
    no_repeat_ngram_size: Annotated[
        int | None, typer.Option(help="No run of so many tokens comes twice; 0 is off.", rich_help_panel=_SAMPLING)
    ] = None
    logit_bias: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ID=VALUE", help="Added to a token's logit; may be given several times.", rich_help_panel=_SAMPLING
        ),
    ] = None
    bad_word: Annotated[
        list[str] | None,
        typer.Option(help="Text that must not appear; may be given several times.", rich_help_panel=_SAMPLING),
    ] = None
    seed: Annotated[int | None, typer.Option(help="Makes a sampled run repeatable.", rich_help_panel=_SAMPLING)] = None
    num_beams: Annotated[
        int | None, typer.Option(min=1, help="Beams to keep; text then comes at the end.", rich_help_panel=_BEAMS)
    ] = None
    length_penalty: Annotated[
        float | None, typer.Option(help="Above 0 favours longer beams. Default: 1.", rich_help_panel=_BEAMS)
    ] = None
    early_stopping: Annotated[
        EarlyStopping | None,
        typer.Option(
            help="End with num_beams finished (true), when better is unlikely (false) or impossible (never). "
            "Default: false.",
            rich_help_panel=_BEAMS,
        ),
    ] = None
    stop: Annotated[
        list[str] | None,
        typer.Option(help="End before this text; may be given several times.", rich_help_panel=_STOPPING),
    ] = None
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Go on after the end-of-sequence token.", rich_help_panel=_STOPPING)
    ] = False
    min_tokens: Annotated[
        int | None, typer.Option(help="Nothing ends the text before so many tokens.", rich_help_panel=_STOPPING)
    ] = None
    guided_json: Annotated[
        str | None,
        typer.Option(metavar="FILE|TEXT", help="JSON schema that the text must follow.", rich_help_panel=_GUIDED),
    ] = None
    guided_regex: Annotated[
        str | None, typer.Option(help="Regular expression that the whole text must match.", rich_help_panel=_GUIDED)
    ] = None
    guided_grammar: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="EBNF grammar that the text must follow.", rich_help_panel=_GUIDED),
    ] = None
    guided_choice: Annotated[
        list[str] | None,
        typer.Option(help="Text to choose among; may be given several times.", rich_help_panel=_GUIDED),
    ] = None

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """Raises ValueError for an empty one, which would end every text at once."""
        strings = tuple(self.stop or ())
        if "" in strings:
            raise ValueError("--stop is empty: give the text to stop at, or leave it out")
        return strings


def unbundle(command: Callable[..., None]) -> Callable[..., None]:
    """The command with the fields of its dataclass parameters as parameters of its own, for typer to read."""
    hints = get_type_hints(command, include_extras=True)
    parameters: list[inspect.Parameter] = []
    bundles: dict[str, tuple[type[Any], list[str]]] = {}
    for parameter in inspect.signature(command).parameters.values():
        hint = hints[parameter.name]
        if not (isinstance(hint, type) and dataclasses.is_dataclass(hint)):
            kind = inspect.Parameter.KEYWORD_ONLY
            parameters.append(parameter.replace(annotation=hint, kind=kind))
            continue
        field_hints = get_type_hints(hint, include_extras=True)
        for field in dataclasses.fields(hint):
            default = inspect.Parameter.empty if field.default is dataclasses.MISSING else field.default
            parameters.append(
                inspect.Parameter(
                    field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=field_hints[field.name]
                )
            )
        bundles[parameter.name] = (hint, [field.name for field in dataclasses.fields(hint)])

    def unbundled(**values: Any) -> None:
        for name, (bundle, fields) in bundles.items():
            values[name] = bundle(**{field: values.pop(field) for field in fields})
        command(**values)

    # Not functools.wraps: its __wrapped__ would lead readers of the signature back to the bundles.
    unbundled.__name__, unbundled.__doc__ = command.__name__, command.__doc__
    unbundled.__module__ = command.__module__
    unbundled.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    unbundled.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return unbundled
