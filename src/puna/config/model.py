"""LLaMAConfig: everything that decides a model's shape and arithmetic, read from and written to config.json."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, Literal, cast, get_args

from puna.config.families import FAMILIES, Family
from puna.config.fields import FieldReader, read_json_object
from puna.config.rotary import RotaryScaling, read_rotary

Dtype = Literal["float32", "bfloat16", "float16"]
Activation = Literal["silu", "gelu", "gelu_pytorch_tanh", "relu"]


@dataclass(frozen=True, kw_only=True)
class LLaMAConfig:
    """Everything that decides the shape and the arithmetic of a LLaMA-family model.

    `sliding_window` is in tokens, a token sees itself and `sliding_window - 1` before it; `sliding_window_layers` names
    the layers that have it (None: all). `attn_bias` is the bias of q, k and v, `attn_output_bias` that of the output
    projection. `quant` names a weight format of `puna.quantization`. `logits_dtype` is what `forward` returns.
    `deterministic`: a token's logits must not depend on what is computed together with it, also where that costs time.

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
    deterministic: bool = False

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
    def windows(self) -> tuple[int | None, ...]:
        """The different windows of the layers, None first. The cache has blocks of their own for each of them."""
        found = {self.layer_window(layer) for layer in range(self.num_layers)}
        return tuple(sorted(found, key=lambda window: window or 0))

    def window_idx(self, layer_idx: int) -> int:
        """Which of `windows` a layer has."""
        return self.windows.index(self.layer_window(layer_idx))

    @property
    def context_length(self) -> int:
        """The most tokens a sequence may have: more than max_position_embeddings where rotary scaling extends it."""
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
        reader = FieldReader(fields, source)
        architecture = _read_architecture(reader)
        family = FAMILIES[architecture]
        _refuse_unsupported(reader)

        hidden_size = reader.count("hidden_size")
        num_heads = reader.count("num_attention_heads")
        num_layers = reader.count("num_hidden_layers")
        max_positions = reader.count("max_position_embeddings", family.default_max_positions)
        head_size = _read_head_size(reader, family, hidden_size, num_heads)
        attention_bias = _read_bias(reader, "attention_bias", family.reads_attention_bias)
        rotary_base, rotary_scaling = read_rotary(reader, family.default_rotary_base, max_positions, head_size)
        window, window_layers = _read_sliding_window(reader, family, num_layers)
        config = cls(
            architecture=architecture,
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=_read_kv_heads(reader, family, num_heads),
            head_size=head_size,
            hidden_size=hidden_size,
            mlp_hidden_size=reader.count("intermediate_size"),
            vocab_size=reader.count("vocab_size"),
            hidden_act=cast(Activation, reader.choice("hidden_act", get_args(Activation), "silu")),
            max_position_embeddings=max_positions,
            dtype=_read_dtype(reader),
            rotary_base=rotary_base,
            rotary_scaling=rotary_scaling,
            rms_norm_eps=reader.positive("rms_norm_eps", family.default_rms_norm_eps),
            attn_bias=attention_bias or family.qkv_bias,
            attn_output_bias=attention_bias,
            mlp_bias=_read_bias(reader, "mlp_bias", family.reads_mlp_bias),
            qk_norm=family.qk_norm,
            sliding_window=window,
            sliding_window_layers=window_layers,
            tie_embeddings=reader.boolean("tie_word_embeddings", False),
            num_experts=reader.count("num_local_experts") if family.has_experts else 0,
            experts_per_token=reader.count("num_experts_per_tok") if family.has_experts else 0,
        )
        reader.warn_of_unread(frozenset((*_NO_EFFECT.split(), *_HARMLESS_ONLY_AT)))
        return config

    def to_hugging_face(self) -> dict[str, Any]:
        """The fields of a `config.json` that `from_hugging_face`, and transformers, read back to the same model.

        `logits_dtype`, `quant` and `deterministic` have no place there. Raises ValueError where this architecture's
        config.json can't say what this config does, such as q/k norms in a LlamaForCausalLM.
        """
        family = FAMILIES[self.architecture]
        scaling = None if self.rotary_scaling is None else self.rotary_scaling.to_hugging_face()
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
            # Both spellings, with the same content: readers older than transformers 5 know only the first.
            "rope_theta": self.rotary_base,
            "rope_scaling": scaling,
            "rope_parameters": {**(scaling or {"rope_type": "default"}), "rope_theta": self.rotary_base},
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
        self._require_same(LLaMAConfig.from_fields(fields))
        return fields

    def _require_same(self, read_back: LLaMAConfig) -> None:
        unsaid = ("logits_dtype", "quant", "deterministic", "sliding_window", "sliding_window_layers")
        names = [field.name for field in dataclasses.fields(self) if field.name not in unsaid]
        pairs = {name: (getattr(self, name), getattr(read_back, name)) for name in names}
        layers = range(self.num_layers)
        pairs["the layers' sliding windows"] = (
            [self.layer_window(layer) for layer in layers],
            [read_back.layer_window(layer) for layer in layers],
        )
        for name, (mine, theirs) in pairs.items():
            if mine != theirs:
                raise ValueError(
                    f"{name}: {mine!r} in this config, but the config.json of a {self.architecture} can only say "
                    f"{theirs!r}: change it, or the architecture"
                )


# Fields that change the arithmetic in other models: harmless at these values, refused by name at any other.
_HARMLESS_ONLY_AT: Final = MappingProxyType(
    {
        "partial_rotary_factor": (None, 1.0),
        "rope_interleaved": (None, False),
        "use_mrope": (None, False),
        "compression_config": (None,),
        "attn_logit_softcapping": (None,),
        "final_logit_softcapping": (None,),
        "logit_scale": (None, 1.0),
        "logits_scaling": (None, 1.0),
        "residual_multiplier": (None, 1.0),
        "embedding_multiplier": (None, 1.0),
        "attention_multiplier": (None,),
        "clip_qkv": (None,),
        "no_rope_layers": (None,),
        "is_encoder_decoder": (None, False),
        "add_cross_attention": (None, False),
    }
)

# Fields that do not change what a trained model computes; the last ones are about generating, see GenerationConfig.
# How weights are stored, quantization_config, is for who reads the weights, see puna.checkpoints.fp8.
_NO_EFFECT: Final = (
    "model_type transformers_version _name_or_path _commit_hash use_cache initializer_range attention_dropout "
    "hidden_dropout pretraining_tp torch_dtype dtype auto_map output_router_logits router_aux_loss_coef "
    "router_jitter_noise output_attentions output_hidden_states return_dict tokenizer_class max_window_layers "
    "id2label label2id problem_type chunk_size_feed_forward is_decoder is_llama_config unsloth_version "
    "unsloth_fixed attn_implementation _attn_implementation_autoset use_bfloat16 cross_attention_hidden_size "
    "max_sequence_length transformers.js_config quantization_config "
    "bos_token_id eos_token_id pad_token_id do_sample temperature top_k top_p min_p repetition_penalty max_length "
    "max_new_tokens"
)


def read_architecture(fields: Mapping[str, Any], source: str = "config.json") -> str:
    """The architecture that the fields of a config.json name. Raises ValueError for one that puna does not run."""
    return _read_architecture(FieldReader(fields, source))


def _read_architecture(reader: FieldReader) -> str:
    named = reader.value("architectures")
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


def _refuse_unsupported(reader: FieldReader) -> None:
    for name, harmless in _HARMLESS_ONLY_AT.items():
        value = reader.value(name)
        if value in harmless:
            continue
        if name == "compression_config":
            method = value.get("quant_method", "unnamed") if isinstance(value, dict) else value
            raise ValueError(
                f"{reader.source}: {name}, the field of old quantised checkpoints, is not supported (its method is "
                f"{method!r}): use a newer copy, or the checkpoint's float32, bfloat16 or float16 original"
            )
        raise ValueError(f"{reader.source}: {name} is {value!r}: puna does not support this option")


def _read_dtype(reader: FieldReader) -> Dtype:
    name = "dtype" if reader.value("dtype") is not None else "torch_dtype"
    value = reader.text(name, "float32").removeprefix("torch.")
    if value not in get_args(Dtype):
        raise reader.error(name, value, f"one of {', '.join(get_args(Dtype))}")
    return cast(Dtype, value)


def _read_head_size(reader: FieldReader, family: Family, hidden_size: int, num_heads: int) -> int:
    head_size = reader.optional_count("head_dim") or family.default_head_size
    if head_size is not None:
        return head_size
    if hidden_size % num_heads != 0:
        raise reader.error("num_attention_heads", num_heads, f"a divisor of hidden_size, {hidden_size}")
    return hidden_size // num_heads


def _read_kv_heads(reader: FieldReader, family: Family, num_heads: int) -> int:
    # null and a field left out differ here: null is as many as heads, in every family.
    absent = "num_key_value_heads" not in reader.fields
    default = family.default_kv_heads if absent and family.default_kv_heads is not None else num_heads
    heads = reader.count("num_key_value_heads", default)
    if num_heads % heads != 0:
        raise reader.error("num_key_value_heads", heads, f"a divisor of num_attention_heads, {num_heads}")
    return heads


def _read_bias(reader: FieldReader, name: str, family_reads_it: bool) -> bool:
    """A bias switch. In families without one, true stays unread, so that the warning names it."""
    if not family_reads_it and reader.fields.get(name) not in (None, False):
        return False
    return reader.boolean(name, False)


def _read_sliding_window(
    reader: FieldReader, family: Family, num_layers: int
) -> tuple[int | None, tuple[int, ...] | None]:
    """The window in tokens and the layers that have it (None: all of them)."""
    kinds = reader.value("layer_types")
    known = ("full_attention", "sliding_attention")
    if kinds is not None and (
        not isinstance(kinds, list) or len(kinds) != num_layers or any(kind not in known for kind in kinds)
    ):
        raise reader.error("layer_types", kinds, f"a list of {num_layers} names out of {', '.join(known)}")
    if family.window == "none":
        if isinstance(kinds, list) and "sliding_attention" in kinds:
            raise reader.error("layer_types", kinds, "full_attention everywhere in this architecture")
        return None, None
    absent = "sliding_window" not in reader.fields
    window = family.default_window if absent else reader.optional_count("sliding_window")
    if family.window == "all_layers":
        if isinstance(kinds, list) and len(set(kinds)) > 1:
            raise reader.error("layer_types", kinds, "the same everywhere in this architecture")
        return window, None
    if not reader.boolean("use_sliding_window", False):
        window = None
    if isinstance(kinds, list):
        layers = tuple(layer for layer, kind in enumerate(kinds) if kind == "sliding_attention")
        if layers and window is None:
            raise reader.error("layer_types", kinds, "full_attention everywhere, since the window is switched off")
    else:
        layers = tuple(range(reader.integer("max_window_layers", 28), num_layers))
    if window is None or not layers:
        return None, None
    return window, None if len(layers) == num_layers else layers
