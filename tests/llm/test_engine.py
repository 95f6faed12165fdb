"""Engine at its edges: listeners that raise, names taken again, shutdown in a step, errors of one among many."""

from __future__ import annotations

import asyncio
import gc
import queue
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from puna.config import EngineConfig
from puna.engine.async_engine import AsyncEngine
from puna.engine.engine import Engine
from puna.engine.outputs import RequestDelta
from puna.engine.tokenizer import Tokenizer
from puna.llm import LLM
from puna.models import LLaMAForCausalLM
from puna.models.loading import ModelLoader
from puna.scheduling.beams import BeamParams
from puna.scheduling.sampling_params import SamplingParams

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
LONG = SamplingParams(temperature=0, max_tokens=None, ignore_eos=True)
PATIENCE = 30


@pytest.fixture
def engine(folder: Path) -> Iterator[Engine]:
    it = Engine.from_pretrained(str(folder))
    yield it
    it.shutdown()


def greedy(dense: LLaMAForCausalLM, prompt: list[int], count: int = 12) -> list[int]:
    found = dense.generate(torch.tensor([prompt]), max_new_tokens=count, eos_token_id=[])
    return found[0, len(prompt) :].tolist()


def collect(deltas: queue.SimpleQueue[RequestDelta]) -> tuple[list[int], RequestDelta]:
    """All tokens up to the end, and the delta that was the end."""
    tokens: list[int] = []
    while True:
        delta = deltas.get(timeout=PATIENCE)
        for part in delta.completions:
            tokens += part.token_ids
        if delta.finished:
            return tokens, delta


def at_rest(engine: Engine) -> None:
    """Waits until nothing is left to do, then sees that nothing is left behind."""
    scheduler, idle = engine.parts.scheduler, threading.Event()
    for _ in range(PATIENCE * 100):
        with engine._lock:
            if not scheduler.has_work:
                break
        idle.wait(0.01)
    with engine._lock:
        assert not scheduler.has_work
        assert not engine._processors
        assert scheduler.blocks.utilization.in_use == 0
        scheduler.check_integrity()


class Gate:
    """Holds the engine's steps back until it is opened."""

    def __init__(self, engine: Engine) -> None:
        self.reached = threading.Event()
        self._open = threading.Event()
        runner = engine.parts.executor._runner  # type: ignore[attr-defined]
        execute = runner.execute

        def wait_and_execute(plan: Any) -> Any:
            self.reached.set()
            assert self._open.wait(PATIENCE)
            return execute(plan)

        runner.execute = wait_and_execute

    def open(self) -> None:
        self._open.set()


@pytest.mark.parametrize("when", ["first", "last"])
def test_a_listener_that_raises_ends_its_own_request(
    engine: Engine, dense: LLaMAForCausalLM, when: str, caplog: pytest.LogCaptureFixture
) -> None:
    calls = []

    def broken(delta: RequestDelta) -> None:
        calls.append(delta)
        if when == "first" or delta.finished:
            raise ConnectionError("the client is gone")

    deltas: queue.SimpleQueue[RequestDelta] = queue.SimpleQueue()
    engine.submit([3, 4, 5], GREEDY, broken, request_id="broken")
    engine.submit([6, 7], GREEDY, deltas.put)
    assert collect(deltas)[0] == greedy(dense, [6, 7])
    at_rest(engine)
    assert len(calls) == (1 if when == "first" else 12)
    assert "request broken: its listener failed" in caplog.text
    assert "the client is gone" in caplog.text
    engine.submit([8], GREEDY, deltas.put)  # the engine goes on
    assert collect(deltas)[0] == greedy(dense, [8])


def test_a_closed_event_loop_does_not_stop_the_engine(engine: Engine, dense: LLaMAForCausalLM) -> None:
    gate = Gate(engine)

    async def leave() -> None:
        stream = AsyncEngine(engine).generate([3, 4], LONG)
        await stream.asend(None)

    loop = asyncio.new_event_loop()
    task = loop.create_task(leave())
    while not gate.reached.is_set():
        loop.run_until_complete(asyncio.sleep(0.001))
    # As where a program ends in a hurry: a request still runs, and there is nobody to take its deltas.
    closed, loop.call_soon_threadsafe = loop.call_soon_threadsafe, _refuse  # type: ignore[method-assign]
    gate.open()
    deltas: queue.SimpleQueue[RequestDelta] = queue.SimpleQueue()
    engine.submit([6, 7], GREEDY, deltas.put)
    assert collect(deltas)[0] == greedy(dense, [6, 7])
    at_rest(engine)
    loop.call_soon_threadsafe = closed  # type: ignore[method-assign]
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        loop.run_until_complete(task)
    loop.close()


def _refuse(*_: Any) -> Any:
    raise RuntimeError("Event loop is closed")


def test_text_that_cannot_be_made_fails_its_request_alone(
    engine: Engine, dense: LLaMAForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode = Tokenizer.decode

    def broken(self: Tokenizer, ids: Any, **options: Any) -> str:
        if len(ids) == 1:  # only log-probabilities decode single tokens
            raise UnicodeError("no such text")
        return decode(self, ids, **options)

    monkeypatch.setattr(Tokenizer, "decode", broken)
    bad: queue.SimpleQueue[RequestDelta] = queue.SimpleQueue()
    good: queue.SimpleQueue[RequestDelta] = queue.SimpleQueue()
    engine.submit([3], SamplingParams(temperature=0, logprobs=1), bad.put)
    engine.submit([6, 7], GREEDY, good.put)
    assert collect(bad)[1].error == "UnicodeError: no such text"
    assert collect(good)[0] == greedy(dense, [6, 7])
    at_rest(engine)


def test_a_raising_logits_processor_ends_its_request_alone(engine: Engine, dense: LLaMAForCausalLM) -> None:
    def broken(token_ids: Any, logits: Any) -> Any:
        if len(token_ids) == 5:
            raise KeyError("mine")
        return logits

    bad: queue.SimpleQueue[RequestDelta] = queue.SimpleQueue()
    good: queue.SimpleQueue[RequestDelta] = queue.SimpleQueue()
    params = SamplingParams(n=3, seed=1, max_tokens=None, ignore_eos=True, logits_processors=[broken])
    engine.submit([3, 9], params, bad.put, request_id="bad")
    engine.submit([6, 7], GREEDY, good.put)
    tokens, end = collect(bad)
    assert len(tokens) == 9  # three of each, then the fourth step fails
    assert end.error is not None
    assert "KeyError: 'mine'" in end.error
    assert collect(good)[0] == greedy(dense, [6, 7])
    at_rest(engine)
    with pytest.raises(queue.Empty):
        bad.get_nowait()


def test_the_others_of_n_end_with_the_one_that_fails(engine: Engine) -> None:
    seen: set[int] = set()
    lock = threading.Lock()

    def first_only(token_ids: Any, logits: Any) -> Any:
        with lock:
            if len(token_ids) == 4 and not seen:
                seen.add(1)
                raise KeyError("mine")
        return logits

    deltas: queue.SimpleQueue[RequestDelta] = queue.SimpleQueue()
    params = SamplingParams(n=3, seed=1, max_tokens=None, ignore_eos=True, logits_processors=[first_only])
    engine.submit([3, 9], params, deltas.put)
    tokens, end = collect(deltas)
    assert end.error is not None
    assert len(tokens) < 12
    at_rest(engine)
    assert engine.parts.scheduler._num_plans < 50  # not to the end of the context, for nobody


def test_a_name_can_be_taken_again_at_once(engine: Engine, dense: LLaMAForCausalLM) -> None:
    gate = Gate(engine)
    old: queue.SimpleQueue[RequestDelta] = queue.SimpleQueue()
    new: queue.SimpleQueue[RequestDelta] = queue.SimpleQueue()
    engine.submit([3, 4], LONG, old.put, request_id="mine", timeout=3600)
    assert gate.reached.wait(PATIENCE)
    with pytest.raises(ValueError, match="request_id 'mine' is in use"):
        engine.submit([6, 7], GREEDY, new.put, request_id="mine")
    engine.cancel("mine")
    engine.submit([6, 7], GREEDY, new.put, request_id="mine")  # before the old one's listener was told
    gate.open()
    tokens, end = collect(old)
    assert tokens == []
    assert end.completions[0].finish_reason == "abort"
    assert collect(new)[0] == greedy(dense, [6, 7])
    at_rest(engine)


@pytest.mark.parametrize("how", ["cancel", "deadline"])
def test_all_n_end_where_none_has_begun(engine: Engine, how: str) -> None:
    gate = Gate(engine)
    engine.submit([9] * 3, GREEDY, lambda delta: None)
    assert gate.reached.wait(PATIENCE)
    deltas: queue.SimpleQueue[RequestDelta] = queue.SimpleQueue()
    params = SamplingParams(n=3, seed=1, max_tokens=None)
    name = engine.submit([3, 4], params, deltas.put, timeout=0 if how == "deadline" else None)
    if how == "cancel":
        engine.cancel(name)
    gate.open()
    end = collect(deltas)[1]
    reason = "abort" if how == "cancel" else "deadline"
    assert [(part.index, part.finish_reason) for part in end.completions] == [(i, reason) for i in range(3)]
    at_rest(engine)


def test_an_old_deadline_does_not_end_a_new_request_of_that_name(engine: Engine, dense: LLaMAForCausalLM) -> None:
    deltas: queue.SimpleQueue[RequestDelta] = queue.SimpleQueue()
    engine.submit([9], LONG, lambda delta: None)  # while anything runs, old deadlines may still be there
    engine.submit([3, 4], GREEDY, deltas.put, request_id="mine", timeout=3600)
    collect(deltas)
    scheduler = engine.parts.scheduler
    ((deadline, *_),) = scheduler._deadlines
    gate = Gate(engine)
    engine.submit([6, 7], GREEDY, deltas.put, request_id="mine")
    assert gate.reached.wait(PATIENCE)
    with engine._lock:
        scheduler._expire(deadline + 1)
    gate.open()
    tokens, end = collect(deltas)
    assert tokens == greedy(dense, [6, 7])
    assert end.completions[0].finish_reason == "length"


def test_deadlines_of_ended_requests_are_forgotten(engine: Engine) -> None:
    deltas: queue.SimpleQueue[RequestDelta] = queue.SimpleQueue()
    params = SamplingParams(temperature=0, max_tokens=1)
    engine.submit([4], LONG, lambda delta: None)  # long enough that there is always one that is alive
    for _ in range(200):
        engine.submit([3], params, deltas.put, timeout=3600)
        collect(deltas)
    assert len(engine.parts.scheduler._deadlines) < 100
    at_rest(engine)
    assert not engine.parts.scheduler._deadlines


def test_a_long_wait_does_not_keep_requests_that_were_cancelled(folder: Path) -> None:
    engine = Engine.from_pretrained(str(folder), engine_config=EngineConfig(max_num_seqs=1))
    gate = Gate(engine)
    engine.submit([3], LONG, lambda delta: None)
    assert gate.reached.wait(PATIENCE)
    engine.submit([3], LONG, lambda delta: None, priority=-1)  # first in the queue, so the others never come up
    for _ in range(500):
        engine.cancel(engine.submit([4, 5], LONG, lambda delta: None))
    waiting = engine.parts.scheduler._waiting
    assert len(waiting) == 1
    assert len(waiting._by_urgency) + len(waiting._by_time) < 200
    gate.open()
    engine.shutdown()


def test_closing_an_ended_stream_spares_a_new_request_of_that_name(engine: Engine, dense: LLaMAForCausalLM) -> None:
    async def run() -> list[int]:
        it = AsyncEngine(engine)
        old = it.generate([3, 4], GREEDY, request_id="mine")
        async for output in old:
            if output.finished:
                break
        new = it.generate([6, 7], GREEDY, request_id="mine")
        first = await anext(new)
        await old.aclose()
        outputs = [first] + [output async for output in new]
        return outputs[-1].outputs[0].token_ids

    assert asyncio.run(run()) == greedy(dense, [6, 7])


def test_shutdown_in_the_middle_of_a_step(folder: Path) -> None:
    engine = Engine.from_pretrained(str(folder))
    gate = Gate(engine)
    deltas: queue.SimpleQueue[RequestDelta] = queue.SimpleQueue()
    for prompt in ([3, 4], [5]):
        engine.submit(prompt, LONG, deltas.put)
    engine.submit([6], GREEDY, deltas.put, beams=BeamParams(width=3))
    assert gate.reached.wait(PATIENCE)
    threads = [threading.Thread(target=engine.shutdown) for _ in range(3)]
    for thread in threads:
        thread.start()
    gate.open()
    ends = [collect(deltas)[1] for _ in range(3)]
    for thread in threads:
        thread.join(PATIENCE)
        assert not thread.is_alive()
    reasons = [end.completions[0].finish_reason if end.completions else end.error for end in ends]
    assert sorted(map(str, reasons)) == ["abort", "abort", "the beam search ended before it was done: abort"]
    with pytest.raises(RuntimeError, match="it was shut down"):
        engine.submit([3], GREEDY, deltas.put)
    engine.cancel("request-0")  # of one that has ended: nothing
    assert engine.parts.scheduler.blocks.utilization.in_use == 0


def test_a_listener_may_shut_down_cancel_and_submit(folder: Path) -> None:
    engine = Engine.from_pretrained(str(folder))
    done = threading.Event()
    order: list[str] = []

    def first(delta: RequestDelta) -> None:
        if not order:
            order.append("first")
            engine.cancel(delta.request_id)
            engine.submit([5], GREEDY, second)

    def second(delta: RequestDelta) -> None:
        if delta.finished:
            order.append("second")
            engine.shutdown()
            done.set()

    engine.submit([3], LONG, first)
    assert done.wait(PATIENCE)
    engine.shutdown()
    assert order == ["first", "second"]
    assert not engine._thread.is_alive()


def test_a_step_that_exits_fails_all_and_hangs_nobody(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def leave(token_ids: Any, logits: Any) -> Any:
        raise SystemExit(3)

    def broken(delta: RequestDelta) -> None:
        raise ValueError("not now")

    deltas: queue.SimpleQueue[RequestDelta] = queue.SimpleQueue()
    gate = Gate(engine)
    engine.submit([5], GREEDY, broken)  # one whose listener raises does not keep the news from the others
    engine.submit([3], SamplingParams(logits_processors=[leave]), deltas.put)
    engine.submit([4], LONG, deltas.put)
    gate.open()
    errors = [collect(deltas)[1].error for _ in range(2)]
    assert errors == ["SystemExit: 3", "SystemExit: 3"]
    engine._thread.join(PATIENCE)
    assert not engine._thread.is_alive()
    with pytest.raises(RuntimeError, match="the engine has stopped: SystemExit: 3"):
        engine.submit([3], GREEDY, deltas.put)


def test_an_idle_engine_keeps_nothing_of_what_has_ended(engine: Engine) -> None:
    class Processor:
        def __call__(self, token_ids: Any, logits: Any) -> Any:
            return logits

    processor = Processor()
    kept = weakref.ref(processor)
    deltas: queue.SimpleQueue[RequestDelta] = queue.SimpleQueue()
    engine.submit([3], SamplingParams(n=2, seed=1, logits_processors=[processor]), deltas.put)
    collect(deltas)
    at_rest(engine)
    del processor
    sampler = engine.parts.executor._runner.sampler  # type: ignore[attr-defined]
    for _ in range(PATIENCE * 100):  # the last plan, which only says what has ended, may still be on its way
        if not sampler._states:
            break
        threading.Event().wait(0.01)
    gc.collect()
    assert not sampler._states
    assert kept() is None


def test_memory_is_planned_before_any_weight_is_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = []

    def load(loader: ModelLoader[LLaMAForCausalLM], progress: Any) -> LLaMAForCausalLM:
        read.append(loader)
        return original(loader, progress)

    original = ModelLoader.load
    monkeypatch.setattr(ModelLoader, "load", load)
    with LLM(folder, max_model_len=100) as llm:
        plan, per_block = (
            llm.engine.parts.memory,
            llm.engine.parts.memory.cache // llm.engine.parts.memory.num_blocks[0],
        )
    assert len(read) == 1
    tight = plan.weights + plan.workspace + 6 * per_block
    for free, words in (
        (plan.weights, "the model does not fit: weights of .* and a workspace of"),
        (tight, "the largest context that fits is 48 tokens"),
    ):
        monkeypatch.setattr("puna.engine.placement.available_memory", lambda device, free=free: free)
        with pytest.raises(ValueError, match=words):
            LLM(folder, max_model_len=100)
        assert len(read) == 1
    with LLM(folder, max_model_len=48) as llm:  # the error's advice
        assert llm.generate("a", SamplingParams(temperature=0, max_tokens=None))[0].finished
    with pytest.raises(ValueError, match=r"kv_cache_memory is .*, but beside weights of"):
        LLM(folder, max_model_len=48, kv_cache_memory=100 * per_block)


def test_requests_that_are_refused_cost_nothing(folder: Path) -> None:
    with LLM(folder) as llm:
        for params, words in (
            ({"n": 10**12}, "max_num_seqs is 64"),
            ({"seed": 1.5}, "seed is 1.5: it must be a whole number"),
            ({"top_k": 2.5}, "top_k is 2.5: it must be a whole number"),
        ):
            with pytest.raises(ValueError, match=words):
                llm.generate("a", SamplingParams(**params))
        with pytest.raises(ValueError, match="a prompt is 3"):
            llm.generate([3, 4, 5], GREEDY)  # type: ignore[list-item]
        with pytest.raises(ValueError, match="not a list of token ids"):
            llm.generate({"prompt_token_ids": [3.5]}, GREEDY)  # type: ignore[list-item]
        with pytest.raises(ValueError, match="timeout is nan"):
            llm.engine.submit([3], GREEDY, print, timeout=float("nan"))
        with pytest.raises(ValueError, match="the prompt is empty"):
            llm.beam_search([{"prompt_token_ids": [3]}, {"prompt_token_ids": []}], 2, 200)
        at_rest(llm.engine)
        assert llm.generate({"prompt_token_ids": torch.tensor([3, 4])}, GREEDY)[0].finished  # type: ignore[dict-item]


def test_a_beam_search_that_is_cut_short_is_an_error(folder: Path) -> None:
    llm = LLM(folder)
    gate = Gate(llm.engine)
    found: list[Callable[[], Any] | BaseException] = []

    def search() -> None:
        try:
            llm.beam_search({"prompt_token_ids": [3, 4]}, 3, 100, ignore_eos=True)
        except RuntimeError as error:
            found.append(error)

    thread = threading.Thread(target=search)
    thread.start()
    assert gate.reached.wait(PATIENCE)
    gate.open()
    llm.close()
    thread.join(PATIENCE)
    assert "the beam search ended before it was done: abort" in str(found[0])


def test_engines_come_and_go_without_threads_left(folder: Path) -> None:
    before = set(threading.enumerate())
    for _ in range(3):
        engine = Engine.from_pretrained(str(folder), engine_config=EngineConfig(max_num_seqs=2))
        deltas: queue.SimpleQueue[RequestDelta] = queue.SimpleQueue()
        engine.submit([3], GREEDY, deltas.put)
        collect(deltas)
        engine.shutdown()
    assert set(threading.enumerate()) <= before
