"""What an H200 can do at most: the yardstick's rows, the least time that measured limits allow, and shares of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from puna.config import CacheDtype, LLaMAConfig
from puna.planning.memory import parameter_counts
from puna.planning.roofline import MachineLimit, decode_work, prefill_work


@dataclass(frozen=True)
class Row:
    """Requests that all have so many tokens of prompt and of output; `published` output tokens a second, of `requests`.

    Published by NVIDIA for TensorRT-LLM 1.0 on one H200, FP8 weights, all requests queued at once.
    """

    input_tokens: int
    output_tokens: int
    published: float | None
    requests: int

    @property
    def name(self) -> str:
        return f"{self.input_tokens}/{self.output_tokens}"

    @property
    def rate(self) -> float:
        """What to plan time by."""
        return self.published or 1000.0

    def expected_seconds(self, requests: int) -> float:
        return requests * self.output_tokens / self.rate


ROWS_8B: Final = (
    Row(128, 128, 27911, 30000),
    Row(128, 2048, 26221, 3000),
    Row(128, 4096, 18027, 1500),
    Row(500, 2000, 20770, 3000),
    Row(1000, 1000, 17744, 3000),
    Row(1000, 2000, 16828, 1500),
    Row(2048, 128, 3538, 3000),
    Row(2048, 2048, 12194, 1500),
    Row(5000, 500, 3902, 1500),
    Row(20000, 2000, 1804, 1000),
)
ROWS_70B: Final = (
    Row(128, 128, 3803, 30000),
    Row(128, 2048, 4336, 3000),
    Row(1000, 1000, 2909, 3000),
    Row(2048, 128, 442, 3000),
    Row(2048, 2048, 2003, 1500),
)


@dataclass(frozen=True)
class Limits:
    """Of a machine, as measured: bytes a second (read plus written by a copy), and operations a second."""

    bandwidth: float
    bfloat16: float
    fp8: float | None

    def of(self, is_fp8: bool) -> MachineLimit:
        """For a model whose matrices are multiplied in FP8, or in bfloat16; attention is in bfloat16 always."""
        low = self.fp8 if is_fp8 and self.fp8 is not None else self.bfloat16
        return MachineLimit(read_bandwidth=self.bandwidth, operations={"int8": low, "bfloat16": self.bfloat16})


@dataclass(frozen=True)
class Floor:
    """The least seconds of a batch of requests, what rate of output tokens this allows, and which limit sets it."""

    reading_seconds: float
    computing_seconds: float
    tokens: int

    @property
    def seconds(self) -> float:
        return max(self.reading_seconds, self.computing_seconds)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds

    @property
    def limited_by(self) -> str:
        return "reading" if self.reading_seconds > self.computing_seconds else "computing"


def effective_weights(config: LLaMAConfig, weights: int, quantization: str) -> int:
    """Bytes that planning.roofline should be told, where it takes every weight for equally wide: an embedding of its
    own is not read, and it is in bfloat16 where the layers are in FP8, as lm_head is, which is read."""
    counts = parameter_counts(config)
    if not counts.head:
        return weights
    width = {"int8": 34 / 32, "int4": 18 / 32}.get(quantization, 2.0)
    return int((weights - width * counts.embedding) * counts.total / (counts.total - counts.embedding))


def offline_floor(
    config: LLaMAConfig,
    weights: int,
    row: Row,
    at_once: int,
    limits: MachineLimit,
    kv_cache_dtype: CacheDtype,
    head_in_bfloat16: bool,
) -> Floor:
    """`weights` are effective ones. Of `at_once` requests that run side by side from their first token to their last.

    Every step reads the weights once and each request's cache; prompts are computed in steps that read the weights
    anyway, so they add arithmetic alone. Reading and computing overlap perfectly. The mean step has half the output.
    """
    prompts = prefill_work(config, weights, at_once, row.input_tokens)
    # The first token comes out of the prompt.
    steps = row.output_tokens - 1
    step = decode_work(config, weights, at_once, row.input_tokens + max(1, row.output_tokens // 2), kv_cache_dtype)
    operations = {
        kind: prompts.operations.get(kind, 0.0) + steps * step.operations.get(kind, 0.0)
        for kind in {*prompts.operations, *step.operations}
    }
    if head_in_bfloat16 and "int8" in operations:
        head = 2.0 * config.vocab_size * config.hidden_size * at_once * row.output_tokens
        operations["int8"] -= head
        operations["bfloat16"] = operations.get("bfloat16", 0.0) + head
    return Floor(
        reading_seconds=max(steps * step.bytes_read, prompts.bytes_read) / limits.read_bandwidth,
        computing_seconds=sum(count / limits.operations[kind] for kind, count in operations.items()),
        tokens=at_once * row.output_tokens,
    )


def requests_for(row: Row, seconds: float, at_once: int) -> int:
    """How many requests of a row to run: what takes about so many seconds at the published rate, but as many as run at
    once at least, and never more than were published. With fewer the batch would never be full."""
    return min(row.requests, max(int(row.rate * seconds / row.output_tokens), at_once))


@dataclass(frozen=True)
class Phases:
    """Output tokens a second of a run: of all of it, and between ramp-up and drain-out where there is anything between.

    The ramp-up ends when the first request does; the drain-out begins when the last one has its first token, since
    nothing waits from then on.
    """

    total_seconds: float
    tokens_per_second: float
    ramp_up_seconds: float
    drain_out_seconds: float
    steady_tokens_per_second: float | None


def phases(bins: dict[int, int], width: float, first_end: float, last_begin: float, end: float) -> Phases:
    """`bins`: tokens in each `width` seconds since the start, by index; the times are seconds since the start."""
    low, high = -int(-first_end // width), int(last_begin // width)
    steady = None
    if high - low >= 10:  # bins: less is no state
        steady = sum(count for index, count in bins.items() if low <= index < high) / ((high - low) * width)
    return Phases(
        total_seconds=end,
        tokens_per_second=sum(bins.values()) / end,
        ramp_up_seconds=first_end,
        drain_out_seconds=end - last_begin,
        steady_tokens_per_second=steady,
    )
