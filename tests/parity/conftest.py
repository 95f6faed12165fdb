"""The models of the parity tests: tiny and random, one for every family and option, made by transformers."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 131,
    "max_position_embeddings": 128,
    "eos_token_id": None,
    "bos_token_id": 1,
    "pad_token_id": 0,
}


@dataclass(frozen=True)
class Case:
    """`options` of the transformers config; `old_spelling` has config.json rewritten as transformers 4 wrote it."""

    name: str
    family: str
    options: dict[str, Any] = field(default_factory=dict)
    old_spelling: bool = False
    length_dependent: bool = False


def rope(kind: str, **fields: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **fields}}


LONGROPE = {
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [1.0, 2.0, 3.0, 4.0],
    "original_max_position_embeddings": 24,
    "factor": 4.0,
}
YARN = {"factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}

CASES = (
    Case("llama_mha", "Llama", {"num_key_value_heads": 4}),
    Case("llama_gqa", "Llama"),
    Case("llama_mqa", "Llama", {"num_key_value_heads": 1}),
    Case("llama_head_size", "Llama", {"head_dim": 20}),
    Case("llama_attention_bias", "Llama", {"attention_bias": True}),
    Case("llama_mlp_bias", "Llama", {"mlp_bias": True, "intermediate_size": 51}),
    Case("llama_tied", "Llama", {"tie_word_embeddings": True}),
    Case("llama_gelu", "Llama", {"hidden_act": "gelu"}),
    Case("llama_gelu_tanh", "Llama", {"hidden_act": "gelu_pytorch_tanh"}),
    Case("llama_relu", "Llama", {"hidden_act": "relu", "vocab_size": 97}),
    Case("llama_theta", "Llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}, True),
    Case("rope_linear", "Llama", rope("linear", factor=2.5)),
    Case("rope_linear_old", "Llama", rope("linear", factor=2.5), True),
    Case("rope_dynamic_short", "Llama", rope("dynamic", factor=4.0)),
    Case("rope_dynamic", "Llama", rope("dynamic", factor=4.0) | {"max_position_embeddings": 24}, False, True),
    Case("rope_dynamic_old", "Llama", rope("dynamic", factor=4.0) | {"max_position_embeddings": 24}, True, True),
    Case("rope_yarn", "Llama", rope("yarn", **YARN)),
    Case("rope_yarn_old", "Qwen2", rope("yarn", **YARN), True),
    Case("rope_yarn_mscale", "Llama", rope("yarn", **YARN, mscale=0.7, mscale_all_dim=1.3, beta_fast=8.0)),
    Case("rope_yarn_beta", "Llama", rope("yarn", **YARN, beta_fast=16.0, beta_slow=2.0)),
    Case("rope_yarn_factor", "Llama", rope("yarn", **YARN, attention_factor=1.3, truncate=False)),
    Case("rope_llama3", "Llama", rope("llama3", **LLAMA3)),
    Case("rope_llama3_old", "Llama", rope("llama3", **LLAMA3), True),
    Case("rope_longrope", "Llama", rope("longrope", **LONGROPE), False, True),
    Case("rope_longrope_old", "Llama", rope("longrope", **LONGROPE, attention_factor=1.2), True, True),
    Case("mistral", "Mistral", {"sliding_window": None}),
    Case("mistral_window", "Mistral", {"sliding_window": 7}),
    Case("mistral_window_one", "Mistral", {"sliding_window": 1, "head_dim": 10}),
    Case("qwen2", "Qwen2", {"tie_word_embeddings": True}),
    Case("qwen2_window", "Qwen2", {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}),
    Case("qwen3", "Qwen3", {"head_dim": 12}),
    Case("qwen3_bias_window", "Qwen3", {
        "head_dim": 16, "attention_bias": True, "use_sliding_window": True, "sliding_window": 9, "max_window_layers": 0,
    }),
    Case("mixtral", "Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    Case("mixtral_window", "Mixtral", {
        "num_local_experts": 5, "num_experts_per_tok": 3, "sliding_window": 8, "tie_word_embeddings": True,
    }),
)  # fmt: skip


@dataclass(frozen=True)
class Oracle:
    """A transformers model in float32 and the folder that it was saved to."""

    case: Case
    model: Any
    folder: Path
    vocab_size: int

    def logits(self, tokens: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """float32 [B, S, V] of one forward pass over tokens [B, S] in `dtype`.

        The model is loaded anew: one in use remembers the longest sequence for dynamic rotary scaling, and a cast one
        has rounded rotary frequencies.
        """
        model = type(self.model).from_pretrained(self.folder, dtype=dtype)
        with torch.no_grad():
            return model(tokens).logits.float()

    def cached_logits(self, tokens: torch.Tensor, chunks: list[int]) -> torch.Tensor:
        """The same, with the tokens passed in chunks of these sizes and the cache kept in between."""
        cache, parts = transformers.DynamicCache(), []
        model = type(self.model).from_pretrained(self.folder)
        with torch.no_grad():
            for chunk in tokens.split(chunks, dim=1):
                parts.append(model(chunk, past_key_values=cache, use_cache=True).logits)
        return torch.cat(parts, dim=1)


transformers.utils.logging.disable_progress_bar()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "oracle" in metafunc.fixturenames:
        metafunc.parametrize("oracle", CASES, ids=lambda case: case.name, indirect=True, scope="session")


@pytest.fixture(scope="session")
def make_oracle(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Oracle]:
    """The oracle of a case by its name, made once."""
    cases = {case.name: case for case in CASES}
    made: dict[str, Oracle] = {}

    def make(name: str) -> Oracle:
        if name not in made:
            made[name] = _make(cases[name], tmp_path_factory.mktemp(name))
        return made[name]

    return make


@pytest.fixture(scope="session")
def oracle(request: pytest.FixtureRequest, make_oracle: Callable[[str], Oracle]) -> Oracle:
    return make_oracle(request.param.name)


def _make(case: Case, folder: Path) -> Oracle:
    config = getattr(transformers, f"{case.family}Config")(**(SMALL | case.options))
    torch.manual_seed(sum(map(ord, case.name)))
    model = getattr(transformers, f"{case.family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.copy_(1 + 0.3 * torch.randn_like(parameter))
            elif name.endswith("bias"):
                parameter.normal_(std=0.3)
            elif "gate.weight" in name:  # a router, whose choices should not hang on a rounding
                parameter.normal_(std=4 * parameter.shape[-1] ** -0.5)
            else:
                parameter.normal_(std=1.2 * parameter.shape[-1] ** -0.5)
    model.save_pretrained(folder)
    if case.old_spelling:
        file = folder / "config.json"
        fields = json.loads(file.read_text())
        rotary = fields.pop("rope_parameters")
        fields["rope_theta"] = rotary.pop("rope_theta")
        fields["torch_dtype"] = fields.pop("dtype")
        kind = rotary.pop("rope_type")
        fields["rope_scaling"] = None if kind == "default" else {"type": kind, **rotary}
        file.write_text(json.dumps(fields))
    return Oracle(case, model, folder, config.vocab_size)
