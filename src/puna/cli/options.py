"""The options that commands share, as bundles: typed dataclasses whose fields `unbundle` makes options of a command."""

from __future__ import annotations

import dataclasses
import enum
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

if TYPE_CHECKING:
    from puna.config import GenerationConfig
    from puna.models.generation_mixin import GenerationOptions

_SAMPLING, _BEAMS, _MODEL = "Sampling", "Beam search", "Model and machine"


class DtypeName(str, enum.Enum):
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


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
            help="A checkpoint's folder, a Hugging Face hub id (owner/name), or 'demo'.",
            rich_help_panel=_MODEL,
        ),
    ]
    dtype: Annotated[
        DtypeName | None,
        typer.Option(help="Number type to run in; the checkpoint's if not given.", rich_help_panel=_MODEL),
    ] = None
    device: Annotated[str, typer.Option(help="Where to run, such as cpu or cuda.", rich_help_panel=_MODEL)] = "cpu"
    threads: Annotated[
        int | None,
        typer.Option(min=1, help="CPU threads; what this process may use if not given.", rich_help_panel=_MODEL),
    ] = None


@dataclass(frozen=True, kw_only=True)
class SamplingFlags:
    """How tokens are chosen. What is not given is what the checkpoint's generation_config.json recommends."""

    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Most tokens to generate.", rich_help_panel=_SAMPLING)
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
    repetition_penalty: Annotated[
        float | None, typer.Option(help="Above 1 makes earlier tokens less likely.", rich_help_panel=_SAMPLING)
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
        typer.Option(help="End before this text; may be given several times.", rich_help_panel=_SAMPLING),
    ] = None
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Go on after the end-of-sequence token.", rich_help_panel=_SAMPLING)
    ] = False

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """Raises ValueError for an empty one, which would end every text at once."""
        strings = tuple(self.stop or ())
        if "" in strings:
            raise ValueError("--stop is empty: give the text to stop at, or leave it out")
        return strings


def generation_options(
    flags: SamplingFlags, recommended: GenerationConfig, eos_token_ids: tuple[int, ...], max_new_tokens: int
) -> GenerationOptions:
    """The flags over what the checkpoint recommends, which is greedy unless it says `do_sample`.

    Of the sampling flags, top-k, top-p and min-p ask for sampling by themselves. Raises ValueError for values out of
    range and for flags that could have no effect.
    """
    from puna.models.generation_mixin import GenerationOptions

    filters = {name: getattr(flags, name) for name in ("top_k", "top_p", "min_p")}
    given = [_spelled(name) for name, value in filters.items() if value is not None]
    beams = flags.num_beams or 1
    if beams == 1:
        for name in ("length_penalty", "early_stopping"):
            if getattr(flags, name) is not None:
                raise ValueError(f"{_spelled(name)} belongs to beam search: add --num-beams, or leave it out")
    elif given:
        raise ValueError(f"beam search does not sample: leave out {' and '.join(given)}, or --num-beams")
    if flags.temperature == 0 and given:
        raise ValueError(
            f"--temperature 0 always takes the likeliest token: leave out {' and '.join(given)}, or raise it"
        )

    temperature = flags.temperature
    if temperature is None:
        samples = beams == 1 and (recommended.do_sample or bool(given))
        temperature = recommended.temperature if samples else 0.0
    sampling: dict[str, Any] = {}
    if temperature != 0:
        sampling = {
            name: getattr(recommended, name) if value is None and recommended.do_sample else value
            for name, value in filters.items()
        }
        sampling = {name: value for name, value in sampling.items() if value is not None}
    if flags.length_penalty is not None:
        sampling["length_penalty"] = flags.length_penalty
    if flags.early_stopping is not None:
        sampling["early_stopping"] = {"true": True, "false": False, "never": "never"}[flags.early_stopping.value]
    penalty = flags.repetition_penalty
    return GenerationOptions(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        repetition_penalty=recommended.repetition_penalty if penalty is None else penalty,
        seed=flags.seed,
        eos_token_id=() if flags.ignore_eos else eos_token_ids,
        num_beams=beams,
        **sampling,
    )


def _spelled(name: str) -> str:
    return f"--{name.replace('_', '-')}"


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
