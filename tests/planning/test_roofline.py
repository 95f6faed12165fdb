"""The least work of a step, against sums written out by hand, and the limits that turn it into seconds."""

from __future__ import annotations

import dataclasses

import pytest

from puna.config import LLaMAConfig
from puna.planning.memory import parameter_counts
from puna.planning.roofline import MachineLimit, Work, decode_work, prefill_work

SMALL = LLaMAConfig(
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_size=8,
    hidden_size=32,
    mlp_hidden_size=48,
    vocab_size=100,
    dtype="bfloat16",
)
# q, k, v and the output projection; gate, up and down; twice.
LAYERS = 2 * (32 * (32 + 16 + 16 + 32) + 3 * 32 * 48)
HEAD = 100 * 32
NORMS = 5 * 32


def dense_bytes(config: LLaMAConfig) -> int:
    return 2 * parameter_counts(config).total


def test_decode_by_hand() -> None:
    work = decode_work(SMALL, dense_bytes(SMALL), batch=3, context=10)
    cache = 3 * 10 * (2 * 2 * 2 * 8) * 2  # sequences, tokens, layers x (key, value) x heads x size, bytes
    assert work.bytes_read == pytest.approx(2 * (LAYERS + HEAD + NORMS) + cache)
    attention = 3 * 2 * 10 * 4 * 4 * 8  # sequences, layers, tokens seen, operations a pair and number, heads x size
    assert work.operations == {"bfloat16": 2 * 3 * (LAYERS + HEAD) + attention}


def test_an_int8_cache_has_a_scale_beside_each_head() -> None:
    plain, small = (decode_work(SMALL, 0, batch=3, context=10, kv_cache_dtype=kind) for kind in ("auto", "int8"))
    assert plain.bytes_read == pytest.approx(3 * 10 * (2 * 2 * 2 * 8) * 2)
    assert small.bytes_read == pytest.approx(3 * 10 * (2 * 2 * 2) * (8 + 4))


def test_prefill_by_hand() -> None:
    work = prefill_work(SMALL, dense_bytes(SMALL), batch=2, prompt_tokens=5)
    attention = 2 * 2 * (1 + 2 + 3 + 4 + 5) * 4 * 4 * 8
    assert work.operations == {"bfloat16": 2 * (2 * 5 * LAYERS + 2 * HEAD) + attention}
    assert work.bytes_read == pytest.approx(2 * (LAYERS + HEAD + NORMS))


def test_a_tied_embedding_is_read_as_the_head() -> None:
    tied = dataclasses.replace(SMALL, tie_embeddings=True)
    untied, same = (decode_work(config, dense_bytes(config), 1, 1) for config in (SMALL, tied))
    assert same.bytes_read == pytest.approx(untied.bytes_read)
    assert same.operations == untied.operations


def test_codes_are_multiplied_as_int8_and_attention_is_not() -> None:
    weights = parameter_counts(SMALL).total * 9 // 16
    work = decode_work(SMALL, weights, 1, 10)
    assert work.operations == {"int8": 2 * (LAYERS + HEAD), "bfloat16": 2 * 10 * 4 * 4 * 8}
    assert work.bytes_read < decode_work(SMALL, dense_bytes(SMALL), 1, 10).bytes_read / 2


def test_a_window_bounds_what_is_seen() -> None:
    windowed = dataclasses.replace(SMALL, sliding_window=4, sliding_window_layers=(1,))
    work = prefill_work(windowed, dense_bytes(SMALL), 1, 6)
    seen = (1 + 2 + 3 + 4 + 5 + 6) + (1 + 2 + 3 + 4 + 4 + 4)
    assert work.operations["bfloat16"] == 2 * (6 * LAYERS + HEAD) + seen * 4 * 4 * 8


def test_experts_are_read_as_far_as_tokens_reach_them() -> None:
    config = dataclasses.replace(
        SMALL, architecture="MixtralForCausalLM", num_experts=4, experts_per_token=1, num_kv_heads=4
    )
    experts = 2 * 2 * 4 * 3 * 32 * 48  # bytes, layers, experts, matrices
    cache = 2 * 2 * 2 * 32
    one, two, many = (decode_work(config, dense_bytes(config), batch, 1).bytes_read for batch in (1, 2, 1000))
    assert two - one == pytest.approx(experts * (1 / 4) * (3 / 4) + cache)
    assert many - one == pytest.approx(experts * 3 / 4 + cache * 999)


def test_the_slower_of_reading_and_computing_counts() -> None:
    limit = MachineLimit(read_bandwidth=100.0, operations={"int8": 50.0, "float32": 10.0})
    assert limit.least_seconds(Work(bytes_read=1000, operations={"int8": 100, "float32": 20})) == 10
    assert limit.least_seconds(Work(bytes_read=100, operations={"int8": 100, "float32": 20})) == 4
