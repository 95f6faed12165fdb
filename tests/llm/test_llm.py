"""LLM against the dense path: tokens, log-probabilities, stops, beams, scores, limits and bad input."""

from __future__ import annotations

import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from puna.config import RotaryScaling
from puna.llm import LLM
from puna.models import LLaMAForCausalLM, load_model
from puna.scheduling.block_allocator import DUMMY_BLOCK
from puna.scheduling.sampling_params import SamplingParams
from puna.scheduling.step_plan import StepPlan

GREEDY = SamplingParams(temperature=0, max_tokens=20)


def prompts(count: int, seed: int = 0, longest: int = 60) -> list[list[int]]:
    """Half of them begin alike, so that there are prefixes to share."""
    chooser = random.Random(seed)
    shared = [chooser.randrange(2, 250) for _ in range(40)]
    made = []
    for _ in range(count):
        own = [chooser.randrange(2, 250) for _ in range(chooser.randint(1, longest // 2))]
        made.append((shared[: chooser.randint(0, longest // 2)] if chooser.random() < 0.5 else []) + own)
    return made


def as_prompts(token_ids: list[list[int]]) -> list[dict[str, list[int]]]:
    return [{"prompt_token_ids": ids} for ids in token_ids]


def greedy_alone(dense: LLaMAForCausalLM, prompt: list[int], max_tokens: int) -> list[int]:
    return dense.generate(torch.tensor([prompt]), max_new_tokens=max_tokens)[0, len(prompt) :].tolist()


def test_a_batch_gets_what_each_prompt_gets_alone(llm: LLM, dense: LLaMAForCausalLM) -> None:
    many = prompts(64)
    outputs = llm.generate(as_prompts(many), GREEDY)
    for prompt, output in zip(many, outputs, strict=True):
        assert output.prompt_token_ids == prompt
        assert output.finished
        (completion,) = output.outputs
        assert completion.token_ids == greedy_alone(dense, prompt, 20)
        ended = completion.token_ids[-1] in (1, 40, 90)
        assert completion.finish_reason == ("stop" if ended else "length")
    assert {output.outputs[0].finish_reason for output in outputs} == {"stop", "length"}


def test_chunks_preemption_and_prefix_hits_change_nothing(tight_llm: LLM, dense: LLaMAForCausalLM) -> None:
    many = prompts(40, seed=1)
    for _ in range(2):  # the second time with the prefixes of the first in the cache
        outputs = tight_llm.generate(as_prompts(many), GREEDY)
        for prompt, output in zip(many, outputs, strict=True):
            assert output.outputs[0].token_ids == greedy_alone(dense, prompt, 20)
    scheduler = tight_llm.engine.parts.scheduler
    assert scheduler.num_preemptions > 0
    assert scheduler.num_prefix_hit_tokens > 0
    assert scheduler.blocks.utilization.in_use == 0


@pytest.mark.parametrize(
    "options",
    [
        {"architecture": "MistralForCausalLM", "sliding_window": 9},
        {"architecture": "Qwen2ForCausalLM", "attn_bias": True, "sliding_window": 6, "sliding_window_layers": (1,)},
        {"architecture": "MixtralForCausalLM", "num_experts": 3, "experts_per_token": 2},
        # Prompts on either side of the length at which keys are rotated otherwise, some with a prefix in common.
        {"max_position_embeddings": 24, "rotary_scaling": RotaryScaling(type="dynamic", factor=4.0)},
        {
            "rotary_scaling": RotaryScaling(
                type="longrope",
                factor=8.0,
                original_max_position_embeddings=32,
                short_factor=(1.0, 1.1, 1.2, 1.3),
                long_factor=(1.0, 2.0, 4.0, 8.0),
            )
        },
    ],
    ids=["mistral", "qwen2", "mixtral", "dynamic", "longrope"],
)
def test_families(make_folder: Callable[..., Path], options: dict[str, Any]) -> None:
    folder = make_folder(**options)
    dense, many = load_model(folder), prompts(12, seed=2)
    with LLM(folder, block_size=4, max_num_batched_tokens=16, max_num_seqs=4) as it:
        for _ in range(2):
            for prompt, output in zip(many, it.generate(as_prompts(many), GREEDY), strict=True):
                assert output.outputs[0].token_ids == greedy_alone(dense, prompt, 20)


MIXED: list[dict[str, Any]] = [
    {"architecture": "Qwen2ForCausalLM", "attn_bias": True, "sliding_window": 6, "sliding_window_layers": (2,)},
    {"architecture": "Qwen3ForCausalLM", "qk_norm": True, "sliding_window": 11, "sliding_window_layers": (0, 2)},
]


@pytest.fixture(scope="module", params=MIXED, ids=["qwen2", "qwen3"])
def mixed_folder(request: pytest.FixtureRequest, make_folder: Callable[..., Path]) -> Path:
    """Three layers, of which some see everything and some have a window, shorter than most prompts."""
    return make_folder(num_layers=3, **request.param)


def test_mixed_windows_in_a_tight_cache(mixed_folder: Path) -> None:
    """Chunks, preemption and prefix hits, with what windowed layers can't see given back."""
    dense, many = load_model(mixed_folder), prompts(30, seed=6, longest=80)
    block_of_a_layer = 2 * 2 * 8 * 4 * 4
    limits = {"max_model_len": 100, "max_num_seqs": 6, "max_num_batched_tokens": 7}
    with LLM(mixed_folder, kv_cache_memory=90 * block_of_a_layer, block_size=4, **limits) as it:
        for _ in range(2):
            for prompt, output in zip(many, it.generate(as_prompts(many), GREEDY), strict=True):
                assert output.outputs[0].token_ids == greedy_alone(dense, prompt, 20)
        full, windowed = it.engine.parts.memory.num_blocks
        assert windowed <= full < 37
        scheduler = it.engine.parts.scheduler
        assert scheduler.num_preemptions > 0
        assert scheduler.num_prefix_hit_tokens > 0
        assert scheduler.blocks.utilization.in_use == 0
        scheduler.check_integrity()


def test_forks_of_mixed_windows(mixed_folder: Path) -> None:
    """Beams, and n continuations of a prompt."""
    dense, many = load_model(mixed_folder), prompts(3, seed=7)
    with LLM(mixed_folder, block_size=4, max_num_seqs=6, max_num_batched_tokens=9) as it:
        found = it.beam_search(as_prompts(many), 3, 15, ignore_eos=True)
        options: dict[str, Any] = {"num_beams": 3, "num_return_sequences": 3, "eos_token_id": []}
        for prompt, output in zip(many, found, strict=True):
            rows = dense.generate(torch.tensor([prompt]), max_new_tokens=15, **options)
            assert [beam.token_ids for beam in output.sequences] == rows[:, len(prompt) :].tolist()
        sampled: dict[str, Any] = {"temperature": 1, "max_tokens": 15, "ignore_eos": True}
        together = it.generate(as_prompts(many), SamplingParams(seed=5, n=4, **sampled))
        for prompt, output in zip(many, together, strict=True):
            alone = it.generate(as_prompts([prompt] * 4), [SamplingParams(seed=5 + i, **sampled) for i in range(4)])
            assert [part.token_ids for part in output.outputs] == [one.outputs[0].token_ids for one in alone]
        assert it.engine.parts.scheduler.blocks.utilization.in_use == 0


def test_a_long_sequence_of_a_mixed_model_holds_a_window_of_blocks(
    mixed_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense, (prompt,) = load_model(mixed_folder), prompts(1, seed=8)
    prompt = prompt * (170 // len(prompt))
    window = dense.config.sliding_window
    assert window is not None
    held: list[tuple[int, int, int, int]] = []
    with LLM(mixed_folder, block_size=4, max_num_batched_tokens=16, max_num_seqs=2) as it:
        executor = it.engine.parts.executor
        submit = executor.submit

        def watched(plan: StepPlan) -> Any:
            for row in plan.rows:
                full, windowed = (sum(block != DUMMY_BLOCK for block in table) for table in row.block_ids)
                held.append((row.sequence_length, len(row.token_ids), full, windowed))
            return submit(plan)

        monkeypatch.setattr(executor, "submit", watched)
        (output,) = it.generate(as_prompts([prompt]), SamplingParams(temperature=0, max_tokens=40, ignore_eos=True))
    assert (
        output.outputs[0].token_ids
        == dense.generate(torch.tensor([prompt]), max_new_tokens=40, eos_token_id=[])[0, len(prompt) :].tolist()
    )
    assert {step for _, step, _, _ in held} >= {1, 16}
    assert max(length for length, *_ in held) == len(prompt) + 39
    for length, step, full, windowed in held:
        assert full == -(-length // 4)
        assert windowed <= -(-(window + step) // 4) + 1


def test_a_seed_gives_the_same_tokens_in_any_company(llm: LLM, tight_llm: LLM) -> None:
    many = prompts(12, seed=3)
    params = [SamplingParams(temperature=0.9, top_p=0.9, seed=i, max_tokens=15, n=1 + i % 3) for i in range(12)]
    together = llm.generate(as_prompts(many), params)
    in_chunks = tight_llm.generate(as_prompts(many), params)
    for i, prompt in enumerate(many):
        (alone,) = llm.generate(as_prompts([prompt]), params[i])
        expected = [completion.token_ids for completion in alone.outputs]
        assert len(expected) == 1 + i % 3
        assert [completion.token_ids for completion in together[i].outputs] == expected
        assert [completion.token_ids for completion in in_chunks[i].outputs] == expected
    several = together[2].outputs
    assert several[0].token_ids != several[1].token_ids != several[2].token_ids


def test_unseeded_requests_differ_and_the_engines_seed_repeats_them(folder: Path) -> None:
    params = SamplingParams(temperature=1.5, max_tokens=12)
    found = []
    for seed in (1, 1, 2):
        with LLM(folder, seed=seed) as it:
            found.append([o.outputs[0].token_ids for o in it.generate(["abc", "abc"], params)])
    assert found[0][0] != found[0][1]
    assert found[0] == found[1] != found[2]


def test_text_and_echo(llm: LLM) -> None:
    (plain,) = llm.generate("hello wörld", GREEDY)
    assert plain.prompt == "hello wörld"
    assert plain.prompt_token_ids == llm.encode("hello wörld")
    assert plain.outputs[0].text == llm.decode(plain.outputs[0].token_ids)
    (echoed,) = llm.generate("hello wörld", SamplingParams(temperature=0, max_tokens=20, echo=True))
    assert echoed.outputs[0].text == "hello wörld" + plain.outputs[0].text


def test_logprobs(llm: LLM, dense: LLaMAForCausalLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=8, logprobs=3, prompt_logprobs=2, ignore_eos=True)
    prompt = prompts(1, seed=4)[0]
    (output,) = llm.generate(as_prompts([prompt]), params)
    completion = output.outputs[0]
    whole = torch.tensor([prompt + completion.token_ids])
    with torch.no_grad():
        expected = dense(whole)[0].log_softmax(-1)
    assert completion.logprobs is not None
    assert len(completion.logprobs) == 8
    total = 0.0
    for i, position in enumerate(completion.logprobs):
        row = expected[len(prompt) - 1 + i]
        chosen = completion.token_ids[i]
        assert next(iter(position)) == chosen
        assert set(position) == set(row.topk(3).indices.tolist())
        for token, found in position.items():
            assert found.logprob == pytest.approx(row[token].item(), abs=1e-4)
            assert found.rank == int((row > row[token]).sum()) + 1
        total += row[chosen].item()
    assert completion.cumulative_logprob == pytest.approx(total, abs=1e-3)
    assert output.prompt_logprobs is not None
    assert output.prompt_logprobs[0] is None
    for i, position in enumerate(output.prompt_logprobs[1:]):
        assert position is not None
        assert position[prompt[i + 1]].logprob == pytest.approx(expected[i, prompt[i + 1]].item(), abs=1e-4)
        assert len(position) in (2, 3)


def test_score(llm: LLM, tight_llm: LLM, dense: LLaMAForCausalLM) -> None:
    prompt, continuation = prompts(1, seed=5)[0], [5, 6, 7]
    with torch.no_grad():
        rows = dense(torch.tensor([prompt + continuation]))[0].log_softmax(-1)
    expected = [rows[len(prompt) - 1 + i, token].item() for i, token in enumerate(continuation)]
    for it in (llm, tight_llm):
        score = it.score({"prompt_token_ids": prompt}, continuation)
        assert score.token_logprobs == pytest.approx(expected, abs=1e-4)
        assert score.logprob == pytest.approx(sum(expected), abs=1e-4)
        assert score.token_ids == continuation
        assert not score.is_greedy
    assert llm.score({"prompt_token_ids": prompt}, greedy_alone(dense, prompt, 4)).is_greedy
    assert llm.score("ab", "cd").token_ids == llm.encode("cd", add_special_tokens=False)
    with pytest.raises(ValueError, match="continuation is empty"):
        llm.score("ab", "")


def test_lists_are_scored_together(llm: LLM) -> None:
    many = prompts(20, seed=4)
    pairs = [("ab", "cd"), *(({"prompt_token_ids": ids}, ids[:3]) for ids in many), ("x", [7, 8])]
    found = llm.score([prompt for prompt, _ in pairs], [continuation for _, continuation in pairs])
    for one, (prompt, continuation) in zip(found, pairs, strict=True):
        alone = llm.score(prompt, continuation)
        assert one.token_ids == alone.token_ids
        assert one.token_logprobs == pytest.approx(alone.token_logprobs, abs=1e-5)
    assert llm.score([], []) == []
    with pytest.raises(ValueError, match="2 prompts and 1 continuations"):
        llm.score(["a", "b"], ["c"])
    with pytest.raises(ValueError, match="the continuation is empty"):
        llm.score(["a", "b"], ["c", ""])


@pytest.mark.parametrize("width", [1, 2, 5, 8])
@pytest.mark.parametrize("early_stopping", [False, True, "never"])
@pytest.mark.parametrize("length_penalty", [1.0, 0.0, 2.0])
def test_beam_search(
    llm: LLM, dense: LLaMAForCausalLM, width: int, early_stopping: bool, length_penalty: float
) -> None:
    many = prompts(3, seed=width)
    found = llm.beam_search(as_prompts(many), width, 10, length_penalty, early_stopping)
    for prompt, output in zip(many, found, strict=True):
        options: dict[str, Any] = {"num_beams": width, "num_return_sequences": width}
        options |= {"length_penalty": length_penalty, "early_stopping": early_stopping}
        if width == 1:
            continue
        rows = dense.generate(torch.tensor([prompt]), max_new_tokens=10, pad_token_id=0, **options)
        for row, beam in zip(rows, output.sequences, strict=True):
            expected = row[len(prompt) :].tolist()
            ends = [i for i, token in enumerate(expected) if token in (1, 40, 90)]
            assert beam.token_ids == (expected[: ends[0] + 1] if ends else expected)
            assert beam.text == llm.decode(beam.token_ids)
            assert beam.score == pytest.approx(beam.cum_logprob / len(beam.token_ids) ** length_penalty)
        scores = [beam.score for beam in output.sequences]
        assert scores == sorted(scores, reverse=True)


def test_beams_among_other_requests_in_a_tight_cache(tight_llm: LLM, llm: LLM) -> None:
    many = prompts(6, seed=8, longest=30)
    expected = [[b.token_ids for b in o.sequences] for o in llm.beam_search(as_prompts(many), 3, 12)]
    with ThreadPoolExecutor(2) as pool:
        others = pool.submit(tight_llm.generate, as_prompts(prompts(10, seed=9)), GREEDY)
        found = tight_llm.beam_search(as_prompts(many), 3, 12)
        others.result()
    assert [[b.token_ids for b in o.sequences] for o in found] == expected


def test_stop_strings_and_tokens(llm: LLM) -> None:
    free = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
    (output,) = llm.generate("stop here", free)
    text, tokens = output.outputs[0].text, output.outputs[0].token_ids
    assert len(tokens) == 30
    middle = text[len(text) // 2 : len(text) // 2 + 2]
    for include in (False, True):
        params = SamplingParams(
            temperature=0, max_tokens=30, ignore_eos=True, stop=["never", middle], include_stop_str_in_output=include
        )
        (stopped,) = llm.generate("stop here", params)
        completion = stopped.outputs[0]
        assert completion.text == text[: text.find(middle) + len(middle) * include]
        assert (completion.finish_reason, completion.stop_reason) == ("stop", middle)
        assert len(completion.token_ids) < 30
    token = tokens[7]
    (stopped,) = llm.generate(
        "stop here", SamplingParams(temperature=0, max_tokens=30, ignore_eos=True, stop_token_ids=[token])
    )
    completion = stopped.outputs[0]
    assert completion.token_ids == tokens[: tokens.index(token) + 1]
    assert completion.stop_reason == token
    assert completion.text == llm.decode(completion.token_ids[:-1])


def test_threads_share_one_engine(llm: LLM, dense: LLaMAForCausalLM) -> None:
    many = prompts(24, seed=11)

    def one(prompt: list[int]) -> list[int]:
        return llm.generate(as_prompts([prompt]), GREEDY)[0].outputs[0].token_ids

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(one, many))
    assert found == [greedy_alone(dense, prompt, 20) for prompt in many]


def test_chat(llm: LLM) -> None:
    messages = [{"role": "user", "content": "hi"}]
    (output,) = llm.chat(messages, GREEDY)
    assert output.prompt_token_ids == llm.encode("[user]hi[a]", add_special_tokens=False)
    both = llm.chat([messages, [{"role": "user", "content": "bye"}]], GREEDY)
    assert both[0].outputs[0].token_ids == output.outputs[0].token_ids
    assert both[1].prompt_token_ids == llm.encode("[user]bye[a]", add_special_tokens=False)


def test_max_tokens_none_goes_to_the_end_of_the_context(llm: LLM) -> None:
    prompt = prompts(1, seed=12)[0]
    (output,) = llm.generate(as_prompts([prompt]), SamplingParams(temperature=0, max_tokens=None, ignore_eos=True))
    assert len(output.outputs[0].token_ids) == 256 - len(prompt)
    assert output.outputs[0].finish_reason == "length"


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ({"prompt_token_ids": []}, "the prompt is empty"),
        ({"prompt_token_ids": [5, 258]}, "token 258: the model's vocabulary goes from 0 to 257"),
        ({"prompt_token_ids": [3] * 256}, "the prompt has 256 tokens, but max_model_len is 256"),
        ({"token_ids": [3]}, "a prompt is"),
    ],
)
def test_bad_prompts(llm: LLM, prompt: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        llm.generate(["good", prompt], GREEDY)
    assert llm.generate("good", GREEDY)[0].finished


def test_bad_params(llm: LLM) -> None:
    with pytest.raises(ValueError, match="1 prompts and 2 params"):
        llm.generate("a", [GREEDY, GREEDY])
    with pytest.raises(ValueError, match="999"):
        llm.generate("a", SamplingParams(logit_bias={999: 1.0}))
    with pytest.raises(ValueError, match="max_num_seqs is 64"):
        llm.generate("a", SamplingParams(n=65))


def test_memory_is_planned_before_loading(folder: Path) -> None:
    with pytest.raises(ValueError, match="the largest context that fits is"):
        LLM(folder, kv_cache_memory=20_000)
    with pytest.raises(ValueError, match="ask for at most that"):
        LLM(folder, max_model_len=300)
    with pytest.raises(ValueError, match="max_num_seqs is 0"):
        LLM(folder, max_num_seqs=0)
    with pytest.raises(ValueError, match=r"only .* are free"):
        LLM(folder, kv_cache_memory=2**60)


def test_a_failing_step_fails_its_requests_and_stops_the_engine(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from puna.runtime.model_runner import ModelRunner

    with LLM(folder) as it:
        monkeypatch.setattr(ModelRunner, "execute", lambda self, plan: 1 / 0)
        with pytest.raises(RuntimeError, match="ZeroDivisionError"):
            it.generate(["a", "b"], GREEDY)
        with pytest.raises(RuntimeError, match="the engine has stopped"):
            it.generate("a", GREEDY)


def test_closing_ends_the_threads(folder: Path) -> None:
    it = LLM(folder)
    it.generate("a", GREEDY)
    it.close()
    it.close()
    assert not it.engine._thread.is_alive()
    with pytest.raises(RuntimeError, match="has stopped"):
        it.generate("a", GREEDY)
