"""Where the time of a decode step goes: each kernel's share, and what is spent outside of the recorded step.

Run `python benchmarks/decode_profile.py [--shape llama-3.2-1b --quantization int4 --batch 1 ...]` where nothing else
runs. Random weights; medians over the steps. docs/cpu_kernels.md quotes its figures.
"""

from __future__ import annotations

import argparse
import statistics
import threading
import time
from collections import defaultdict

import torch

from puna.config import EngineConfig
from puna.config.presets import PRESETS
from puna.engine.engine import Engine
from puna.engine.token_ids import token_id_tokenizer
from puna.models.random_weights import random_checkpoint
from puna.quantization import QUANTIZATIONS
from puna.runtime.model_runner import ModelRunner
from puna.runtime.step_graph import CpuStepGraph
from puna.scheduling.sampling_params import SamplingParams


class Clocks:
    """Seconds of each step from its beginning to the next one's, and of what its recording's kernels took.

    Odd steps are replayed as ever, even ones with a clock after every kernel.
    """

    def __init__(self) -> None:
        self.begins: list[float] = []
        self.replays: list[float] = []
        self.kernels: defaultdict[str, list[float]] = defaultdict(list)

    def watch(self) -> None:
        """Puts clocks into the runner and the recordings of this process."""
        execute, run = ModelRunner.execute, CpuStepGraph.run
        clocks = self

        def timed_execute(runner: ModelRunner, *arguments: object) -> object:
            clocks.begins.append(time.perf_counter())
            return execute(runner, *arguments)

        class Timed:
            def __init__(self, graph: CpuStepGraph) -> None:
                self.recording = graph._recording

            def replay(self) -> None:
                begin = time.perf_counter()
                if len(clocks.begins) % 2:
                    self.recording.replay()
                    clocks.replays.append(time.perf_counter() - begin)
                    return
                sums: defaultdict[str, float] = defaultdict(float)
                for kernel, seconds in self.recording.profile():
                    sums[kernel] += seconds
                for kernel, seconds in sums.items():
                    clocks.kernels[kernel].append(seconds)

        def timed_run(graph: CpuStepGraph, inputs: object) -> object:
            if not isinstance(graph._recording, Timed):
                graph._recording = Timed(graph)
            return run(graph, inputs)

        ModelRunner.execute, CpuStepGraph.run = timed_execute, timed_run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="llama-3.2-1b", choices=sorted(PRESETS))
    parser.add_argument("--quantization", default="int4", choices=QUANTIZATIONS)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    clocks = Clocks()
    clocks.watch()
    config = PRESETS[arguments.shape]
    engine = Engine.from_pretrained(
        random_checkpoint(config, quantization=arguments.quantization),
        config.dtype,
        engine_config=EngineConfig(
            max_model_len=arguments.prompt_tokens + arguments.steps + 16,
            max_num_seqs=arguments.batch,
            threads=arguments.threads,
        ),
        tokenizer=token_id_tokenizer(config.vocab_size),
    )
    done = threading.Semaphore(0)
    params = SamplingParams(temperature=0, max_tokens=arguments.steps, ignore_eos=True)
    for i in range(arguments.batch):
        prompt = [(7 * i + j) % 1000 + 1 for j in range(arguments.prompt_tokens)]
        engine.submit(prompt, params, lambda delta: done.release() if delta.finished else None)
    for _ in range(arguments.batch):
        done.acquire()
    engine.shutdown()
    # The first steps compute prompts and record.
    steps = [1e3 * (b - a) for a, b in zip(clocks.begins, clocks.begins[1:], strict=False)]
    numbers = range(len(steps) - arguments.steps + 10, len(steps))
    step = statistics.median(steps[i] for i in numbers if (i + 1) % 2)
    replay = 1e3 * statistics.median(clocks.replays[4:])
    weights = engine.parts.memory.weights
    print(f"{arguments.shape} {arguments.quantization}, batch {arguments.batch}, {arguments.threads} threads")
    print(f"{'step':<20} {step:8.3f} ms  {arguments.batch / step * 1e3:.1f} tokens/s")
    print(f"{'recorded kernels':<20} {replay:8.3f} ms  {weights / replay / 1e6:.1f} GB/s of weights")
    print(f"{'outside of them':<20} {step - replay:8.3f} ms  {100 * (1 - replay / step):.1f} % of the step")
    medians = {kernel: 1e3 * statistics.median(seconds[4:]) for kernel, seconds in clocks.kernels.items()}
    for kernel, milliseconds in sorted(medians.items(), key=lambda item: -item[1]):
        print(
            f"  {kernel:<18} {milliseconds:8.3f} ms  {100 * milliseconds / sum(medians.values()):.1f} % of the kernels"
        )


if __name__ == "__main__":
    main()
