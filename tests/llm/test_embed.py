"""LLM.embed and AsyncEngine.embed against transformers' hidden states, and in company against alone, bit for bit."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from puna.engine.async_engine import AsyncEngine
from puna.engine.outputs import RequestDelta
from puna.llm import LLM
from puna.ops import cpu
from puna.scheduling.pooling_params import Pooling, PoolingParams
from puna.scheduling.sampling_params import SamplingParams
from puna.scheduling.step_plan import StepPlan, StepResult

WINDOW: dict[str, Any] = {"architecture": "MistralForCausalLM", "sliding_window": 9}


def prompts(seed: int = 0) -> list[list[int]]:
    """Of 1 to 150 tokens, some of them continuations of others."""
    rng = random.Random(seed)
    made: list[list[int]] = []
    for i, length in enumerate((1, 150, 2, 7, 16, 33, 60, 17, 5, 100, 1, 64)):
        own = [rng.randrange(2, 258) for _ in range(length)]
        made.append(made[rng.randrange(i)][:96] + own if i % 3 == 2 else own)
    return made


def as_prompts(token_ids: list[list[int]]) -> list[dict[str, list[int]]]:
    return [{"prompt_token_ids": ids} for ids in token_ids]


@torch.no_grad()
def expected(model: Any, token_ids: list[int], pooling: Pooling, normalize: bool) -> Tensor:
    """transformers' last_hidden_state, pooled in float64."""
    hidden = model(torch.tensor([token_ids])).last_hidden_state[0].double()
    pooled = hidden[-1] if pooling == "last" else hidden.mean(0)
    return torch.nn.functional.normalize(pooled, dim=0) if normalize else pooled


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Any:
    return transformers.AutoModel.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_pooled_hidden_states_are_those_of_transformers(
    llm: LLM, theirs: Any, pooling: Pooling, normalize: bool
) -> None:
    many = prompts()
    found = llm.embed(as_prompts(many), pooling, normalize)
    assert len(found) == len(many)
    for token_ids, embedding in zip(many, found, strict=True):
        assert embedding.dtype == torch.float32
        assert embedding.shape == (32,)
        torch.testing.assert_close(
            embedding.double(), expected(theirs, token_ids, pooling, normalize), rtol=0, atol=2e-5
        )
        assert not normalize or embedding.double().norm().item() == pytest.approx(1, abs=1e-6)


def test_chunks_preemption_and_windows(tight_llm: LLM, theirs: Any, make_folder: Callable[..., Path]) -> None:
    """A cache that is too small for all, seven tokens a step; beside them requests that generate."""
    folder = make_folder(**WINDOW)
    windowed = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    limits: dict[str, Any] = {"max_model_len": 100, "max_num_seqs": 6, "max_num_batched_tokens": 7, "block_size": 16}
    many = [ids[:90] for ids in prompts(1)]
    with LLM(folder, **limits) as cut:
        for llm, model in ((tight_llm, theirs), (cut, windowed)):
            for pooling in ("last", "mean", "last"):
                company = threading.Thread(target=llm.generate, args=(as_prompts(many), SamplingParams(max_tokens=9)))
                company.start()
                for token_ids, embedding in zip(many, llm.embed(as_prompts(many), pooling), strict=True):
                    wanted = expected(model, token_ids, pooling, True)
                    torch.testing.assert_close(embedding.double(), wanted, rtol=0, atol=2e-5)
                company.join()
            assert llm.engine.parts.scheduler.blocks.utilization.in_use == 0
    scheduler = tight_llm.engine.parts.scheduler
    assert scheduler.num_preemptions > 0
    assert scheduler.num_prefix_hit_tokens > 0


def test_only_last_token_pooling_takes_cached_blocks(folder: Path) -> None:
    token_ids = prompts()[1]
    with LLM(folder) as llm:
        first = llm.embed(as_prompts([token_ids]), "mean")
        assert torch.equal(llm.embed(as_prompts([token_ids]), "mean")[0], first[0])
        assert llm.engine.statistics().num_prefix_hit_tokens == 0
        llm.embed(as_prompts([token_ids]), "last")  # what the mean-pooled ones left there
        assert llm.engine.statistics().num_prefix_hit_tokens == 144


def test_no_logits_are_computed_for_them(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = llm.engine.parts.executor._runner  # type: ignore[attr-defined]
    counts: list[int] = []
    logits = runner.model.logits

    def counted(hidden_states: Tensor, rows: Tensor) -> Tensor:
        counts.append(len(rows))
        found: Tensor = logits(hidden_states, rows)
        return found

    monkeypatch.setattr(runner.model, "logits", counted)
    llm.embed(as_prompts(prompts()), "mean")
    assert counts == []
    ended = threading.Semaphore(0)
    listen = lambda delta: ended.release() if delta.finished else None  # noqa: E731
    with llm.engine._lock:  # so that all are in the same steps
        for token_ids in prompts()[:4]:
            llm.engine.submit(token_ids, SamplingParams(), listen, pooling=PoolingParams())
        llm.engine.submit([5, 6, 7], SamplingParams(max_tokens=3, ignore_eos=True), listen)
    for _ in range(5):
        assert ended.acquire(timeout=30)
    assert counts == [1, 1, 1]


def test_texts_are_encoded_as_for_generate(llm: LLM) -> None:
    (found,) = llm.embed("a llama", "mean")
    assert torch.equal(found, llm.embed(as_prompts([llm.encode("a llama")]), "mean")[0])
    assert llm.embed([]) == []


def test_refusals(llm: LLM) -> None:
    assert len(llm.embed(as_prompts([[5] * 256]))) == 1  # the whole context
    with pytest.raises(ValueError, match="257 tokens, but max_model_len is 256"):
        llm.embed(as_prompts([[5], [5] * 257]))
    with pytest.raises(ValueError, match="pooling is 'max'"):
        llm.embed("a", "max")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="the prompt is empty"):
        llm.embed(as_prompts([[]]))
    with pytest.raises(ValueError, match="no sampling params"):
        llm.engine.submit([5], SamplingParams(n=2), lambda _: None, pooling=PoolingParams())


def test_nan_is_an_error_of_its_own_request(make_folder: Callable[..., Path]) -> None:
    with LLM(make_folder()) as llm:
        weight = llm.engine.parts.executor._runner.model.ln_f.weight  # type: ignore[attr-defined]
        with torch.no_grad():
            weight[3] = torch.nan
        with pytest.raises(RuntimeError, match="hidden states are NaN or infinite"):
            llm.embed("a")


@pytest.fixture
def engine(folder: Path) -> Iterator[AsyncEngine]:
    with LLM(folder, max_num_seqs=2, max_num_batched_tokens=8) as llm:
        yield AsyncEngine(llm.engine)


def test_cancelled_and_late_ones_leave_nothing(engine: AsyncEngine, llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    long, parts = [7] * 250, engine.engine.parts
    runner = parts.executor._runner  # type: ignore[attr-defined]
    execute, has_run, may_go_on = runner.execute, threading.Event(), threading.Event()

    def held(plan: StepPlan) -> StepResult:
        result: StepResult = execute(plan)
        has_run.set()
        assert may_go_on.wait(30)
        return result

    async def use() -> None:
        with pytest.raises(TimeoutError):
            await engine.embed(long, "mean", timeout=0)
        monkeypatch.setattr(runner, "execute", held)
        task = asyncio.create_task(engine.embed(long, "mean"))
        assert await asyncio.to_thread(has_run.wait, 30)
        assert len(runner.pooler) == 1
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert parts.scheduler.blocks.utilization.in_use == 0
        may_go_on.set()
        whole = await engine.embed(long, "mean", normalize=False)
        torch.testing.assert_close(whole, llm.embed(as_prompts([long]), "mean", normalize=False)[0], rtol=0, atol=2e-5)
        torch.testing.assert_close(await engine.embed("ab"), llm.embed("ab")[0], rtol=0, atol=2e-5)

    asyncio.run(use())
    engine.engine.shutdown()
    assert parts.scheduler.blocks.utilization.in_use == 0
    assert not parts.scheduler.has_work
    assert len(runner.pooler) == 0


def test_shutdown_tells_those_on_their_way(folder: Path) -> None:
    deltas: list[RequestDelta] = []
    with LLM(folder, max_num_seqs=2, max_num_batched_tokens=2) as llm, llm.engine._lock:
        llm.engine.submit([5] * 200, SamplingParams(), deltas.append, pooling=PoolingParams(method="mean"))
        # Ends after a step or two, and the engine with it.
        llm.engine.submit([5], SamplingParams(), lambda _: llm.close(), priority=-1, pooling=PoolingParams())
    assert [delta.finished for delta in deltas] == [True]
    assert deltas[0].embedding is None
    assert deltas[0].completions[0].finish_reason == "abort"


ALONE: dict[str, Any] = {"enforce_eager": True, "enable_prefix_caching": False, "threads": 1, "max_num_seqs": 1}
TOGETHER: tuple[dict[str, Any], ...] = (
    {"threads": 2, "max_num_batched_tokens": 600, "max_num_seqs": 12},
    {"threads": 1, "max_num_batched_tokens": 17, "max_num_seqs": 5, "enable_prefix_caching": False},
    {"threads": 3, "max_num_batched_tokens": 64, "max_num_seqs": 12},
    {"threads": 2, "max_num_batched_tokens": 3, "max_num_seqs": 3},
)


@pytest.fixture
def restore() -> Iterator[None]:
    threads = cpu.threads()
    yield
    cpu.set_threads(threads)


@pytest.mark.skipif(not cpu.compiled(), reason="the reference ops' bits depend on the batch")
@pytest.mark.parametrize(("dtype", "quantization"), [("float32", None), ("bfloat16", None), ("bfloat16", "int4")])
@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_bits_do_not_depend_on_the_company(
    make_folder: Callable[..., Path], restore: None, pooling: Pooling, dtype: str, quantization: str | None
) -> None:
    folder = make_folder(head_size=20, hidden_size=72, mlp_hidden_size=96)
    model: dict[str, Any] = {"dtype": dtype, "quantization": quantization}
    many = as_prompts(prompts(2))
    with LLM(folder, **model, **ALONE) as llm:
        alone = torch.stack([llm.embed(prompt, pooling)[0] for prompt in many])
    assert len({tuple(row) for row in alone.tolist()}) == len(many)
    for options in TOGETHER:
        with LLM(folder, **model, **options) as llm:
            for _ in range(2):  # the second time with the prefixes in the cache
                company = threading.Thread(target=llm.generate, args=(many, SamplingParams(max_tokens=20)))
                company.start()
                found = torch.stack(llm.embed(many, pooling))
                company.join()
                assert torch.equal(found.view(torch.int32), alone.view(torch.int32)), options
