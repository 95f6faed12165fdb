"""NameMap: from our names of weights to those in Hugging Face checkpoints."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class NameMap:
    """Substitutions of dotted parts, applied one after another to a name such as "layers.3.attention.qkv.q.weight"."""

    rules: tuple[tuple[str, str], ...]

    def checkpoint_name(self, name: str) -> str:
        dotted = f".{name}"
        for ours, theirs in self.rules:
            dotted = dotted.replace(ours, theirs)
        return dotted.removeprefix(".")


LLAMA_NAMES = NameMap(
    (
        (".vocab_embedding.", ".model.embed_tokens."),
        (".layers.", ".model.layers."),
        (".ln_f.", ".model.norm."),
        (".attention.qkv.q.", ".self_attn.q_proj."),
        (".attention.qkv.k.", ".self_attn.k_proj."),
        (".attention.qkv.v.", ".self_attn.v_proj."),
        (".attention.dense.", ".self_attn.o_proj."),
        (".attention.q_norm.", ".self_attn.q_norm."),
        (".attention.k_norm.", ".self_attn.k_norm."),
        (".post_layernorm.", ".post_attention_layernorm."),
        (".mlp.gate_up.gate.", ".mlp.gate_proj."),
        (".mlp.gate_up.up.", ".mlp.up_proj."),
        (".mlp.proj.", ".mlp.down_proj."),
    )
)
