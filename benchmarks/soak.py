"""Thousands of random requests against one engine with a cache far too small for them, and what is left afterwards.

Threads and asyncio tasks submit requests of every kind (lengths, n, beams, seeds, priorities, deadlines, guided texts,
penalties, log-probabilities), and cancel some of them at random moments: from other threads, by closing the stream, by
cancelling the task. Now and then all pause, garbage is collected, and the process's memory is read. Each request must
come to exactly one end; some are run again alone, and must give the same tokens. In the end no block, thread, task,
listener, sampler state or request may be left.

Run: python benchmarks/soak.py [--requests 10000] [--seed 0] [--json FILE]
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import heapq
import itertools
import json
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import tokenizers
import torch

from puna import LLaMAConfig
from puna.config import EngineConfig, GenerationConfig
from puna.engine.async_engine import AsyncEngine
from puna.engine.engine import Engine
from puna.engine.output_processor import OutputProcessor
from puna.engine.outputs import RequestDelta
from puna.models import LLaMAForCausalLM
from puna.models.loading import save_model
from puna.runtime.sequence_state import SequenceState
from puna.scheduling.beams import BeamParams
from puna.scheduling.group import Group
from puna.scheduling.sampling_params import GuidedDecoding, SamplingParams
from puna.scheduling.sequence import Request, Sequence

CONTEXT = 96
BLOCK_SIZE = 4
NUM_BLOCKS = 36
MAX_NUM_SEQS = 8
NUM_THREADS = 4
NUM_TASKS = 8
# Requests that each thread keeps under way at once.
WINDOW = 8
OWN_TYPES = (Request, Sequence, Group, SequenceState, OutputProcessor)


@dataclass
class Report:
    """What a soak found. `memory`: bytes resident at each pause, the first one after a warm-up."""

    requests: int = 0
    ends: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    tokens: int = 0
    compared: int = 0
    differing: int = 0
    preemptions: int = 0
    prefix_hit_tokens: int = 0
    steps: int = 0
    seconds: float = 0.0
    memory: list[int] = field(default_factory=list)
    left: dict[str, int] = field(default_factory=dict)

    @property
    def memory_growth(self) -> float:
        """From the first pause after the warm-up to the last one, as a share."""
        return self.memory[-1] / self.memory[0] - 1


@dataclass
class Order:
    """A request to make. `cancel_after`: seconds, None for never; `again`: to be run once more, alone."""

    prompt: list[int]
    params: SamplingParams
    kind: str
    beams: BeamParams | None = None
    priority: int = 0
    timeout: float | None = None
    cancel_after: float | None = None
    again: bool = False


def make_model(folder: Path, context: int = CONTEXT, chat_template: str | None = None) -> None:
    """One layer over single bytes; its texts end now and then."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<s>", "</s>", *alphabet])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names | {"chat_template": chat_template}))
    shape = {"num_layers": 1, "num_heads": 2, "num_kv_heads": 1, "head_size": 8, "hidden_size": 16}
    config = LLaMAConfig(**shape, mlp_hidden_size=24, vocab_size=len(vocabulary), max_position_embeddings=context)
    torch.manual_seed(0)
    model = LLaMAForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.normal_(std=1.3 * parameter.shape[-1] ** -0.5)
    model.generation_config = GenerationConfig(bos_token_id=0, eos_token_ids=(1, 40, 90))
    save_model(model, folder)


def make_engine(folder: Path) -> Engine:
    block_bytes = 2 * 8 * BLOCK_SIZE * 4
    limits = EngineConfig(
        max_num_seqs=MAX_NUM_SEQS,
        max_num_batched_tokens=16,
        block_size=BLOCK_SIZE,
        kv_cache_memory=NUM_BLOCKS * block_bytes,
        max_skips=64,
    )
    return Engine.from_pretrained(str(folder), engine_config=limits)


def make_order(chooser: random.Random) -> Order:
    prompt = [chooser.randrange(2, 250) for _ in range(chooser.choice((1, 3, 8, 20, 50)))]
    if chooser.random() < 0.3:  # prefixes to share
        prompt = list(range(10, 10 + chooser.choice((8, 16, 30)))) + prompt[:20]
    max_tokens = chooser.choice((1, 2, 5, 10, 20, 30))
    options: dict[str, object] = {"max_tokens": max_tokens, "ignore_eos": chooser.random() < 0.2}
    kind = chooser.choice(("greedy", "sampled", "sampled", "penalties", "logprobs", "stop", "guided", "beams"))
    beams = None
    if kind in ("greedy", "beams"):
        options["temperature"] = 0
    else:
        options |= {"temperature": chooser.uniform(0.2, 1.5), "n": chooser.choice((1, 1, 1, 2, 4))}
        options["seed"] = chooser.choice((None, chooser.randrange(1000)))
    if kind == "sampled":
        options |= {"top_k": chooser.choice((0, 5, 40)), "top_p": chooser.choice((1.0, 0.8)), "min_p": 0.01}
    elif kind == "penalties":
        options |= {"repetition_penalty": 1.2, "presence_penalty": 0.5, "no_repeat_ngram_size": 3}
        options |= {"bad_words": ["ab"], "min_tokens": min(2, max_tokens), "logit_bias": {5: 2.0}}
    elif kind == "logprobs":
        options |= {"logprobs": 3, "prompt_logprobs": 2}
    elif kind == "stop":
        options |= {"stop": ["e", "12"], "stop_token_ids": [77]}
    elif kind == "guided":
        options |= {"guided": GuidedDecoding(regex="(ab|cd){1,3}[0-9]{2}"), "ignore_eos": False}
    elif kind == "beams":
        beams = BeamParams(width=chooser.randint(2, 4), early_stopping=chooser.random() < 0.5)
        prompt, options["max_tokens"] = prompt[:16], min(max_tokens, 10)
    cancel_after = chooser.uniform(0, 0.2) if chooser.random() < 0.25 else None
    timeout = chooser.uniform(0, 0.5) if chooser.random() < 0.1 else None
    is_repeatable = cancel_after is None and timeout is None and (kind == "greedy" or options.get("seed") is not None)
    return Order(
        prompt,
        SamplingParams(**options),  # type: ignore[arg-type]
        kind,
        beams,
        chooser.randint(-2, 2),
        timeout,
        cancel_after,
        again=is_repeatable and chooser.random() < 0.1,
    )


class Canceller:
    """A thread that cancels requests when their time has come."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._due: list[tuple[float, int, str]] = []
        self._numbers = itertools.count()
        self._lock = threading.Condition()
        self._ends = False
        self._thread = threading.Thread(target=self._run, name="soak-cancel")
        self._thread.start()

    def add(self, request_id: str, seconds: float) -> None:
        with self._lock:
            heapq.heappush(self._due, (time.monotonic() + seconds, next(self._numbers), request_id))
            self._lock.notify()

    def close(self) -> None:
        with self._lock:
            self._ends = True
            self._lock.notify()
        self._thread.join()

    def _run(self) -> None:
        with self._lock:
            while not self._ends:
                if not self._due:
                    self._lock.wait()
                elif self._due[0][0] > time.monotonic():
                    self._lock.wait(self._due[0][0] - time.monotonic())
                else:
                    request_id = heapq.heappop(self._due)[2]
                    self._lock.release()
                    self._engine.cancel(request_id)
                    self._lock.acquire()


class Tally:
    """Collects one request's deltas; sees to it that nothing comes after the end, and lets the next one begin."""

    def __init__(self, soak: Soak, order: Order, done: threading.Semaphore) -> None:
        self._soak, self._order, self._done = soak, order, done
        self.tokens: list[list[int]] = [[] for _ in range(order.params.n)]
        self._ended = False

    def __call__(self, delta: RequestDelta) -> None:
        if self._ended:
            self._soak.count("a delta after the end", 0)
            return
        reasons = [part.finish_reason for part in delta.completions]
        for part in delta.completions:
            self.tokens[part.index] += part.token_ids
        if delta.finished:
            self._ended = True
            last = "error" if delta.error else "beams" if delta.beams is not None else str(reasons[-1])
            if delta.error and "the beam search ended before it was done" in delta.error:
                last = "beams cut short"
            self._soak.count(last, sum(map(len, self.tokens)))
            if self._order.again:
                self._soak.remember(self._order, self.tokens)
            self._done.release()


class Soak:
    def __init__(self, engine: Engine, seed: int) -> None:
        self.engine = engine
        self.report = Report()
        self._seed = seed
        self._canceller = Canceller(engine)
        self._lock = threading.Lock()
        self._to_compare: list[tuple[Order, list[list[int]]]] = []

    def count(self, end: str, tokens: int) -> None:
        with self._lock:
            self.report.ends[end] += 1
            self.report.tokens += tokens

    def remember(self, order: Order, tokens: list[list[int]]) -> None:
        with self._lock:
            self._to_compare.append((order, tokens))

    def run(self, num_requests: int) -> None:
        """That many requests, half from threads and half from asyncio; returns when all have ended."""
        start = time.perf_counter()
        half = num_requests // 2
        shares = [half // NUM_THREADS + (i < half % NUM_THREADS) for i in range(NUM_THREADS)]
        threads = [
            threading.Thread(target=self._submit, args=(self._chooser(), share), name="soak-submit") for share in shares
        ]
        for thread in threads:
            thread.start()
        tasks_left = asyncio.run(self._stream(num_requests - half))
        for thread in threads:
            thread.join()
        with self._lock:
            self.report.left["tasks"] = self.report.left.get("tasks", 0) + tasks_left
            self.report.requests += num_requests
            self.report.seconds += time.perf_counter() - start

    def pause(self) -> None:
        """Waits until the engine has nothing to do, runs some requests again, and reads the memory."""
        self.wait_until_idle()
        with self._lock:
            to_compare, self._to_compare = self._to_compare, []
        for order, tokens in to_compare:
            again = Tally(self, Order(order.prompt, order.params, order.kind), threading.Semaphore(0))
            self.engine.submit(order.prompt, order.params, again, beams=order.beams)
            again._done.acquire()
            self.report.compared += 1
            self.report.differing += tokens != again.tokens
        del to_compare
        self.wait_until_idle()
        gc.collect()
        self.report.memory.append(resident_bytes())

    def wait_until_idle(self) -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            with self.engine._lock:
                if not self.engine.parts.scheduler.has_work:
                    return
            time.sleep(0.005)
        raise RuntimeError("the engine does not come to rest")

    def close(self, threads_before: set[threading.Thread], objects_before: int) -> Report:
        """Sees what is left, ends everything, and sees what is left then."""
        self._canceller.close()
        engine, scheduler, left = self.engine, self.engine.parts.scheduler, self.report.left
        scheduler.check_integrity()
        left["blocks in use"] = scheduler.blocks.utilization.in_use
        left["listeners"] = len(engine._processors)
        left["running or waiting"] = scheduler.num_running + scheduler.num_waiting
        self.report.preemptions = scheduler.num_preemptions
        self.report.prefix_hit_tokens = scheduler.num_prefix_hit_tokens
        self.report.steps = scheduler._num_plans
        engine.shutdown()  # behind the last plan, which tells the sampler what has ended
        left["sampler states"] = len(engine.parts.executor._runner.sampler._states)  # type: ignore[attr-defined]
        left["threads"] = len(set(threading.enumerate()) - threads_before)
        left["own objects"] = count_own_objects() - objects_before
        return self.report

    def _chooser(self) -> random.Random:
        self._seed += 1
        return random.Random(self._seed)

    def _submit(self, chooser: random.Random, count: int) -> None:
        """A thread that submits requests, never too many at once."""
        free = threading.Semaphore(WINDOW)
        for _ in range(count):
            order = make_order(chooser)
            free.acquire()
            tally = Tally(self, order, free)
            with self._lock:
                self.report.kinds[order.kind] += 1
            request_id = self.engine.submit(
                order.prompt,
                order.params,
                tally,
                priority=order.priority,
                timeout=order.timeout,
                beams=order.beams,
                cache_salt=chooser.choice(("", "", "other")),
            )
            if order.cancel_after is not None:
                self._canceller.add(request_id, order.cancel_after)
        for _ in range(WINDOW):
            free.acquire()

    async def _stream(self, count: int) -> int:
        """Tasks that read streams, close some of them and are cancelled now and then; returns how many are left."""
        engine = AsyncEngine(self.engine)
        chooser = self._chooser()
        slots = asyncio.Semaphore(NUM_TASKS)

        async def one(order: Order, closes_after: int | None) -> None:
            try:
                stream = engine.generate(order.prompt, order.params, priority=order.priority, timeout=order.timeout)
                number, end = 0, "closed"
                async for output in stream:
                    number += 1
                    if output.finished:
                        end = str(output.outputs[-1].finish_reason)
                        if order.again:
                            self.remember(order, [completion.token_ids for completion in output.outputs])
                    elif number == closes_after:
                        break
                await stream.aclose()
                self.count(end, sum(len(completion.token_ids) for completion in output.outputs))
            except asyncio.CancelledError:
                self.count("task cancelled", 0)
                raise
            finally:
                slots.release()

        running: set[asyncio.Task[None]] = set()
        loop = asyncio.get_running_loop()
        for _ in range(count):
            order = make_order(chooser)
            while order.beams is not None:
                order = make_order(chooser)
            self.report.kinds[order.kind] += 1
            await slots.acquire()
            closes = order.cancel_after is not None and chooser.random() < 0.5
            task = asyncio.create_task(one(order, chooser.randint(1, 5) if closes else None))
            running.add(task)
            task.add_done_callback(running.discard)
            if order.cancel_after is not None and not closes:
                # Not before it has begun: a task that never ran would not free its slot.
                loop.call_later(0.001 + order.cancel_after, task.cancel)
        await asyncio.gather(*running, return_exceptions=True)
        await asyncio.sleep(0)
        return len(asyncio.all_tasks()) - 1


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def count_own_objects() -> int:
    gc.collect()
    return sum(type(thing) in OWN_TYPES for thing in gc.get_objects())


def soak(folder: Path, num_requests: int, seed: int = 0, num_pauses: int = 10) -> Report:
    """Makes a model in the folder and runs the requests in `num_pauses` parts, after a warm-up of two parts more."""
    threads_before, objects_before = set(threading.enumerate()), count_own_objects()
    make_model(folder)
    it = Soak(make_engine(folder), seed)
    part = -(-num_requests // (num_pauses + 1))
    for number in range(num_pauses + 1):
        it.run(min(part, num_requests - number * part))
        it.pause()
        print(f"{it.report.requests:6} requests, {it.report.memory[-1] / 2**20:7.1f} MiB", file=sys.stderr)
    it.report.memory = it.report.memory[1:]  # the first part is the warm-up
    return it.close(threads_before, objects_before)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pauses", type=int, default=10)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        report = soak(Path(temporary), arguments.requests, arguments.seed, arguments.pauses)
    found = vars(report) | {"memory_growth": report.memory_growth}
    print(json.dumps(found, indent=2))
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=2) + "\n")
    is_bad = any(report.left.values()) or report.differing or report.memory_growth > 0.01 or report.ends["error"]
    sys.exit(bool(is_bad))


if __name__ == "__main__":
    main()
