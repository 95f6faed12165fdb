"""The LLaMA model: a decoder layer, the stack of them, and the language model on top (Touvron et al., 2023)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from collections.abc import Mapping as ReadOnlyDict
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from puna.config import GenerationConfig, LLaMAConfig
from puna.distributed import Communicator, NullCommunicator
from puna.layers.attention import Attention, Present
from puna.layers.embedding import Embedding
from puna.layers.linear import ColumnLinear, Segment
from puna.layers.mlp import FeedForward, GatedMLP
from puna.layers.norm import RmsNorm
from puna.layers.params import AttentionParams, KeyValueCacheParams
from puna.layers.pieces import Piece, PiecewiseModule, op_table, torch_dtype
from puna.layers.rotary import RotaryEmbedding
from puna.mapping import Mapping
from puna.models.generation_mixin import GenerationMixin
from puna.models.loading import ModelLoader
from puna.models.names import LLAMA_NAMES, NameMap
from puna.quantization import vocabulary_format

if TYPE_CHECKING:
    from typing_extensions import Self


class LLaMADecoderLayer(nn.Module):
    """Attention and a gated MLP, each on a normalised copy of the hidden states and added back to them.

    hidden_states [B, S, E] with position_ids [B, S], or packed [T, E] with [T]. Returns the hidden states, and with
    `use_cache` also the layer's present: keys and values [B, K, L, D] of all tokens so far.
    """

    def __init__(self, config: LLaMAConfig, layer_idx: int, comm: Communicator) -> None:
        super().__init__()
        self.input_layernorm = RmsNorm(config.hidden_size, config, comm)
        self.attention = Attention(config, layer_idx, comm)
        self.post_layernorm = RmsNorm(config.hidden_size, config, comm)
        self.mlp = self.build_mlp(config, comm)
        self.ops = op_table(config, comm)

    def build_mlp(self, config: LLaMAConfig, comm: Communicator) -> FeedForward:
        """The feed-forward part; a family with another kind overrides this."""
        return GatedMLP(config, comm)

    def forward(
        self,
        hidden_states: Tensor,
        position_ids: Tensor,
        attention_mask: Tensor | None = None,
        use_cache: bool = False,
        kv_cache_params: KeyValueCacheParams | None = None,
        attention_params: AttentionParams | None = None,
    ) -> Tensor | tuple[Tensor, Present]:
        normalized = self.input_layernorm(hidden_states, self.attention.qkv.input_scaling)
        attended, present = self.attention(normalized, position_ids, attention_mask, kv_cache_params, attention_params)
        hidden_states, normalized = self.post_layernorm.after_adding(hidden_states, attended, self.mlp.input_scaling)
        hidden_states = self.ops.add(hidden_states, self.mlp(normalized))
        return (hidden_states, present) if use_cache else hidden_states


class LLaMAModel(nn.Module):
    """This rank's part of the stack: the embedding on the first pipeline rank, its layers, the last norm on the last.

    Dense: input_ids [B, S], attention_mask [B, L] (true or 1 where a token is real, over cached and new tokens).
    Packed: input_ids [T] with position_ids [T], attention_params and a paged kv_cache_params.
    Ranks after the first take `hidden_states` instead of token ids. Returns hidden states, and with `use_cache` also
    the presents of the layers, to be passed back as `KeyValueCacheParams(past_key_value=presents)`.
    """

    layer_class: ClassVar[type[LLaMADecoderLayer]] = LLaMADecoderLayer

    def __init__(self, config: LLaMAConfig, comm: Communicator | None = None) -> None:
        super().__init__()
        self.config = config
        self.comm: Communicator = NullCommunicator() if comm is None else comm
        mapping = self.comm.mapping
        self.vocab_embedding = Embedding(config, self.comm) if mapping.is_first_pp_rank() else None
        self.layers = nn.ModuleList(
            self.layer_class(config, layer_idx, self.comm) for layer_idx in mapping.pp_layers(config.num_layers)
        )
        self.rotary = RotaryEmbedding(config)
        self.ln_f = RmsNorm(config.hidden_size, config, self.comm) if mapping.is_last_pp_rank() else None

    def set_cache_scales(self, scales: ReadOnlyDict[int, tuple[float, float]]) -> None:
        """What this rank's layers divide keys and values by before an FP8 cache holds them, by the layers' numbers in
        the whole model; 1 for those that are not named."""
        for layer_idx, layer in zip(self.comm.mapping.pp_layers(self.config.num_layers), self.layers, strict=True):
            assert isinstance(layer, LLaMADecoderLayer)
            layer.attention.cache_scales = scales.get(layer_idx, (1.0, 1.0))

    def forward(
        self,
        input_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        use_cache: bool = False,
        kv_cache_params: KeyValueCacheParams | None = None,
        attention_params: AttentionParams | None = None,
        hidden_states: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, list[Present]]:
        if self.vocab_embedding is not None:
            if input_ids is None:
                raise ValueError("the first pipeline rank embeds the tokens: pass input_ids")
            hidden_states = self.vocab_embedding(input_ids)
        elif hidden_states is None:
            raise ValueError("this pipeline rank does not embed: pass hidden_states from the rank before it")
        if attention_params is None:
            attention_mask = None if attention_mask is None else attention_mask.bool()
            position_ids = self._dense_positions(hidden_states, position_ids, attention_mask, kv_cache_params)
        elif position_ids is None or use_cache or attention_mask is not None:
            raise ValueError(
                "packed tokens need position_ids; their cache is the pool, so no use_cache or attention_mask"
            )
        elif attention_params.cos_sin is None:
            cos_sin = self.rotary(position_ids, attention_params.rotary_lengths)
            attention_params = dataclasses.replace(attention_params, cos_sin=cos_sin)

        presents: list[Present] = []
        for layer in self.layers:
            hidden_states = layer(
                hidden_states, position_ids, attention_mask, use_cache, kv_cache_params, attention_params
            )
            if use_cache:
                hidden_states, present = hidden_states
                presents.append(present)
        if self.ln_f is not None:
            hidden_states = self.ln_f(hidden_states)
        return (hidden_states, presents) if use_cache else hidden_states

    @staticmethod
    def _dense_positions(
        hidden_states: Tensor,
        position_ids: Tensor | None,
        attention_mask: Tensor | None,
        kv_cache_params: KeyValueCacheParams | None,
    ) -> Tensor:
        """The given positions, or else the count of real tokens before each one -> [B, S]."""
        batch, new = hidden_states.shape[:2]
        past = 0 if kv_cache_params is None else kv_cache_params.past_length
        if attention_mask is not None and attention_mask.shape != (batch, past + new):
            raise ValueError(
                f"attention_mask has the shape {tuple(attention_mask.shape)}: it must cover the {past} cached and "
                f"{new} new tokens of {batch} sequences, {(batch, past + new)}"
            )
        if position_ids is not None:
            return position_ids
        if attention_mask is not None:
            return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, past:]
        return torch.arange(past, past + new, device=hidden_states.device).expand(batch, new)


class LLaMAForCausalLM(LLaMAModel, GenerationMixin):
    """The language model: the stack with `lm_head` on the last pipeline rank, which returns logits.

    `forward` takes what LLaMAModel's does, and `last_token_ids`: the indices of the tokens whose logits are wanted, one
    for each sequence ([B], dense) or any rows of the packed tokens ([R]); None means all. Logits are in
    `config.logits_dtype`: [B, S, V] or [B, V], packed [T, V] or [R, V]. Other ranks return hidden states.
    """

    architecture: ClassVar[str] = "LlamaForCausalLM"
    names: ClassVar[NameMap] = LLAMA_NAMES

    def __init__(self, config: LLaMAConfig, comm: Communicator | None = None) -> None:
        super().__init__(config, comm)
        self.generation_config = GenerationConfig()
        self.lm_head: ColumnLinear | None = None
        if self.comm.mapping.is_last_pp_rank():
            vocabulary = (Segment("", config.vocab_size, padded=True),)
            head_config = dataclasses.replace(config, quant=vocabulary_format(config.quant))
            self.lm_head = ColumnLinear(
                config.hidden_size, vocabulary, False, head_config, self.comm, gather_output=True
            )
        self.tie_weights()

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        dtype: str | torch.dtype | None = None,
        device: torch.device | str = "cpu",
        mapping: Mapping | None = None,
        comm: Communicator | None = None,
    ) -> Self:
        """Loads a checkpoint of this class's architecture; see `puna.load_model` for the arguments and errors."""
        return ModelLoader(cls, path, dtype, device, mapping, comm).load()

    def tie_weights(self) -> None:
        """Makes `lm_head` share the embedding's weight where the config says so and both are on this rank."""
        if self.config.tie_embeddings and self.lm_head is not None and self.vocab_embedding is not None:
            self.lm_head.share_weight(self.vocab_embedding)

    def forward(  # type: ignore[override]  # last_token_ids stands where the API that this follows has it
        self,
        input_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        use_cache: bool = False,
        last_token_ids: Tensor | None = None,
        kv_cache_params: KeyValueCacheParams | None = None,
        attention_params: AttentionParams | None = None,
        hidden_states: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, list[Present]]:
        result = super().forward(
            input_ids, position_ids, attention_mask, use_cache, kv_cache_params, attention_params, hidden_states
        )
        output, presents = result if isinstance(result, tuple) else (result, None)
        if self.lm_head is not None:
            rows = last_token_ids
            if rows is not None and attention_params is None:
                rows = torch.arange(len(output)) * output.shape[1] + rows
            output = self.logits(output, rows)
        return output if presents is None else (output, presents)

    def logits(self, hidden_states: Tensor, rows: Tensor | None = None) -> Tensor:
        """Logits [..., V] of hidden states [..., E] that the last norm has passed; with `rows` [R], of these tokens of
        all, [R, V]. On the last pipeline rank only."""
        assert self.lm_head is not None
        if rows is not None:
            hidden_states = self.lm_head.ops.embedding(rows, hidden_states.flatten(0, -2))
        logits: Tensor = self.lm_head(hidden_states, torch_dtype(self.config.logits_dtype))
        return logits

    def pieces(self) -> Iterator[tuple[str, Piece]]:
        """This rank's pieces of a checkpoint, each with the name that Hugging Face gives it."""
        first_layer = self.comm.mapping.pp_layers(self.config.num_layers).start
        for path, module in self.named_modules():
            if not isinstance(module, PiecewiseModule):
                continue
            if path.startswith("layers."):
                _, local, rest = path.split(".", 2)
                path = f"layers.{first_layer + int(local)}.{rest}"
            elif module is self.lm_head and self.config.tie_embeddings:
                if self.vocab_embedding is not None:
                    continue
                path = "vocab_embedding"
            for piece in module.pieces():
                yield self.names.checkpoint_name(f"{path}.{piece.name}"), piece
