"""The same answer every time, in bits: a request's tokens and log-probabilities on the compiled kernels do not depend
on what else is in the batch, the threads, how its prompt was cut, prefix hits, preemption, padding or replay."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("puna._kernels")

from puna.llm import LLM
from puna.ops import cpu
from puna.scheduling.sampling_params import SamplingParams

# Dimensions with tails: hidden is no multiple of 32, the mlp no multiple of 64, heads are in groups of three.
SHAPE: dict[str, Any] = {
    "num_layers": 2,
    "num_heads": 6,
    "num_kv_heads": 2,
    "head_size": 20,
    "hidden_size": 72,
    "mlp_hidden_size": 96,
    "max_position_embeddings": 512,
}
ALONE: dict[str, Any] = {"enforce_eager": True, "enable_prefix_caching": False, "threads": 1, "max_num_seqs": 1}
TOGETHER: tuple[dict[str, Any], ...] = (
    {"threads": 2, "max_num_batched_tokens": 600, "max_num_seqs": 12},
    {"threads": 1, "max_num_batched_tokens": 17, "max_num_seqs": 5, "enable_prefix_caching": False},
    {"threads": 3, "max_num_batched_tokens": 64, "max_num_seqs": 12, "num_blocks": 24},
    {"threads": 8, "max_num_batched_tokens": 100, "max_num_seqs": 3, "enforce_eager": True},
)


@pytest.fixture
def restore() -> Iterator[None]:
    threads, level = cpu.threads(), cpu.level()
    yield
    cpu.set_threads(threads)
    if level is not None:
        cpu.set_level(level)


def requests(seed: int) -> tuple[list[dict[str, list[int]]], list[SamplingParams]]:
    """Prompts of 1 to 150 tokens, some of them continuations of others; greedy and seeded ones."""
    rng = random.Random(seed)
    prompts: list[list[int]] = []
    for i in range(12):
        own = [rng.randrange(2, 258) for _ in range(rng.choice((1, 2, 7, 16, 33, 60, 150)))]
        prompts.append(prompts[rng.randrange(i)][:96] + own if i % 3 == 2 else own)
    params = [
        SamplingParams(
            temperature=rng.choice((0.0, 1.0)), seed=i, max_tokens=rng.randrange(1, 24), ignore_eos=True, logprobs=3
        )
        for i in range(len(prompts))
    ]
    return [{"prompt_token_ids": prompt} for prompt in prompts], params


def answers(folder: Path, one_by_one: bool, seed: int, options: dict[str, Any]) -> list[Any]:
    options = dict(options)
    num_blocks = options.pop("num_blocks", None)
    if num_blocks is not None:
        with LLM(folder, **(options | {"max_model_len": 256, "kv_cache_memory": 1 << 24})) as probe:
            memory = probe.engine.parts.memory
            options["kv_cache_memory"] = memory.cache // memory.num_blocks[0] * num_blocks
    prompts, params = requests(seed)
    with LLM(folder, **(options | {"max_model_len": 256})) as llm:
        if one_by_one:
            outputs = [llm.generate(prompt, own)[0] for prompt, own in zip(prompts, params, strict=True)]
        else:
            outputs = llm.generate(prompts, params) + llm.generate(prompts, params)  # the second time from the cache
    return [(output.outputs[0].token_ids, output.outputs[0].logprobs) for output in outputs]


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "int8"])
@pytest.mark.parametrize("quantization", [None, "bf16", "int8", "int4"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bits_do_not_depend_on_the_company(
    make_folder: Callable[..., Path], restore: None, dtype: str, quantization: str | None, kv_cache_dtype: str
) -> None:
    folder = make_folder(**SHAPE)
    model = {"dtype": dtype, "quantization": quantization, "kv_cache_dtype": kv_cache_dtype}
    alone = answers(folder, True, 5, model | ALONE)
    assert len({tuple(tokens) for tokens, _ in alone}) > 6  # texts differ, or there would be nothing to see
    for options in TOGETHER:
        found = answers(folder, False, 5, model | options)
        assert found[: len(alone)] == alone, options
        assert found[len(alone) :] == alone, options


@pytest.mark.parametrize("level", cpu.levels())
@pytest.mark.parametrize(
    "options",
    [
        {"architecture": "Qwen3ForCausalLM", "qk_norm": True, "tie_embeddings": True},
        {"architecture": "MixtralForCausalLM", "num_experts": 4, "experts_per_token": 2},
        {"architecture": "MistralForCausalLM", "sliding_window": 24},
    ],
    ids=["qwen3", "mixtral", "mistral"],
)
def test_every_level_and_family(
    make_folder: Callable[..., Path], restore: None, options: dict[str, Any], level: str
) -> None:
    folder = make_folder(**(SHAPE | options))
    cpu.set_level(level)
    model = {"dtype": "bfloat16", "quantization": "int8"}
    alone = answers(folder, True, 6, model | ALONE)
    assert answers(folder, False, 6, model | TOGETHER[2])[: len(alone)] == alone
