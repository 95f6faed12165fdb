"""What the host does for a step of a GPU, without the GPU: processor time of planning, launching, reading, taking over.

Run `python benchmarks/host_step.py [--sequences 1,64,256,1024] [--temperature 0.8]`. Decode steps of plain sequences,
whose model is replaced by nothing. A GPU waits for the host where its steps are shorter than the sum, which is what
docs/gpu.md quotes. Times are of the processor, so that other work on the machine counts little.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

from puna.config import LLaMAConfig
from puna.distributed import NullCommunicator
from puna.models import LLaMAForCausalLM
from puna.runtime.accelerator import DeviceMemory
from puna.runtime.async_runner import AsyncModelRunner, PendingStep
from puna.runtime.kv_pool import KVPool
from puna.runtime.sampler import Sampler
from puna.runtime.step_buffers import StepBuffers
from puna.scheduling.block_manager import BlockManager
from puna.scheduling.sampling_params import SamplingParams
from puna.scheduling.scheduler import Scheduler, SchedulerLimits
from puna.scheduling.sequence import Request
from puna.scheduling.step_plan import StepResult

PROMPT, CONTEXT, BLOCK, WARM_UP = 64, 4096, 16, 30


class Nothing:
    """An event, a graph and an accelerator that does no work."""

    device = torch.device("cpu")

    def synchronize(self) -> None: ...

    def replay(self) -> None: ...

    def seconds_since(self, earlier: Any) -> float:
        return 0.0

    def use(self) -> None: ...

    def pinned(self, num_bytes: int) -> Tensor:
        return torch.zeros(num_bytes, dtype=torch.uint8)

    def copy(self, target: Tensor, source: Tensor) -> None: ...

    def record(self, timed: bool = False) -> Nothing:
        return self

    def capture(self, function: Any) -> Any:
        return self, torch.zeros(1)

    def memory(self) -> DeviceMemory:
        return DeviceMemory(total=0, free=0, allocated=0, reserved=0, peak=0)

    def reset_peak(self) -> None: ...

    def release_cached(self) -> None: ...


def measure(sequences: int, temperature: float, steps: int) -> dict[str, float]:
    """Medians of milliseconds a step."""
    config = LLaMAConfig(
        num_layers=1,
        num_heads=2,
        num_kv_heads=1,
        head_size=8,
        hidden_size=16,
        mlp_hidden_size=16,
        vocab_size=97,
        max_position_embeddings=CONTEXT,
    )
    blocks = sequences * CONTEXT // BLOCK + 1
    buffers = StepBuffers(8192, sequences, CONTEXT // BLOCK, BLOCK, Nothing())
    pool = KVPool(config, NullCommunicator(), (blocks,), BLOCK)
    runner = AsyncModelRunner(LLaMAForCausalLM(config).eval(), pool, buffers, Sampler(97), Nothing(), use_buckets=True)
    runner._run = lambda ending, inputs: torch.zeros(1)  # type: ignore[method-assign]
    limits = SchedulerLimits(max_num_seqs=sequences, max_num_batched_tokens=8192)
    scheduler = Scheduler(limits, BlockManager((blocks,), BLOCK))
    params = SamplingParams(temperature=temperature, max_tokens=CONTEXT - PROMPT, ignore_eos=True)
    for i in range(sequences):
        scheduler.add(
            Request(
                request_id=str(i),
                prompt_token_ids=tuple(range(PROMPT)),
                params=params,
                max_tokens=CONTEXT - PROMPT,
                seed=i,
            )
        )
    times: defaultdict[str, list[float]] = defaultdict(list)
    in_flight: PendingStep | None = None
    for step in range(WARM_UP + steps):
        marks = [time.thread_time()]
        plan = scheduler.plan(0.0)
        marks.append(time.thread_time())
        launched = None if plan is None else runner.launch(plan)
        marks.append(time.thread_time())
        result = StepResult((), {}, {}, {}) if in_flight is None else in_flight.result()
        marks.append(time.thread_time())
        scheduler.commit(result)
        marks.append(time.thread_time())
        in_flight = launched
        if step >= WARM_UP:
            for name, begin, end in zip(("plan", "launch", "read", "commit"), marks, marks[1:], strict=False):
                times[name].append(1000 * (end - begin))
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", default="1,64,256,1024")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--steps", type=int, default=200)
    arguments = parser.parse_args()
    print("sequences    plan  launch    read  commit     sum   ms")
    for count in map(int, arguments.sequences.split(",")):
        found = measure(count, arguments.temperature, arguments.steps)
        print(f"{count:9}" + "".join(f"{value:8.3f}" for value in (*found.values(), sum(found.values()))))


if __name__ == "__main__":
    main()
