"""Runs of `puna bench`: batches through an engine, their times, and a process beside it that probes the machine."""

from __future__ import annotations

import multiprocessing
import random
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from types import TracebackType
from typing import TYPE_CHECKING

from puna.checkpoints import Checkpoint
from puna.config import CacheDtype, EngineConfig, LLaMAConfig
from puna.engine.engine import Engine
from puna.engine.outputs import RequestDelta
from puna.engine.tokenizer import Tokenizer
from puna.ops.cpu import level
from puna.ops.probe import READ_BYTES, Probe, Prober
from puna.planning.roofline import MachineLimit, Work, decode_work, prefill_work
from puna.runtime.machine import available_host_memory, peak_memory_bytes
from puna.scheduling.sampling_params import SamplingParams

if TYPE_CHECKING:
    from typing_extensions import Self

_MAX_NUM_BATCHED_TOKENS = 2048  # as LLM has it
_WARM_UP_TOKENS = 4


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is measured. `batches` are numbers of sequences at once, each run `repeat` times."""

    prompt_tokens: int
    new_tokens: int
    batches: tuple[int, ...]
    repeat: int
    threads: int
    kv_cache_dtype: CacheDtype = "auto"


@dataclass(frozen=True, kw_only=True)
class Result:
    """Medians over the runs of one batch. The percentages are of the least time that the machine allowed just then."""

    batch: int
    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    time_to_first_token_seconds: float
    prefill_percent: float
    decode_percent: float


@dataclass(frozen=True, kw_only=True)
class Report:
    """Everything that was measured; `limit` is the median of the probes between the runs.

    `level` is the compiled kernels' instruction level, None where nothing is compiled and the reference ops run.
    """

    config: LLaMAConfig
    settings: Settings
    results: tuple[Result, ...]
    limit: MachineLimit
    level: str | None
    load_seconds: float
    peak_memory_bytes: int


def measure(
    checkpoint: Checkpoint,
    dtype: str,
    quantization: str | None,
    tokenizer: Tokenizer | None,
    settings: Settings,
    on_progress: Callable[[int, int], None],
) -> Report:
    """Loads the model and runs all batches in turns, each between two looks at the machine.

    Raises ValueError where model and cache do not fit into memory, or where `new_tokens` are too few for the batch.
    """
    length = settings.prompt_tokens + settings.new_tokens
    limits = EngineConfig(
        max_model_len=length,
        max_num_seqs=max(settings.batches),
        max_num_batched_tokens=_MAX_NUM_BATCHED_TOKENS,
        enable_prefix_caching=False,
        kv_cache_dtype=settings.kv_cache_dtype,
    )
    for batch in settings.batches:
        _check_steps(batch, settings)
    chooser = random.Random(0)
    with (
        ProbeProcess(settings.threads, level()) as probes,
        _engine(checkpoint, dtype, quantization, tokenizer, limits) as (engine, load_seconds),
    ):
        config, weights = engine.parts.config, engine.parts.memory.weights

        def run(batch: int, new_tokens: int) -> BatchTimes:
            tokens = range(config.vocab_size)
            prompts = [chooser.choices(tokens, k=settings.prompt_tokens) for _ in range(batch)]
            return run_batch(engine, prompts, new_tokens)

        runs: dict[int, list[tuple[BatchTimes, MachineLimit]]] = {batch: [] for batch in settings.batches}
        for batch in settings.batches:  # what is made once, such as recorded steps
            run(batch, min(settings.new_tokens, _WARM_UP_TOKENS + _prefill_steps(batch, settings)))
        turns = [batch for _ in range(settings.repeat) for batch in settings.batches]
        before = probes.measure()
        for count, batch in enumerate(turns):
            on_progress(count, len(turns))
            times = run(batch, settings.new_tokens)
            after = probes.measure()
            runs[batch].append((times, _between(before, after)))
            before = after
        peak = peak_memory_bytes()
    return Report(
        config=config,
        settings=settings,
        results=tuple(_result(config, weights, batch, settings, runs[batch]) for batch in settings.batches),
        limit=_median_limit([limit for found in runs.values() for _, limit in found]),
        level=level(),
        load_seconds=load_seconds,
        peak_memory_bytes=peak,
    )


@contextmanager
def _engine(
    checkpoint: Checkpoint,
    dtype: str,
    quantization: str | None,
    tokenizer: Tokenizer | None,
    limits: EngineConfig,
) -> Iterator[tuple[Engine, float]]:
    start = time.perf_counter()
    engine = Engine.from_pretrained(
        checkpoint,
        dtype,
        engine_config=limits,
        tokenizer=tokenizer,
        quantization=quantization,
    )
    try:
        yield engine, time.perf_counter() - start
    finally:
        engine.shutdown()


def _prefill_steps(batch: int, settings: Settings) -> int:
    return -(-batch * settings.prompt_tokens // _MAX_NUM_BATCHED_TOKENS)


def _check_steps(batch: int, settings: Settings) -> None:
    """The first sequences get their tokens while the last prompts are computed, and must not end before these."""
    # Each step beside others takes fewer prompt tokens, so there may be twice as many as of prompts alone.
    needed = 2 * _prefill_steps(batch, settings) + 1
    if settings.new_tokens < needed and batch > 1:
        raise ValueError(
            f"--new-tokens is {settings.new_tokens}: with a batch of {batch} the first sequences end before the last "
            f"ones begin; ask for at least {needed}"
        )


def _result(
    config: LLaMAConfig,
    weights: int,
    batch: int,
    settings: Settings,
    runs: Sequence[tuple[BatchTimes, MachineLimit]],
) -> Result:
    prompt = settings.prompt_tokens
    prefill = prefill_work(config, weights, batch, prompt)

    def decode(times: BatchTimes) -> Work:
        # The cache grows by a token a step: the mean is that of the step in the middle of those counted.
        last = prompt + settings.new_tokens - 1
        return decode_work(config, weights, batch, last - times.decode_steps // 2, settings.kv_cache_dtype)

    return Result(
        batch=batch,
        prefill_tokens_per_second=statistics.median(batch * prompt / one.prefill_seconds for one, _ in runs),
        decode_tokens_per_second=statistics.median(batch * one.decode_steps / one.decode_seconds for one, _ in runs),
        time_to_first_token_seconds=statistics.median(at for one, _ in runs for at in one.first_tokens),
        prefill_percent=statistics.median(
            100 * limit.least_seconds(prefill) / one.prefill_seconds for one, limit in runs
        ),
        decode_percent=statistics.median(
            100 * limit.least_seconds(decode(one)) * one.decode_steps / one.decode_seconds for one, limit in runs
        ),
    )


def _between(before: Probe, after: Probe) -> MachineLimit:
    return MachineLimit(
        read_bandwidth=(before.read_bandwidth + after.read_bandwidth) / 2,
        operations={kind: (count + after.operations[kind]) / 2 for kind, count in before.operations.items()},
    )


def _median_limit(limits: Sequence[MachineLimit]) -> MachineLimit:
    return MachineLimit(
        read_bandwidth=statistics.median(one.read_bandwidth for one in limits),
        operations={kind: statistics.median(one.operations[kind] for one in limits) for kind in limits[0].operations},
    )


@dataclass(frozen=True, kw_only=True)
class BatchTimes:
    """Seconds of one run. `decode_steps` took `decode_seconds`, and in each of them every sequence got a token.

    first_tokens: until each sequence had its first token; the last of them ends the prefill.
    """

    first_tokens: Sequence[float]
    decode_seconds: float
    decode_steps: int

    @property
    def prefill_seconds(self) -> float:
        return max(self.first_tokens)


def run_batch(engine: Engine, prompts: Sequence[Sequence[int]], new_tokens: int) -> BatchTimes:
    """Submits all prompts at once and waits for all tokens. Raises RuntimeError where a request fails.

    A long batch is prefilled in several steps, in which the first sequences go on already; the decode steps counted are
    those between the last sequence's first token and the first sequence's last one.
    """
    arrivals: list[list[float]] = [[] for _ in prompts]
    failures: list[str] = []
    left = threading.Semaphore(0)

    def listener_of(times: list[float]) -> Callable[[RequestDelta], None]:
        def listen(delta: RequestDelta) -> None:
            now = time.perf_counter()
            times.extend(now for part in delta.completions for _ in part.token_ids)
            if delta.error is not None:
                failures.append(delta.error)
            if delta.finished:
                left.release()

        return listen

    params = SamplingParams(max_tokens=new_tokens, temperature=0, ignore_eos=True)
    start = time.perf_counter()
    for prompt, times in zip(prompts, arrivals, strict=True):
        engine.submit(prompt, params, listener_of(times))
    for _ in prompts:
        left.acquire()
    if failures:
        raise RuntimeError(f"a request failed: {failures[0]}")
    last = max(arrivals, key=lambda times: times[0])
    ahead = max(sum(at <= last[0] for at in times) for times in arrivals)
    steps = new_tokens - ahead
    return BatchTimes(
        first_tokens=[times[0] - start for times in arrivals],
        decode_seconds=last[steps] - last[0],
        decode_steps=steps,
    )


class ProbeProcess:
    """Measures the machine whenever it is asked, in a process of its own: its memory is not this one's."""

    def __init__(self, threads: int, level: str | None) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        size = min(READ_BYTES, available_host_memory() // 8)
        self._process = context.Process(target=_serve, args=(theirs, threads, level, size), daemon=True)
        self._process.start()
        theirs.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._connection.close()
        self._process.join()

    def measure(self) -> Probe:
        """Takes half a second, in which nothing else should run. Raises RuntimeError where the process has died."""
        try:
            self._connection.send(None)
            found: Probe = self._connection.recv()
        except (EOFError, OSError) as error:
            raise RuntimeError("the process that probes the machine has ended") from error
        return found


def _serve(connection: Connection, threads: int, level: str | None, read_bytes: int) -> None:
    prober = Prober(threads, level, read_bytes)
    while True:
        try:
            connection.recv()
        except (EOFError, KeyboardInterrupt):
            return
        connection.send(prober.measure())
