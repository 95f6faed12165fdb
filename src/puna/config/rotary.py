"""RotaryScaling: how rotary frequencies are changed for long contexts; read from both spellings that files use."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final, Literal, cast, get_args

from puna.config.fields import FieldReader

RotaryType = Literal["linear", "dynamic", "yarn", "llama3", "longrope"]


@dataclass(frozen=True, kw_only=True)
class RotaryScaling:
    """How rotary frequencies are changed for contexts longer than the trained one; layers/rotary.py names the sources.

    `factor` is the ratio of the contexts. `None` in `factor` (yarn, longrope) means max_position_embeddings /
    original_max_position_embeddings; `None` in `attention_factor` means the formula of the method's paper.
    """

    type: RotaryType
    factor: float | None = None
    original_max_position_embeddings: int | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()

    def to_hugging_face(self) -> dict[str, Any]:
        """The fields of a `rope_scaling` object that `read_rotary` reads back."""
        values = dataclasses.asdict(self)
        fields: dict[str, Any] = {"rope_type": self.type}
        for name in (*_REQUIRED[self.type], *_OPTIONAL[self.type]):
            if values[name] is not None:
                fields[name] = list(values[name]) if isinstance(values[name], tuple) else values[name]
        if self.type == "yarn":
            fields.setdefault("factor", None)  # transformers looks it up even where it follows from the lengths
        return fields


# Which fields of `rope_scaling` / `rope_parameters` each rotary type requires, and which it may have.
_REQUIRED: Final = MappingProxyType(
    {
        "default": (),
        "linear": ("factor",),
        "dynamic": ("factor",),
        "yarn": (),
        "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
        "longrope": ("short_factor", "long_factor"),
    }
)
_OPTIONAL: Final = MappingProxyType(
    {
        "default": (),
        "linear": (),
        "dynamic": (),
        "yarn": (
            "factor",
            "original_max_position_embeddings",
            "attention_factor",
            "beta_fast",
            "beta_slow",
            "mscale",
            "mscale_all_dim",
            "truncate",
        ),
        "llama3": ("original_max_position_embeddings",),
        "longrope": ("factor", "original_max_position_embeddings", "attention_factor"),
    }
)

# Beside these: linear and dynamic scaling start from max_position_embeddings, whatever original length is there too;
# and `finetuned` stands in the first yarn checkpoints.
_HARMLESS: Final = ("type", "rope_type", "rope_theta", "original_max_position_embeddings", "finetuned")


def read_rotary(
    reader: FieldReader, default_base: float, max_positions: int, head_size: int
) -> tuple[float, RotaryScaling | None]:
    """The base and the scaling, from `rope_theta` and `rope_scaling` (older files) or `rope_parameters` (newer)."""
    base = reader.positive("rope_theta", default_base)
    outer_original = reader.optional_count("original_max_position_embeddings")
    found = [
        _read_object(fields, base, outer_original, max_positions, head_size)
        for fields in (reader.child("rope_scaling"), reader.child("rope_parameters"))
        if fields is not None
    ]
    if len(found) == 2 and found[0] != found[1]:
        raise ValueError(
            f"{reader.source}: rope_scaling and rope_parameters say different things: keep the one that is right"
        )
    return found[0] if found else (base, None)


def _read_object(
    fields: FieldReader, base: float, outer_original: int | None, max_positions: int, head_size: int
) -> tuple[float, RotaryScaling | None]:
    if any(isinstance(value, dict) for value in fields.fields.values()):
        raise ValueError(f"{fields.source} differs from layer to layer: puna does not support that")
    base = fields.positive("rope_theta", base)
    if fields.number("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(f"{fields.source}: partial_rotary_factor is not 1: puna does not support that")
    name = "type" if fields.value("rope_type") is None else "rope_type"
    kind = fields.text(name, "default")
    if kind == "su":  # the name that longrope had in the first Phi-3 checkpoints
        kind = "longrope"
    known = ("default", *get_args(RotaryType))
    if kind not in known:
        raise fields.error(name, kind, f"one of {', '.join(known)} (the ones that puna supports)")
    unread = fields.unread(frozenset((*_HARMLESS, *_REQUIRED[kind], *_OPTIONAL[kind])))
    if unread:
        raise ValueError(f"{fields.source}: {', '.join(unread)}: not a field of rope_type {kind!r}")
    if kind == "default":
        return base, None
    return base, RotaryScaling(
        type=cast(RotaryType, kind), **_read_values(fields, kind, outer_original, max_positions, head_size)
    )


def _read_values(
    fields: FieldReader, kind: str, outer_original: int | None, max_positions: int, head_size: int
) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name in (*_REQUIRED[kind], *_OPTIONAL[kind]):
        if name in _OPTIONAL[kind] and fields.value(name) is None:
            continue
        if name in ("short_factor", "long_factor"):
            values[name] = fields.numbers(name)
            if len(values[name]) != head_size // 2:
                raise fields.error(name, f"{len(values[name])} numbers", f"{head_size // 2} numbers, half of head_dim")
        elif name == "original_max_position_embeddings":
            values[name] = fields.count(name)
        elif name == "truncate":
            values[name] = fields.boolean(name)
        elif name in ("mscale", "mscale_all_dim"):  # 0 is how files turn it off
            values[name] = fields.number(name)
        else:
            values[name] = fields.positive(name)
    if kind == "llama3" and values["high_freq_factor"] <= values["low_freq_factor"]:
        raise fields.error("high_freq_factor", values["high_freq_factor"], "more than low_freq_factor")
    if "original_max_position_embeddings" in _OPTIONAL[kind]:
        # Phi-3 writes it beside rope_scaling instead of inside; the outer one has priority there.
        inner = values.get("original_max_position_embeddings")
        values["original_max_position_embeddings"] = outer_original or inner or max_positions
    return values
