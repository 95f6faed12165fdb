"""packed_ops beside the ops that a step of prompts and one of single tokens really call."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch

from puna import ops
from puna.config import LLaMAConfig
from puna.distributed import NullCommunicator
from puna.layers import pieces
from puna.models import model_loader
from puna.models.packed_ops import packed_ops
from puna.models.random_weights import random_checkpoint
from puna.runtime.kv_pool import KVPool
from puna.runtime.step_buffers import StepBuffers
from puna.scheduling.step_plan import StepPlan, StepRow

SHAPE: dict[str, Any] = {
    "num_layers": 2,
    "num_heads": 2,
    "num_kv_heads": 1,
    "head_size": 16,
    "hidden_size": 64,
    "mlp_hidden_size": 96,
    "vocab_size": 61,
    "max_position_embeddings": 32,
    "dtype": "bfloat16",
}
EXPERTS: dict[str, Any] = {"architecture": "MixtralForCausalLM", "num_experts": 3, "experts_per_token": 2}
QWEN3: dict[str, Any] = {"architecture": "Qwen3ForCausalLM", "qk_norm": True, "tie_embeddings": True}


@pytest.mark.parametrize("options", [{}, QWEN3, EXPERTS], ids=["llama", "qwen3", "mixtral"])
@pytest.mark.parametrize(
    ("layout", "quantization"),
    [("panels", "stored"), ("panels", "int8"), ("rows", "stored"), ("rows", "int4"), ("rows", "fp8")],
)
def test_they_are_what_is_called(
    layout: Literal["panels", "rows"], quantization: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    called: set[str] = set()

    def recorded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            called.add(name)
            return function(*arguments)

        return call

    def table(spec: ops.OpSpec) -> ops.OpTable:
        found = ops.table(spec)
        return dataclasses.replace(found, **{name: recorded(name, getattr(found, name)) for name in ops.OP_NAMES})

    monkeypatch.setattr(pieces, "table", table)
    monkeypatch.setattr(pieces, "dense_layout", lambda device: layout)
    monkeypatch.setattr(ops, "backends_for", lambda device: (ops.ReferenceBackend(),))
    config = LLaMAConfig(**SHAPE, **options)
    loader = model_loader(random_checkpoint(config), quantization=quantization)
    listed = packed_ops(loader.model, reports_prompts=True)
    model, pool = loader.load(), KVPool(config, NullCommunicator(), (4,), 16)
    buffers = StepBuffers(16, 2, 2, 16, reports_prompts=True)
    with torch.inference_mode():
        for plan in (
            StepPlan((StepRow(0, 0, (3, 1, 4), ((1,),), 3, (0,)), StepRow(1, 0, (5,), ((2,),), 1, (1,)))),
            StepPlan((StepRow(0, 3, (9,), ((1,),), 3, (0,)), StepRow(1, 1, (2,), ((2,),), 1, (1,)))),
        ):
            inputs = buffers.fill(plan)
            logits = model(
                inputs.input_ids,
                inputs.position_ids,
                last_token_ids=inputs.logits_ids,
                kv_cache_params=pool.params(),
                attention_params=inputs.attention_params,
            )
            assert logits.shape == (2, 61)
    assert called == listed
