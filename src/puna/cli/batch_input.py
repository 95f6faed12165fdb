"""The lines of a batch's input: JSON objects with a prompt and perhaps sampling fields, checked before any runs."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from puna.cli.sampling import RequestSettings
from puna.cli.session import OpenedModel
from puna.runtime.sampler import validate
from puna.scheduling.sampling_params import GuidedDecoding, SamplingParams

_PROMPTS: Final = ("prompt", "prompt_token_ids", "messages")
# The fields of SamplingParams that JSON can say, by what they hold; with "?", null as well.
_FIELDS: Final = MappingProxyType(
    {
        **dict.fromkeys(("n", "top_k", "no_repeat_ngram_size", "min_tokens"), "a whole number"),
        **dict.fromkeys(("seed", "max_tokens", "logprobs", "prompt_logprobs"), "a whole number?"),
        **dict.fromkeys(("temperature", "top_p", "min_p", "typical_p", "repetition_penalty"), "a number"),
        **dict.fromkeys(("presence_penalty", "frequency_penalty"), "a number"),
        **dict.fromkeys(("include_stop_str_in_output", "ignore_eos", "skip_special_tokens", "echo"), "true or false"),
        "stop": "a text or a list of texts",
        "stop_token_ids": "a list of whole numbers",
        "allowed_token_ids": "a list of whole numbers?",
        "bad_words": "a list of texts",
        "logit_bias": "an object of numbers",
        "guided": "an object?",
    }
)


@dataclass(frozen=True, kw_only=True)
class PromptFlags:
    """How texts become prompts."""

    apply_chat_template: bool
    system: str | None
    parse_special: bool


@dataclass(frozen=True, kw_only=True)
class Job:
    """One line: its place, counted from 0, and what to generate. `text` is the prompt where it was given as one."""

    index: int
    id: Any
    text: str | None
    prompt_token_ids: list[int]
    settings: RequestSettings


class BatchInput:
    """A file of prompts, which is read from its start on every call, so that it need not fit into memory.

    `base` is how lines without sampling fields are generated; a seed in it belongs to line 0, and counts up. Raises
    FileNotFoundError, and ValueError, naming the line, for what can't be run.
    """

    def __init__(self, file: Path, opened: OpenedModel, base: RequestSettings, flags: PromptFlags) -> None:
        if not file.is_file():
            raise FileNotFoundError(f"--input is {str(file)!r}, which is no file")
        self._file, self._opened, self._base, self._flags = file, opened, base, flags

    def jobs(self) -> Iterator[Job]:
        with self._file.open("rb") as lines:
            index = 0
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                try:
                    job = self._job(index, line)
                except (ValueError, TypeError) as error:
                    raise ValueError(f"{self._file}, line {number}: {error}") from error
                yield job
                index += 1

    def fingerprint(self) -> str:
        """Tells this file from others."""
        with self._file.open("rb") as content:
            digest = hashlib.sha256()
            while part := content.read(1 << 20):
                digest.update(part)
        return digest.hexdigest()

    def _job(self, index: int, line: bytes) -> Job:
        try:
            fields = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise ValueError(f"not UTF-8 text, from byte {error.start} on") from error
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"not JSON ({error})") from error
        if not isinstance(fields, dict):
            raise ValueError(f"{_shown(fields)} is not an object such as {{'prompt': 'Once upon a time'}}")
        given = [name for name in _PROMPTS if name in fields]
        if len(given) != 1:
            raise ValueError(f"has {' and '.join(given) or 'no prompt'}: give exactly one of {', '.join(_PROMPTS)}")
        text, prompt_ids = self._prompt(given[0], fields.pop(given[0]))
        identity = fields.pop("id", None)
        if isinstance(identity, (dict, list)):
            raise ValueError(f"id is {_shown(identity)}: give a text or a number")
        settings = self._settings(index, fields)
        room = self._opened.room_after(prompt_ids)
        params = dataclasses.replace(
            settings.params,
            max_tokens=min(room if settings.params.max_tokens is None else settings.params.max_tokens, room),
        )
        validate(params, self._opened.config.vocab_size)
        settings = dataclasses.replace(settings, params=params)
        return Job(index=index, id=identity, text=text, prompt_token_ids=prompt_ids, settings=settings)

    def _prompt(self, kind: str, value: Any) -> tuple[str | None, list[int]]:
        tokenizer, flags = self._opened.tokenizer, self._flags
        if kind == "prompt_token_ids":
            if not isinstance(value, list) or not all(type(token) is int and token >= 0 for token in value):
                raise ValueError(f"prompt_token_ids is {_shown(value)}: give a list of token ids")
            return None, value
        if kind == "messages":
            if not isinstance(value, list) or not value or not all(isinstance(message, dict) for message in value):
                raise ValueError(f"messages is {_shown(value)}: give a list of objects with role and content")
            return None, tokenizer.encode_chat(value)
        if not isinstance(value, str):
            raise ValueError(f"prompt is {_shown(value)}: give a text")
        if flags.apply_chat_template:
            system = [] if flags.system is None else [{"role": "system", "content": flags.system}]
            return value, tokenizer.encode_chat([*system, {"role": "user", "content": value}])
        return value, tokenizer.encode(value, parse_special=flags.parse_special)

    def _settings(self, index: int, fields: Mapping[str, Any]) -> RequestSettings:
        unknown = next((name for name in fields if name not in _FIELDS), None)
        if unknown is not None:
            raise ValueError(
                f"there is no field {unknown}: a line has one of {', '.join(_PROMPTS)}, perhaps id, and these "
                f"sampling fields: {', '.join(sorted(_FIELDS))}"
            )
        if fields and self._base.beams is not None:
            raise ValueError(f"beam search takes no sampling fields, but {' and '.join(fields)} is given")
        values = {name: _checked(name, value) for name, value in fields.items()}
        params = self._base.params
        if params.seed is not None:  # else equal prompts would get equal texts
            values.setdefault("seed", params.seed + index)
        return dataclasses.replace(self._base, params=dataclasses.replace(params, **values))


def params_as_json(params: SamplingParams) -> dict[str, Any]:
    """Params as a file can hold them."""
    return {name: value for name, value in dataclasses.asdict(params).items() if name != "logits_processors"}


def _checked(name: str, value: Any) -> Any:
    """A field's value as SamplingParams takes it. Raises ValueError for another type."""
    kind = _FIELDS[name]
    if value is None and kind.endswith("?"):
        return None
    if not _is(kind.removesuffix("?"), value):
        raise ValueError(f"{name} is {_shown(value)}: it must be {kind.removesuffix('?')}")
    if name == "logit_bias":
        try:
            return {int(token): bias for token, bias in value.items()}
        except ValueError as error:
            raise ValueError(f"logit_bias is {_shown(value)}: its names must be token ids") from error
    if name == "guided":
        known = [field.name for field in dataclasses.fields(GuidedDecoding)]
        wrong = next((key for key in value if key not in known), None)
        if wrong is not None:
            raise ValueError(f"guided has {wrong}: use one of {', '.join(known)}")
        schema = value.get("json_schema")
        if isinstance(schema, dict):
            value = {**value, "json_schema": json.dumps(schema)}
        return GuidedDecoding(**value)
    return value


def _is(kind: str, value: Any) -> bool:
    if kind == "a text or a list of texts":
        return isinstance(value, str) or _is("a list of texts", value)
    if kind == "a list of texts":
        return isinstance(value, list) and all(isinstance(one, str) for one in value)
    if kind == "a list of whole numbers":
        return isinstance(value, list) and all(type(one) is int for one in value)
    if kind == "an object of numbers":
        return isinstance(value, dict) and all(_is("a number", one) for one in value.values())
    if kind == "an object":
        return isinstance(value, dict)
    if kind == "true or false":
        return isinstance(value, bool)
    return type(value) is int or (kind == "a number" and type(value) is float)


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."
