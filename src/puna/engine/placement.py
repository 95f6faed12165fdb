"""Placement: an engine's share of one device; how much its cache may take there, and what runs its steps."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from puna.config import EngineConfig, LLaMAConfig
from puna.distributed import Communicator
from puna.engine.executor import AsyncExecutor, Executor, LocalExecutor
from puna.models import LLaMAForCausalLM
from puna.ops.triton_tuning import Tuning
from puna.planning.memory_plan import Capacity, MemoryPlan, plan_memory
from puna.runtime.accelerator import Accelerator, DeviceMemory
from puna.runtime.async_runner import AsyncModelRunner
from puna.runtime.kv_pool import KVPool, available_memory
from puna.runtime.model_runner import ModelRunner
from puna.runtime.sampler import CHUNK_ELEMENTS_ELSEWHERE, Sampler
from puna.runtime.step_buffers import StepBuffers
from puna.runtime.tracing import Tracer

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Placement:
    """`accelerator` is None on the CPU."""

    config: LLaMAConfig
    comm: Communicator
    capacity: Capacity
    engine_config: EngineConfig
    accelerator: Accelerator | None = None

    @property
    def reports_prompts(self) -> bool:
        """Whether the model is told of steps of nothing but whole prompts."""
        return self.accelerator is not None and not self.config.deterministic

    def plan(self, weight_bytes: int) -> MemoryPlan:
        """What memory goes to, before anything is read; see `plan_memory`."""
        if self.accelerator is None:
            available = available_memory(self.comm.device)
            return self._plan(weight_bytes, available)
        available = _usable(self.accelerator.memory(), self.engine_config.gpu_memory_utilization)
        return self._plan(weight_bytes, available, cache_share=1)

    def executor(
        self, network: LLaMAForCausalLM, memory: MemoryPlan, sampler: Sampler, use_buckets: bool, tracer: Tracer | None
    ) -> tuple[Executor, MemoryPlan]:
        """What runs the steps of a model that is loaded, and the plan as it is now: on GPUs, with measured numbers."""
        num_windows = len(self.config.windows)
        blocks = -(-self.capacity.max_model_len // self.capacity.block_size)
        buffers = StepBuffers(
            self.capacity.max_num_batched_tokens,
            self.capacity.max_num_seqs,
            blocks,
            self.capacity.block_size,
            self.accelerator,
            num_windows,
            reports_prompts=self.reports_prompts,
        )
        if self.accelerator is None:
            runner = ModelRunner(network, self._pool(memory.num_blocks), buffers, sampler, use_buckets, tracer)
            return LocalExecutor(runner, tracer), memory
        limits = self.engine_config
        folder = None if limits.tuning_dir is None else Path(limits.tuning_dir)
        tuning = Tuning.of_device(self.accelerator.device, folder, overlaps=limits.overlap_kernels)
        asynchronous = AsyncModelRunner(
            network, self._pool((1,) * num_windows), buffers, sampler, self.accelerator, use_buckets, tracer, tuning
        )
        memory = self._measured(asynchronous, memory.weights)
        asynchronous.pool = self._pool(memory.num_blocks)
        if use_buckets:
            asynchronous.capture_steps(None if self.engine_config.capture == "eager" else 1)
        return AsyncExecutor(asynchronous, tracer), memory

    def _measured(self, runner: AsyncModelRunner, weight_bytes: int) -> MemoryPlan:
        """The plan with the workspace of the largest steps there can be, run on a cache of one block."""
        assert self.accelerator is not None
        self.accelerator.release_cached()
        before = self.accelerator.memory()
        peaks = []
        for plan in (runner.largest_prefill(), runner.largest_decode(), runner.largest_mixed()):
            runner.rehearse(plan, tune=True)  # measuring kernels takes memory of its own
            self.accelerator.release_cached()
            self.accelerator.reset_peak()
            runner.rehearse(plan)
            peaks.append(self.accelerator.memory().peak - before.allocated)
            self.accelerator.release_cached()
        # Captured steps have memory of their own, all of them the same.
        workspace = peaks[0] + max(peaks[1:])
        for plan in runner.small_steps():
            runner.rehearse(plan)
        if not self.config.deterministic:
            runner.tune_prompts()
        # Steps in which the host has a part hold copies of some rows of logits; scored prompts, of theirs.
        vocab_size = self.config.vocab_size
        workspace += 8 * min(CHUNK_ELEMENTS_ELSEWHERE, self.capacity.max_num_seqs * vocab_size)
        workspace += 8 * self.capacity.max_scored_tokens * vocab_size
        usable = _usable(self.accelerator.memory(), self.engine_config.gpu_memory_utilization)
        memory = self._plan(weight_bytes, usable + weight_bytes, cache_share=1, workspace=workspace)
        _log.info(
            "memory of %s: weights %.2f GiB, workspace %.2f GiB, cache %.2f GiB",
            self.accelerator.device,
            *(part / 2**30 for part in (memory.weights, memory.workspace, memory.cache)),
        )
        return memory

    def _plan(
        self, weight_bytes: int, available: int, cache_share: float | None = None, workspace: int | None = None
    ) -> MemoryPlan:
        return plan_memory(
            self.config,
            self.comm.mapping,
            self.capacity,
            available,
            self.engine_config.kv_cache_memory,
            weight_bytes,
            workspace=workspace,
            cache_share=cache_share,
        )

    def _pool(self, num_blocks: tuple[int, ...]) -> KVPool:
        return KVPool(self.config, self.comm, num_blocks, self.capacity.block_size, self.capacity.kv_cache_dtype)


def _usable(memory: DeviceMemory, utilization: float) -> int:
    """Bytes that this process may still take: of the device's share, what neither others nor its own tensors have."""
    taken = memory.total - memory.free - (memory.reserved - memory.allocated)
    return max(0, int(memory.total * utilization) - taken)
