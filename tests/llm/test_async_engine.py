"""AsyncEngine: streams, cancellation by closing, deadlines, clean shutdown."""

from __future__ import annotations

import asyncio
import threading
import time
from pathlib import Path

import pytest
import torch

from puna.config import EngineConfig
from puna.engine.async_engine import AsyncEngine
from puna.engine.engine import Engine
from puna.models import LLaMAForCausalLM
from puna.scheduling.sampling_params import GuidedDecoding, SamplingParams
from puna.scheduling.scheduler import QueueFullError

GREEDY = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
LONG = SamplingParams(temperature=0, max_tokens=None, ignore_eos=True)


def engine(folder: Path, **limits: int) -> AsyncEngine:
    return AsyncEngine(Engine.from_pretrained(str(folder), engine_config=EngineConfig(**limits)))


def test_streams_grow_to_the_whole(folder: Path, dense: LLaMAForCausalLM) -> None:
    async def one(it: AsyncEngine, prompt: list[int]) -> tuple[list[int], int]:
        lengths, output = [], None
        async for output in it.generate(prompt, GREEDY):
            lengths.append(len(output.outputs[0].token_ids))
        assert output is not None
        assert output.finished
        assert lengths == sorted(lengths)
        return output.outputs[0].token_ids, len(lengths)

    async def run() -> list[tuple[list[int], int]]:
        async with engine(folder) as it:
            return list(await asyncio.gather(*(one(it, [i, i + 1, 7]) for i in range(2, 12))))

    for i, (tokens, _) in enumerate(asyncio.run(run())):
        prompt = [i + 2, i + 3, 7]
        expected = dense.generate(torch.tensor([prompt]), max_new_tokens=20, eos_token_id=[])[0, 3:].tolist()
        assert tokens == expected


def test_closing_the_iterator_frees_the_blocks(folder: Path) -> None:
    async def run() -> None:
        async with engine(folder) as it:
            scheduler = it.engine.parts.scheduler
            stream = it.generate([3, 4, 5], LONG)
            await anext(stream)
            assert scheduler.blocks.utilization.in_use > 0
            await stream.aclose()
            assert scheduler.blocks.utilization.in_use == 0
            assert not scheduler.num_running

            async def read() -> None:
                async for _ in it.generate([3, 4, 5], LONG):
                    pass

            task = asyncio.create_task(read())
            while not scheduler.num_running:
                await asyncio.sleep(0.001)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert scheduler.blocks.utilization.in_use == 0

    asyncio.run(run())


def test_a_deadline_ends_a_request(folder: Path) -> None:
    async def run() -> tuple[str | None, int]:
        async with engine(folder) as it:
            it.engine.parts.executor.submit = _slowed(it.engine.parts.executor.submit)  # type: ignore[method-assign]
            outputs = [output async for output in it.generate([3, 4], LONG, timeout=0.2)]
            return outputs[-1].outputs[0].finish_reason, len(outputs[-1].outputs[0].token_ids)

    reason, count = asyncio.run(run())
    assert reason == "deadline"
    assert 0 < count < 200


def _slowed(submit):  # type: ignore[no-untyped-def]
    def slow(plan):  # type: ignore[no-untyped-def]
        time.sleep(0.005)
        return submit(plan)

    return slow


def test_a_full_queue_refuses(folder: Path) -> None:
    async def run() -> None:
        async with engine(folder, max_num_seqs=1, max_num_batched_tokens=8, max_waiting=1) as it:
            streams = [it.generate([3, 4], LONG) for _ in range(2)]
            await anext(streams[0])
            waiting = asyncio.create_task(anext(streams[1]))  # type: ignore[arg-type]
            while not it.engine.parts.scheduler.num_waiting:
                await asyncio.sleep(0.001)
            with pytest.raises(QueueFullError, match="1 requests are waiting"):
                await anext(it.generate([3, 4], LONG))
            await streams[0].aclose()
            await waiting
            await streams[1].aclose()

    asyncio.run(run())


def test_shutdown_ends_what_runs(folder: Path) -> None:
    async def run() -> str | None:
        it = engine(folder)
        stream = it.generate([3, 4], LONG)
        await anext(stream)
        await it.shutdown()
        outputs = [output async for output in stream]
        assert not it.engine._thread.is_alive()
        return outputs[-1].outputs[0].finish_reason

    assert asyncio.run(run()) == "abort"


def test_long_prompts_and_grammars_do_not_hold_the_event_loop_up(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Text is encoded, and grammars are compiled, in other threads."""
    seen: list[threading.Thread] = []

    async def run() -> None:
        async with engine(folder) as it:
            parts = it.engine.parts
            encode, compile_grammar = parts.tokenizer.encode, parts.grammars.compile
            monkeypatch.setattr(
                parts.tokenizer, "encode", lambda text: (seen.append(threading.current_thread()), encode(text))[1]
            )
            monkeypatch.setattr(
                parts.grammars,
                "compile",
                lambda guided: (seen.append(threading.current_thread()), compile_grammar(guided))[1],
            )
            params = SamplingParams(temperature=0, max_tokens=4, guided=GuidedDecoding(regex="[ab]{4}"))
            outputs = [output async for output in it.generate("text", params)]
            assert len(outputs[-1].outputs[0].text) == 4

    asyncio.run(run())
    # After these two, submit and the sampler look the grammar up.
    assert len(seen) > 2
    assert threading.main_thread() not in seen[:2]
