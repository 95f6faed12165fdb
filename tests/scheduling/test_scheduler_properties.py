"""Random arrivals, cancels, forks, beams and small pools: each step is sound, each request gets its tokens."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from puna.scheduling.beams import BeamParams, BeamSearch
from puna.scheduling.pooling_params import PoolingParams
from puna.scheduling.sampling_params import SamplingParams
from puna.scheduling.scheduler import QueueFullError, Scheduler

PREFIXES = [tuple(random.Random(i).randrange(50) for _ in range(30)) for i in range(3)]


@st.composite
def arrivals(draw: st.DrawFn) -> dict[str, Any]:
    """A request and when it comes: half of the prompts share a prefix with others."""
    shared = draw(st.sampled_from(PREFIXES))[: draw(st.integers(0, 30))] if draw(st.booleans()) else ()
    own = tuple(draw(st.lists(st.integers(0, 49), min_size=0 if shared else 1, max_size=20)))
    kind = draw(st.sampled_from(["one", "one", "one", "several", "beams", "last", "mean"]))
    return {
        "step": draw(st.integers(0, 8)),
        "prompt": shared + own,
        "max_tokens": draw(st.integers(1, 40)),
        "seed": draw(st.integers(0, 3)),
        "priority": draw(st.integers(-1, 2)),
        "salt": draw(st.sampled_from([b"", b"", b"other"])),
        "n": draw(st.integers(2, 4)) if kind == "several" else 1,
        "beams": BeamParams(width=draw(st.integers(1, 3)), length_penalty=draw(st.sampled_from([0.0, 1.0])))
        if kind == "beams"
        else None,
        "pooling": PoolingParams(method=kind) if kind in ("last", "mean") else None,
        "cancel_after": draw(st.one_of(st.none(), st.none(), st.integers(0, 30))),
    }


@st.composite
def pools(draw: st.DrawFn) -> dict[str, Any]:
    """The windows of a model's layers, and a small pool for each, in which few requests have room at once."""
    windows = draw(st.sampled_from([(None,), (5,), (13,), (None, 1), (None, 6), (None, 13), (None, 50), (3, 14)]))
    return {
        "windows": windows,
        "num_blocks": tuple(draw(st.integers(20, 45) if window is None else st.integers(12, 30)) for window in windows),
    }


def beams_alone(request: Any, next_candidates: Callable[..., Any], seen: Callable[..., Any]) -> Any:
    search = BeamSearch(request.beams, request.eos_token_ids, request.max_tokens)
    running = [tuple(request.prompt_token_ids)]
    while True:
        going_on = search.advance([next_candidates(seen(tokens), search.num_candidates) for tokens in running])
        if not going_on:
            return tuple(search.finished)
        running = [(*running[c.parent], c.token_id) for c in going_on]


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    requests=st.lists(arrivals(), min_size=6, max_size=25),
    pools=pools(),
    max_num_seqs=st.integers(4, 9),
    budget=st.integers(9, 40),
    caching=st.booleans(),
    overlap=st.booleans(),
    max_skips=st.sampled_from([1, 10, 1000]),
)
def test_every_request_gets_what_it_gets_alone(
    harness: Callable[..., Any],
    request_of: Callable[..., Any],
    tokens_alone: Callable[..., Any],
    candidates_of: Callable[..., Any],
    tokens_seen: Callable[..., Any],
    requests: list[dict[str, Any]],
    pools: dict[str, Any],
    max_num_seqs: int,
    budget: int,
    caching: bool,
    overlap: bool,
    max_skips: int,
) -> None:
    it = harness(
        **pools,
        caching=caching,
        overlap=overlap,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=budget,
        max_skips=max_skips,
    )
    made = {}
    for number, arrival in enumerate(requests):
        made[f"r{number}"] = request_of(
            f"r{number}",
            arrival["prompt"],
            arrival["max_tokens"] if arrival["pooling"] is None else 0,
            seed=arrival["seed"],
            priority=arrival["priority"],
            cache_salt=arrival["salt"],
            params=SamplingParams(n=arrival["n"], max_tokens=arrival["max_tokens"]),
            beams=arrival["beams"],
            pooling=arrival["pooling"],
        )
    refused, cancelled, reasons = set(), set(), []
    for step in range(61):
        for number, arrival in enumerate(requests):
            name = f"r{number}"
            if arrival["step"] == step:
                try:
                    it.scheduler.add(made[name])
                except ValueError as error:
                    refused.add(name)
                    reasons.append(str(error))
            if arrival["cancel_after"] is not None and arrival["step"] + arrival["cancel_after"] == step:
                it.scheduler.cancel(name)
                it.scheduler.check_integrity()
                cancelled.add(name)
        it.step()
    it.run()

    assert all("cache blocks" in reason for reason in reasons)
    windows = pools["windows"]
    assert it.scheduler.blocks.utilization.in_use == 0
    assert it.scheduler.num_running == it.scheduler.num_waiting == 0
    for name, request in made.items():
        if name in refused:
            continue
        if request.beams is not None:
            event = it.beams[name]
            if event.finish_reason == "stop":
                assert event.beams == beams_alone(request, candidates_of, lambda tokens: tokens_seen(tokens, windows))
            else:
                assert name in cancelled
            continue
        if request.pooling is not None:
            if it.reasons.get((name, 0)) != "stop":
                assert name in cancelled
                assert name not in it.embeddings
            elif request.pooling.method == "mean":
                assert it.embeddings[name] == list(request.prompt_token_ids)
            else:
                assert it.embeddings[name] == list(tokens_seen(request.prompt_token_ids, windows)[0])
            continue
        for index in range(request.params.n):
            expected, reason = tokens_alone(request, index, windows)
            found = it.outputs.get((name, index), [])
            if it.reasons.get((name, index)) in ("stop", "length"):
                assert (found, it.reasons[name, index]) == (expected, reason)
            else:  # a cancelled one has the beginning
                assert name in cancelled
                assert found == expected[: len(found)]
                assert it.reasons.get((name, index), "abort") == "abort"
    # What the sampler was told of, it was told to forget.
    leftover = it.scheduler.plan()
    assert leftover is None
    assert it.runner.seeds.keys() | it.runner.sums.keys() <= set(it.scheduler._ended)


@pytest.mark.parametrize("windows", [(None,), (None, 6)])
def test_beams_that_are_preempted_while_their_step_runs(
    harness: Callable[..., Any],
    request_of: Callable[..., Any],
    candidates_of: Callable[..., Any],
    tokens_seen: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    windows: tuple[int | None, ...],
) -> None:
    """They wait without blocks when the step's candidates come, and go on from these later."""
    waiting_widths = []
    preempt = Scheduler._preempt

    def watched(self: Scheduler, group: Any, step: Any) -> None:
        if group.waits_for_result:
            waiting_widths.append(len(group.sequences))
        preempt(self, group, step)

    monkeypatch.setattr(Scheduler, "_preempt", watched)
    for start in range(16):
        it = harness(num_blocks=(13,) * len(windows), windows=windows)
        it.scheduler.add(request_of("urgent", tuple(range(15)), 30, priority=-1, eos_token_ids=frozenset()))
        for _ in range(start):
            it.step()
        beams = request_of("beams", (5, 6, 7), 10, beams=BeamParams(width=3))
        it.scheduler.add(beams)
        it.run()
        found = it.beams["beams"].beams
        assert found == beams_alone(beams, candidates_of, lambda tokens: tokens_seen(tokens, windows))
    assert 3 in waiting_widths


def test_a_stream_of_urgent_requests_does_not_starve_another(
    harness: Callable[..., Any], request_of: Callable[..., Any]
) -> None:
    """The bound that scheduler.py states: max_skips plans, then those that run, each for at most its length."""
    max_skips, length = 40, 12
    it = harness(max_num_seqs=4, max_skips=max_skips)
    it.scheduler.add(request_of("patient", (1, 2, 3), max_tokens=2, priority=9, eos_token_ids=frozenset()))
    for number in range(400):
        for place in range(4):
            name = f"urgent{number}-{place}"
            it.scheduler.add(request_of(name, (number % 50, place), length, priority=0, eos_token_ids=frozenset()))
        it.step()
        if ("patient", 0) in it.outputs:
            break
    assert max_skips <= it.num_plans <= max_skips + length + 4


def test_overdue_requests_go_in_the_order_of_arrival(
    harness: Callable[..., Any], request_of: Callable[..., Any]
) -> None:
    it = harness(max_num_seqs=1, max_skips=5)
    for number in range(6):
        it.scheduler.add(request_of(f"r{number}", (number,), 10, priority=-number, eos_token_ids=frozenset()))
    it.run()
    # The first plan takes the most urgent, then all others are overdue.
    assert [name for name, _ in it.outputs] == ["r5", "r0", "r1", "r2", "r3", "r4"]


def test_the_queue_has_an_end(harness: Callable[..., Any], request_of: Callable[..., Any]) -> None:
    it = harness(max_waiting=2)
    it.scheduler.add(request_of("a", (1,)))
    it.scheduler.add(request_of("b", (1,)))
    with pytest.raises(QueueFullError, match="2 requests are waiting"):
        it.scheduler.add(request_of("c", (1,)))
    it.run()
    it.scheduler.add(request_of("c", (1,)))
    it.run()
    assert len(it.reasons) == 3


def test_scored_tokens_of_a_step_are_few_and_each_is_scored_once(
    harness: Callable[..., Any], request_of: Callable[..., Any]
) -> None:
    it = harness(max_scored_tokens=5, max_num_batched_tokens=30)
    prompts = {f"r{i}": tuple(range(i, i + 17)) for i in range(4)}
    for name, prompt in prompts.items():
        params = SamplingParams(max_tokens=2, prompt_logprobs=0)
        it.scheduler.add(request_of(name, prompt, 2, params=params, eos_token_ids=frozenset()))
    it.scheduler.add(request_of("plain", tuple(range(40)), 2, eos_token_ids=frozenset()))
    scored: dict[int, list[int]] = {}
    run = it.runner.run

    def watched(plan: Any) -> Any:
        rows = [row for row in plan.rows if row.logprob_targets]
        assert sum(len(row.token_ids) for row in rows) <= 5
        for row in rows:
            scored.setdefault(row.sequence_id, []).extend(row.logprob_targets)
        return run(plan)

    it.runner.run = watched
    it.run()
    assert sorted(map(tuple, scored.values())) == sorted(prompt[1:] for prompt in prompts.values())
    assert set(it.reasons.values()) == {"length"}
