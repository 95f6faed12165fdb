"""/metrics counts what clients saw, exactly, under vLLM's names; and the log has a line for every request."""

from __future__ import annotations

import json
import logging
import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import pytest
from prometheus_client.parser import text_string_to_metric_families

from serving.conftest import Running

BODY: dict[str, Any] = {"model": "small", "prompt": "x" * 40, "max_tokens": 10, "ignore_eos": True}

# vLLM's names and types, as its documentation lists them; what Prometheus' client library tells of a process; ours.
EXPORTED: Final = {
    "vllm:num_requests_running": "gauge",
    "vllm:num_requests_waiting": "gauge",
    "vllm:kv_cache_usage_perc": "gauge",
    "vllm:cache_config_info": "gauge",
    "vllm:prefix_cache_queries": "counter",
    "vllm:prefix_cache_hits": "counter",
    "vllm:num_preemptions": "counter",
    "vllm:prompt_tokens": "counter",
    "vllm:generation_tokens": "counter",
    "vllm:request_success": "counter",
    "vllm:iteration_tokens_total": "histogram",
    "vllm:time_to_first_token_seconds": "histogram",
    "vllm:inter_token_latency_seconds": "histogram",
    "vllm:request_time_per_output_token_seconds": "histogram",
    "vllm:e2e_request_latency_seconds": "histogram",
    "vllm:request_queue_time_seconds": "histogram",
    "vllm:request_inference_time_seconds": "histogram",
    "vllm:request_prefill_time_seconds": "histogram",
    "vllm:request_decode_time_seconds": "histogram",
    "vllm:request_prompt_tokens": "histogram",
    "vllm:request_generation_tokens": "histogram",
    "vllm:request_max_num_generation_tokens": "histogram",
    "vllm:request_params_n": "histogram",
    "vllm:request_params_max_tokens": "histogram",
    "http_requests": "counter",
    "process_virtual_memory_bytes": "gauge",
    "process_resident_memory_bytes": "gauge",
    "process_start_time_seconds": "gauge",
    "process_cpu_seconds": "counter",
    "process_open_fds": "gauge",
    "process_max_fds": "gauge",
    "puna:event_loop_tasks": "gauge",
}


def families(running: Running) -> list[Any]:
    answer = running.http.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    return list(text_string_to_metric_families(answer.text))


def read(running: Running) -> dict[str, float]:
    """By name and the labels that tell samples of one name apart; without buckets."""
    found = {}
    for family in families(running):
        for sample in family.samples:
            if family.name.startswith("vllm:"):
                assert sample.labels["model_name"] == "small"
                assert sample.labels["engine"] == "0"
            if "le" not in sample.labels:
                own = (sample.labels.get(name, "") for name in ("finished_reason", "handler", "status"))
                found[" ".join([sample.name, *filter(None, own)])] = sample.value
    return found


def test_names_types_and_buckets(server: Running) -> None:
    assert server.http.post("/v1/completions", json=BODY).status_code == 200
    found = families(server)
    kinds = {family.name: family.type for family in found if not family.name.endswith("_created")}
    assert kinds == EXPORTED
    for family in found:
        assert family.documentation
        if family.type == "histogram":
            buckets = [(float(s.labels["le"]), s.value) for s in family.samples if s.name.endswith("_bucket")]
            (count,) = (s.value for s in family.samples if s.name.endswith("_count"))
            assert buckets == sorted(buckets)
            assert [value for _, value in buckets] == sorted(value for _, value in buckets)
            assert buckets[-1] == (float("inf"), count)
    (cache,) = (s.labels for family in found if family.name == "vllm:cache_config_info" for s in family.samples)
    engine = server.state.engine
    assert engine is not None
    assert cache["block_size"] == "16"
    assert int(cache["num_gpu_blocks"]) == engine.parts.memory.num_blocks[0]
    assert cache["enable_prefix_caching"] == "True"


def test_counts_are_those_of_the_requests(serve: Any) -> None:
    with serve() as running:
        before = read(running)
        assert before["vllm:generation_tokens_total"] == 0
        assert before["vllm:request_success_total length"] == before["vllm:request_success_total abort"] == 0
        for stream in (False, True):
            assert running.http.post("/v1/completions", json=BODY | {"stream": stream, "n": 2}).status_code == 200
        running.wait_until_idle()
        after = read(running)
    assert after["vllm:prompt_tokens_total"] == 2 * 41
    assert after["vllm:generation_tokens_total"] == 2 * 2 * 10
    assert after["vllm:request_success_total length"] == 4
    assert after["vllm:time_to_first_token_seconds_count"] == 2
    assert after["vllm:inter_token_latency_seconds_count"] == 2 * 2 * 9
    assert after["vllm:time_to_first_token_seconds_sum"] < after["vllm:e2e_request_latency_seconds_sum"]
    assert after["vllm:prefix_cache_queries_total"] == 2 * 41
    assert after["vllm:prefix_cache_hits_total"] == 32  # two whole blocks of the second request's prompt
    # Each prompt but for what was cached, and every token but the last of each text.
    assert after["vllm:iteration_tokens_total_sum"] == 2 * 41 - 32 + 2 * 2 * 9
    assert after["vllm:request_prompt_tokens_sum"] == 2 * 41
    assert after["vllm:request_generation_tokens_sum"] == 2 * 2 * 10
    assert after["vllm:request_max_num_generation_tokens_sum"] == 2 * 10
    assert after["vllm:request_params_n_sum"] == 2 * 2
    assert after["vllm:request_params_max_tokens_sum"] == 2 * 10
    for name in ("e2e_request_latency", "request_queue_time", "request_prefill_time", "request_decode_time"):
        assert after[f"vllm:{name}_seconds_count"] == 2
        assert after[f"vllm:{name}_seconds_sum"] >= 0
    parts = [after[f"vllm:request_{name}_time_seconds_sum"] for name in ("queue", "prefill", "decode", "inference")]
    assert parts[3] == pytest.approx(parts[1] + parts[2])
    assert sum(parts[:3]) <= after["vllm:e2e_request_latency_seconds_sum"]
    assert after["vllm:num_requests_running"] == after["vllm:num_requests_waiting"] == 0
    assert after["vllm:kv_cache_usage_perc"] == after["vllm:num_preemptions_total"] == 0
    assert after["http_requests_total /v1/completions 2xx"] == 2
    assert after["process_open_fds"] > 0


def test_a_mixed_load_adds_up_to_what_the_clients_saw(serve: Any) -> None:
    """Many at once over a small cache: preempted, stopped, refused and whole ones."""

    def ask(number: int) -> tuple[int, dict[str, Any]]:
        body = BODY | {"prompt": [f"{number} " * (3 + number % 5)], "max_tokens": 20 + number, "n": 1 + number % 3}
        body |= {"stream": number % 2 == 0, "logprobs": number % 21, "ignore_eos": number % 4 > 0}
        if number == 7:
            body["temperature"] = -1
        if body["stream"]:
            body["stream_options"] = {"include_usage": True}
        answer = running.http.post("/v1/completions", json=body)
        if answer.status_code != 200:
            return answer.status_code, {}
        if not body["stream"]:
            return 200, answer.json()
        events = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
        ends = [choice for event in events for choice in event["choices"] if choice["finish_reason"]]
        return 200, {"choices": ends, "usage": events[-1]["usage"]}

    with serve({"max_num_seqs": 8, "kv_cache_memory": 60_000, "max_model_len": 128}) as running:
        with ThreadPoolExecutor(12) as pool:
            answers = list(pool.map(ask, range(24)))
        running.wait_until_idle()
        after = read(running)
    whole = [answer for status, answer in answers if status == 200]
    assert [status for status, _ in answers if status != 200] == [400]
    usage = [answer["usage"] for answer in whole]
    reasons = [choice["finish_reason"] for answer in whole for choice in answer["choices"]]
    assert after["vllm:prompt_tokens_total"] == sum(one["prompt_tokens"] for one in usage)
    assert after["vllm:generation_tokens_total"] == sum(one["completion_tokens"] for one in usage)
    assert after["vllm:request_generation_tokens_sum"] == after["vllm:generation_tokens_total"]
    for reason in ("length", "stop"):
        assert after[f"vllm:request_success_total {reason}"] == reasons.count(reason)
    assert after["vllm:request_success_total abort"] == after["vllm:request_success_total error"] == 0
    for name in ("time_to_first_token_seconds", "e2e_request_latency_seconds", "request_queue_time_seconds"):
        assert after[f"vllm:{name}_count"] == len(whole) == 23
    assert after["vllm:inter_token_latency_seconds_count"] == after["vllm:generation_tokens_total"] - len(reasons)
    assert after["http_requests_total /v1/completions 2xx"] == 23
    assert after["http_requests_total /v1/completions 4xx"] == 1
    assert after["vllm:prefix_cache_queries_total"] == after["vllm:prompt_tokens_total"]
    assert after["vllm:num_preemptions_total"] > 0


def test_a_client_that_leaves_counts_as_aborted_and_in_no_latency(serve: Any) -> None:
    with serve() as running:
        with running.http.stream("POST", "/v1/completions", json=BODY | {"stream": True, "max_tokens": 200}) as answer:
            lines = answer.iter_lines()
            next(lines)
        running.wait_until_idle()
        after = read(running)
        assert after["vllm:request_success_total abort"] == 1
        assert 1 <= after["vllm:generation_tokens_total"] < 200
        assert after["vllm:e2e_request_latency_seconds_count"] == 0


def test_paths_of_attackers_make_no_series(server: Running) -> None:
    for number in range(5):
        assert server.http.get(f"/nothing/{number}").status_code == 404
    handlers = [s.labels["handler"] for f in families(server) if f.name == "http_requests" for s in f.samples]
    assert "none" in handlers
    assert not any("nothing" in handler for handler in handlers)


def test_the_log_has_the_request_and_none_of_its_text(server: Running, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "puna.serving"):
        body = BODY | {"prompt": "secret" * 9}
        for name in ("abc", "def"):
            server.http.post("/v1/completions", json=body, headers={"x-request-id": name})
        server.http.post("/v1/completions", json=BODY | {"temperature": -1}, headers={"x-request-id": "bad"})
        server.http.get("/evil%0Apath")
    (line,) = [record for record in caplog.records if "request_id=def" in record.getMessage()]
    fields = line.__dict__["fields"]
    times = {name: fields[name] for name in ("seconds", "queue_seconds", "first_token_seconds")}
    assert 0 <= times["queue_seconds"] <= times["first_token_seconds"] <= times["seconds"] < 30
    assert fields == times | {
        "method": "POST",
        "path": "/v1/completions",
        "status": 200,
        "request_id": "def",
        "model": "small",
        "prompt_tokens": 55,
        "cached_tokens": 48,
        "generated_tokens": 10,
        "finish_reason": "length",
    }
    assert re.fullmatch(
        r"POST '/v1/completions' 200 \d+\.\d{3}s request_id=def model=small prompt_tokens=55 cached_tokens=48 "
        r"generated_tokens=10 queue_seconds=[\d.]+ first_token_seconds=[\d.]+ finish_reason=length",
        line.getMessage(),
    )
    (refused,) = [record for record in caplog.records if "request_id=bad" in record.getMessage()]
    assert refused.__dict__["fields"]["status"] == 400
    assert "model" not in refused.__dict__["fields"]
    assert "secret" not in caplog.text
    assert "\npath" not in caplog.text
