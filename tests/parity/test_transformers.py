"""Logits and greedy tokens of every family and option equal those of transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from puna.layers.params import KeyValueCacheParams
from puna.models import LLaMAForCausalLM, load_model
from puna.runtime.kv_pool import KVPool
from puna.runtime.step_buffers import StepBuffers
from puna.scheduling.step_plan import StepPlan, StepRow

BLOCK_SIZE = 4


def tokens_for(oracle: Any, *shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, oracle.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def assert_close(ours: Tensor, theirs: Tensor, tolerance: float = 2e-5) -> None:
    assert ours.shape == theirs.shape
    error = ((ours.float() - theirs).abs().max() / theirs.abs().max()).item()
    assert error <= tolerance, f"largest difference {error:.2e} of the largest logit"


class PackedRunner:
    """Runs sequences through the packed path, each in its own shuffled blocks of one pool."""

    def __init__(self, model: LLaMAForCausalLM, lengths: list[int]) -> None:
        counts = [-(-length // BLOCK_SIZE) for length in lengths]
        shuffled = torch.randperm(sum(counts), generator=torch.Generator().manual_seed(1)).tolist()
        self.blocks = [tuple(shuffled[sum(counts[:i]) : sum(counts[: i + 1])]) for i in range(len(counts))]
        self.model = model
        num_windows = len(model.config.windows)
        self.pool = KVPool(model.config, model.comm, (sum(counts),) * num_windows, BLOCK_SIZE)
        self.buffers = StepBuffers(sum(lengths), len(lengths), max(counts), BLOCK_SIZE, num_windows=num_windows)

    @torch.no_grad()
    def step(self, rows: list[tuple[int, int, list[int], int]]) -> Tensor:
        """rows of (sequence, first position, tokens, prompt length) -> logits of all their tokens [T, V]."""
        plan = StepPlan(
            tuple(
                StepRow(
                    sequence_id=sequence,
                    first_position=first,
                    token_ids=tuple(tokens),
                    block_ids=(self.blocks[sequence],) * len(self.model.config.windows),
                    prompt_length=prompt_length,
                )
                for sequence, first, tokens, prompt_length in rows
            )
        )
        inputs = self.buffers.fill(plan)
        return self.model(
            inputs.input_ids,
            inputs.position_ids,
            kv_cache_params=self.pool.params(),
            attention_params=inputs.attention_params,
        )


def test_dense(oracle: Any) -> None:
    tokens = tokens_for(oracle, 3, 37)
    with torch.no_grad():
        logits = load_model(oracle.folder)(tokens)
    assert_close(logits, oracle.logits(tokens))


@pytest.mark.parametrize("chunks", [[21, *[1] * 16], [5, 1, 17, 14], [1] * 37], ids=["decode", "chunks", "singles"])
def test_dense_with_cache(oracle: Any, chunks: list[int]) -> None:
    tokens = tokens_for(oracle, 2, 37)
    model, cache, parts = load_model(oracle.folder), None, []
    with torch.no_grad():
        for chunk in tokens.split(chunks, dim=1):
            logits, presents = model(chunk, use_cache=True, kv_cache_params=cache)
            cache = KeyValueCacheParams(past_key_value=presents)
            parts.append(logits)
    assert_close(torch.cat(parts, dim=1), oracle.cached_logits(tokens, chunks))
    if not oracle.case.length_dependent:
        assert_close(torch.cat(parts, dim=1), oracle.logits(tokens))


def test_packed_in_one_piece(oracle: Any) -> None:
    lengths = [37, 1, 16, 29]
    sequences = [tokens_for(oracle, length, seed=length) for length in lengths]
    runner = PackedRunner(load_model(oracle.folder), lengths)
    logits = runner.step([(i, 0, s.tolist(), len(s)) for i, s in enumerate(sequences)])
    for part, sequence in zip(logits.split(lengths), sequences, strict=True):
        assert_close(part, oracle.logits(sequence[None])[0])


def test_packed_in_chunks_of_mixed_steps(oracle: Any) -> None:
    """Prompts in chunks beside tokens that come after prompts give what whole prompts and then single tokens give."""
    prompts, total = [30, 7, 19], [37, 25, 23]
    sequences = [tokens_for(oracle, length, seed=length) for length in total]
    expected = [
        oracle.cached_logits(s[None], [prompt, *[1] * (len(s) - prompt)])[0]
        for s, prompt in zip(sequences, prompts, strict=True)
    ]
    runner = PackedRunner(load_model(oracle.folder), total)
    done, found = [0, 0, 0], [[], [], []]
    generator = torch.Generator().manual_seed(3)
    while done != total:
        rows = []
        for i, sequence in enumerate(sequences):
            if done[i] < total[i]:
                left = prompts[i] - done[i]
                size = int(torch.randint(1, min(left, 9) + 1, (), generator=generator)) if left > 0 else 1
                rows.append((i, done[i], sequence[done[i] : done[i] + size].tolist(), prompts[i]))
        for part, row in zip(runner.step(rows).split([len(row[2]) for row in rows]), rows, strict=True):
            found[row[0]].append(part)
            done[row[0]] += len(row[2])
    for ours, theirs in zip(found, expected, strict=True):
        assert_close(torch.cat(ours), theirs)


def test_bfloat16(oracle: Any) -> None:
    tokens = tokens_for(oracle, 1, 37)
    theirs = oracle.logits(tokens, torch.bfloat16)[0]
    model = load_model(oracle.folder, dtype="bfloat16")
    assert model.ln_f.weight.dtype == torch.bfloat16
    with torch.no_grad():
        dense = model(tokens)[0]
    packed = PackedRunner(model, [37]).step([(0, 0, tokens[0].tolist(), 37)])
    tolerance = 2e-2 * theirs.abs().max()
    best_two = theirs.topk(2, dim=-1).values
    clear = best_two[:, 0] - best_two[:, 1] > tolerance
    assert clear.any()
    for ours in (dense, packed):
        assert_close(ours, theirs, 2e-2)
        assert torch.equal(ours.argmax(-1)[clear], theirs.argmax(-1)[clear])


def test_greedy_tokens(oracle: Any) -> None:
    """48 tokens after prompts of 20: dense generation, and packed steps, give what transformers gives."""
    prompts = tokens_for(oracle, 2, 20, seed=5)
    expected = (
        type(oracle.model)
        .from_pretrained(oracle.folder)
        .generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=48,
            do_sample=False,
            # Where it makes no difference, no cache: transformers' cache for a window of one token keeps all of them.
            use_cache=oracle.case.length_dependent,
        )
    )
    model = load_model(oracle.folder)
    assert torch.equal(model.generate(prompts, max_new_tokens=48), expected)

    runner = PackedRunner(model, [68, 68])
    rows = [(i, 0, prompt.tolist(), 20) for i, prompt in enumerate(prompts)]
    for position in range(20, 68):
        logits = runner.step(rows)
        ends = torch.tensor([len(row[2]) for row in rows]).cumsum(0) - 1
        chosen = logits[ends].argmax(-1)
        assert torch.equal(chosen, expected[:, position])
        rows = [(i, position, [int(token)], 20) for i, token in enumerate(chosen)]
