"""From flags to what the engine takes: SamplingParams and BeamParams, guided decoding, and sizes with units."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from puna.scheduling.beams import BeamParams
from puna.scheduling.sampling_params import GuidedDecoding, SamplingParams

if TYPE_CHECKING:
    from puna.cli.options import SamplingFlags
    from puna.config import GenerationConfig

# These choose among the likely tokens, so asking for one asks for sampling.
_FILTERS: Final = ("top_k", "top_p", "min_p", "typical_p")
_PENALTIES: Final = ("repetition_penalty", "presence_penalty", "frequency_penalty", "no_repeat_ngram_size")
_GUIDES: Final = ("guided_json", "guided_regex", "guided_grammar", "guided_choice")
_UNITS: Final = ("B", "KB", "MB", "GB", "TB"), ("B", "KiB", "MiB", "GiB", "TiB")


@dataclass(frozen=True, kw_only=True)
class RequestSettings:
    """How one request is generated. With `beams`, of `params` only max_tokens and ignore_eos count."""

    params: SamplingParams
    beams: BeamParams | None = None

    @property
    def num_sequences(self) -> int:
        """How many sequences run at once for it."""
        return self.params.n if self.beams is None else self.beams.width


def request_settings(
    flags: SamplingFlags, recommended: GenerationConfig, max_tokens: int, n: int = 1
) -> RequestSettings:
    """The flags over what the checkpoint recommends, which is greedy unless it says `do_sample`.

    Raises ValueError for values out of range and for flags that could have no effect.
    """
    if (flags.num_beams or 1) > 1:
        return _beam_settings(flags, max_tokens, n)
    for name in ("length_penalty", "early_stopping"):
        if getattr(flags, name) is not None:
            raise ValueError(f"{spelled(name)} belongs to beam search: add --num-beams, or leave it out")
    given = [name for name in _FILTERS if getattr(flags, name) is not None]
    if flags.temperature == 0 and given:
        raise ValueError(f"--temperature 0 always takes the likeliest token: leave out {_listed(given)}, or raise it")
    temperature = flags.temperature
    if temperature is None:
        temperature = recommended.temperature if recommended.do_sample or given else 0.0
    if temperature == 0 and n > 1:
        raise ValueError(f"--n is {n}, but the likeliest tokens are always the same: give a --temperature above 0")
    chosen: dict[str, Any] = {name: getattr(flags, name) for name in (*_FILTERS, *_PENALTIES)}
    chosen = {name: value for name, value in chosen.items() if value is not None}
    chosen.setdefault("repetition_penalty", recommended.repetition_penalty)
    if temperature != 0 and recommended.do_sample:
        for name in ("top_k", "top_p", "min_p"):
            chosen.setdefault(name, getattr(recommended, name))
    return RequestSettings(
        params=SamplingParams(
            n=n,
            temperature=temperature,
            seed=flags.seed,
            max_tokens=max_tokens,
            min_tokens=flags.min_tokens or 0,
            stop=flags.stop_strings,
            ignore_eos=flags.ignore_eos,
            logit_bias=logit_bias(flags.logit_bias or ()),
            bad_words=tuple(flags.bad_word or ()),
            guided=guided_decoding(flags),
            **chosen,
        )
    )


def _beam_settings(flags: SamplingFlags, max_tokens: int, n: int) -> RequestSettings:
    given = [name for name in _FILTERS if getattr(flags, name) is not None]
    if given or flags.temperature:
        raise ValueError(f"beam search does not sample: leave out {_listed(given or ['temperature'])}, or --num-beams")
    others = (*_PENALTIES, "min_tokens", "stop", "logit_bias", "bad_word", *_GUIDES)
    given = [name for name in others if getattr(flags, name)]
    if n > 1:
        given.append("n")
    if given:
        raise ValueError(
            f"beam search goes by the model's own probabilities: leave out {_listed(given)}, or --num-beams"
        )
    early = None if flags.early_stopping is None else flags.early_stopping.value
    beams = BeamParams(
        width=flags.num_beams or 1,
        length_penalty=1.0 if flags.length_penalty is None else flags.length_penalty,
        early_stopping="never" if early == "never" else early == "true",
    )
    params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=flags.ignore_eos)
    return RequestSettings(params=params, beams=beams)


def guided_decoding(flags: SamplingFlags) -> GuidedDecoding | None:
    """What the --guided flags ask for; None without one. Raises ValueError for two of them, or a missing file."""
    given = [name for name in _GUIDES if getattr(flags, name)]
    if not given:
        return None
    if len(given) > 1:
        raise ValueError(f"{_listed(given)} are given: the text can follow only one of them")
    if flags.guided_json is not None:
        text = flags.guided_json
        is_text = text.lstrip().startswith("{")
        return GuidedDecoding(json_schema=text if is_text else _text_of(Path(text), "guided_json"))
    if flags.guided_grammar is not None:
        return GuidedDecoding(grammar=_text_of(flags.guided_grammar, "guided_grammar"))
    if flags.guided_regex is not None:
        return GuidedDecoding(regex=flags.guided_regex)
    return GuidedDecoding(choice=tuple(flags.guided_choice or ()))


def logit_bias(given: Sequence[str]) -> dict[int, float]:
    """{id: value} of texts such as '12=-1.5'. Raises ValueError for others."""
    found: dict[int, float] = {}
    for text in given:
        token, _, value = text.partition("=")
        try:
            found[int(token)] = float(value)
        except ValueError as error:
            raise ValueError(f"--logit-bias is {text!r}: give a token's id and what to add, such as 12=-1.5") from error
    return found


def num_bytes(text: str, flag: str) -> int:
    """'2GiB' as bytes; KB, MB, GB and TB are powers of 1000, KiB, MiB, GiB and TiB of 1024. Raises ValueError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]i?B|B)?", text.strip())
    if match is None:
        raise ValueError(f"{flag} is {text!r}: give a size such as 500MB or 2GiB, or a number of bytes")
    unit = match.group(2) or "B"
    decimal, binary = _UNITS
    scale = 1000 ** decimal.index(unit) if unit in decimal else 1024 ** binary.index(unit)
    return int(float(match.group(1)) * scale)


def spelled(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _listed(names: Sequence[str]) -> str:
    return " and ".join(map(spelled, names))


def _text_of(file: Path, name: str) -> str:
    if not file.is_file():
        raise ValueError(f"{spelled(name)} is {str(file)!r}, which is no file")
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text, from byte {error.start} on: convert it first") from error
