"""CpuStepGraph: a recorded decode step gives the bits of the step that runs in Python, whatever is in the buffers."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("puna._kernels")

from puna.config import LLaMAConfig
from puna.distributed import NullCommunicator
from puna.models import MODELS, LLaMAForCausalLM, load_model
from puna.models.loading import save_model
from puna.ops import cpu
from puna.runtime.kv_pool import KVPool
from puna.runtime.step_buffers import StepBuffers, StepInputs
from puna.runtime.step_graph import CpuStepGraph, NotRecordable
from puna.scheduling.step_plan import StepPlan, StepRow

SIZE, NUM_BLOCKS, CONTEXT = 16, 60, 128
BASE = LLaMAConfig(
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_size=16,
    hidden_size=64,
    mlp_hidden_size=96,
    vocab_size=97,
    max_position_embeddings=CONTEXT,
)
CONFIGS = {
    "llama": BASE,
    "tied": dataclasses.replace(BASE, tie_embeddings=True, attn_bias=True, attn_output_bias=True, mlp_bias=True),
    "qwen3": dataclasses.replace(BASE, architecture="Qwen3ForCausalLM", qk_norm=True),
    "mistral": dataclasses.replace(BASE, architecture="MistralForCausalLM", sliding_window=20),
    "mixed": dataclasses.replace(
        BASE, architecture="Qwen2ForCausalLM", attn_bias=True, sliding_window=20, sliding_window_layers=(1,)
    ),
    "mixtral": dataclasses.replace(BASE, architecture="MixtralForCausalLM", num_experts=4, experts_per_token=2),
    "odd": dataclasses.replace(BASE, hidden_size=40, mlp_hidden_size=72, head_size=10),
}


def make(config: LLaMAConfig, folder: Path, quantization: str | None, dtype: str) -> LLaMAForCausalLM:
    torch.manual_seed(2)
    save_model(MODELS[config.architecture](config), folder)
    return load_model(folder, dtype, quantization=quantization)


class Steps:
    """Decode steps of `rows` sequences with random pasts, each in blocks of its own."""

    def __init__(self, model: LLaMAForCausalLM, bucket: int) -> None:
        self.model, self.bucket = model, bucket
        self.windows = model.config.windows
        self.pool = KVPool(model.config, NullCommunicator(), (NUM_BLOCKS,) * len(self.windows), SIZE)
        self.buffers = StepBuffers(64, 8, CONTEXT // SIZE, SIZE, num_windows=len(self.windows))
        self.random = random.Random(4)
        for cache in (*self.pool.key_caches, *self.pool.value_caches):
            cache.copy_(torch.randn(cache.shape))

    def fill(self, rows: int) -> StepInputs:
        blocks = list(range(1, NUM_BLOCKS))
        self.random.shuffle(blocks)
        plan_rows = []
        for i in range(rows):
            position = self.random.randrange(CONTEXT - 1)
            count = position // SIZE + 1
            own, blocks = blocks[:count], blocks[count:]
            token = self.random.randrange(self.model.config.vocab_size)
            plan_rows.append(
                StepRow(
                    sequence_id=i,
                    first_position=position,
                    token_ids=(token,),
                    block_ids=tuple(self.table(own, position, window) for window in self.windows),
                    prompt_length=1,
                    sampled_ids=(i,),
                )
            )
        return self.buffers.fill(StepPlan(rows=tuple(plan_rows)), num_rows=self.bucket)

    def table(self, blocks: list[int], position: int, window: int | None) -> tuple[int, ...]:
        """The blocks in an order of the window's own, without those that it has left behind."""
        unseen = 0 if window is None else max(0, position - window + 1) // SIZE
        order = blocks if window is None else self.random.sample(blocks, len(blocks))
        return (*[0] * unseen, *order[unseen:])

    def forward(self, inputs: StepInputs) -> Tensor:
        logits: Tensor = self.model(
            inputs.input_ids,
            inputs.position_ids,
            last_token_ids=inputs.logits_ids,
            kv_cache_params=self.pool.params(),
            attention_params=inputs.attention_params,
        )
        return logits

    def angles(self, inputs: StepInputs) -> tuple[Tensor, Tensor]:
        angles: tuple[Tensor, Tensor] = self.model.rotary(inputs.position_ids, inputs.attention_params.rotary_lengths)
        return angles


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("quantization", ["stored", "bf16", "int8", "int4"])
@pytest.mark.parametrize("name", CONFIGS)
@torch.inference_mode()
def test_replay_equals_eager_in_every_bit(name: str, quantization: str, dtype: str, tmp_path: Path) -> None:
    model = make(CONFIGS[name], tmp_path / "model", quantization, dtype)
    arena = cpu.Arena()
    graphs = {}
    every = {bucket: Steps(model, bucket) for bucket in (1, 2, 8)}
    for rows, bucket in [(1, 1), (2, 2), (5, 8), (8, 8), (1, 2), (3, 8), (1, 1), (2, 8)]:
        steps = every[bucket]
        inputs = steps.fill(rows)
        if bucket not in graphs:
            graphs[bucket] = CpuStepGraph(steps.forward, steps.angles, inputs, arena)
        eager = steps.forward(inputs)[:rows]
        assert eager.isfinite().all()
        assert eager.std() > 0
        assert torch.equal(graphs[bucket].run(inputs)[:rows], eager)
        pools = [cache.clone() for cache in (*steps.pool.key_caches, *steps.pool.value_caches)]
        steps.forward(inputs)
        now = (*steps.pool.key_caches, *steps.pool.value_caches)
        assert all(torch.equal(before, after) for before, after in zip(pools, now, strict=True))


class OnlyViews(TorchDispatchMode):
    """Fails at every torch operation that computes something."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.is_view, f"{func} is not one of the compiled kernels"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", CONFIGS)
@torch.inference_mode()
def test_no_torch_kernel_runs_within_a_recording(name: str, tmp_path: Path) -> None:
    steps = Steps(make(CONFIGS[name], tmp_path / "model", "int8", "bfloat16"), 2)
    inputs = steps.fill(2)
    params = dataclasses.replace(inputs.attention_params, cos_sin=steps.angles(inputs))
    inputs = dataclasses.replace(inputs, attention_params=params)
    arena = cpu.Arena()
    with cpu.recording(arena) as recording, OnlyViews():
        steps.forward(inputs)
    assert len(recording) >= 9 * BASE.num_layers + 4


@torch.inference_mode()
def test_torch_operations_can_not_escape_a_recording(tmp_path: Path) -> None:
    steps = Steps(make(BASE, tmp_path / "model", "int8", "float32"), 2)
    inputs = steps.fill(2)

    def forward(inputs: StepInputs) -> Tensor:
        return steps.forward(inputs) * 2

    def forward_in_place(inputs: StepInputs) -> Tensor:
        return steps.forward(inputs).mul_(2)

    with pytest.raises(NotRecordable, match="do not come from a compiled kernel"):
        CpuStepGraph(forward, steps.angles, inputs, cpu.Arena())
    with pytest.raises(NotRecordable, match="between the kernels"):
        CpuStepGraph(forward_in_place, steps.angles, inputs, cpu.Arena())
    # And nothing is left of the attempts: the same kernels run at once again.
    assert steps.forward(inputs).isfinite().all()


@torch.inference_mode()
def test_other_buffers_are_refused(tmp_path: Path) -> None:
    steps = Steps(make(BASE, tmp_path / "model", "int8", "float32"), 2)
    graph = CpuStepGraph(steps.forward, steps.angles, steps.fill(2), cpu.Arena())
    other = Steps(steps.model, 2)
    with pytest.raises(ValueError, match="buffers"):
        graph.run(other.fill(2))


def test_what_recorded_ops_left_is_used_again() -> None:
    arena = cpu.Arena()
    first = arena.empty((3, 5), torch.float32)
    view, address = first[1:], first.data_ptr()
    del first
    second = arena.empty((3, 5), torch.float32)
    assert second.data_ptr() != address  # a view still needs the first one
    del view
    assert arena.empty((3, 5), torch.bfloat16).data_ptr() == address


def test_a_tensor_larger_than_a_chunk() -> None:
    arena = cpu.Arena()
    large = arena.empty((3 << 20,), torch.float32)
    large.fill_(1)
    small = arena.empty((4,), torch.float32)
    small.fill_(2)
    assert large.sum() == 3 << 20


@pytest.mark.parametrize("threads", [1, 2])
def test_a_profile_computes_the_same_and_names_each_kernel(threads: int) -> None:
    weight, x, ids = torch.ones(64), torch.arange(3000 * 64.0).view(3000, 64), torch.tensor([7, 1])
    before = cpu.threads()
    cpu.set_threads(threads)
    try:
        arena = cpu.Arena()
        with cpu.recording(arena) as recording:
            total = cpu.add(x, x)  # shared by the threads; what follows is too little for that
            rows = cpu.embedding(ids, total)
            normed = cpu.rms_norm(rows, weight, 1e-6)
            best = cpu.argmax(normed)
        timed = recording.profile()
    finally:
        cpu.set_threads(before)
    with cpu.recording(arena) as alone:  # a single call that no thread shares
        _ = cpu.argmax(x[:1])
    assert all(seconds > 0 for _, seconds in alone.profile())
    assert [kernel for kernel, _ in timed] == ["add", "embedding", "rms_norm", "argmax"]
    assert all(0 <= seconds < 10 for _, seconds in timed)
    assert torch.equal(rows, 2 * x[ids])
    assert best[0].tolist() == [63, 63]
