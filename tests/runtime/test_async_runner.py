"""AsyncModelRunner on an accelerator that takes its time: the tokens of the synchronous path, whatever is in flight."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fake_accelerator import FakeAccelerator
from puna.config import LLaMAConfig
from puna.distributed import NullCommunicator
from puna.models import LLaMAForCausalLM
from puna.ops import triton_tuning
from puna.runtime import async_runner
from puna.runtime.async_runner import AsyncModelRunner, PendingStep
from puna.runtime.device_clock import DeviceClock
from puna.runtime.kv_pool import KVPool
from puna.runtime.model_runner import ModelRunner
from puna.runtime.sampler import Sampler
from puna.runtime.step_buffers import StepBuffers
from puna.scheduling.beams import BeamParams
from puna.scheduling.block_manager import BlockManager
from puna.scheduling.events import BeamEvent, PromptEvent, SequenceEvent
from puna.scheduling.pooling_params import PoolingParams
from puna.scheduling.sampling_params import SamplingParams
from puna.scheduling.scheduler import Scheduler, SchedulerLimits
from puna.scheduling.sequence import Request
from puna.scheduling.step_plan import PENDING_TOKEN, NewSequence, StepPlan, StepResult, StepRow

SIZE, NUM_BLOCKS, MAX_ROWS, CONTEXT, VOCAB = 4, 40, 10, 128, 97
CONFIG = LLaMAConfig(
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_size=8,
    hidden_size=32,
    mlp_hidden_size=48,
    vocab_size=VOCAB,
    max_position_embeddings=CONTEXT,
)
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


@pytest.fixture(scope="module")
def model() -> LLaMAForCausalLM:
    torch.manual_seed(1)
    model = LLaMAForCausalLM(CONFIG)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.normal_(std=1.3 * parameter.shape[-1] ** -0.5)
    return model.eval()


def pool() -> KVPool:
    return KVPool(CONFIG, NullCommunicator(), (NUM_BLOCKS,), SIZE)


def synchronous(model: LLaMAForCausalLM) -> ModelRunner:
    return ModelRunner(model, pool(), StepBuffers(64, MAX_ROWS, CONTEXT // SIZE, SIZE), Sampler(VOCAB))


def asynchronous(model: LLaMAForCausalLM, accelerator: FakeAccelerator, use_buckets: bool = True) -> AsyncModelRunner:
    buffers = StepBuffers(64, MAX_ROWS, CONTEXT // SIZE, SIZE, accelerator, reports_prompts=True)
    return AsyncModelRunner(model, pool(), buffers, Sampler(VOCAB), accelerator, use_buckets)


class Run:
    """Requests through a scheduler and a runner. With an asynchronous one, each step is planned and launched before the
    result of the one before is taken over."""

    def __init__(self, runner: ModelRunner, budget: int = 64, num_blocks: int = NUM_BLOCKS) -> None:
        limits = SchedulerLimits(max_num_seqs=MAX_ROWS, max_num_batched_tokens=budget)
        self.runner = runner
        self.scheduler = Scheduler(limits, BlockManager((num_blocks,), SIZE))
        self.found: dict[str, dict[int, list[Any]]] = {}
        self.errors: dict[str, str] = {}
        self.ends: dict[str, str | None] = {}
        self.num_plans = 0
        self.before_plan: Callable[[], bool] = lambda: False  # whether there is more to come

    def add(self, name: str, prompt: list[int], params: SamplingParams = GREEDY, **fields: Any) -> Run:
        count = 0 if "pooling" in fields else params.max_tokens or 1
        self.scheduler.add(
            Request(request_id=name, prompt_token_ids=tuple(prompt), params=params, max_tokens=count, **fields)
        )
        return self

    def finish(self) -> Run:
        in_flight: PendingStep | None = None
        while self.before_plan() or self.scheduler.has_work or in_flight is not None:
            plan = self.scheduler.plan(0.0)
            self.num_plans += 1
            result = StepResult((), {}, {}, {})
            if isinstance(self.runner, AsyncModelRunner):
                launched = None if plan is None else self.runner.launch(plan)
                result = result if in_flight is None else in_flight.result()
                in_flight = launched
            elif plan is not None:
                result = self.runner.execute(plan)
            self._take(result)
        return self

    def _take(self, result: StepResult) -> None:
        for event in self.scheduler.commit(result):
            name = event.request.request_id
            found = self.found.setdefault(name, {})
            if isinstance(event, SequenceEvent):
                if event.token_id is not None:
                    found.setdefault(event.sequence.index, []).append(event.token_id)
                if event.logprobs is not None:
                    found.setdefault(-1, []).append(round(event.logprobs.logprob, 4))
                if event.embedding is not None:
                    found[0] = [round(number, 4) for number in event.embedding]
                if event.error is not None:
                    self.errors[name] = event.error
                if event.finish_reason is not None:
                    self.ends[name] = event.finish_reason
            elif isinstance(event, PromptEvent):
                for offset, one in enumerate(event.logprobs.tokens):
                    found.setdefault(-2 - event.logprobs.first_position - offset, [round(one.logprob, 4)])
            elif isinstance(event, BeamEvent):
                found[0] = [beam.token_ids for beam in event.beams]
                self.ends[name] = event.finish_reason


def random_request(rng: random.Random) -> tuple[list[int], SamplingParams, dict[str, Any]]:
    """Mostly plain ones, greedy or drawn, and some of each kind that the host has a part in."""
    prompt = [rng.randrange(VOCAB) for _ in range(rng.choice((1, 2, 3, 7, 20, 33)))]
    options: dict[str, Any] = {"max_tokens": rng.randrange(1, 20), "temperature": rng.choice((0.0, 0.0, 0.7, 1.5))}
    fields: dict[str, Any] = {"seed": rng.randrange(1 << 62)}
    if options["temperature"]:
        options |= rng.choice(({}, {"top_k": 5}, {"top_p": 0.8}, {"min_p": 0.05, "top_k": 20, "top_p": 0.95}))
    kind = rng.random()
    if kind < 0.25:
        options["stop_token_ids"] = tuple(rng.sample(range(VOCAB), 12))  # ends after some eight tokens
    elif kind < 0.45:
        options |= rng.choice(
            (
                {"repetition_penalty": 1.7},
                {"frequency_penalty": 0.9, "presence_penalty": 0.5},
                {"no_repeat_ngram_size": 2},
                {"min_tokens": 4, "stop_token_ids": tuple(range(0, VOCAB, 2))},
                {"logit_bias": {3: 5.0}},
                {"typical_p": 0.7},
                {"logprobs": 2},
                {"prompt_logprobs": 0},
            )
        )
    elif kind < 0.52 and options["temperature"]:
        options["n"] = 3
    elif kind < 0.57:
        return prompt, SamplingParams(temperature=0, max_tokens=6), {"beams": BeamParams(width=3)}
    elif kind < 0.62:
        return prompt, SamplingParams(), {"pooling": PoolingParams(method="mean")}
    return prompt, SamplingParams(**options), fields


@pytest.mark.parametrize("runs_freely", [True, False])
@pytest.mark.parametrize("seed", range(6))
def test_random_requests_get_the_tokens_of_the_synchronous_path(
    model: LLaMAForCausalLM, seed: int, runs_freely: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many at once on few blocks, some cancelled on the way, all compared with runs of their own. The device does its
    work as late as it can, or now and then some of it in between."""
    rng = random.Random(seed)
    monkeypatch.setattr(async_runner, "_UNCAPTURED_STEPS", seed % 2)
    accelerator = FakeAccelerator()
    runner = asynchronous(model, accelerator, use_buckets=seed % 3 != 0)
    run = Run(runner, budget=rng.choice((12, 30, 64)), num_blocks=rng.choice((34, 40)))
    requests = {str(i): random_request(rng) for i in range(24)}
    waiting = list(requests.items())
    cancelled: set[str] = set()

    def before_plan() -> bool:
        while waiting and rng.random() < 0.5:
            name, (prompt, params, fields) = waiting.pop()
            run.add(name, prompt, params, **fields)
        if rng.random() < 0.05:
            cancelled.add(name := rng.choice(list(requests)))
            run.scheduler.cancel(name)
        if not runs_freely and rng.random() < 0.7:
            accelerator.go(min(rng.randrange(4), accelerator.queued - accelerator.reached))
        run.scheduler.check_integrity()
        return bool(waiting)

    run.before_plan = before_plan
    run.finish()
    assert run.scheduler.num_preemptions > 0 or run.scheduler.blocks.utilization.in_use == 0
    assert not runner.sampler._states
    for name, (prompt, params, fields) in requests.items():
        alone = Run(synchronous(model)).add(name, prompt, params, **fields).finish()
        found, expected = run.found.get(name, {}), alone.found[name]
        if name not in cancelled:
            assert found.keys() == expected.keys(), name
            assert run.ends[name] == alone.ends[name]
            for key, values in expected.items():
                assert len(found[key]) == len(values)
                tolerance = 2e-3 if key < 0 or "pooling" in fields else 0
                assert found[key] == (pytest.approx(values, abs=tolerance) if tolerance else values), (name, params)
        elif "beams" not in fields:
            for key, values in found.items():
                assert key < 0 or "pooling" in fields or values == expected[key][: len(values)]
    assert run.errors == {}


@pytest.mark.parametrize("seed", range(4))
def test_prompts_in_captured_steps(model: LLaMAForCausalLM, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests that the device ends by itself, some of long prompts in pieces: nearly all steps are replays."""
    rng = random.Random(seed)
    monkeypatch.setattr(async_runner, "_UNCAPTURED_STEPS", seed % 2)
    accelerator = FakeAccelerator()
    runner = asynchronous(model, accelerator)
    run = Run(runner, budget=rng.choice((24, 40, 64)))
    requests = {}
    for i in range(40):
        prompt = [rng.randrange(VOCAB) for _ in range(rng.choice((1, 2, 5, 18, 50)))]
        params = SamplingParams(temperature=rng.choice((0.0, 0.8)), top_k=9, max_tokens=rng.randrange(1, 12))
        requests[str(i)] = prompt, params
    waiting = list(requests.items())

    def before_plan() -> bool:
        if waiting and rng.random() < 0.6:
            name, (prompt, params) = waiting.pop()
            run.add(name, prompt, params, seed=int(name))
        return bool(waiting)

    run.before_plan = before_plan
    run.finish()
    for name, (prompt, params) in requests.items():
        assert run.found[name] == Run(synchronous(model)).add(name, prompt, params, seed=int(name)).finish().found[name]
    mixed = {bucket for bucket in runner._captured if bucket.is_mixed}
    assert len(mixed) > 4
    assert {bucket.ending for bucket in mixed} == {"greedy", "drawn"}
    replays = sum(graph.num_replays for graph in accelerator.graphs)
    assert replays > run.num_plans * (0.85 if seed % 2 == 0 else 0.6)


def begin(runner: AsyncModelRunner, params: dict[int, SamplingParams]) -> PendingStep:
    """A first step of sequences with prompts of one token."""
    rows = tuple(StepRow(i, 0, (5 + i,), ((2 * i + 1, 2 * i + 2),), 1, (i,)) for i in params)
    new = tuple(NewSequence(i, (5 + i,), own, i, frozenset()) for i, own in params.items())
    return runner.launch(StepPlan(rows, new_sequences=new))


def go_on(runner: AsyncModelRunner, position: int, *ids: int) -> PendingStep:
    rows = tuple(StepRow(i, position, (PENDING_TOKEN,), ((2 * i + 1, 2 * i + 2),), 1, (i,)) for i in ids)
    return runner.launch(StepPlan(rows))


def test_plain_steps_wait_for_nothing(model: LLaMAForCausalLM) -> None:
    """Two steps are launched while the device stands still; with the third, the host has no memory left for it."""
    accelerator = FakeAccelerator(runs_freely=False)
    runner = asynchronous(model, accelerator)
    steps = [begin(runner, {0: GREEDY, 1: SamplingParams(temperature=0.9, max_tokens=9)})]
    steps.append(go_on(runner, 1, 0, 1))
    assert accelerator.reached == 0
    accelerator.go()
    found = [[token.token_id for token in step.result().tokens] for step in steps]
    expected = synchronous(model)
    rows = (StepRow(0, 0, (5,), ((1, 2),), 1, (0,)), StepRow(1, 0, (6,), ((3, 4),), 1, (1,)))
    new = (
        NewSequence(0, (5,), GREEDY, 0, frozenset()),
        NewSequence(1, (6,), SamplingParams(temperature=0.9, max_tokens=9), 1, frozenset()),
    )
    first = [token.token_id for token in expected.execute(StepPlan(rows, new_sequences=new)).tokens]
    rows = tuple(row._replace(first_position=1, token_ids=(PENDING_TOKEN,)) for row in rows)
    second = [token.token_id for token in expected.execute(StepPlan(rows)).tokens]
    assert found == [first, second]


def test_a_step_is_one_copy_to_the_device_and_one_back(model: LLaMAForCausalLM) -> None:
    accelerator = FakeAccelerator()
    runner = asynchronous(model, accelerator)
    begin(runner, {0: GREEDY, 1: GREEDY}).result()
    for position in range(1, 6):
        before = accelerator.num_copies
        go_on(runner, position, 0, 1).result()
        assert accelerator.num_copies == before + 2
    assert len(accelerator.graphs) == 1  # both of the first step, all of whose rows have one token, and of the others
    assert accelerator.graphs[0].num_replays == 6


def test_results_are_made_in_order_whoever_asks(model: LLaMAForCausalLM) -> None:
    runner = asynchronous(model, FakeAccelerator())
    steps = [begin(runner, {0: GREEDY}), go_on(runner, 1, 0), go_on(runner, 2, 0)]
    (state,) = runner.sampler.states([0])
    last = steps[2].result()
    assert [step.result().tokens[0].token_id for step in steps] == state.token_ids[1:]
    assert steps[2].result() is last


def test_a_step_of_the_hosts_waits_for_the_one_before(model: LLaMAForCausalLM) -> None:
    """A penalty counts the tokens of the step in flight, too; the plain row beside it goes on from its own."""
    penalty = SamplingParams(temperature=0, repetition_penalty=3.0, max_tokens=9)
    runner = asynchronous(model, FakeAccelerator())
    steps = [begin(runner, {0: GREEDY, 1: penalty})] + [go_on(runner, i, 0, 1) for i in range(1, 5)]
    found = [[token.token_id for token in step.result().tokens] for step in steps]
    prompts = {"0": ([5], GREEDY), "1": ([6], penalty)}
    for i, (name, (prompt, params)) in enumerate(prompts.items()):
        alone = Run(synchronous(model)).add(name, prompt, params).finish()
        assert [tokens[i] for tokens in found] == alone.found[name][0][:5]


def test_nan_is_told_of_the_right_step_and_leaves_the_others_alone(model: LLaMAForCausalLM) -> None:
    """The cache of one sequence becomes NaN: its next token is an error, although a step that follows is in flight."""
    runner = asynchronous(model, FakeAccelerator())
    first = begin(runner, {0: GREEDY, 1: GREEDY})
    assert not first.result().errors
    for cache in runner.pool.value_caches:
        cache[3] = torch.nan  # of sequence 1
    steps = [go_on(runner, 1, 0, 1), go_on(runner, 2, 0, 1)]
    for step in steps:
        result = step.result()
        assert [token.sequence_id for token in result.tokens] == [0]
        assert list(result.errors) == [1]
        assert "NaN" in result.errors[1]
    (good, bad) = runner.sampler.states([0, 1])
    assert (len(good.token_ids), len(bad.token_ids)) == (4, 2)


def test_an_error_of_the_device_is_that_of_its_step_and_of_those_behind_it(model: LLaMAForCausalLM) -> None:
    accelerator = FakeAccelerator()
    runner = asynchronous(model, accelerator)
    first = begin(runner, {0: GREEDY})
    assert first.result().tokens
    second = go_on(runner, 1, 0)
    accelerator.error = accelerator.queued, RuntimeError("an illegal memory access")
    third = go_on(runner, 2, 0)
    for step in (third, second):
        with pytest.raises(RuntimeError, match="illegal memory access"):
            step.result()
    assert first.result().tokens


def test_a_plan_without_rows_only_forgets(model: LLaMAForCausalLM) -> None:
    runner = asynchronous(model, FakeAccelerator())
    first = begin(runner, {0: GREEDY})
    forgotten = runner.launch(StepPlan((), ended_sequences=(0,)))
    assert forgotten.result() == StepResult((), {}, {}, {})
    assert not runner.sampler._states
    assert len(first.result().tokens) == 1  # of a sequence that is gone


def test_everything_is_captured_at_the_start_the_largest_first(model: LLaMAForCausalLM) -> None:
    accelerator = FakeAccelerator()
    runner = asynchronous(model, accelerator)
    runner.capture_steps(1)
    width = runner.buffers.max_blocks
    assert list(runner._captured) == [(64, MAX_ROWS + 1, width, "drawn"), (MAX_ROWS, MAX_ROWS, width, "drawn")]
    runner.capture_steps()
    assert len(runner._captured) == len(accelerator.graphs)
    buckets = [key.tokens for key in runner._captured]
    assert buckets == sorted(buckets, reverse=True)
    assert {key.ending for key in runner._captured} == {"greedy", "drawn"}
    before = len(accelerator.graphs)
    assert [graph.num_replays for graph in accelerator.graphs] == [2, 2] + [1] * (before - 2)
    begin(runner, {0: GREEDY, 1: GREEDY, 2: GREEDY}).result()
    go_on(runner, 1, 0, 1, 2).result()
    assert len(accelerator.graphs) == before
    assert sum(graph.num_replays for graph in accelerator.graphs) == before + 4


def test_steps_with_prompts_are_captured_when_their_size_has_come_twice(model: LLaMAForCausalLM) -> None:
    accelerator = FakeAccelerator()
    runner = asynchronous(model, accelerator)
    new = NewSequence(0, tuple(range(3, 12)), GREEDY, 0, frozenset())
    prompt = StepRow(0, 0, tuple(range(3, 12)), ((1, 2, 3),), 9, (0,))
    others = tuple(StepRow(i, 0, (5,) * (3 + i), ((3 * i + 1, 3 * i + 2),), 3 + i, (i,)) for i in (1, 2))
    for i in (1, 2):
        runner.sampler.add(NewSequence(i, (5,) * (3 + i), GREEDY, i, frozenset()))
    expected = runner.launch(StepPlan((prompt, *others), new_sequences=(new,))).result().tokens
    found = [runner.launch(StepPlan((prompt, *others))).result().tokens for _ in range(3)]
    assert found == [expected] * 3
    (bucket,) = runner._captured  # 18 tokens and a row more, padded to 32 and to 4
    assert bucket == (32, 4, runner.buffers.max_blocks, "greedy")
    assert accelerator.graphs[0].num_replays == 2  # of the fourth step, and of the third behind its capture
    whole = StepRow(0, 0, (5,) * 60, (tuple(range(1, 17)),), 60, (0,))
    for _ in range(4):  # with what padding adds, 65 tokens and more: no step may have so many
        runner.launch(StepPlan((whole, *others)))
    assert len(accelerator.graphs) == 1


def test_attention_of_long_prompts_is_measured_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    config = LLaMAConfig(
        num_layers=1, num_heads=2, num_kv_heads=1, head_size=8, hidden_size=16, mlp_hidden_size=16, vocab_size=16,
        max_position_embeddings=8192, dtype="bfloat16", quant="bf16",
    )  # fmt: skip
    model, accelerator = LLaMAForCausalLM(config, NullCommunicator()), FakeAccelerator()
    asked: list[tuple[int, ...]] = []

    def prompt_attention(query: Tensor, key: Tensor, value: Tensor, lengths: tuple[int, ...], *rest: object) -> None:
        assert query.shape == (*lengths, 2, 8)
        assert key.shape == value.shape == (*lengths, 1, 8)
        assert query.dtype == torch.bfloat16
        assert triton_tuning.current().choose("prompts/1", lengths, "a", ("a", "b"), lambda variant: None) == "b"
        asked.append(lengths)

    attention = model.layers[0].attention
    monkeypatch.setattr(attention, "ops", dataclasses.replace(attention.ops, prompt_attention=prompt_attention))
    buffers = StepBuffers(3000, 2, 8192 // SIZE, SIZE, accelerator, reports_prompts=True)
    runner = AsyncModelRunner(model, pool(), buffers, Sampler(16), accelerator)
    runner.tune_prompts()  # nothing can be measured here
    assert asked == []
    runner._tuning = triton_tuning.Tuning(None, lambda calls: [2.0, 1.0])
    runner.tune_prompts()
    assert asked == [(1024,), (1023,), (2048,), (2047,)]


def test_what_can_not_be_captured_runs_eagerly_and_says_so(
    model: LLaMAForCausalLM, caplog: pytest.LogCaptureFixture
) -> None:
    accelerator = FakeAccelerator()
    accelerator.refusal = "an op waits for the device"
    runner = asynchronous(model, accelerator)
    runner.capture_steps()
    steps = [begin(runner, {0: GREEDY})] + [go_on(runner, i, 0) for i in range(1, 6)]
    found = [step.result().tokens[0].token_id for step in steps]
    alone = Run(synchronous(model)).add("alone", [5], GREEDY).finish()
    assert found == alone.found["alone"][0][:6]
    assert [record.message for record in caplog.records].count(
        "steps are not captured, which costs time: an op waits for the device"
    ) == 1


def test_the_largest_steps_have_all_tokens_and_rows(model: LLaMAForCausalLM) -> None:
    runner = asynchronous(model, FakeAccelerator())
    prefill, decode, mixed = runner.largest_prefill(), runner.largest_decode(), runner.largest_mixed()
    assert (prefill.num_tokens, len(prefill.rows)) == (64, MAX_ROWS)
    assert (decode.num_tokens, len(decode.rows)) == (MAX_ROWS, MAX_ROWS)
    assert (mixed.num_tokens, len(mixed.rows)) == (63, MAX_ROWS)
    for cache in (*runner.pool.key_caches, *runner.pool.value_caches):
        cache[1:] = 7.0
    for plan in (prefill, decode, mixed, *runner.small_steps()):
        runner.rehearse(plan)
    for cache in (*runner.pool.key_caches, *runner.pool.value_caches):
        assert bool((cache[1:] == 7.0).all())  # and touch no block but the dummy


def test_whole_prompts_are_told_of(model: LLaMAForCausalLM) -> None:
    accelerator = FakeAccelerator()
    buffers = StepBuffers(64, MAX_ROWS, 4, SIZE, accelerator, reports_prompts=True)
    prompts = (StepRow(0, 0, (5, 6, 7), ((1,),), 3, (0,)), StepRow(1, 0, (8, 9), ((2,),), 6))
    assert buffers.fill(StepPlan(prompts)).attention_params.prompt_lengths == (3, 2)
    later = StepRow(1, 2, (8, 9), ((2,),), 6)
    assert buffers.fill(StepPlan((prompts[0], later))).attention_params.prompt_lengths is None
    silent = StepBuffers(64, MAX_ROWS, 4, SIZE, accelerator)
    assert silent.fill(StepPlan(prompts)).attention_params.prompt_lengths is None


def test_the_clock_of_a_device() -> None:
    accelerator = FakeAccelerator()
    clock = DeviceClock(accelerator)
    began, ended = clock.mark(), clock.mark()
    accelerator.go()
    start, end = clock.times(began, ended)
    assert start <= end
    assert (start, end) == pytest.approx((began.time, ended.time), abs=0.5)  # type: ignore[attr-defined]
    ended.time += 100.0  # type: ignore[attr-defined]
    _, late = clock.times(began, ended)
    assert late == pytest.approx(end + 100)
    assert clock._anchor is ended  # float32 milliseconds would grow coarse
