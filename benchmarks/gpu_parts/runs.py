"""Engines of random weights on a device, and what is measured of them: throughput, decoding, first tokens, kernels."""

from __future__ import annotations

import dataclasses
import gc
import gzip
import json
import random
import statistics
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gpu_parts.arithmetic import Limits, Phases, Row, effective_weights, offline_floor, phases, requests_for
from gpu_parts.trace import ON_DEVICE, ON_HOST, device_times

from puna.cli.bench_run import run_batch
from puna.config import CacheDtype, EngineConfig, LLaMAConfig
from puna.engine.engine import Engine
from puna.engine.outputs import RequestDelta
from puna.engine.token_ids import token_id_tokenizer
from puna.models.random_weights import random_checkpoint
from puna.planning.roofline import decode_work, prefill_work
from puna.scheduling.sampling_params import SamplingParams

BIN_SECONDS = 0.05


@dataclass(frozen=True)
class Setting:
    """What all parts share. `scale` divides lengths and numbers: above 1 where only the script itself is tried."""

    config: LLaMAConfig
    device: torch.device
    rows: tuple[Row, ...]
    at_once: int
    batched_tokens: int
    scale: int = 1

    @property
    def is_dry(self) -> bool:
        return self.scale > 1

    def tokens(self, count: int) -> int:
        return max(2, count // self.scale)


@contextmanager
def engine_of(
    setting: Setting, quantization: str, max_model_len: int, max_num_seqs: int, kv: CacheDtype = "auto", **more: Any
) -> Iterator[Engine]:
    """An engine with random weights that were made on the device: "bf16", "fp8", "int8" or "int4".

    Where FP8 is not to be had (a dry run on a CPU) the weights are bfloat16, and kernels do not overlap.
    """
    if setting.device.type == "cpu":
        kv = "auto"
        more = more | {"overlap_kernels": False}
        quantization = "bf16" if quantization == "fp8" else quantization
    _release(setting.device)
    in_codes = quantization in ("int8", "int4")
    checkpoint = random_checkpoint(
        setting.config, quantization=quantization if in_codes else None, device=setting.device
    )
    engine = Engine.from_pretrained(
        checkpoint,
        device=setting.device,
        quantization="stored" if in_codes else quantization,
        tokenizer=token_id_tokenizer(setting.config.vocab_size),
        engine_config=EngineConfig(
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max(max_num_seqs, setting.batched_tokens),
            enable_prefix_caching=False,
            kv_cache_dtype=kv,
            **more,
        ),
    )
    try:
        yield engine
    finally:
        engine.shutdown()


def _release(device: torch.device) -> None:
    """The memory of engines that nobody holds any more, so that the next one finds it free."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def prompts_of(setting: Setting, count: int, length: int, seed: int = 0) -> list[list[int]]:
    chooser = random.Random(seed)
    return [chooser.choices(range(setting.config.vocab_size), k=length) for _ in range(count)]


# --- offline throughput


def run_offline(engine: Engine, prompts: list[list[int]], new_tokens: int) -> Phases:
    """All requests at once, until the last one has its last token. Raises RuntimeError where one fails."""
    bins: defaultdict[int, int] = defaultdict(int)
    failures: list[str] = []
    left = threading.Semaphore(0)
    marks = {"first_end": 0.0, "last_begin": 0.0, "end": 0.0}
    begun = [False] * len(prompts)
    params = SamplingParams(max_tokens=new_tokens, temperature=0, ignore_eos=True)
    start = time.perf_counter()

    def listener_of(index: int) -> Callable[[RequestDelta], None]:
        def listen(delta: RequestDelta) -> None:  # all in the engine's thread
            now = time.perf_counter() - start
            count = sum(len(part.token_ids) for part in delta.completions)
            bins[int(now / BIN_SECONDS)] += count
            if count and not begun[index]:
                begun[index] = True
                marks["last_begin"] = now
            if delta.error is not None:
                failures.append(delta.error)
            if delta.finished:
                marks["first_end"] = marks["first_end"] or now
                marks["end"] = now
                left.release()

        return listen

    for index, prompt in enumerate(prompts):
        engine.submit(prompt, params, listener_of(index))
    for _ in prompts:
        left.acquire()
    if failures:
        raise RuntimeError(f"a request failed: {failures[0]}")
    expected = len(prompts) * new_tokens
    if sum(bins.values()) != expected:
        raise RuntimeError(f"{sum(bins.values())} tokens came, not {expected}")
    return phases(bins, BIN_SECONDS, marks["first_end"], marks["last_begin"], marks["end"])


def offline(
    setting: Setting, quantization: str, kv: CacheDtype, limits: Limits, seconds: float, time_left: Callable[[], float]
) -> Iterator[dict[str, Any]]:
    """A result for each of the setting's rows, as it comes; rows for which no time is left say so."""
    rows = setting.rows
    if setting.is_dry:
        rows = tuple(Row(setting.tokens(r.input_tokens), setting.tokens(r.output_tokens), None, 6) for r in rows[:2])
    longest = max(row.input_tokens + row.output_tokens for row in rows)
    # All steps are captured before anything is timed; the drain-out goes through the buckets of all sizes.
    with engine_of(setting, quantization, longest, setting.at_once, kv, capture="eager") as engine:
        weights = effective_weights(setting.config, engine.parts.memory.weights, quantization)
        blocks = engine.statistics().num_blocks
        block_size = engine.parts.engine_config.block_size
        for row in rows:
            # Once requests end and begin all the time, they are half done on average.
            fitting = blocks * block_size // (row.input_tokens + row.output_tokens // 2)
            at_once = max(1, min(setting.at_once, fitting, row.requests))
            count = row.requests if setting.is_dry else requests_for(row, seconds, at_once)
            if time_left() < 1.3 * row.expected_seconds(count) and not setting.is_dry:
                yield {"row": row.name, "skipped": f"{time_left():.0f} s left, of {row.expected_seconds(count):.0f}"}
                continue
            # Kernels that have not been compiled yet, or not measured against each other.
            run_offline(
                engine, prompts_of(setting, min(16, count), row.input_tokens, seed=2), min(8, row.output_tokens)
            )
            before = engine.statistics().num_preemptions
            found = run_offline(engine, prompts_of(setting, count, row.input_tokens), row.output_tokens)
            floor = offline_floor(
                setting.config,
                weights,
                row,
                min(at_once, count),
                limits.of(quantization == "fp8"),
                kv,
                head_in_bfloat16=quantization == "fp8",
            )
            best = found.steady_tokens_per_second or found.tokens_per_second
            yield {
                "row": row.name,
                "requests": count,
                "at_once": min(at_once, count),
                "weights": quantization,
                "kv_cache": kv,
                **dataclasses.asdict(found),
                "published": row.published,
                "ratio": found.tokens_per_second / row.published if row.published else None,
                "steady_ratio": best / row.published if row.published else None,
                "floor": floor.tokens_per_second,
                "percent_of_floor": 100 * best / floor.tokens_per_second,
                "limited_by": floor.limited_by,
                "preemptions": engine.statistics().num_preemptions - before,
            }


# --- one sequence


def single(setting: Setting, quantization: str, limits: Limits, **more: Any) -> dict[str, Any]:
    """Decoding of one sequence and the prefill of a long prompt: tokens a second, and shares of what limits them."""
    long, short, new = setting.tokens(8192), setting.tokens(128), setting.tokens(512)
    own = dataclasses.replace(setting, batched_tokens=max(setting.batched_tokens, long))
    with engine_of(own, quantization, long + new, 1, **more) as engine:
        config = setting.config
        weights = effective_weights(config, engine.parts.memory.weights, quantization)
        run_batch(engine, prompts_of(setting, 1, short, seed=3), 8)
        run_batch(engine, prompts_of(setting, 1, long, seed=3), 2)
        repeats = range(1 if setting.is_dry else 3)
        decodes = [run_batch(engine, prompts_of(setting, 1, short, seed), new) for seed in repeats]
        firsts = {
            length: statistics.median(
                run_batch(engine, prompts_of(setting, 1, length, 10 + seed), 2).prefill_seconds
                for seed in range(1 if setting.is_dry else 5)
            )
            for length in (short, long)
        }
        rate = statistics.median(one.decode_steps / one.decode_seconds for one in decodes)
        step = decode_work(config, weights, 1, short + new // 2)
        prompt = prefill_work(config, weights, 1, long)
        limit = limits.of(quantization == "fp8")
        computing = sum(count / limit.operations[kind] for kind, count in prompt.operations.items())
        return {
            "weights": quantization,
            "overlap": engine.parts.engine_config.overlap_kernels,
            "tokens_per_second": rate,
            "percent_of_bandwidth": 100 * rate * step.bytes_read / limit.read_bandwidth,
            "prefill_tokens": long,
            "prefill_tokens_per_second": long / firsts[long],
            "percent_of_matmul_rate": 100 * computing / firsts[long],
            "seconds_to_first_token": {str(length): seconds for length, seconds in firsts.items()},
        }


def deterministic_cost(setting: Setting, quantization: str, seconds: float) -> dict[str, Any]:
    """Decoding alone, and many requests at once, with and without the deterministic mode, in the same run."""
    short, new = setting.tokens(128), setting.tokens(128)
    count = max(2, int(setting.at_once * min(4.0, seconds / 15)))

    def rates_of(**more: Any) -> dict[str, float]:
        with engine_of(setting, quantization, short + new, setting.at_once, capture="eager", **more) as engine:
            run_offline(engine, prompts_of(setting, min(count, setting.at_once), short, seed=1), min(4, new))
            one = run_batch(engine, prompts_of(setting, 1, short), new)
            many = run_offline(engine, prompts_of(setting, count, short), new)
        return {"single": one.decode_steps / one.decode_seconds, "offline": many.tokens_per_second}

    rates: dict[str, Any] = {"usual": rates_of(), "deterministic": rates_of(deterministic=True)}
    for kind in ("single", "offline"):
        rates[f"{kind}_cost_percent"] = 100 * (1 - rates["deterministic"][kind] / rates["usual"][kind])
    return {"weights": quantization, "requests": count, "lengths": f"{short}/{new}", **rates}


def traced(
    setting: Setting, quantization: str, batch: int, kv: CacheDtype, folder: Path, **more: Any
) -> dict[str, Any]:
    """Kernels of decode steps in the middle of a batch, by torch's profiler; the trace itself is left in the folder."""
    short, new = setting.tokens(128), max(64, setting.tokens(1024))
    on_gpu = setting.device.type == "cuda"
    activities = [torch.profiler.ProfilerActivity.CUDA if on_gpu else torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities):  # sets up what takes seconds the first time
        torch.zeros(8, device=setting.device).sum().item()
    with engine_of(setting, quantization, short + new, batch, kv, **more) as engine:
        overlap = engine.parts.engine_config.overlap_kernels
        prompts = prompts_of(setting, batch, short)
        run_batch(engine, prompts, min(32, new))
        done = engine.statistics().num_step_tokens
        runner = threading.Thread(target=run_batch, args=(engine, prompts, new))
        runner.start()
        deadline = time.monotonic() + 60
        while engine.statistics().num_step_tokens < done + batch * (short + 4) and time.monotonic() < deadline:
            time.sleep(0.001)
        with torch.profiler.profile(activities=activities) as profile:
            before, start = engine.statistics().num_step_tokens, time.perf_counter()
            if not on_gpu:  # the engine's own thread is not seen
                torch.zeros(8).sum().item()
            time.sleep(0.2)
            steps = (engine.statistics().num_step_tokens - before) // batch
            seconds = time.perf_counter() - start
        runner.join()
    # Packed: as text, a fifth of a second is some 15 MB.
    path = folder / f"trace_{quantization}_{batch}{'_overlap' * overlap}.json.gz"
    profile.export_chrome_trace(str(path))
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    times = device_times(events, ON_DEVICE if on_gpu else ON_HOST)
    return {
        "weights": quantization,
        "batch": batch,
        "overlap": overlap,
        "steps": steps,
        "milliseconds_per_step": 1000 * seconds / max(1, steps),
        "idle_percent": 100 * times.idle_share,
        "kernels": [
            {"name": name, "percent": 100 * total / times.span, "microseconds": total / calls, "calls": calls}
            for name, total, calls in times.kernels[:14]
        ],
        "trace": path.name,
    }


# --- the device itself


def measured_limits(device: torch.device, is_dry: bool) -> Limits:
    """Copy bandwidth (bytes read plus written) and the rates of large products in bfloat16 and FP8; medians of 20."""
    size = 256 if is_dry else 8192
    words = (1 << 20) if is_dry else (1 << 30)
    bandwidth = _copy_bandwidth(device, words)
    a, b = (torch.randn(size, size, device=device).to(torch.bfloat16) for _ in range(2))
    operations = 2.0 * size**3
    bfloat16 = operations / median_seconds(device, lambda: a @ b)
    fp8 = None
    if device.type == "cuda":
        scale = torch.ones((), device=device)
        x, y = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn).t().contiguous().t()
        fp8 = operations / median_seconds(
            device,
            lambda: torch._scaled_mm(x, y, scale_a=scale, scale_b=scale, out_dtype=torch.bfloat16, use_fast_accum=True),
        )
    return Limits(bandwidth, bfloat16, fp8)


def _copy_bandwidth(device: torch.device, words: int) -> float:
    source = torch.randint(-(1 << 31), 1 << 31, (words,), dtype=torch.int32, device=device)
    target = torch.empty_like(source)
    seconds = median_seconds(device, lambda: target.copy_(source))
    return 2 * source.numel() * source.element_size() / seconds


def median_seconds(device: torch.device, function: Callable[[], object], repeats: int = 20) -> float:
    """After three runs to warm up; timed by the device's own events where it has them."""
    for _ in range(3):
        function()
    found = []
    for _ in range(repeats):
        if device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            function()
            end.record()
            end.synchronize()
            found.append(begin.elapsed_time(end) / 1000)
        else:
            start = time.perf_counter()
            function()
            found.append(time.perf_counter() - start)
    return statistics.median(found)
