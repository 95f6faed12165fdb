"""Metrics: what Prometheus reads, under the names and meanings that vLLM made common, so that its dashboards fit."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from puna.engine.engine import Engine, EngineStatistics
from puna.scheduling.sequence import FinishReason

# Seconds. From a small model's token on a quick machine to a long prompt on a busy one.
_SHORT: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 2.5, 5.0)
_LONG: Final = (
    *(0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0),
    *(10.0, 20.0, 40.0, 80.0, 160.0, 640.0),
)
_TOKENS: Final = tuple(float(digit * 10**zeros) for zeros in range(6) for digit in (1, 2, 5))
_COUNTS: Final = (1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0)
# One engine: vLLM tells several of a server apart by it.
_METHODS: Final = frozenset(["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"])
_LABELS: Final = ("model_name", "engine")
_ENGINE: Final = "0"


@dataclass(frozen=True, kw_only=True)
class FinishedRequest:
    """What is known of a prompt once all its continuations have ended; times in seconds.

    `queue`: from taking it to planning it. `prefill`: from there to the first token, `decode` from there to the last.
    `whole`: from the arrival of its HTTP request to its end. `generated`: tokens of each continuation.
    """

    prompt_tokens: int
    generated: tuple[int, ...]
    max_tokens: int | None
    whole: float
    queue: float
    prefill: float
    decode: float


class Metrics:
    """One server's. The methods are called in its event loop."""

    def __init__(self, model_name: str) -> None:
        self.registry = CollectorRegistry()
        self._model = model_name
        self._prompt_tokens = self._counter(
            "vllm:prompt_tokens", "Tokens of prompts that were computed or found cached."
        )
        self._tokens = _TokenCollector({"model_name": model_name, "engine": _ENGINE})
        self.registry.register(self._tokens)
        ended = Counter(
            "vllm:request_success",
            "Continuations that ended, by their finish_reason.",
            [*_LABELS, "finished_reason"],
            registry=self.registry,
        )
        # All of them from the start: a rate over a series that begins with its first event does not see that event.
        self._ended = {reason: ended.labels(model_name, _ENGINE, reason) for reason in get_args(FinishReason)}
        times = {
            name: self._histogram(f"vllm:{name}_seconds", help_text, _LONG)
            for name, help_text in (
                ("time_to_first_token", "From request to first token."),
                ("e2e_request_latency", "From request to last token."),
                ("request_queue_time", "From request taken to its first step."),
                ("request_inference_time", "From a request's first step to its last token."),
                ("request_prefill_time", "From a request's first step to its first token."),
                ("request_decode_time", "From a request's first token to its last."),
                ("request_time_per_output_token", "A request's decode time by the tokens after the first."),
            )
        }
        self._first_token = times.pop("time_to_first_token")
        self._times = times
        self._sizes = {
            name: self._histogram(f"vllm:{name}", help_text, _COUNTS if name == "request_params_n" else _TOKENS)
            for name, help_text in (
                ("request_prompt_tokens", "Tokens of a request's prompt."),
                ("request_generation_tokens", "Tokens that a request generated, all its continuations together."),
                ("request_max_num_generation_tokens", "Tokens of a request's longest continuation."),
                ("request_params_n", "Continuations that a request asked for."),
                ("request_params_max_tokens", "What requests set max_tokens to."),
            )
        }
        self._http = Counter(
            "http_requests",
            "Answers, by the path's pattern, method and status.",
            ["handler", "method", "status"],
            registry=self.registry,
        )
        ProcessCollector(registry=self.registry)
        # Requests and connections are tasks: a server at rest has always the same number.
        tasks = Gauge("puna:event_loop_tasks", "Tasks of the event loop.", ["model_name"], registry=self.registry)
        self.tasks = tasks.labels(model_name)

    def watch(self, engine: Engine) -> None:
        """Also tell how this engine is doing, as it is when it is asked for. What it did until now does not count."""
        self.registry.register(_EngineCollector(engine, {"model_name": self._model, "engine": _ENGINE}))

    def answered(self, handler: str, method: str, status: int) -> None:
        """`handler` is a route's pattern, never a path as it came: there would be no end of series."""
        self._http.labels(handler, method if method in _METHODS else "other", f"{status // 100}xx").inc()

    def first_token(self, seconds: float, prompt_tokens: int) -> None:
        self._first_token.observe(seconds)
        self._prompt_tokens.inc(prompt_tokens)

    def embedded(self, prompt_tokens: int) -> None:
        self._prompt_tokens.inc(prompt_tokens)

    def tokens(self, count: int, seconds_between: float | None) -> None:
        self._tokens.add(count, seconds_between)

    def ended(self, finish_reason: FinishReason) -> None:
        self._ended[finish_reason].inc()

    def finished(self, request: FinishedRequest) -> None:
        """Of one that came to its end; what was cancelled or failed says nothing of how long requests take."""
        generated = sum(request.generated)
        self._times["e2e_request_latency"].observe(request.whole)
        self._times["request_queue_time"].observe(request.queue)
        self._times["request_inference_time"].observe(request.prefill + request.decode)
        self._times["request_prefill_time"].observe(request.prefill)
        self._times["request_decode_time"].observe(request.decode)
        if (longest := max(request.generated)) > 1:
            self._times["request_time_per_output_token"].observe(request.decode / (longest - 1))
        self._sizes["request_prompt_tokens"].observe(request.prompt_tokens)
        self._sizes["request_generation_tokens"].observe(generated)
        self._sizes["request_max_num_generation_tokens"].observe(longest)
        self._sizes["request_params_n"].observe(len(request.generated))
        if request.max_tokens is not None:
            self._sizes["request_params_max_tokens"].observe(request.max_tokens)

    def text(self) -> bytes:
        return generate_latest(self.registry)

    def _counter(self, name: str, help_text: str) -> Counter:
        return Counter(name, help_text, _LABELS, registry=self.registry).labels(self._model, _ENGINE)

    def _histogram(self, name: str, help_text: str, buckets: tuple[float, ...]) -> Histogram:
        metric = Histogram(name, help_text, _LABELS, registry=self.registry, buckets=buckets)
        return metric.labels(self._model, _ENGINE)


class _TokenCollector(Collector):
    """What is counted for each token of every stream: the library's counter and histogram, which lock for each of their
    numbers, took as long as half of all else that the event loop does for a token."""

    def __init__(self, labels: dict[str, str]) -> None:
        self._labels = labels
        self._generated = 0
        self._between = [0] * (len(_SHORT) + 1)  # by bucket; the last one has no bound
        self._seconds = 0.0

    def add(self, count: int, seconds_between: float | None) -> None:
        self._generated += count
        if seconds_between is not None:
            self._between[bisect_left(_SHORT, seconds_between)] += 1
            self._seconds += seconds_between

    def collect(self) -> Iterator[Metric]:
        names, values = list(self._labels), list(self._labels.values())
        generated = CounterMetricFamily("vllm:generation_tokens", "Tokens that were generated.", labels=names)
        generated.add_metric(values, float(self._generated))
        yield generated
        counts = list(self._between)  # of one moment: another thread collects
        buckets = [(str(bound), float(sum(counts[: place + 1]))) for place, bound in enumerate((*_SHORT, "+Inf"))]
        between = HistogramMetricFamily(
            "vllm:inter_token_latency_seconds", "Between two tokens of a text.", labels=names
        )
        between.add_metric(values, buckets, self._seconds)
        yield between


class _EngineCollector(Collector):
    def __init__(self, engine: Engine, labels: dict[str, str]) -> None:
        self._engine = engine
        self._labels = labels
        self._before = engine.statistics()  # the server's own requests at its start are nobody's

    def collect(self) -> Iterator[Metric]:
        now, before = self._engine.statistics(), self._before
        config = self._engine.parts.engine_config
        # vLLM's name for the blocks, on every device: routers of requests look for it.
        cache = {
            "block_size": str(config.block_size),
            "num_gpu_blocks": str(now.num_blocks),
            "cache_dtype": config.kv_cache_dtype,
            "enable_prefix_caching": str(config.enable_prefix_caching),
        }
        for name, help_text, value, labels in (
            ("vllm:num_requests_running", "Continuations that run.", float(now.num_running), {}),
            ("vllm:num_requests_waiting", "Requests that wait.", float(now.num_waiting), {}),
            ("vllm:kv_cache_usage_perc", "Part of the blocks that is in use; 1 is all.", now.cache_usage, {}),
            ("vllm:cache_config_info", "How the cache is made, in labels.", 1.0, cache),
        ):
            labels = self._labels | labels
            gauge = GaugeMetricFamily(name, help_text, labels=list(labels))
            gauge.add_metric(list(labels.values()), value)
            yield gauge
        for name, help_text, count in (
            (
                "vllm:num_preemptions",
                "Continuations that had to give up their blocks.",
                now.num_preemptions - before.num_preemptions,
            ),
            (
                "vllm:prefix_cache_queries",
                "Tokens that were looked for in the cache.",
                now.num_prefix_query_tokens - before.num_prefix_query_tokens,
            ),
            (
                "vllm:prefix_cache_hits",
                "Tokens that were found there.",
                now.num_prefix_hit_tokens - before.num_prefix_hit_tokens,
            ),
        ):
            counter = CounterMetricFamily(name, help_text, labels=list(self._labels))
            counter.add_metric(list(self._labels.values()), float(count))
            yield counter
        yield self._step_tokens(now, before)

    def _step_tokens(self, now: EngineStatistics, before: EngineStatistics) -> Metric:
        counts = [a - b for a, b in zip(now.num_steps_by_size, before.num_steps_by_size, strict=True)]
        steps = HistogramMetricFamily(
            "vllm:iteration_tokens_total", "Tokens that a step computes.", labels=list(self._labels)
        )
        buckets = [(str(float(2**power)), float(sum(counts[: power + 1]))) for power in range(len(counts) - 1)]
        buckets.append(("+Inf", float(sum(counts))))
        steps.add_metric(list(self._labels.values()), buckets, float(now.num_step_tokens - before.num_step_tokens))
        return steps
