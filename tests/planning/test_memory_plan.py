"""plan_memory against the tensors of real modules and caches on every rank, and what it says where they do not fit."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from puna.config import LLaMAConfig
from puna.distributed import NullCommunicator
from puna.mapping import Mapping
from puna.models import MODELS
from puna.planning.memory_plan import Capacity, MemoryPlan, plan_memory
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
    ],
    ids=["llama", "tied", "qwen3", "qwen2", "mixtral"],
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
        pool = KVPool(config, comm, (plan.num_blocks,), CAPACITY.block_size)
        caches.append(held((*pool.key_caches, *pool.value_caches)))
    assert plan.cache == max(caches)
    # Never less than what is held. More only because the fullest stage of layers need not be one of the two ends.
    assert max(weights) <= plan.weights <= (1.02 if pp == 1 else 1.35) * max(weights)


def test_sums() -> None:
    plan = plan_memory(config_of(), ALONE, CAPACITY, PLENTY)
    assert plan.total == sum(bytes_of(plan))
    assert plan.num_blocks == 4 * BLOCKS_EACH + 1  # what all sequences can need at once, and the dummy
    assert plan.cache == plan.num_blocks * 16 * (2 * 5 * 2 * 16) * 2
    wider = plan_memory(config_of(dtype="float32"), ALONE, CAPACITY, PLENTY)
    assert (wider.weights, wider.cache) == (2 * plan.weights, 2 * plan.cache)


def test_the_cache_takes_most_of_what_is_left() -> None:
    everything = plan_memory(config_of(), ALONE, CAPACITY, PLENTY)
    per_block = everything.cache // everything.num_blocks
    available = everything.weights + everything.workspace + 100 * per_block
    plan = plan_memory(config_of(), ALONE, CAPACITY, available)
    assert plan.num_blocks == 80
    assert plan.total <= available


def test_kv_cache_memory_is_kept_to() -> None:
    per_block = plan_memory(config_of(), ALONE, CAPACITY, PLENTY).cache // (4 * BLOCKS_EACH + 1)
    budget = 100 * per_block + per_block // 2
    plan = plan_memory(config_of(), ALONE, CAPACITY, PLENTY, budget)
    assert plan.num_blocks == 100
    assert plan.cache <= budget
    # No more than can be used, however much is offered.
    assert plan_memory(config_of(), ALONE, CAPACITY, PLENTY, 1000 * per_block).num_blocks == 4 * BLOCKS_EACH + 1


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
    per_block = everything.cache // everything.num_blocks
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
