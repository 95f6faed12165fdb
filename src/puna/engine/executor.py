"""Executor: carries plans to wherever they run, and brings back results, one step after another."""

from __future__ import annotations

import atexit
import logging
import queue
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import Final, Protocol

from puna.runtime.async_runner import AsyncModelRunner
from puna.runtime.model_runner import ModelRunner
from puna.runtime.tracing import Tracer
from puna.scheduling.step_plan import StepPlan, StepResult

_log = logging.getLogger(__name__)
_TICKS: Final = 10


class StepTimeout(RuntimeError):
    """A step does not end."""


def result_within(future: Future[StepResult], seconds: float | None) -> StepResult:
    """The step's result, or its error; a StepTimeout where it has neither after so many seconds.

    They are waited for in pieces: a process that is stopped and goes on later loses one of these, and not its engine.
    """
    if seconds is None:
        return future.result()
    for _ in range(_TICKS):
        try:
            return future.result(seconds / _TICKS)
        except FutureTimeoutError:
            if future.done():  # just now, or the error is the step's own
                return future.result()
    raise StepTimeout(f"a step has not ended after {seconds:g} seconds: it hangs, or step_timeout is too short for it")


class ExecutorEnded(RuntimeError):
    """A step can't run: what would run it has been shut down, or has died."""


class Executor(Protocol):
    """Runs plans in the order in which they are submitted."""

    def submit(self, plan: StepPlan) -> Future[StepResult]:
        """Starts a step, or queues it behind the one that runs. Raises ExecutorEnded."""
        ...

    def shutdown(self, wait: bool = True) -> None:
        """Lets the running step end, and frees what it took to run; without `wait` it leaves alone what hangs."""
        ...


class LocalExecutor:
    """Runs the steps in a thread of this process; torch lets go of the interpreter while its kernels run.

    However that thread ends, every step gets a result or an error, and the next one is refused: nobody waits forever.
    concurrent.futures' own pool would not notice that its thread has died.
    """

    def __init__(self, runner: ModelRunner, tracer: Tracer | None = None) -> None:
        self._runner = runner
        self._tracer = tracer
        self._num_steps = 0
        self._plans: queue.SimpleQueue[StepPlan | None] = queue.SimpleQueue()
        self._lock = threading.Lock()  # guards what follows
        self._futures: deque[Future[StepResult]] = deque()  # of plans that are queued, and of the one that runs
        self._has_ended = False
        self._thread = threading.Thread(target=self._run, name="puna-step", daemon=True)
        self._thread.start()
        self._threads = [self._thread]
        # A program may end without a word to its engine; its last step must not run while the interpreter goes away.
        atexit.register(self.shutdown)

    def submit(self, plan: StepPlan) -> Future[StepResult]:
        future: Future[StepResult] = Future()
        with self._lock:
            if self._has_ended:
                raise ExecutorEnded("the thread that runs the steps has ended")
            self._futures.append(future)
            self._plans.put(plan)
        return future

    def shutdown(self, wait: bool = True) -> None:
        atexit.unregister(self.shutdown)
        self._end("the executor was shut down")
        self._plans.put(None)
        for thread in self._threads:
            if wait:
                thread.join()
            elif (frame := sys._current_frames().get(thread.ident or 0)) is not None:
                _log.error("what the step hangs in:\n%s", "".join(traceback.format_stack(frame)))

    def _run(self) -> None:
        try:
            while (plan := self._plans.get()) is not None and not self._has_ended:
                self._step(plan)
        finally:
            self._end("the thread that runs the steps has died")

    def _step(self, plan: StepPlan) -> None:
        self._settle(lambda: self._execute(plan))

    def _settle(self, result_of: Callable[[], StepResult]) -> None:
        """Gives the oldest step its result, or the error that comes instead."""
        try:
            result = result_of()
        except BaseException as error:  # also what was meant to end this thread: it is the engine that ends
            self._take_future().set_exception(error)
        else:
            self._take_future().set_result(result)

    def _execute(self, plan: StepPlan) -> StepResult:
        start = time.monotonic()
        result = self._runner.execute(plan)
        self._trace("step", plan, start)
        return result

    def _trace(self, name: str, plan: StepPlan, start: float) -> None:
        if self._tracer is not None:
            self._num_steps += 1
            self._tracer.span("steps", name, start, time.monotonic(), _describe(plan) | {"step": self._num_steps})

    def _take_future(self) -> Future[StepResult]:
        with self._lock:
            return self._futures.popleft() if self._futures else Future()  # nobody waits for what was queued at the end

    def _end(self, reason: str) -> None:
        with self._lock:
            self._has_ended = True
            left = list(self._futures)
            self._futures.clear()
        for future in left:
            future.set_exception(ExecutorEnded(reason))


class AsyncExecutor(LocalExecutor):
    """Launches steps in one thread and reads their results in another.

    So a step is launched as soon as it is planned, behind the one that the device is at, and what that one gave is
    read while the device goes on.
    """

    def __init__(self, runner: AsyncModelRunner, tracer: Tracer | None = None) -> None:
        self._launcher = runner
        self._launched: queue.SimpleQueue[Callable[[], StepResult] | None] = queue.SimpleQueue()
        super().__init__(runner, tracer)
        self._reader = threading.Thread(target=self._read, name="puna-results", daemon=True)
        self._reader.start()
        self._threads.append(self._reader)

    def _run(self) -> None:
        try:
            super()._run()
        finally:
            self._launched.put(None)

    def _step(self, plan: StepPlan) -> None:
        start = time.monotonic()
        try:
            result_of = self._launcher.launch(plan).result
        except BaseException as error:  # it is told in its turn, behind the steps before
            result_of = _raising(error)
        else:
            self._trace("launch", plan, start)
        self._launched.put(result_of)

    def _read(self) -> None:
        while (result_of := self._launched.get()) is not None:
            self._settle(result_of)


def _raising(error: BaseException) -> Callable[[], StepResult]:
    def result() -> StepResult:
        raise error

    return result


def _describe(plan: StepPlan) -> dict[str, int]:
    """Sizes of a step. A row is of the prefill where it has tokens of a prompt."""
    prefill = [row for row in plan.rows if row.first_position < row.prompt_length]
    prefill_tokens = sum(len(row.token_ids) for row in prefill)
    return {
        "tokens": plan.num_tokens,
        "sequences": len(plan.rows),
        "prefill_tokens": prefill_tokens,
        "prefill_sequences": len(prefill),
        "decode_tokens": plan.num_tokens - prefill_tokens,
        "decode_sequences": len(plan.rows) - len(prefill),
    }
