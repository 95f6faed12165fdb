"""LoadReport: what a load test found, under the names and meanings of vLLM's `bench serve`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from puna.cli.load_run import Record, Run

# By its short name: what the latency is.
LATENCIES: Final = (
    ("ttft", "time to first token"),
    ("tpot", "time per output token after the first"),
    ("itl", "inter-token latency"),
    ("e2el", "end-to-end latency"),
)
_PERCENTILES: Final = (50, 90, 95, 99)


@dataclass(frozen=True)
class Latency:
    """Of one kind, in milliseconds; `values` are sorted."""

    values: Sequence[float]

    @property
    def mean(self) -> float:
        return float(np.mean(self.values)) if len(self.values) else 0.0

    @property
    def deviation(self) -> float:
        return float(np.std(self.values)) if len(self.values) else 0.0

    def percentile(self, percent: float) -> float:
        return float(np.percentile(self.values, percent)) if len(self.values) else 0.0


@dataclass(frozen=True)
class LoadReport:
    """`request_goodput`: requests per second that kept all `limits` (milliseconds); None without any.

    ttft is from sending to the first text, itl between pieces of text (of all requests together), tpot a request's time
    after its first text by its further tokens, e2el from sending to the last choice.
    """

    completed: int
    errors: Mapping[str, int]
    duration: float
    total_input_tokens: int
    total_output_tokens: int
    latencies: Mapping[str, Latency]
    limits: Mapping[str, float]
    request_goodput: float | None
    client_cpu_seconds: float

    @classmethod
    def of(cls, run: Run, limits: Mapping[str, float]) -> LoadReport:
        good = [record for record in run.records if record.error is None]
        errors = Counter(record.error for record in run.records if record.error is not None)
        found: dict[str, list[float]] = {name: [] for name, _ in LATENCIES}
        kept = 0
        for record in good:
            own = _latencies(record)
            for name, values in own.items():
                found[name] += values
            kept += all(max(own[name], default=0.0) <= limit for name, limit in limits.items())
        return cls(
            completed=len(good),
            errors=dict(errors.most_common()),
            duration=run.duration,
            total_input_tokens=sum(record.prompt_tokens for record in good),
            total_output_tokens=sum(record.output_tokens for record in good),
            latencies={name: Latency(sorted(values)) for name, values in found.items()},
            limits=dict(limits),
            request_goodput=kept / run.duration if limits else None,
            client_cpu_seconds=run.cpu_seconds,
        )

    @property
    def failed(self) -> int:
        return sum(self.errors.values())

    @property
    def request_throughput(self) -> float:
        return self.completed / self.duration

    @property
    def output_throughput(self) -> float:
        return self.total_output_tokens / self.duration

    @property
    def total_token_throughput(self) -> float:
        return (self.total_input_tokens + self.total_output_tokens) / self.duration

    def fields(self) -> dict[str, Any]:
        """As vLLM names them."""
        found: dict[str, Any] = {
            "duration": self.duration,
            "completed": self.completed,
            "failed": self.failed,
            "errors": dict(self.errors),
            "total_input_tokens": self.total_input_tokens,
            "total_output_tokens": self.total_output_tokens,
            "request_throughput": self.request_throughput,
            "request_goodput": self.request_goodput,
            "output_throughput": self.output_throughput,
            "total_token_throughput": self.total_token_throughput,
            "client_cpu_seconds": self.client_cpu_seconds,
        }
        for name, _ in LATENCIES:
            latency = self.latencies[name]
            found |= {f"mean_{name}_ms": latency.mean, f"median_{name}_ms": latency.percentile(50)}
            found |= {f"std_{name}_ms": latency.deviation}
            found |= {f"p{percent}_{name}_ms": latency.percentile(percent) for percent in _PERCENTILES}
        return found

    def rows(self) -> list[tuple[str, ...]]:
        """A table's: the latency, its mean, and its percentiles."""
        found = []
        for name, meaning in LATENCIES:
            latency = self.latencies[name]
            numbers = (latency.mean, *(latency.percentile(percent) for percent in _PERCENTILES))
            found.append((f"{meaning} ({name.upper()})", *(f"{number:,.1f}" for number in numbers)))
        return found


HEADER: Final = ("milliseconds", "mean", *(f"p{percent}" for percent in _PERCENTILES))


def _latencies(record: Record) -> dict[str, list[float]]:
    """Of one request, in milliseconds. One token has no time after it."""
    first, whole = record.times[0] - record.start, record.end - record.start
    further = record.output_tokens - 1
    pieces = zip(record.times, record.times[1:], strict=False)
    return {
        "ttft": [1e3 * first],
        "tpot": [1e3 * (whole - first) / further] if further > 0 else [],
        "itl": [1e3 * (after - before) for before, after in pieces],
        "e2el": [1e3 * whole],
    }
