"""A model in FP8 with an FP8 cache on the Triton kernels, against the reference ops."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from puna import ops
from puna.config import LLaMAConfig
from puna.distributed import NullCommunicator
from puna.layers import pieces
from puna.layers.params import AttentionParams, CacheTables
from puna.models import LLaMAForCausalLM, load_model
from puna.models.random_weights import random_checkpoint
from puna.ops.scaled import FP8
from puna.runtime.kv_pool import KVPool

CONFIG = LLaMAConfig(
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    head_size=64,
    hidden_size=160,
    mlp_hidden_size=192,
    vocab_size=97,
    max_position_embeddings=64,
    dtype="bfloat16",
)
BLOCK = 16
# Two prompts, then one more token of each.
PROMPTS = ((3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2), (27, 18))
NEXT = (14, 15)


def model_on(device: torch.device, monkeypatch: pytest.MonkeyPatch, *backends: ops.Backend) -> LLaMAForCausalLM:
    monkeypatch.setattr(pieces, "dense_layout", lambda device: "rows")
    monkeypatch.setattr(ops, "backends_for", lambda device: (*backends, ops.ReferenceBackend()))
    model = load_model(random_checkpoint(CONFIG), device=device, quantization="fp8")
    model.set_cache_scales({0: (0.01, 0.02)})
    return model


@torch.no_grad()
def logits(model: LLaMAForCausalLM, device: torch.device) -> Tensor:
    """Of all tokens of the prompts, and of the next ones."""
    pool = KVPool(CONFIG, NullCommunicator(device), (6,), BLOCK, "fp8")
    tables = torch.tensor([[5, 1], [2, 3]], dtype=torch.int32, device=device)
    lengths = [len(prompt) for prompt in PROMPTS]

    def step(tokens: list[int], positions: list[list[int]]) -> Tensor:
        starts = torch.tensor([0, *(len(one) for one in positions)]).cumsum(0)
        slots = [tables[b, p // BLOCK].item() * BLOCK + p % BLOCK for b, one in enumerate(positions) for p in one]
        params = AttentionParams(
            query_starts=starts.to(device, torch.int32),
            sequence_lengths=torch.tensor([one[-1] + 1 for one in positions], dtype=torch.int32, device=device),
            cache_tables=(CacheTables(tables, torch.tensor(slots, device=device)),),
            rotary_lengths=torch.zeros(len(tokens), dtype=torch.int64, device=device),
        )
        flat = torch.tensor([p for one in positions for p in one], device=device)
        ids = torch.tensor(tokens, device=device)
        found: Tensor = model(ids, flat, attention_params=params, kv_cache_params=pool.params())
        return found.float().cpu()

    prompts = step([token for prompt in PROMPTS for token in prompt], [list(range(length)) for length in lengths])
    return torch.cat((prompts, step(list(NEXT), [[length] for length in lengths])))


def test_logits_are_those_of_the_reference(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    exact = load_model(random_checkpoint(CONFIG), dtype="float32")
    with torch.no_grad():
        whole = [exact(torch.tensor([[*prompt, token]]))[0] for prompt, token in zip(PROMPTS, NEXT, strict=True)]
    wanted = torch.cat([*(one[:-1] for one in whole), *(one[-1:] for one in whole)])
    model = model_on(device, monkeypatch, ops.TritonBackend())
    assert {p.dtype for p in model.layers[0].parameters()} == {FP8, torch.float32, torch.bfloat16}
    got = logits(model, device)
    reference = logits(model_on(torch.device("cpu"), monkeypatch), torch.device("cpu"))
    # Where sums differ in their last bit, an input now and then goes to FP8's next number: a sixteenth of it.
    assert (got - reference).norm() / wanted.norm() < 0.04
    errors = [float((one - wanted).norm() / wanted.norm()) for one in (got, reference)]
    assert errors[0] < 1.1 * errors[1]
    assert 0.01 < errors[1] < 0.15
