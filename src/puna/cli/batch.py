"""`puna generate --input FILE --output FILE`: many prompts through one engine, with progress, to be resumed at will."""

from __future__ import annotations

import queue
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from puna.cli.batch_input import BatchInput, Job, PromptFlags, params_as_json
from puna.cli.batch_output import BatchOutput
from puna.cli.options import EngineFlags, ModelFlags, SamplingFlags
from puna.cli.sampling import request_settings
from puna.cli.session import OpenedModel, add_delta, result_fields, usage
from puna.engine.engine import Engine
from puna.engine.outputs import CompletionOutput, RequestDelta, RequestOutput
from puna.runtime.machine import peak_memory_bytes
from puna.scheduling.sampling_params import GuidedDecoding

_FORMAT: Final = 1  # of the two files; a change of what is in them needs another number


@dataclass(frozen=True, kw_only=True)
class BatchOptions:
    """The flags of `puna generate` that are neither of the model nor of the sampling."""

    input_file: Path
    output_file: Path
    max_num_seqs: int
    n: int
    apply_chat_template: bool
    system: str | None
    parse_special: bool
    echo: bool
    stats: bool
    default_max_new_tokens: int


@dataclass(frozen=True, kw_only=True)
class _Extent:
    """What a first look at all lines found: how many there are, and the most that one needs."""

    num_jobs: int
    max_model_len: int
    num_sequences: int
    guided: tuple[tuple[int, GuidedDecoding], ...]  # each constraint once, with the index of its first job


def run_batch(
    model_flags: ModelFlags, engine_flags: EngineFlags, sampling: SamplingFlags, options: BatchOptions
) -> None:
    """Checks every line, then generates for those that have no result yet.

    Raises ValueError for a line that can't be run, before any is, and for an output of another run; RuntimeError, at
    the end, where requests failed.
    """
    opened = OpenedModel.open(model_flags, engine_flags)
    max_tokens = sampling.max_new_tokens or options.default_max_new_tokens
    base = request_settings(sampling, opened.generation_config, max_tokens, options.n)
    prompts = PromptFlags(
        apply_chat_template=options.apply_chat_template, system=options.system, parse_special=options.parse_special
    )
    source = BatchInput(options.input_file, opened, base, prompts)
    extent = _look_at(source)
    belongs_to = {
        "format": _FORMAT,
        "input": source.fingerprint(),
        "model": model_flags.model,
        "dtype": opened.config.dtype,
        "max_model_len": opened.context_length,
        "prompts": vars(prompts) | {"echo": options.echo},
        "sampling": params_as_json(base.params),
        "beams": None
        if base.beams is None
        else [base.beams.width, base.beams.length_penalty, base.beams.early_stopping],
    }
    output = BatchOutput(options.output_file, belongs_to)
    try:
        before = len(output.done)
        if before == extent.num_jobs:
            _note(f"all {before} prompts have their results in {options.output_file}")
            return
        with opened.engine(extent.max_model_len, max(options.max_num_seqs, extent.num_sequences)) as (engine, _):
            for index, guided in extent.guided:
                try:
                    engine.parts.grammars.compile(guided)
                except ValueError as error:
                    raise ValueError(f"prompt {index}: {error}") from error
            left = (job for job in source.jobs() if job.index not in output.done)
            run = _Run(engine, output, opened.eos_token_ids, options, extent.num_jobs)
            try:
                run.work(left)
            except KeyboardInterrupt:
                _note(f"\n{len(output.done)} of {extent.num_jobs} prompts are done; the same command does the rest")
                raise
    finally:
        output.close()
    if options.stats or sys.stderr.isatty():
        _note(run.summary(before))
    if run.failed:
        first, reason = run.failed[0]
        raise RuntimeError(
            f"{len(run.failed)} prompts failed and have no result, the first of them prompt {first}: {reason}"
        )


def _look_at(source: BatchInput) -> _Extent:
    count = longest = sequences = 0
    guided: dict[str, tuple[int, GuidedDecoding]] = {}
    for job in source.jobs():
        params = job.settings.params
        count += 1
        longest = max(longest, len(job.prompt_token_ids) + (params.max_tokens or 0))
        sequences = max(sequences, job.settings.num_sequences)
        if params.guided is not None:
            guided.setdefault(repr(params.guided), (job.index, params.guided))
    if count == 0:
        raise ValueError("--input has no prompts in it")
    return _Extent(num_jobs=count, max_model_len=longest, num_sequences=sequences, guided=tuple(guided.values()))


class _Run:
    """Keeps a bounded number of requests in the engine, and writes each result when it is done."""

    def __init__(
        self, engine: Engine, output: BatchOutput, ends: frozenset[int], options: BatchOptions, num_jobs: int
    ) -> None:
        self.failed: list[tuple[int, str]] = []
        self._engine, self._output, self._ends = engine, output, ends
        self._echo = options.echo
        # Twice as many as run at once, so that one is always waiting where another ends.
        self._window = 2 * options.max_num_seqs
        self._num_jobs = num_jobs
        self._deltas: queue.SimpleQueue[RequestDelta] = queue.SimpleQueue()
        self._running: dict[str, tuple[Job, RequestOutput]] = {}
        self._num_tokens = 0
        self._start = time.perf_counter()

    def work(self, jobs: Iterator[Job]) -> None:
        self._start = time.perf_counter()
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[speed]}"),
            TimeRemainingColumn(),
        )
        with Progress(
            *columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()
        ) as progress:
            task = progress.add_task("generating", total=self._num_jobs, completed=len(self._output.done), speed="")
            while True:
                while len(self._running) < self._window and (job := next(jobs, None)) is not None:
                    self._submit(job)
                if not self._running:
                    return
                self._output.append(self._results(self._waited_for()))
                self._show(progress, task)

    def summary(self, before: int) -> str:
        seconds = time.perf_counter() - self._start
        return (
            f"{len(self._output.done) - before} prompts, {self._num_tokens} new tokens in {seconds:.1f} s, "
            f"{self._num_tokens / seconds:.1f} tokens/s, peak memory {peak_memory_bytes() / 2**20:.0f} MiB"
        )

    def _submit(self, job: Job) -> None:
        settings, output = job.settings, RequestOutput("", job.text, job.prompt_token_ids, [])
        output.outputs = [CompletionOutput(index) for index in range(settings.params.n)]
        output.request_id = self._engine.submit(
            job.prompt_token_ids, settings.params, self._deltas.put, beams=settings.beams
        )
        self._running[output.request_id] = (job, output)

    def _waited_for(self) -> list[RequestDelta]:
        """At least one delta, and all that are there."""
        found = [self._deltas.get()]
        while not self._deltas.empty():
            found.append(self._deltas.get())
        return found

    def _results(self, deltas: list[RequestDelta]) -> list[dict[str, Any]]:
        """The results of the requests that these deltas end."""
        finished: list[dict[str, Any]] = []
        for delta in deltas:
            job, output = self._running[delta.request_id]
            if delta.error is not None:  # no result: the next run tries again
                self.failed.append((job.index, delta.error))
                del self._running[delta.request_id]
                continue
            add_delta(output, delta, self._ends)
            self._num_tokens += sum(len(part.token_ids) for part in delta.completions)
            if delta.finished:
                self._num_tokens += len(output.outputs[0].token_ids) if delta.beams else 0
                del self._running[delta.request_id]
                finished.append(self._result(job, output))
        return finished

    def _result(self, job: Job, output: RequestOutput) -> dict[str, Any]:
        echoed = ""
        if self._echo or job.settings.params.echo:
            echoed = self._engine.parts.tokenizer.decode(job.prompt_token_ids) if job.text is None else job.text
        identity = {} if job.id is None else {"id": job.id}
        return {"index": job.index, **identity, **result_fields(output, echoed), "usage": usage(output)}

    def _show(self, progress: Progress, task: TaskID) -> None:
        speed = self._num_tokens / max(1e-9, time.perf_counter() - self._start)
        progress.update(task, completed=len(self._output.done), speed=f"{speed:.0f} tokens/s")


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
