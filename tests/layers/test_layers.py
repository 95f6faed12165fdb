"""Layers by themselves: as plain PyTorch modules that train, cast, move and say what is wrong."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from puna.config import LLaMAConfig, RotaryScaling
from puna.distributed import NullCommunicator
from puna.layers.attention import Attention
from puna.layers.embedding import Embedding
from puna.layers.linear import ColumnLinear, Segment
from puna.layers.params import KeyValueCacheParams
from puna.layers.rotary import RotaryEmbedding
from puna.mapping import Mapping
from puna.models.llama import LLaMADecoderLayer, LLaMAForCausalLM, LLaMAModel
from puna.models.loading import save_model
from puna.quantization import GroupQuantized, WeightFormat, weight_format
from puna.runtime.kv_pool import KVPool
from puna.runtime.step_buffers import StepBuffers, StepInputs
from puna.scheduling.step_plan import StepPlan, StepRow

SMALL: dict[str, Any] = {
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_size": 8,
    "hidden_size": 32,
    "mlp_hidden_size": 40,
    "vocab_size": 61,
    "max_position_embeddings": 64,
}
CONFIG = LLaMAConfig(**SMALL)
TOKENS = torch.randint(0, 61, (2, 12), generator=torch.Generator().manual_seed(0))


def test_a_new_model_has_sound_random_weights() -> None:
    model = LLaMAForCausalLM(CONFIG)
    with torch.no_grad():
        logits = model(TOKENS)
    assert logits.shape == (2, 12, 61)
    assert logits.isfinite().all()
    assert logits.std() > 1e-3


@dataclass
class _SecondOfTwo(NullCommunicator):
    mapping: Mapping = field(default_factory=lambda: Mapping(tp_size=2, rank=1))
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))


@pytest.mark.parametrize("vocabulary", ["embedding", "head"])
@pytest.mark.parametrize(("form", "zero"), [("int8", 128), ("int4-min", 0)])
def test_padded_rows_of_codes_are_not_rounded_anew(vocabulary: str, form: str, zero: int) -> None:
    """The second of two ranks has 30 rows of 61 and one that is padding; scales that float16 holds stay as they are."""
    config = LLaMAConfig(**SMALL, quant="stored")
    random = torch.Generator().manual_seed(1)
    codes = torch.randint(0, 16, (30, 32), dtype=torch.uint8, generator=random)
    scales, minimums = torch.rand(30, 1, generator=random).half().float(), torch.full((30, 1), -0.25)
    quantized = GroupQuantized(codes, scales, minimums if form.endswith("min") else None, zero, 32)
    layer: Embedding | ColumnLinear
    if vocabulary == "embedding":
        layer = Embedding(config, _SecondOfTwo())
    else:
        layer = ColumnLinear(32, (Segment("", 61, padded=True),), False, config, _SecondOfTwo())
    (piece,) = layer.pieces()
    assert piece.source == (slice(31, 61), slice(0, 32))
    assert piece.store_as is not None
    assert piece.write_quantized is not None
    piece.store_as(form)
    piece.write_quantized(quantized)
    assert torch.equal(piece.read(), quantized.dequantize())
    form_of, weights = (layer.format, layer.weights()) if isinstance(layer, Embedding) else _only_part(layer)
    assert not form_of.read(weights, slice(30, 31)).any()


def _only_part(layer: ColumnLinear) -> tuple[WeightFormat, dict[str, torch.nn.Parameter]]:
    (part,) = layer.parts
    return part.format, {own: layer.get_parameter(name) for own, name in part.names.items()}


def test_a_layer_runs_by_itself() -> None:
    layer = LLaMADecoderLayer(CONFIG, 1, NullCommunicator())
    hidden, positions = torch.randn(2, 5, 32), torch.arange(5).expand(2, 5)
    output = layer(hidden, positions)
    assert output.shape == hidden.shape
    again, (key, value) = layer(hidden, positions, use_cache=True)
    assert torch.equal(again, output)
    assert key.shape == value.shape == (2, 2, 5, 8)


def test_gradients_equal_those_of_transformers(tmp_path: Any) -> None:
    """Cross-entropy through the dense path, padded batch included, gives the same gradient to every weight."""
    torch.manual_seed(0)
    ours = LLaMAForCausalLM(LLaMAConfig(**SMALL, attn_bias=True, attn_output_bias=True))
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.normal_(std=0.3)
    save_model(ours, tmp_path)
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    mask = torch.ones_like(TOKENS)
    mask[1, 9:] = 0

    def loss(logits: Tensor) -> Tensor:
        labels = TOKENS.masked_fill(mask == 0, -100)[:, 1:]
        return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels.flatten())

    our_loss, their_loss = loss(ours(TOKENS, attention_mask=mask)), loss(theirs(TOKENS, attention_mask=mask).logits)
    our_loss.backward()
    their_loss.backward()
    torch.testing.assert_close(our_loss, their_loss)
    their_grads = dict(theirs.named_parameters())
    for path, module in ours.named_modules():
        if path.endswith("attention.qkv"):
            hugging_face = path.replace("attention.qkv", "self_attn")
            expected = torch.cat([their_grads[f"model.{hugging_face}.{p}_proj.weight"].grad for p in "qkv"])
            torch.testing.assert_close(module.weight.grad, expected, rtol=1e-4, atol=1e-6)
    for name, parameter in (("vocab_embedding", "model.embed_tokens"), ("lm_head", "lm_head"), ("ln_f", "model.norm")):
        grad = ours.get_submodule(name).weight.grad
        torch.testing.assert_close(grad, their_grads[f"{parameter}.weight"].grad, rtol=1e-4, atol=1e-6)
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in ours.parameters())


def test_a_few_steps_of_plain_pytorch_learn() -> None:
    torch.manual_seed(0)
    model = LLaMAForCausalLM(CONFIG)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        loss = torch.nn.functional.cross_entropy(model(TOKENS)[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 4


def test_state_dict_round_trip() -> None:
    one, other = LLaMAForCausalLM(CONFIG), LLaMAForCausalLM(CONFIG)
    assert "layers.1.attention.qkv.weight" in one.state_dict()
    other.load_state_dict(one.state_dict())
    with torch.no_grad():
        assert torch.equal(one(TOKENS), other(TOKENS))


def test_tied_embeddings_share_their_storage_and_gradient() -> None:
    model = LLaMAForCausalLM(LLaMAConfig(**SMALL, tie_embeddings=True))
    assert model.lm_head.weight is model.vocab_embedding.weight
    assert model.lm_head.weight is not LLaMAForCausalLM(CONFIG).vocab_embedding.weight
    assert copy.deepcopy(model).lm_head.weight is not model.vocab_embedding.weight


def test_a_cast_keeps_the_rotary_frequencies() -> None:
    model = LLaMAForCausalLM(CONFIG)
    before = model.rotary(torch.tensor([50]))
    after = model.to(torch.bfloat16).rotary(torch.tensor([50]))
    assert torch.equal(before[0], after[0])
    assert torch.equal(before[1], after[1])


def test_last_token_ids_pick_rows() -> None:
    model = LLaMAForCausalLM(CONFIG)
    with torch.no_grad():
        whole = model(TOKENS)
        picked = model(TOKENS, last_token_ids=torch.tensor([11, 4]))
    torch.testing.assert_close(picked, torch.stack((whole[0, 11], whole[1, 4])))


def test_logits_dtype() -> None:
    config = LLaMAConfig(**SMALL, dtype="bfloat16", logits_dtype="bfloat16")
    assert LLaMAForCausalLM(config)(TOKENS).dtype == torch.bfloat16
    assert LLaMAForCausalLM(LLaMAConfig(**SMALL, dtype="bfloat16"))(TOKENS).dtype == torch.float32


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "pass input_ids"),
        ({"input_ids": TOKENS, "attention_mask": torch.ones(2, 11)}, "attention_mask has the shape \\(2, 11\\)"),
    ],
)
def test_bad_dense_calls(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        LLaMAModel(CONFIG)(**arguments)


def packed_inputs() -> StepInputs:
    row = StepRow(sequence_id=0, first_position=0, token_ids=(1, 2, 3), block_ids=((0,),), prompt_length=3)
    return StepBuffers(3, 1, 1, block_size=4).fill(StepPlan((row,)))


def test_bad_packed_calls() -> None:
    model, inputs = LLaMAModel(CONFIG), packed_inputs()
    pool = KVPool(CONFIG, model.comm, (1,), 4).params()
    with pytest.raises(ValueError, match="packed tokens need position_ids"):
        model(inputs.input_ids, attention_params=inputs.attention_params, kv_cache_params=pool)
    with pytest.raises(ValueError, match="no use_cache or attention_mask"):
        model(inputs.input_ids, inputs.position_ids, use_cache=True, attention_params=inputs.attention_params)
    with pytest.raises(ValueError, match="pass kv_cache_params with key_caches"):
        model(inputs.input_ids, inputs.position_ids, attention_params=inputs.attention_params)
    past = KeyValueCacheParams(past_key_value=[])
    with pytest.raises(ValueError, match="pass kv_cache_params with key_caches"):
        model(inputs.input_ids, inputs.position_ids, attention_params=inputs.attention_params, kv_cache_params=past)


def test_bad_plans_and_pools() -> None:
    with pytest.raises(ValueError, match="nothing to run"):
        StepBuffers(8, 2, 2, 4).fill(StepPlan(()))
    row = StepRow(sequence_id=8, first_position=3, token_ids=(1, 2), block_ids=((0,),), prompt_length=3)
    with pytest.raises(ValueError, match="sequence 8 has 5 tokens, but its 1 blocks hold 4"):
        StepBuffers(8, 2, 2, 4).fill(StepPlan((row,)))
    with pytest.raises(ValueError, match=r"num_blocks is \(0,\)"):
        KVPool(CONFIG, NullCommunicator(), (0,))


def test_a_length_dependent_rotary_needs_lengths() -> None:
    scaling = RotaryScaling(type="dynamic", factor=2.0)
    rotary = RotaryEmbedding(LLaMAConfig(**SMALL, rotary_scaling=scaling))
    with pytest.raises(ValueError, match="pass `lengths`"):
        rotary(torch.arange(3))


def test_attention_by_itself_equals_attention_in_packed_form_without_prepared_angles() -> None:
    torch.manual_seed(0)
    attention, inputs = Attention(CONFIG, 0, NullCommunicator()), packed_inputs()
    hidden = torch.randn(3, 32)
    with torch.no_grad():
        dense, _ = attention(hidden[None], inputs.position_ids[None])
        packed, present = attention(
            hidden,
            inputs.position_ids,
            kv_cache_params=KVPool(CONFIG, NullCommunicator(), (1,), 4).params(),
            attention_params=inputs.attention_params,
        )
    assert present is None
    torch.testing.assert_close(packed, dense[0])


def test_segments_of_a_fused_layer_are_pieces_of_their_own() -> None:
    linear = ColumnLinear(6, (Segment("gate", 4), Segment("up", 4)), True, CONFIG, NullCommunicator())
    assert [piece.name for piece in linear.pieces()] == ["gate.weight", "gate.bias", "up.weight", "up.bias"]
    up = torch.randn(4, 6)
    linear.pieces()[2].write(up)
    assert torch.equal(linear.weight[4:], up)
    assert torch.equal(linear.pieces()[2].read(), up)


def test_unknown_weight_format() -> None:
    with pytest.raises(ValueError, match="weight format 'int3' is not known"):
        weight_format("int3", torch.float32, 8, 8)
