"""plan_memory against the tensors of real modules and caches on every rank, and what it says where they do not fit."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest
import torch

from puna.config import LLaMAConfig
from puna.distributed import NullCommunicator
from puna.mapping import Mapping
from puna.models import MODELS
from puna.planning.memory_plan import Capacity, MemoryPlan, longest_context, plan_memory
from puna.runtime.kv_pool import KVPool

ALONE = Mapping()
CAPACITY = Capacity(max_model_len=1000, max_num_seqs=4, max_num_batched_tokens=64, block_size=16)
BLOCKS_EACH = 63  # of 16, for 1000 tokens
PLENTY = 1 << 40


def config_of(**options: Any) -> LLaMAConfig:
    chosen: dict[str, Any] = {
        "num_layers": 5,
        "num_heads": 8,
        "num_kv_heads": 2,
        "head_size": 16,
        "hidden_size": 96,
        "mlp_hidden_size": 160,
        "vocab_size": 640,
        "dtype": "bfloat16",
    }
    return LLaMAConfig(**(chosen | options))


class MetaCommunicator(NullCommunicator):
    """One rank of several; its tensors have shapes only."""

    def __init__(self, mapping: Mapping) -> None:
        super().__init__("meta")
        self.mapping = mapping


def held(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def bytes_of(plan: MemoryPlan) -> tuple[int, int, int]:
    return plan.weights, plan.workspace, plan.cache


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (4, 1), (1, 2), (1, 3), (2, 2)])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"tie_embeddings": True},
        {"architecture": "Qwen3ForCausalLM", "qk_norm": True},
        {"architecture": "Qwen2ForCausalLM", "attn_bias": True},
        {"architecture": "MixtralForCausalLM", "num_experts": 4, "experts_per_token": 2},
        {"architecture": "MistralForCausalLM", "sliding_window": 40},
        {"architecture": "Qwen3ForCausalLM", "qk_norm": True, "sliding_window": 40, "sliding_window_layers": (3, 4)},
    ],
    ids=["llama", "tied", "qwen3", "qwen2", "mixtral", "mistral", "mixed"],
)
def test_the_fullest_rank_holds_what_is_planned(options: dict[str, Any], tp: int, pp: int) -> None:
    config = config_of(**options)
    weights, caches = [], []
    plan = plan_memory(config, Mapping(tp_size=tp, pp_size=pp), CAPACITY, PLENTY)
    for rank in range(tp * pp):
        mapping = Mapping(tp_size=tp, pp_size=pp, rank=rank)
        assert plan_memory(config, mapping, CAPACITY, PLENTY) == plan
        comm = MetaCommunicator(mapping)
        with torch.device("meta"):
            model = MODELS[config.architecture](config, comm)
        weights.append(2 * sum(parameter.numel() for parameter in model.parameters()))
        pool = KVPool(config, comm, plan.num_blocks, CAPACITY.block_size)
        caches.append(held((*pool.key_caches, *pool.value_caches)))
    assert plan.cache == max(caches)
    # Never less than what is held. More only because the fullest stage of layers need not be one of the two ends.
    assert max(weights) <= plan.weights <= (1.02 if pp == 1 else 1.35) * max(weights)


def test_sums() -> None:
    plan = plan_memory(config_of(), ALONE, CAPACITY, PLENTY)
    assert plan.total == sum(bytes_of(plan))
    assert plan.num_blocks == (4 * BLOCKS_EACH + 1,)  # what all sequences can need at once, and the dummy
    assert plan.cache == plan.num_blocks[0] * 16 * (2 * 5 * 2 * 16) * 2
    wider = plan_memory(config_of(dtype="float32"), ALONE, CAPACITY, PLENTY)
    assert (wider.weights, wider.cache) == (2 * plan.weights, 2 * plan.cache)


def test_the_cache_takes_most_of_what_is_left() -> None:
    everything = plan_memory(config_of(), ALONE, CAPACITY, PLENTY)
    per_block = everything.cache // everything.num_blocks[0]
    available = everything.weights + everything.workspace + 100 * per_block
    plan = plan_memory(config_of(), ALONE, CAPACITY, available)
    assert plan.num_blocks == (80,)
    assert plan.total <= available


def test_kv_cache_memory_is_kept_to() -> None:
    per_block = plan_memory(config_of(), ALONE, CAPACITY, PLENTY).cache // (4 * BLOCKS_EACH + 1)
    budget = 100 * per_block + per_block // 2
    plan = plan_memory(config_of(), ALONE, CAPACITY, PLENTY, budget)
    assert plan.num_blocks == (100,)
    assert plan.cache <= budget
    # No more than can be used, however much is offered.
    assert plan_memory(config_of(), ALONE, CAPACITY, PLENTY, 1000 * per_block).num_blocks == (4 * BLOCKS_EACH + 1,)


MIXED = {"architecture": "Qwen2ForCausalLM", "sliding_window": 100, "sliding_window_layers": (1, 3, 4)}


@pytest.mark.parametrize("num_seqs", [1, 2, 7])
def test_a_mixed_cache(num_seqs: int) -> None:
    config, capacity = config_of(**MIXED), dataclasses.replace(CAPACITY, max_num_seqs=num_seqs)
    everything = plan_memory(config, ALONE, capacity, PLENTY)
    # For each sequence the window in blocks that are cut at both ends, and the tokens of one step.
    most = (num_seqs * BLOCKS_EACH + 1, num_seqs * (7 + 2) + 64 // 16 + 1)
    assert everything.num_blocks == most
    per_layer = 2 * 2 * 16 * 16 * 2
    assert everything.cache == per_layer * (2 * most[0] + 3 * most[1])
    least = per_layer * (2 * (BLOCKS_EACH + 1) + 3 * (9 + 4 + 1))
    for budget in range(least, everything.cache + 1, per_layer * 5):
        plan = plan_memory(config, ALONE, capacity, PLENTY, budget)
        assert plan.cache == per_layer * (2 * plan.num_blocks[0] + 3 * plan.num_blocks[1])
        # All of the budget but for less than a block in every layer.
        assert budget - 5 * per_layer < plan.cache <= budget
        # Enough for one sequence, and of neither less than if all layers had shared one table.
        shared = budget // (5 * per_layer)
        assert plan.num_blocks[0] >= max(BLOCKS_EACH + 1, min(shared, most[0]))
        assert plan.num_blocks[1] >= 9 + 4 + 1
        assert shared < BLOCKS_EACH + 1 or plan.num_blocks[1] >= min(shared, most[1])


@pytest.mark.parametrize("length", [20, 90, 400, 1000])
def test_windowed_layers_need_less(length: int) -> None:
    """One sequence's cache with all layers full, with three of five windowed, and with all of them windowed."""
    capacity = dataclasses.replace(CAPACITY, max_model_len=length, max_num_seqs=1)
    options = ({}, MIXED, {"architecture": "MistralForCausalLM", "sliding_window": 100})
    full, mixed, windowed = (plan_memory(config_of(**chosen), ALONE, capacity, PLENTY) for chosen in options)
    blocks = -(-length // 16)
    seen = min(blocks, 7 + 2 + 64 // 16)
    assert (full.num_blocks, mixed.num_blocks, windowed.num_blocks) == (
        (blocks + 1,),
        (blocks + 1, seen + 1),
        (seen + 1,),
    )
    assert windowed.cache == full.cache * (seen + 1) // (blocks + 1)
    assert 5 * mixed.cache == 2 * full.cache + 3 * windowed.cache


@pytest.mark.parametrize("options", [MIXED, {"architecture": "MistralForCausalLM", "sliding_window": 100}])
@pytest.mark.parametrize("num_blocks", [1, 2, 5, 9, 12])
def test_the_largest_context_counts_what_windows_save(options: dict[str, Any], num_blocks: int) -> None:
    """With a budget for so many blocks of every layer."""
    config, budget = config_of(**options), num_blocks * 5 * 2 * 2 * 16 * 16 * 2
    long = dataclasses.replace(CAPACITY, max_model_len=100_000)
    longest = longest_context(config, ALONE, long, budget)
    assert longest >= (num_blocks - 1) * 16  # what fits without a window
    with pytest.raises(ValueError, match=f"fits is {longest} tokens"):
        plan_memory(config, ALONE, long, PLENTY, budget)
    if longest == 0:
        return
    shorter = dataclasses.replace(long, max_model_len=longest, max_num_seqs=1)
    assert plan_memory(config, ALONE, shorter, PLENTY, budget).cache <= budget
    with pytest.raises(ValueError, match=f"fits is {longest} tokens"):
        plan_memory(config, ALONE, dataclasses.replace(shorter, max_model_len=longest + 1), PLENTY, budget)


def test_a_window_that_fits_fits_at_any_length() -> None:
    config = config_of(architecture="MistralForCausalLM", sliding_window=100)
    budget = (7 + 2 + 64 // 16 + 1) * 5 * 2 * 2 * 16 * 16 * 2
    long = dataclasses.replace(CAPACITY, max_model_len=1_000_000)
    assert longest_context(config, ALONE, long, budget) == 1_000_000
    assert plan_memory(config, ALONE, long, PLENTY, budget).cache == budget
    assert longest_context(config, ALONE, long, budget - 1) == 12 * 16
    # The layers that see everything set the length: 2 of 5 layers, beside the other three's blocks.
    mixed = longest_context(config_of(**MIXED), ALONE, long, 5 * budget)
    assert mixed == ((5 * budget - budget * 3 // 5) * 5 // 2 // (budget // 14) - 1) * 16


def test_kv_cache_memory_that_is_not_there() -> None:
    with pytest.raises(ValueError, match=r"kv_cache_memory is 2048\.00 GiB, .* only \d+\.\d\d GiB of 1024\.00 GiB"):
        plan_memory(config_of(), ALONE, CAPACITY, PLENTY, 2 * PLENTY)


def test_weights_that_do_not_fit() -> None:
    big = config_of(hidden_size=4096, mlp_hidden_size=16384, num_heads=32, head_size=128)
    with pytest.raises(ValueError, match=r"weights of 2\.\d\d GiB and a workspace of .* more than the 1\.00 GiB"):
        plan_memory(big, ALONE, CAPACITY, 1 << 30)


@pytest.mark.parametrize("budgeted", [True, False])
@pytest.mark.parametrize("blocks", [2, 40, BLOCKS_EACH])
def test_the_error_names_the_largest_context_that_fits(blocks: int, budgeted: bool) -> None:
    everything = plan_memory(config_of(), ALONE, CAPACITY, PLENTY)
    per_block = everything.cache // everything.num_blocks[0]
    if budgeted:
        available, budget = PLENTY, blocks * per_block
    else:
        available, budget = everything.weights + everything.workspace + -(-blocks * per_block * 5 // 4), None
    with pytest.raises(ValueError, match="the largest context that fits is") as caught:
        plan_memory(config_of(), ALONE, CAPACITY, available, budget)
    assert f"max_model_len is {CAPACITY.max_model_len}" in str(caught.value)
    found = re.search(r"largest context that fits is (\d+) tokens", str(caught.value))
    assert found is not None
    longest = int(found[1])
    assert longest == (blocks - 1) * 16

    def capacity(max_model_len: int) -> Capacity:
        return Capacity(max_model_len=max_model_len, max_num_seqs=1, max_num_batched_tokens=64, block_size=16)

    plan_memory(config_of(), ALONE, capacity(longest), available, budget)
    if budgeted:
        with pytest.raises(ValueError, match=f"fits is {longest} tokens"):
            plan_memory(config_of(), ALONE, capacity(longest + 1), available, budget)
