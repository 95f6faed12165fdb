"""LocalExecutor: every step has an end, also where the thread that runs them has none."""

from __future__ import annotations

import ctypes
import subprocess
import sys
import threading
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from puna.engine.executor import ExecutorEnded, LocalExecutor, StepTimeout, result_within
from puna.scheduling.step_plan import StepPlan, StepResult

PLAN = StepPlan(())
RESULT = StepResult((), {}, {}, {})
PATIENCE = 30


class Runner:
    """Stands for a ModelRunner: waits where it is told to, raises what it is told to."""

    def __init__(self) -> None:
        self.runs = threading.Event()
        self.go_on = threading.Event()
        self.go_on.set()
        self.error: BaseException | None = None

    def execute(self, plan: StepPlan) -> StepResult:
        self.runs.set()
        assert self.go_on.wait(PATIENCE)
        if self.error is not None:
            raise self.error
        return RESULT


def make() -> tuple[Any, LocalExecutor]:
    runner: Any = Runner()
    return runner, LocalExecutor(runner)


def outcome(future: Future[StepResult]) -> object:
    return future.exception(PATIENCE) or future.result(PATIENCE)


@pytest.mark.parametrize("error", [ValueError("this one"), SystemExit(3)])
def test_an_error_belongs_to_its_step(error: BaseException) -> None:
    runner, executor = make()
    runner.error = error
    assert outcome(executor.submit(PLAN)) is runner.error
    runner.error = None
    assert outcome(executor.submit(PLAN)) is RESULT
    executor.shutdown()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_thread_that_is_killed_while_it_waits() -> None:
    """The exception reaches it between two steps; concurrent.futures' pool would let the later ones wait forever."""
    _, executor = make()
    assert outcome(executor.submit(PLAN)) is RESULT
    thread = executor._thread
    assert thread.ident is not None
    assert ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(SystemExit)) == 1
    assert isinstance(outcome(executor.submit(PLAN)), ExecutorEnded)
    thread.join(PATIENCE)
    with pytest.raises(ExecutorEnded):
        executor.submit(PLAN)
    executor.shutdown()


def test_shutdown_lets_the_running_step_end_and_fails_the_others() -> None:
    runner, executor = make()
    runner.go_on.clear()
    futures = [executor.submit(PLAN) for _ in range(2)]
    assert runner.runs.wait(PATIENCE)
    ending = threading.Thread(target=executor.shutdown)
    ending.start()
    assert isinstance(outcome(futures[1]), ExecutorEnded)
    assert ending.is_alive()
    runner.go_on.set()
    ending.join(PATIENCE)
    assert not ending.is_alive()
    with pytest.raises(ExecutorEnded):
        executor.submit(PLAN)


def test_a_step_that_does_not_end_is_left_alone() -> None:
    runner, executor = make()
    assert result_within(executor.submit(PLAN), PATIENCE) is RESULT
    runner.go_on.clear()
    hanging = executor.submit(PLAN)
    with pytest.raises(StepTimeout, match=r"0\.05 seconds"):
        result_within(hanging, 0.05)
    executor.shutdown(wait=False)
    assert executor._thread.is_alive()
    with pytest.raises(ExecutorEnded):
        executor.submit(PLAN)
    runner.go_on.set()
    executor._thread.join(PATIENCE)


def test_a_steps_own_timeout_is_its_own() -> None:
    runner, executor = make()
    runner.error = TimeoutError("of the step")
    with pytest.raises(TimeoutError, match="of the step"):
        result_within(executor.submit(PLAN), PATIENCE)
    executor.shutdown()


def test_a_program_with_a_step_that_hangs_ends(folder: Path) -> None:
    """The request fails, and neither closing the engine nor the interpreter's end waits for the step."""
    code = """
import queue, sys, time
from puna.config import EngineConfig
from puna.engine.engine import Engine
from puna.runtime.model_runner import ModelRunner
from puna.scheduling.sampling_params import SamplingParams
ModelRunner.execute = lambda self, plan: time.sleep(3600)
engine, deltas = Engine.from_pretrained(sys.argv[1], engine_config=EngineConfig(step_timeout=0.5)), queue.Queue()
engine.submit([2, 3], SamplingParams(), deltas.put)
last = deltas.get(timeout=30)
assert last.finished and last.error.startswith("StepTimeout: "), last
assert engine.failure == last.error
engine.shutdown()
sys.exit(7)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)], check=False, timeout=60, capture_output=True, text=True
    )
    assert done.returncode == 7, done.stderr


def test_a_program_that_closes_nothing_ends_with_its_own_code(folder: Path) -> None:
    """In the middle of a step: the interpreter goes away only after it."""
    code = """
import sys, threading
from puna.engine.engine import Engine
from puna.scheduling.sampling_params import SamplingParams
engine, began = Engine.from_pretrained(sys.argv[1]), threading.Event()
engine.submit([2, 3], SamplingParams(max_tokens=250, ignore_eos=True), lambda delta: began.set())
assert began.wait(30)
sys.exit(7)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)], check=False, timeout=60, capture_output=True, text=True
    )
    assert done.returncode == 7, done.stderr
    assert "Fatal" not in done.stderr
