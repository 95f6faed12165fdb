"""Executor: carries plans to wherever they run, and brings back results, one step after another."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

from puna.runtime.model_runner import ModelRunner
from puna.scheduling.step_plan import StepPlan, StepResult


class Executor(Protocol):
    """Runs plans in the order in which they are submitted."""

    def submit(self, plan: StepPlan) -> Future[StepResult]:
        """Starts a step, or queues it behind the one that runs."""
        ...

    def shutdown(self) -> None:
        """Lets the running step end, and frees what it took to run."""
        ...


class LocalExecutor:
    """Runs the steps in a thread of this process; torch lets go of the interpreter while its kernels run."""

    def __init__(self, runner: ModelRunner) -> None:
        self._runner = runner
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="puna-step")

    def submit(self, plan: StepPlan) -> Future[StepResult]:
        return self._thread.submit(self._runner.execute, plan)

    def shutdown(self) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)
