"""`puna bench serve` on puna's own server: every token that was asked for comes and is counted."""

from __future__ import annotations

import json
from typing import Any

import pytest

from puna.cli import main
from serving.conftest import Running


def bench(capsys: pytest.CaptureFixture[str], url: str, *words: object) -> dict[str, Any]:
    code = main(["bench", "serve", url, "--num-requests", "8", "--concurrency", "3", "--json", *map(str, words)])
    out, err = capsys.readouterr()
    assert (code, err) == (0, "")
    found: dict[str, Any] = json.loads(out)
    assert (found["completed"], found["failed"]) == (8, 0)
    return found


def test_completions(server: Running, capsys: pytest.CaptureFixture[str]) -> None:
    found = bench(
        capsys, server.url, "--input-len", 9, "--prefix-len", 3, "--output-len", "5-7", "--goodput", "e2e:60000"
    )
    assert found["model"] == "small"
    assert found["total_input_tokens"] == 8 * 12
    assert 8 * 5 <= found["total_output_tokens"] <= 8 * 7
    assert found["request_goodput"] == pytest.approx(8 / found["duration"])
    assert 0 < found["median_ttft_ms"] <= found["median_e2el_ms"]
    server.wait_until_idle()


def test_chat_at_a_rate(server: Running, capsys: pytest.CaptureFixture[str]) -> None:
    found = bench(capsys, server.url, "--endpoint", "chat", "--rate", 1000, "--input-len", 4, "--output-len", 6)
    assert found["total_output_tokens"] == 8 * 6
    server.wait_until_idle()
