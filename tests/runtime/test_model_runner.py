"""ModelRunner: plans carried out on a small model, against the model's dense path."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from puna.config import LLaMAConfig
from puna.distributed import NullCommunicator
from puna.models import LLaMAForCausalLM
from puna.runtime.kv_pool import KVPool
from puna.runtime.model_runner import ModelRunner
from puna.runtime.sampler import Sampler
from puna.runtime.step_buffers import StepBuffers
from puna.scheduling.beams import BeamParams
from puna.scheduling.block_manager import BlockManager
from puna.scheduling.events import BeamEvent, PromptEvent, SequenceEvent
from puna.scheduling.sampling_params import SamplingParams
from puna.scheduling.scheduler import Scheduler, SchedulerLimits
from puna.scheduling.sequence import Request
from puna.scheduling.step_plan import PENDING_TOKEN, BlockCopy, NewSequence, StepPlan, StepResult, StepRow

SIZE = 4
NUM_BLOCKS = 40
MAX_ROWS = 10
CONFIG = LLaMAConfig(
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_size=8,
    hidden_size=32,
    mlp_hidden_size=48,
    vocab_size=97,
    max_position_embeddings=128,
)
PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5], [27, 18, 28], [16], [14, 15, 9, 26, 5, 35, 89, 79, 3], [2, 71, 82, 8]]
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, logprobs=2)


@pytest.fixture(scope="module")
def model() -> LLaMAForCausalLM:
    torch.manual_seed(1)
    model = LLaMAForCausalLM(CONFIG)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.normal_(std=1.3 * parameter.shape[-1] ** -0.5)
    return model.eval()


def runner_of(model: LLaMAForCausalLM, use_buckets: bool = False) -> ModelRunner:
    pool = KVPool(CONFIG, NullCommunicator(), (NUM_BLOCKS,), SIZE)
    buffers = StepBuffers(64, MAX_ROWS, 128 // SIZE, SIZE)
    return ModelRunner(model, pool, buffers, Sampler(CONFIG.vocab_size), use_buckets)


@torch.no_grad()
def dense_logprobs(model: LLaMAForCausalLM, tokens: Sequence[int]) -> Tensor:
    return model(torch.tensor([list(tokens)]))[0].log_softmax(-1)


def greedy(model: LLaMAForCausalLM, prompt: list[int], count: int) -> list[int]:
    found = model.generate(torch.tensor([prompt]), max_new_tokens=count, eos_token_id=[])
    return found[0, len(prompt) :].tolist()


class Run:
    """Requests through scheduler and runner in turns, until all are done."""

    def __init__(self, runner: ModelRunner, budget: int = 64, num_blocks: int = NUM_BLOCKS) -> None:
        limits = SchedulerLimits(max_num_seqs=MAX_ROWS, max_num_batched_tokens=budget)
        self.runner = runner
        self.scheduler = Scheduler(limits, BlockManager((num_blocks,), SIZE))
        self.tokens: dict[tuple[str, int], list[int]] = {}
        self.logprobs: dict[tuple[str, int], list[float]] = {}
        self.prompts: dict[str, dict[int, float]] = {}
        self.errors: dict[str, str] = {}
        self.beams: dict[str, list[tuple[int, ...]]] = {}
        self.num_copies = 0

    def add(self, name: str, prompt: list[int], params: SamplingParams = GREEDY, **fields: Any) -> Run:
        self.scheduler.add(
            Request(
                request_id=name,
                prompt_token_ids=tuple(prompt),
                params=params,
                max_tokens=params.max_tokens or 1,
                **fields,
            )
        )
        return self

    def finish(self) -> Run:
        while self.scheduler.has_work:
            plan = self.scheduler.plan()
            result = StepResult((), {}, {}, {})
            if plan is not None:
                self.num_copies += len(plan.copies)
                result = self.runner.execute(plan)
            for event in self.scheduler.commit(result):
                name = event.request.request_id
                if isinstance(event, SequenceEvent):
                    key = (name, event.sequence.index)
                    if event.token_id is not None:
                        self.tokens.setdefault(key, []).append(event.token_id)
                    if event.logprobs is not None:
                        self.logprobs.setdefault(key, []).append(event.logprobs.logprob)
                    if event.error is not None:
                        self.errors[name] = event.error
                elif isinstance(event, PromptEvent):
                    for offset, found in enumerate(event.logprobs.tokens):
                        self.prompts.setdefault(name, {})[event.logprobs.first_position + offset] = found.logprob
                elif isinstance(event, BeamEvent):
                    self.beams[name] = [beam.token_ids for beam in event.beams]
        return self


def test_buckets_give_what_unpadded_steps_give(model: LLaMAForCausalLM) -> None:
    runs = []
    for use_buckets in (False, True):
        run = Run(runner_of(model, use_buckets))
        for number, prompt in enumerate(PROMPTS):
            length = 4 + 3 * number  # they end one after another, through buckets of 8, 4, 2 and 1
            run.add(str(number), prompt, SamplingParams(temperature=0, max_tokens=length, logprobs=2))
        runs.append(run.finish())
    plain, padded = runs
    assert sorted(padded.runner._graphs) == [1, 2, 4, 8]
    assert not plain.runner._graphs
    assert padded.tokens == plain.tokens
    for key, values in plain.logprobs.items():
        assert padded.logprobs[key] == pytest.approx(values, abs=1e-5)
    for number, prompt in enumerate(PROMPTS):
        assert padded.tokens[str(number), 0] == greedy(model, prompt, 4 + 3 * number)


def test_padding_touches_no_block_but_the_dummy(model: LLaMAForCausalLM) -> None:
    runner = runner_of(model, use_buckets=True)
    for cache in (*runner.pool.key_caches, *runner.pool.value_caches):
        cache[1:] = 7.0
    new = tuple(NewSequence(i, (5,), GREEDY, 0, frozenset()) for i in range(3))
    rows = tuple(StepRow(i, 0, (5 + i,), ((10 + i,),), 1, (i,)) for i in range(3))
    result = runner.execute(StepPlan(rows, new_sequences=new))
    assert len(result.tokens) == 3  # and none for the padded row
    for cache in (*runner.pool.key_caches, *runner.pool.value_caches):
        changed = [block for block in range(1, NUM_BLOCKS) if not bool((cache[block] == 7.0).all())]
        assert changed == [10, 11, 12]
        assert bool((cache[10:13, :, 1:] == 7.0).all())


@pytest.mark.parametrize("budget", [10, 11, 13, 64])
@pytest.mark.parametrize("use_buckets", [False, True])
def test_prompt_logprobs_over_chunks(model: LLaMAForCausalLM, budget: int, use_buckets: bool) -> None:
    """Any cut into chunks, also one where the last chunk is a single token, reports every position once and right."""
    chooser = torch.Generator().manual_seed(budget)
    prompt = torch.randint(0, 97, (31,), generator=chooser).tolist()
    params = SamplingParams(temperature=0, max_tokens=3, prompt_logprobs=1)
    run = Run(runner_of(model, use_buckets), budget)
    run.add("long", prompt, params).add("other", PROMPTS[0]).add("short", [8, 9], params).finish()
    for name, tokens in (("long", prompt), ("short", [8, 9])):
        expected = dense_logprobs(model, tokens)
        assert sorted(run.prompts[name]) == list(range(1, len(tokens)))
        for position, found in run.prompts[name].items():
            assert found == pytest.approx(expected[position - 1, tokens[position]].item(), abs=1e-4)
    assert run.tokens["long", 0] == greedy(model, prompt, 3)
    assert run.tokens["other", 0] == greedy(model, PROMPTS[0], 12)


@pytest.mark.parametrize("chunk", [1, 2, 5])
def test_prompt_logprobs_row_by_row(model: LLaMAForCausalLM, chunk: int) -> None:
    runner, prompt = runner_of(model), PROMPTS[0]
    expected = dense_logprobs(model, prompt)
    found: list[float] = []
    for first in range(0, len(prompt), chunk):
        tokens = tuple(prompt[first : first + chunk])
        targets = tuple(prompt[first + 1 : first + chunk + 1])
        row = StepRow(1, first, tokens, ((4, 2, 9),), len(prompt), logprob_targets=targets, num_logprobs=2)
        result = runner.execute(StepPlan((row,)))
        assert result.tokens == ()
        if targets:
            assert result.prompt_logprobs[1].first_position == first + 1
            found += [one.logprob for one in result.prompt_logprobs[1].tokens]
            assert all(len(one.top) == 2 for one in result.prompt_logprobs[1].tokens)
    assert found == pytest.approx([expected[i, t].item() for i, t in enumerate(prompt[1:])], abs=1e-4)


def test_copied_blocks_go_their_own_ways(model: LLaMAForCausalLM) -> None:
    """A fork in the middle of a block: the copy goes on with another token, and the original stays what it was."""
    runner, prompt = runner_of(model), PROMPTS[0][:6]
    new = tuple(NewSequence(i, tuple(prompt), GREEDY, 0, frozenset()) for i in (1, 2))
    first = StepRow(1, 0, tuple(prompt), ((3, 4),), 6, (1, 2))
    runner.execute(StepPlan((first,), new_sequences=new))
    rows = (StepRow(1, 6, (50,), ((3, 4),), 6, (1,)), StepRow(2, 6, (60,), ((3, 8),), 6, (2,)))
    result = runner.execute(StepPlan(rows, copies=(BlockCopy(0, 4, 8),)))
    for token, own in zip(result.tokens, (50, 60), strict=True):
        expected = dense_logprobs(model, [*prompt, own])[-1]
        assert token.token_id == int(expected.argmax())
        assert token.logprobs is not None
        assert token.logprobs.logprob == pytest.approx(expected.max().item(), abs=1e-4)


def test_all_copies_are_read_before_any_is_written() -> None:
    pool = KVPool(CONFIG, NullCommunicator(), (6,), SIZE)
    for cache in (*pool.key_caches, *pool.value_caches):
        for block in range(6):
            cache[block] = block
    pool.copy_blocks([BlockCopy(0, 1, 2), BlockCopy(0, 2, 3), BlockCopy(0, 3, 1)])
    pool.copy_blocks([])
    for cache in (*pool.key_caches, *pool.value_caches):
        assert cache[:, 0, 0, 0].tolist() == [0, 3, 1, 2, 4, 5]


def test_beams_copy_blocks_and_find_what_the_dense_path_finds(model: LLaMAForCausalLM) -> None:
    run = Run(runner_of(model), budget=24)
    params = SamplingParams(temperature=0, max_tokens=9)
    run.add("beams", PROMPTS[3], params, beams=BeamParams(width=4)).add("other", PROMPTS[0]).finish()
    assert run.num_copies > 0
    expected = model.generate(
        torch.tensor([PROMPTS[3]]), max_new_tokens=9, num_beams=4, num_return_sequences=4, eos_token_id=[]
    )
    assert [list(beam) for beam in run.beams["beams"]] == expected[:, len(PROMPTS[3]) :].tolist()
    assert run.tokens["other", 0] == greedy(model, PROMPTS[0], 12)


def test_a_pending_token_is_the_one_last_chosen(model: LLaMAForCausalLM) -> None:
    """Two plans are made before the first one's result is known, and the second goes on from it."""
    runner, prompt = runner_of(model), PROMPTS[1]
    new = NewSequence(1, tuple(prompt), GREEDY, 0, frozenset())
    plans = [
        StepPlan((StepRow(1, 0, tuple(prompt), ((5, 6),), 3, (1,)),), new_sequences=(new,)),
        StepPlan((StepRow(1, 3, (PENDING_TOKEN,), ((5, 6),), 3, (1,)),)),
        StepPlan((StepRow(1, 4, (PENDING_TOKEN,), ((5, 6),), 3, (1,)),)),
    ]
    found = [runner.execute(plan).tokens[0].token_id for plan in plans]
    assert found == greedy(model, prompt, 3)


def test_one_prompt_is_continued_several_times(model: LLaMAForCausalLM) -> None:
    """n sequences begin with one row, each with its own draw from the same logits; the prompt is computed once."""
    run = Run(runner_of(model))
    params = SamplingParams(n=5, max_tokens=6, temperature=1.2, ignore_eos=True, logprobs=0)
    run.add("n", PROMPTS[0], params, seed=100).finish()
    assert len({tuple(tokens) for tokens in run.tokens.values()}) > 1
    for index in range(5):
        alone = Run(runner_of(model))
        one = SamplingParams(max_tokens=6, temperature=1.2, ignore_eos=True)
        alone.add("one", PROMPTS[0], one, seed=100 + index).finish()
        assert alone.tokens["one", 0] == run.tokens["n", index]
        expected = dense_logprobs(model, [*PROMPTS[0], *run.tokens["n", index]])
        for i, found in enumerate(run.logprobs["n", index]):
            token = run.tokens["n", index][i]
            assert found == pytest.approx(expected[len(PROMPTS[0]) - 1 + i, token].item(), abs=1e-4)


@pytest.mark.parametrize("use_buckets", [False, True])
def test_an_error_of_one_sequence_leaves_the_others_alone(model: LLaMAForCausalLM, use_buckets: bool) -> None:
    def broken(token_ids: Sequence[int], logits: Tensor) -> Tensor:
        if len(token_ids) == len(PROMPTS[1]) + 2:
            raise LookupError("nothing there")
        return logits

    def nothing_left(token_ids: Sequence[int], logits: Tensor) -> Tensor:
        return logits * float("nan") if len(token_ids) > len(PROMPTS[2]) + 4 else logits

    runner = runner_of(model, use_buckets)
    run = Run(runner)
    run.add("good", PROMPTS[0])
    run.add("broken", PROMPTS[1], SamplingParams(temperature=0, max_tokens=9, logits_processors=[broken]))
    run.add("nan", PROMPTS[2], SamplingParams(temperature=0, max_tokens=9, logits_processors=[nothing_left]))
    run.add("sampled", PROMPTS[3], SamplingParams(temperature=1.3, max_tokens=10), seed=5).finish()
    assert "LookupError: nothing there" in run.errors["broken"]
    assert "NaN" in run.errors["nan"]
    assert sorted(run.errors) == ["broken", "nan"]
    assert run.tokens["good", 0] == greedy(model, PROMPTS[0], 12)
    assert run.tokens["broken", 0] == greedy(model, PROMPTS[1], 2)
    assert run.tokens["nan", 0] == greedy(model, PROMPTS[2], 5)
    alone = Run(runner_of(model)).add("sampled", PROMPTS[3], SamplingParams(temperature=1.3, max_tokens=10), seed=5)
    assert run.tokens["sampled", 0] == alone.finish().tokens["sampled", 0]
    assert not runner.sampler._states


def test_a_plan_without_rows_only_forgets(model: LLaMAForCausalLM) -> None:
    runner = runner_of(model)
    new = NewSequence(1, (5,), GREEDY, 0, frozenset())
    runner.execute(StepPlan((StepRow(1, 0, (5,), ((3,),), 1, (1,)),), new_sequences=(new,)))
    assert runner.execute(StepPlan((), ended_sequences=(1,))) == StepResult((), {}, {}, {})
    assert not runner.sampler._states
