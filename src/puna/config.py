"""LLaMAConfig, RotaryScaling and GenerationConfig: frozen dataclasses, read with types from Hugging Face files."""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, Literal, cast, get_args

Dtype = Literal["float32", "bfloat16", "float16"]
Activation = Literal["silu", "gelu", "gelu_pytorch_tanh", "relu"]
RotaryType = Literal["linear", "dynamic", "yarn", "llama3", "longrope"]


@dataclass(frozen=True, kw_only=True)
class RotaryScaling:
    """How rotary frequencies are changed for contexts longer than the trained one; see layers/rotary.py for the sources.

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


@dataclass(frozen=True, kw_only=True)
class LLaMAConfig:
    """Everything that decides the shape and the arithmetic of a LLaMA-family model.

    `sliding_window` is in tokens, a token sees itself and `sliding_window - 1` before it; `sliding_window_layers` names
    the layers that have it (None: all). `attn_bias` is the bias of q, k and v, `attn_output_bias` that of the output
    projection. `quant` names a weight format of `puna.quantization`. `logits_dtype` is what `forward` returns.

    Raises ValueError for values that no model can have.
    """

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    hidden_size: int
    mlp_hidden_size: int
    vocab_size: int
    architecture: str = "LlamaForCausalLM"
    hidden_act: Activation = "silu"
    max_position_embeddings: int = 2048
    dtype: Dtype = "float32"
    logits_dtype: Dtype = "float32"
    rotary_base: float = 10000.0
    rotary_scaling: RotaryScaling | None = None
    rms_norm_eps: float = 1e-6
    attn_bias: bool = False
    attn_output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None
    sliding_window_layers: tuple[int, ...] | None = None
    tie_embeddings: bool = False
    num_experts: int = 0
    experts_per_token: int = 0
    quant: str = "none"

    def __post_init__(self) -> None:
        positive = ("num_layers", "num_heads", "num_kv_heads", "head_size", "hidden_size", "mlp_hidden_size")
        for name in (*positive, "vocab_size", "max_position_embeddings", "rotary_base"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be positive")
        if self.num_heads % self.num_kv_heads != 0:
            raise ValueError(
                f"num_kv_heads is {self.num_kv_heads}: it must divide num_heads, {self.num_heads}, since every "
                "key/value head serves the same number of query heads"
            )
        if self.head_size % 2 != 0:
            raise ValueError(f"head_size is {self.head_size}: rotary embeddings need an even number")
        if self.sliding_window is not None and self.sliding_window <= 0:
            raise ValueError(
                f"sliding_window is {self.sliding_window}: it must be positive, or None for full attention"
            )
        if self.num_experts and not 0 < self.experts_per_token <= self.num_experts:
            raise ValueError(f"experts_per_token is {self.experts_per_token}: it must be in 1..{self.num_experts}")
        for name, kind in (("hidden_act", Activation), ("dtype", Dtype), ("logits_dtype", Dtype)):
            if getattr(self, name) not in get_args(kind):
                raise ValueError(f"{name} is {getattr(self, name)!r}: puna supports {', '.join(get_args(kind))}")

    def layer_window(self, layer_idx: int) -> int | None:
        """The sliding window of a layer in tokens, or None where the layer sees everything before it."""
        if self.sliding_window_layers is None or layer_idx in self.sliding_window_layers:
            return self.sliding_window
        return None

    @property
    def context_length(self) -> int:
        """The most tokens a sequence may have: more than max_position_embeddings where the rotary scaling extends it."""
        scaling = self.rotary_scaling
        if scaling is None or scaling.factor is None or scaling.type in ("llama3", "longrope"):
            return self.max_position_embeddings
        # Files differ in whether max_position_embeddings counts yarn's extension already; the original length does not.
        trained = scaling.original_max_position_embeddings or self.max_position_embeddings
        return max(self.max_position_embeddings, int(trained * scaling.factor))

    @classmethod
    def from_hugging_face(cls, path: str | Path) -> LLaMAConfig:
        """Reads `config.json` of a checkpoint folder (or the file itself).

        Raises FileNotFoundError where there is none, and ValueError naming the field and what to do for a missing
        field, a wrong type, an architecture or an option that puna does not support. Fields that puna does not know are
        named in a warning. `dtype` is float32 where the file names none.
        """
        file = Path(path)
        file = file / "config.json" if file.is_dir() else file
        return cls.from_fields(read_json_object(file), source=str(file))

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any], source: str = "config.json") -> LLaMAConfig:
        """The same for fields already parsed; `source` is named in the errors."""
        reader = _FieldReader(fields, source)
        architecture = _read_architecture(reader)
        family = FAMILIES[architecture]
        _refuse_unsupported(reader)

        hidden_size = reader.integer("hidden_size")
        num_heads = reader.integer("num_attention_heads")
        num_layers = reader.integer("num_hidden_layers")
        max_positions = reader.integer("max_position_embeddings", 2048)
        head_size = reader.optional_integer("head_dim") or family.default_head_size
        if head_size is None:
            if num_heads < 1 or hidden_size % num_heads != 0:
                raise reader.error("num_attention_heads", num_heads, f"a divisor of hidden_size, {hidden_size}")
            head_size = hidden_size // num_heads
        attention_bias = reader.boolean("attention_bias", False) if family.reads_attention_bias else family.qkv_bias
        rotary_base, rotary_scaling = _read_rotary(reader, family, max_positions, head_size)
        window, window_layers = _read_sliding_window(reader, family, num_layers)
        if family.has_experts:
            num_experts, per_token = reader.integer("num_local_experts"), reader.integer("num_experts_per_tok")
        else:
            num_experts, per_token = 0, 0
        config = cls(
            architecture=architecture,
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=reader.optional_integer("num_key_value_heads") or num_heads,
            head_size=head_size,
            hidden_size=hidden_size,
            mlp_hidden_size=reader.integer("intermediate_size"),
            vocab_size=reader.integer("vocab_size"),
            hidden_act=cast(Activation, reader.choice("hidden_act", get_args(Activation), "silu")),
            max_position_embeddings=max_positions,
            dtype=_read_dtype(reader),
            rotary_base=rotary_base,
            rotary_scaling=rotary_scaling,
            rms_norm_eps=reader.number("rms_norm_eps", 1e-6),
            attn_bias=attention_bias,
            attn_output_bias=attention_bias and family.reads_attention_bias,
            mlp_bias=reader.boolean("mlp_bias", False) if family.reads_mlp_bias else False,
            qk_norm=family.qk_norm,
            sliding_window=window,
            sliding_window_layers=window_layers,
            tie_embeddings=reader.boolean("tie_word_embeddings", False),
            num_experts=num_experts,
            experts_per_token=per_token,
        )
        reader.warn_of_unread()
        return config

    def to_hugging_face(self) -> dict[str, Any]:
        """The fields of a `config.json` that `from_hugging_face`, and transformers, read back to the same model."""
        family = FAMILIES[self.architecture]
        rotary: dict[str, Any] = {"rope_type": "default"}
        if self.rotary_scaling is not None:
            values = dataclasses.asdict(self.rotary_scaling)
            rotary = {"rope_type": values.pop("type")}
            wanted = (*_ROTARY_FIELDS[self.rotary_scaling.type], *_ROTARY_OPTIONS[self.rotary_scaling.type])
            for name in wanted:
                if values[name] is not None:
                    rotary[name] = list(values[name]) if isinstance(values[name], tuple) else values[name]
        fields: dict[str, Any] = {
            "architectures": [self.architecture],
            "model_type": family.model_type,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.mlp_hidden_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_size,
            "vocab_size": self.vocab_size,
            "hidden_act": self.hidden_act,
            "max_position_embeddings": self.max_position_embeddings,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_theta": self.rotary_base,
            "rope_parameters": {**rotary, "rope_theta": self.rotary_base},
            "tie_word_embeddings": self.tie_embeddings,
            "torch_dtype": self.dtype,
        }
        if family.reads_attention_bias:
            fields["attention_bias"] = self.attn_bias
        if family.reads_mlp_bias:
            fields["mlp_bias"] = self.mlp_bias
        if family.window == "all_layers":
            fields["sliding_window"] = self.sliding_window
        elif family.window == "by_layer":
            fields["use_sliding_window"] = self.sliding_window is not None
            fields["sliding_window"] = self.sliding_window
            fields["layer_types"] = [
                "full_attention" if self.layer_window(layer) is None else "sliding_attention"
                for layer in range(self.num_layers)
            ]
        if family.has_experts:
            fields["num_local_experts"], fields["num_experts_per_tok"] = self.num_experts, self.experts_per_token
        return fields


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
                result = result._updated(_FieldReader(read_json_object(folder / name), str(folder / name)))
        return result

    def _updated(self, reader: _FieldReader) -> GenerationConfig:
        """`self` with what this file names; None in the file counts as not named."""
        eos = reader.fields.get("eos_token_id")
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


@dataclass(frozen=True, kw_only=True)
class Family:
    """What one architecture's config.json means where it differs from LLaMA's.

    `window`: whether `sliding_window` is ignored ("none"), holds for all layers, or is chosen layer by layer.
    """

    model_type: str
    reads_attention_bias: bool = False
    reads_mlp_bias: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False
    window: Literal["none", "all_layers", "by_layer"] = "none"
    has_experts: bool = False
    default_head_size: int | None = None
    default_rotary_base: float = 10000.0


FAMILIES: Final[Mapping[str, Family]] = MappingProxyType(
    {
        "LlamaForCausalLM": Family(model_type="llama", reads_attention_bias=True, reads_mlp_bias=True),
        "MistralForCausalLM": Family(model_type="mistral", window="all_layers"),
        "Qwen2ForCausalLM": Family(model_type="qwen2", qkv_bias=True, window="by_layer"),
        "Qwen3ForCausalLM": Family(
            model_type="qwen3", reads_attention_bias=True, qk_norm=True, window="by_layer", default_head_size=128
        ),
        "MixtralForCausalLM": Family(
            model_type="mixtral", window="all_layers", has_experts=True, default_rotary_base=1e6
        ),
    }
)

# Which fields of `rope_scaling` / `rope_parameters` each rotary type requires, and which it may have.
_ROTARY_FIELDS: Final = MappingProxyType(
    {
        "linear": ("factor",),
        "dynamic": ("factor",),
        "yarn": (),
        "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
        "longrope": ("short_factor", "long_factor"),
    }
)
_ROTARY_OPTIONS: Final = MappingProxyType(
    {
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

# Fields that change the arithmetic in other model families: harmless at this value, refused by name at any other.
_HARMLESS_ONLY_AT: Final = MappingProxyType(
    {
        "partial_rotary_factor": (1.0, None),
        "quantization_config": (None,),
        "attn_logit_softcapping": (None,),
        "final_logit_softcapping": (None,),
        "logit_scale": (None, 1.0),
        "logits_scaling": (None, 1.0),
        "residual_multiplier": (None, 1.0),
        "embedding_multiplier": (None, 1.0),
        "attention_multiplier": (None,),
        "clip_qkv": (None,),
        "no_rope_layers": (None,),
        "is_encoder_decoder": (False, None),
        "add_cross_attention": (False, None),
    }
)

# Fields that do not change what a trained model computes.
_NO_EFFECT: Final = frozenset(
    (
        "architectures model_type transformers_version _name_or_path _commit_hash use_cache initializer_range "
        "attention_dropout pretraining_tp bos_token_id eos_token_id pad_token_id torch_dtype dtype auto_map "
        "output_router_logits router_aux_loss_coef router_jitter_noise output_attentions output_hidden_states "
        "return_dict tokenizer_class max_window_layers sliding_window use_sliding_window layer_types rope_scaling "
        "rope_theta rope_parameters head_dim attention_bias mlp_bias id2label label2id problem_type "
        "chunk_size_feed_forward is_decoder rope_interleaved unsloth_version unsloth_fixed hidden_dropout "
        "original_max_position_embeddings _attn_implementation_autoset use_bfloat16 cross_attention_hidden_size "
        "attn_implementation"
    ).split()
)


def read_json_object(file: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises FileNotFoundError, or ValueError where it is not JSON or not an object."""
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist: give the folder of a checkpoint, which holds {file.name}")
    try:
        parsed = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not valid JSON ({error}): fetch the file again") from error
    if not isinstance(parsed, dict):
        raise ValueError(f"{file} holds a {type(parsed).__name__}, not an object: fetch the file again")
    return parsed


class _FieldReader:
    """Typed reads of one JSON object; remembers what was read, so that the rest can be named."""

    def __init__(self, fields: Mapping[str, Any], source: str) -> None:
        self.fields = fields
        self.source = source
        self._read: set[str] = set()

    def error(self, name: str, value: object, wanted: str) -> ValueError:
        return ValueError(f"{self.source}: {name} is {value!r}: it must be {wanted}")

    def _get(self, name: str, default: object) -> object:
        self._read.add(name)
        value = self.fields.get(name)
        if value is None:
            if default is ...:
                raise ValueError(
                    f"{self.source}: the field {name} is missing: a model of this kind cannot do without it"
                )
            return default
        return value

    # `bool` is a subclass of `int` in Python, so types are compared exactly.
    def integer(self, name: str, default: object = ...) -> int:
        value = self._get(name, default)
        if type(value) is not int:
            raise self.error(name, value, "a whole number")
        return value

    def optional_integer(self, name: str) -> int | None:
        return None if self.fields.get(name) is None else self.integer(name)

    def number(self, name: str, default: object = ...) -> float:
        value = self._get(name, default)
        if type(value) not in (int, float):
            raise self.error(name, value, "a number")
        return float(cast(float, value))

    def boolean(self, name: str, default: object = ...) -> bool:
        value = self._get(name, default)
        if type(value) is not bool:
            raise self.error(name, value, "true or false")
        return value

    def text(self, name: str, default: object = ...) -> str:
        value = self._get(name, default)
        if type(value) is not str:
            raise self.error(name, value, "a string")
        return value

    def choice(self, name: str, choices: tuple[str, ...], default: object = ...) -> str:
        value = self.text(name, default)
        if value not in choices:
            raise self.error(name, value, f"one of {', '.join(choices)} (the ones that puna supports)")
        return value

    def numbers(self, name: str) -> tuple[float, ...]:
        value = self._get(name, ...)
        if not isinstance(value, list) or any(type(item) not in (int, float) for item in value):
            raise self.error(name, value, "a list of numbers")
        return tuple(float(item) for item in value)

    def child(self, name: str) -> _FieldReader | None:
        value = self._get(name, None)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.error(name, value, "an object")
        return _FieldReader(value, f"{self.source}: {name}")

    def unread(self, known: frozenset[str] = frozenset()) -> list[str]:
        return sorted(name for name in self.fields if name not in self._read and name not in known)

    def warn_of_unread(self) -> None:
        unread = self.unread(_NO_EFFECT | frozenset(_HARMLESS_ONLY_AT))
        if unread:
            warnings.warn(f"{self.source}: puna does not know and ignores: {', '.join(unread)}", stacklevel=4)


def _read_architecture(reader: _FieldReader) -> str:
    named = reader.fields.get("architectures")
    supported = ", ".join(FAMILIES)
    if named is None:
        model_type = reader.text("model_type")
        for architecture, family in FAMILIES.items():
            if family.model_type == model_type:
                return architecture
        raise ValueError(f"{reader.source}: model_type is {model_type!r}: puna runs {supported}")
    if not isinstance(named, list) or len(named) != 1 or type(named[0]) is not str:
        raise reader.error("architectures", named, "a list of one name")
    if named[0] not in FAMILIES:
        raise ValueError(f"{reader.source}: the architecture {named[0]!r} is not supported: puna runs {supported}")
    return named[0]


def _refuse_unsupported(reader: _FieldReader) -> None:
    for name, harmless in _HARMLESS_ONLY_AT.items():
        value = reader.fields.get(name)
        if value in harmless:
            continue
        if name == "quantization_config":
            method = value.get("quant_method", "unnamed") if isinstance(value, dict) else value
            raise ValueError(
                f"{reader.source}: the quantization method {method!r} is not supported: "
                "use the checkpoint's float32, bfloat16 or float16 original"
            )
        raise ValueError(f"{reader.source}: {name} is {value!r}: puna does not support this option")


def _read_dtype(reader: _FieldReader) -> Dtype:
    name = "dtype" if reader.fields.get("dtype") is not None else "torch_dtype"
    value = reader.text(name, "float32").removeprefix("torch.")
    if value not in get_args(Dtype):
        raise reader.error(name, value, f"one of {', '.join(get_args(Dtype))}")
    return cast(Dtype, value)


def _read_sliding_window(
    reader: _FieldReader, family: Family, num_layers: int
) -> tuple[int | None, tuple[int, ...] | None]:
    """The window in tokens and the layers that have it (None: all of them)."""
    kinds = reader.fields.get("layer_types")
    if kinds is not None:
        known = ("full_attention", "sliding_attention")
        if not isinstance(kinds, list) or len(kinds) != num_layers or any(kind not in known for kind in kinds):
            raise reader.error("layer_types", kinds, f"a list of {num_layers} names out of {', '.join(known)}")
    window = reader.optional_integer("sliding_window")
    if family.window == "none":
        if kinds is not None and "sliding_attention" in kinds:
            raise reader.error("layer_types", kinds, "full_attention everywhere in this architecture")
        return None, None
    if family.window == "all_layers":
        if kinds is not None and len(set(kinds)) > 1:
            raise reader.error("layer_types", kinds, "the same everywhere in this architecture")
        return window, None
    if not reader.boolean("use_sliding_window", False) or window is None:
        return None, None
    if kinds is None:
        first = reader.integer("max_window_layers", num_layers)
        return window, tuple(range(first, num_layers))
    return window, tuple(layer for layer, kind in enumerate(kinds) if kind == "sliding_attention")


def _read_rotary(
    reader: _FieldReader, family: Family, max_positions: int, head_size: int
) -> tuple[float, RotaryScaling | None]:
    """The base and the scaling, from `rope_parameters` (newer files) or `rope_theta` and `rope_scaling` (older ones)."""
    newer, older = reader.child("rope_parameters"), reader.child("rope_scaling")
    scaling = newer or older
    base = reader.number("rope_theta", family.default_rotary_base)
    if scaling is None:
        return base, None
    base = scaling.number("rope_theta", base)
    if any(isinstance(value, dict) for value in scaling.fields.values()):
        raise ValueError(f"{scaling.source} differs from layer to layer: puna does not support that")
    if scaling.fields.get("partial_rotary_factor") not in (None, 1.0):
        raise ValueError(f"{scaling.source}: partial_rotary_factor is not 1: puna does not support that")
    kind = scaling.text("rope_type", scaling.fields.get("type", "default"))
    if kind == "su":  # the name that longrope had in the first Phi-3 checkpoints
        kind = "longrope"
    known = ("default", *get_args(RotaryType))
    if kind not in known:
        raise scaling.error("rope_type", kind, f"one of {', '.join(known)} (the ones that puna supports)")
    if kind == "default":
        return base, None
    # linear and dynamic scaling start from max_position_embeddings, whatever original length is written beside it.
    harmless = ("type", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings")
    unread = scaling.unread(frozenset((*harmless, *_ROTARY_FIELDS[kind], *_ROTARY_OPTIONS[kind])))
    if unread:
        raise ValueError(f"{scaling.source}: {', '.join(unread)}: not a field of rope_type {kind!r}")

    values: dict[str, Any] = {}
    for name in (*_ROTARY_FIELDS[kind], *_ROTARY_OPTIONS[kind]):
        if scaling.fields.get(name) is None:
            if name in _ROTARY_FIELDS[kind]:
                scaling.number(name)  # raises: missing
            continue
        if name in ("short_factor", "long_factor"):
            values[name] = scaling.numbers(name)
            if len(values[name]) != head_size // 2:
                raise scaling.error(name, f"{len(values[name])} numbers", f"{head_size // 2} numbers, half of head_dim")
        elif name == "original_max_position_embeddings":
            values[name] = scaling.integer(name)
        elif name == "truncate":
            values[name] = scaling.boolean(name)
        else:
            values[name] = scaling.number(name)
    if "original_max_position_embeddings" in _ROTARY_OPTIONS[kind]:
        # Phi-3 writes it beside rope_scaling instead of inside; the outer one has priority there.
        outer = reader.optional_integer("original_max_position_embeddings")
        values["original_max_position_embeddings"] = (
            outer or values.get("original_max_position_embeddings") or max_positions
        )
    for name, value in values.items():
        if name == "factor" and value <= 0:
            raise scaling.error(name, value, "positive")
    return base, RotaryScaling(type=cast(RotaryType, kind), **values)
