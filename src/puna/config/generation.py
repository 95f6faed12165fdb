"""GenerationConfig: a checkpoint's special tokens and recommended sampling."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from puna.config.fields import FieldReader, read_json_object


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """What a checkpoint says about generating: its special tokens and the sampling that its makers recommend."""

    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    @classmethod
    def from_hugging_face(cls, folder: str | Path) -> GenerationConfig:
        """Reads `generation_config.json`, and `config.json` for the token ids it does not name. Missing files are fine.

        Raises ValueError for a wrong type.
        """
        folder = Path(folder)
        result = cls()
        for name in ("config.json", "generation_config.json"):
            if (folder / name).is_file():
                result = result._updated(FieldReader(read_json_object(folder / name), str(folder / name)))
        return result

    def to_hugging_face(self) -> dict[str, Any]:
        """The fields of a `generation_config.json` that `from_hugging_face` reads back, without defaults."""
        fields: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name == "eos_token_ids":
                fields["eos_token_id"] = list(value) or None
            else:
                fields[field.name] = None if value == field.default else value
        return {name: value for name, value in fields.items() if value is not None}

    def _updated(self, reader: FieldReader) -> GenerationConfig:
        """`self` with what this file names; null in the file counts as not named."""
        eos = reader.value("eos_token_id")
        if eos is None:
            eos_ids = self.eos_token_ids
        elif isinstance(eos, list) and all(type(token) is int for token in eos):
            eos_ids = tuple(eos)
        elif type(eos) is int:
            eos_ids = (eos,)
        else:
            raise reader.error("eos_token_id", eos, "a whole number or a list of them")
        bos, pad = reader.optional_integer("bos_token_id"), reader.optional_integer("pad_token_id")
        return GenerationConfig(
            bos_token_id=self.bos_token_id if bos is None else bos,
            eos_token_ids=eos_ids,
            pad_token_id=self.pad_token_id if pad is None else pad,
            do_sample=reader.boolean("do_sample", self.do_sample),
            temperature=reader.number("temperature", self.temperature),
            top_k=reader.integer("top_k", self.top_k),
            top_p=reader.number("top_p", self.top_p),
            min_p=reader.number("min_p", self.min_p),
            repetition_penalty=reader.number("repetition_penalty", self.repetition_penalty),
        )
