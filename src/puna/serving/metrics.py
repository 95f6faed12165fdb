"""Metrics: what Prometheus reads, under the names and meanings that vLLM made common, so that its dashboards fit."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from puna.engine.engine import Engine

# Seconds. From a small model's token on a quick machine to a long prompt on a busy one.
_SHORT: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 2.5, 5.0)
_LONG: Final = (0.01, 0.05, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0)


class Metrics:
    """One server's. The methods are called in its event loop, with times of `time.perf_counter`."""

    def __init__(self, model_name: str) -> None:
        self.registry = CollectorRegistry()
        self._model = model_name
        self._prompt_tokens = self._counter(
            "vllm:prompt_tokens", "Tokens of prompts that were computed or found cached."
        )
        self._generation_tokens = self._counter("vllm:generation_tokens", "Tokens that were generated.")
        self._ended = Counter(
            "vllm:request_success",
            "Continuations that ended, by their finish_reason.",
            ["model_name", "finished_reason"],
            registry=self.registry,
        )
        self._first_token = self._histogram("vllm:time_to_first_token_seconds", "From request to first token.", _LONG)
        self._between = self._histogram("vllm:inter_token_latency_seconds", "Between two tokens of a text.", _SHORT)
        self._whole = self._histogram("vllm:e2e_request_latency_seconds", "From request to last token.", _LONG)

        # Requests and connections are tasks: a server at rest has always the same number.
        tasks = Gauge("puna:event_loop_tasks", "Tasks of the event loop.", ["model_name"], registry=self.registry)
        self.tasks = tasks.labels(model_name)

    def watch(self, engine: Engine) -> None:
        """Also tell how this engine is doing, as it is when it is asked for."""
        self.registry.register(_EngineCollector(engine, self._model))

    def first_token(self, seconds: float, prompt_tokens: int) -> None:
        self._first_token.observe(seconds)
        self._prompt_tokens.inc(prompt_tokens)

    def tokens(self, count: int, seconds_between: float | None) -> None:
        self._generation_tokens.inc(count)
        if seconds_between is not None:
            self._between.observe(seconds_between)

    def ended(self, finish_reason: str) -> None:
        self._ended.labels(self._model, finish_reason).inc()

    def whole(self, seconds: float) -> None:
        self._whole.observe(seconds)

    def text(self) -> bytes:
        return generate_latest(self.registry)

    def _counter(self, name: str, help_text: str) -> Counter:
        return Counter(name, help_text, ["model_name"], registry=self.registry).labels(self._model)

    def _histogram(self, name: str, help_text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(name, help_text, ["model_name"], registry=self.registry, buckets=buckets).labels(self._model)


class _EngineCollector(Collector):
    def __init__(self, engine: Engine, model_name: str) -> None:
        self._engine = engine
        self._labels = {"model_name": model_name}

    def collect(self) -> Iterator[GaugeMetricFamily | CounterMetricFamily]:
        now = self._engine.statistics()
        for name, help_text, value in (
            ("vllm:num_requests_running", "Continuations that run.", float(now.num_running)),
            ("vllm:num_requests_waiting", "Requests that wait.", float(now.num_waiting)),
            ("vllm:kv_cache_usage_perc", "Part of the blocks that is in use; 1 is all.", now.cache_usage),
        ):
            gauge = GaugeMetricFamily(name, help_text, labels=list(self._labels))
            gauge.add_metric(list(self._labels.values()), value)
            yield gauge
        for name, help_text, count in (
            ("vllm:num_preemptions", "Continuations that had to give up their blocks.", now.num_preemptions),
            ("vllm:prefix_cache_queries", "Tokens that were looked for in the cache.", now.num_prefix_query_tokens),
            ("vllm:prefix_cache_hits", "Tokens that were found there.", now.num_prefix_hit_tokens),
        ):
            counter = CounterMetricFamily(name, help_text, labels=list(self._labels))
            counter.add_metric(list(self._labels.values()), float(count))
            yield counter
