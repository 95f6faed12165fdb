"""How long the scheduler takes to plan a decode step, and to take over its result, for many running sequences.

Run: python benchmarks/scheduler_plan.py
"""

from __future__ import annotations

import statistics
import time

from puna.scheduling.block_manager import BlockManager
from puna.scheduling.sampling_params import SamplingParams
from puna.scheduling.scheduler import Scheduler, SchedulerLimits
from puna.scheduling.sequence import Request
from puna.scheduling.step_plan import SampledToken, StepPlan, StepResult


def result_of(plan: StepPlan) -> StepResult:
    tokens = tuple(SampledToken(sequence_id, 5) for row in plan.rows for sequence_id in row.sampled_ids)
    return StepResult(tokens, {}, {}, {})


def measure(num_sequences: int, prompt_length: int, steps: int = 200) -> tuple[float, float]:
    """Median seconds of plan() and of commit() once all sequences decode."""
    blocks = num_sequences * (prompt_length + steps + 64) // 16 + num_sequences + 2
    limits = SchedulerLimits(max_num_seqs=num_sequences, max_num_batched_tokens=num_sequences * prompt_length)
    scheduler = Scheduler(limits, BlockManager((blocks,)))
    for number in range(num_sequences):
        prompt = tuple((number * 31 + i) % 1000 for i in range(prompt_length))
        params = SamplingParams(max_tokens=steps + 10)
        scheduler.add(Request(request_id=str(number), prompt_token_ids=prompt, params=params, max_tokens=steps + 10))
    plans, commits = [], []
    for _ in range(steps):
        start = time.perf_counter()
        plan = scheduler.plan()
        planned = time.perf_counter()
        if plan is None:
            raise RuntimeError("nothing to plan")
        result = result_of(plan)
        before = time.perf_counter()
        scheduler.commit(result)
        if len(plan.rows) == num_sequences and plan.num_tokens == num_sequences:
            plans.append(planned - start)
            commits.append(time.perf_counter() - before)
    return statistics.median(plans), statistics.median(commits)


def main() -> None:
    print(f"{'sequences':>9} {'prompt':>7} {'plan ms':>8} {'commit ms':>9}")
    for num_sequences, prompt_length in ((1, 128), (16, 128), (64, 512), (256, 128), (256, 2048)):
        plan, commit = measure(num_sequences, prompt_length)
        print(f"{num_sequences:9} {prompt_length:7} {plan * 1e3:8.3f} {commit * 1e3:9.3f}")


if __name__ == "__main__":
    main()
