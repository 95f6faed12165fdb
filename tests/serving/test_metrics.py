"""/metrics counts what happened, exactly; and the log has a line for every request."""

from __future__ import annotations

import logging
import re
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

BODY: dict[str, Any] = {"model": "small", "prompt": "x" * 40, "max_tokens": 10, "ignore_eos": True}


def read(running: Any) -> dict[str, float]:
    answer = running.http.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    found = {}
    for family in text_string_to_metric_families(answer.text):
        for sample in family.samples:
            assert sample.labels["model_name"] == "small"
            if "le" not in sample.labels:
                found[sample.name + sample.labels.get("finished_reason", "")] = sample.value
    return found


def test_counts_are_those_of_the_requests(serve: Any) -> None:
    with serve() as running:
        before = read(running)
        assert before["vllm:generation_tokens_total"] == 0
        for stream in (False, True):
            assert running.http.post("/v1/completions", json=BODY | {"stream": stream, "n": 2}).status_code == 200
        running.wait_until_idle()
        after = read(running)
    assert after["vllm:prompt_tokens_total"] == 2 * 41
    assert after["vllm:generation_tokens_total"] == 2 * 2 * 10
    assert after["vllm:request_success_totallength"] == 4
    assert after["vllm:time_to_first_token_seconds_count"] == 2
    assert after["vllm:e2e_request_latency_seconds_count"] == 2
    assert after["vllm:inter_token_latency_seconds_count"] == 2 * 2 * 9
    assert after["vllm:time_to_first_token_seconds_sum"] < after["vllm:e2e_request_latency_seconds_sum"]
    assert after["vllm:prefix_cache_queries_total"] == 2 * 41
    assert after["vllm:prefix_cache_hits_total"] == 32  # two whole blocks of the second request's prompt
    assert after["vllm:num_requests_running"] == after["vllm:num_requests_waiting"] == 0
    assert after["vllm:kv_cache_usage_perc"] == after["vllm:num_preemptions_total"] == 0


def test_the_log_has_the_request_and_none_of_its_text(server: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "puna.serving"):
        server.http.post("/v1/completions", json=BODY | {"prompt": "secret"}, headers={"x-request-id": "abc"})
        server.http.get("/evil%0Apath")
    (line,) = [record for record in caplog.records if "request_id=abc" in record.getMessage()]
    fields = line.__dict__["fields"]
    assert {**fields, "seconds": 0} == {
        "method": "POST",
        "path": "/v1/completions",
        "status": 200,
        "seconds": 0,
        "request_id": "abc",
    }
    assert re.fullmatch(r"POST '/v1/completions' 200 \d+\.\d{3}s request_id=abc", line.getMessage())
    assert "secret" not in caplog.text
    assert "\npath" not in caplog.text
