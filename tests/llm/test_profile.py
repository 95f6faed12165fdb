"""LLM(profile_dir=...): the trace of a real load tells the truth about steps and requests."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from puna.llm import LLM
from puna.scheduling.sampling_params import SamplingParams


@pytest.fixture(scope="module")
def trace(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Of six prompts of 30 tokens and 9 new ones, that share steps of at most 16 tokens."""
    where = tmp_path_factory.mktemp("trace")
    with LLM(folder, profile_dir=where, max_num_seqs=4, max_num_batched_tokens=16) as it:
        prompts = [{"prompt_token_ids": [2 + number] * 30} for number in range(6)]
        it.generate(prompts, SamplingParams(temperature=0, max_tokens=9, ignore_eos=True))
    (path,) = where.iterdir()
    found: list[dict[str, Any]] = json.loads(path.read_text())
    return found


def spans(trace: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    return [event for event in trace if event["ph"] == "X" and event["name"] == name]


def test_spans_of_a_track_lie_apart_or_within_each_other(trace: list[dict[str, Any]]) -> None:
    tracks = defaultdict(list)
    for event in trace:
        if event["ph"] == "X":
            assert event["dur"] >= 0
            start = round(event["ts"] * 1000)
            tracks[event["tid"]].append((start, start + round(event["dur"] * 1000), event["name"]))
    assert set(tracks) == {1, 2}
    for track in tracks.values():
        open_until: list[tuple[int, str]] = []
        for start, end, name in sorted(track, key=lambda span: (span[0], -span[1])):
            while open_until and open_until[-1][0] <= start:
                open_until.pop()
            if open_until:
                assert end <= open_until[-1][0]
                assert (open_until[-1][1], name) == ("step", "sample")
            open_until.append((end, name))


def test_steps_have_their_sizes(trace: list[dict[str, Any]]) -> None:
    steps = [event["args"] for event in spans(trace, "step")]
    assert [step["step"] for step in steps] == list(range(1, len(steps) + 1))
    assert all(step["tokens"] == step["prefill_tokens"] + step["decode_tokens"] <= 16 for step in steps)
    assert all(step["sequences"] == step["prefill_sequences"] + step["decode_sequences"] <= 4 for step in steps)
    assert sum(step["prefill_tokens"] for step in steps) == 6 * 30
    assert sum(step["decode_tokens"] for step in steps) == 6 * 8
    assert sum(event["args"]["tokens"] for event in spans(trace, "sample")) == 6 * 9
    for name in ("plan", "commit", "deliver"):
        assert spans(trace, name)
    assert sum(event["args"]["count"] for event in spans(trace, "commit")) == 6 * 9


def test_requests_are_queued_then_prefilled_then_decoded(trace: list[dict[str, Any]]) -> None:
    states = defaultdict(list)
    for event in trace:
        if event["ph"] in ("b", "e"):
            states[event["id"]].append(event)
    assert len(states) == 6
    started, ended = [], []
    for name, events in states.items():
        assert [(event["ph"], event["name"]) for event in events] == [
            ("b", f"request {name}"),
            ("b", "queued"),
            ("e", "queued"),
            ("b", "prefill"),
            ("e", "prefill"),
            ("b", "decode"),
            ("e", "decode"),
            ("e", f"request {name}"),
        ]
        times = [event["ts"] for event in events]
        assert times == sorted(times)
        assert events[0]["args"] == {"prompt_tokens": 30}
        assert events[3]["args"] == {"cached_tokens": 0}
        assert events[7]["args"] == {"generated_tokens": 9, "finish_reason": "length"}
        started.append(times[3])
        ended.append(times[7])
    # Four run at once; the last two wait until one of these has ended.
    assert min(started[4:]) > min(ended[:4])


def test_a_model_that_does_not_load_ends_the_trace(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        LLM(tmp_path / "none", profile_dir=tmp_path / "trace")
    (path,) = (tmp_path / "trace").iterdir()
    assert {event["ph"] for event in json.loads(path.read_text())} == {"M"}
