"""Engine: takes requests from any thread, runs them together step by step, and calls back with what comes."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import operator
import random
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Final

import torch

from puna.checkpoints import Checkpoint, open_checkpoint
from puna.config import EngineConfig, GenerationConfig, LLaMAConfig
from puna.distributed import NullCommunicator
from puna.engine.executor import Executor, ExecutorEnded, StepTimeout, result_within
from puna.engine.output_processor import OutputProcessor
from puna.engine.outputs import RequestDelta
from puna.engine.placement import Placement
from puna.engine.recommended_pooling import recommended_pooling
from puna.engine.request_trace import RequestTrace
from puna.engine.token_bytes import TokenBytes
from puna.engine.tokenizer import Tokenizer
from puna.engine.weights import in_words, op_choices, resolved_cache_dtype, weights_loader
from puna.models.loading import resolved_config
from puna.ops import Choice, cpu
from puna.planning.memory_plan import Capacity, MemoryPlan
from puna.runtime.cuda import accelerator_of, usable_device
from puna.runtime.guided import GrammarCompiler
from puna.runtime.machine import usable_cpus
from puna.runtime.sampler import Sampler, validate
from puna.runtime.tracing import Tracer
from puna.scheduling.beams import BeamParams
from puna.scheduling.block_manager import BlockManager
from puna.scheduling.events import Event
from puna.scheduling.pooling_params import Pooling, PoolingParams
from puna.scheduling.sampling_params import SamplingParams
from puna.scheduling.scheduler import Scheduler, SchedulerLimits
from puna.scheduling.sequence import Request
from puna.scheduling.step_plan import StepPlan, StepResult, Unsatisfiable

Listener = Callable[[RequestDelta], None]
_STEP_SIZES: Final = 16  # up to 16,384 tokens, and more
_NOTHING = StepResult((), {}, {}, {})
_log = logging.getLogger(__name__)


class PromptTooLongError(ValueError):
    """The context does not hold the prompt, and a token more where one is to be generated."""


@dataclass(frozen=True, kw_only=True)
class EngineParts:
    """What an engine is made of. `Engine.from_pretrained` makes them for a checkpoint; tests bring their own."""

    config: LLaMAConfig
    generation_config: GenerationConfig
    engine_config: EngineConfig
    tokenizer: Tokenizer
    scheduler: Scheduler
    executor: Executor
    grammars: GrammarCompiler
    memory: MemoryPlan
    pooling: Pooling | None = "last"  # what the checkpoint recommends; None: something that is not known here
    ops: tuple[Choice, ...] = ()  # what serves each op of the model; empty where nobody looked


@dataclass(frozen=True, slots=True)
class EngineStatistics:
    """How an engine is doing. `num_running` counts sequences; `cache_usage` is the part of the blocks in use, 1 is all.

    `num_blocks` are those of the first of the model's windows. Since the start: preemptions, the prompts' tokens that
    were looked for in the prefix cache, and found there; `num_steps_by_size`, the steps of at most 2 ** index tokens
    that the entry before does not count (the last one has all that are larger), and the tokens of all steps.
    """

    num_running: int
    num_waiting: int
    cache_usage: float
    num_preemptions: int
    num_prefix_query_tokens: int
    num_prefix_hit_tokens: int
    num_blocks: int
    num_steps_by_size: tuple[int, ...]
    num_step_tokens: int


class Engine:
    """Many requests at once over one model. Every method may be called from any thread.

    One thread plans steps and reads results, another one (the executor's) runs them; a step is planned while the one
    before it runs. Listeners are called in the planning thread: they should hand over and return. One that raises is
    logged and not called again, and its request is cancelled; the others go on. When a step fails, every request fails
    with its error, and the engine takes no more.
    """

    def __init__(self, parts: EngineParts, tracer: Tracer | None = None) -> None:
        self.parts = parts
        self._tracer = tracer
        self.max_model_len = parts.engine_config.max_model_len or parts.config.context_length
        self._seeds = random.Random(parts.engine_config.seed)
        self._request_ids = itertools.count()
        # Guards the scheduler and what follows. It is never held while a step runs or a listener is called.
        self._lock = threading.Condition()
        # By the request itself (its id()), not by its name: a name may be taken again once its request has ended, while
        # that one's last events still wait to be delivered.
        self._processors: dict[int, tuple[OutputProcessor, Listener]] = {}
        self._steps_by_size = [0] * _STEP_SIZES
        self._step_tokens = 0
        self._stopping = False
        self._failure: str | None = None
        self._thread = threading.Thread(target=self._run, name="puna-engine", daemon=True)
        self._thread.start()

    @classmethod
    def from_pretrained(
        cls,
        model: str | Checkpoint,
        dtype: str | torch.dtype | None = None,
        device: torch.device | str = "cpu",
        engine_config: EngineConfig | None = None,
        *,
        quantization: str | None = None,
        tokenizer: Tokenizer | None = None,
        progress: Callable[[int, int], None] | None = None,
        tracer: Tracer | None = None,
    ) -> Engine:
        """Loads a checkpoint (see `puna.load_model`) and starts an engine on it.

        `quantization` None means weights as the checkpoint has them.

        `tokenizer` is the checkpoint's own, of a caller that has read it already: large ones take a while. One without
        files, such as `random_checkpoint`'s, has none: there it must be given. `progress` is called with the bytes of
        weights that are there, and those of all. `tracer` gets the times of steps and requests; the engine closes it.
        Raises ValueError, before any weight is read, where model and cache do not fit into memory.
        """
        engine_config = EngineConfig() if engine_config is None else engine_config
        checkpoint = open_checkpoint(model)
        config = resolved_config(checkpoint, dtype)
        tokenizer = Tokenizer.from_pretrained(checkpoint.folder) if tokenizer is None else tokenizer
        pooling = recommended_pooling(checkpoint.folder)
        max_model_len = engine_config.max_model_len or config.context_length
        if max_model_len > config.context_length:
            raise ValueError(
                f"max_model_len is {max_model_len}, but the model's context is {config.context_length}: ask for at "
                "most that"
            )
        device = usable_device(device)
        accelerator = accelerator_of(device)
        if engine_config.overlap_kernels and (accelerator is None or not accelerator.overlaps_kernels):
            raise ValueError(
                f"overlap_kernels is set, but the device is {device}: it takes an NVIDIA GPU of compute capability 9.0 "
                "or later, such as an H100; leave it out elsewhere"
            )
        comm = NullCommunicator(device)
        cache_dtype = resolved_cache_dtype(checkpoint, config, comm, engine_config)
        engine_config = dataclasses.replace(engine_config, kv_cache_dtype=cache_dtype)
        loader = weights_loader(checkpoint, config, comm, quantization, engine_config)
        capacity = Capacity(
            max_model_len=max_model_len,
            max_num_seqs=engine_config.max_num_seqs,
            max_num_batched_tokens=max(engine_config.max_num_batched_tokens, engine_config.max_num_seqs),
            block_size=engine_config.block_size,
            kv_cache_dtype=engine_config.kv_cache_dtype,
        )
        placement = Placement(
            config=loader.config, comm=comm, capacity=capacity, engine_config=engine_config, accelerator=accelerator
        )
        memory = placement.plan(loader.weight_bytes)
        cpu.set_threads(engine_config.threads or min(usable_cpus(), torch.get_num_threads()))
        ops = op_choices(loader, comm, engine_config, placement.reports_prompts)
        _log.info("ops on %s: %s", device, in_words(ops))
        network = loader.load(progress)
        limits = SchedulerLimits(
            max_num_seqs=capacity.max_num_seqs,
            max_num_batched_tokens=capacity.max_num_batched_tokens,
            max_waiting=engine_config.max_waiting,
            max_skips=engine_config.max_skips,
            max_scored_tokens=capacity.max_scored_tokens,
        )
        eos = _eos_token_ids(checkpoint.generation_config, tokenizer)
        grammars = GrammarCompiler(TokenBytes(tokenizer), eos, config.vocab_size)
        executor, memory = placement.executor(
            network,
            memory,
            Sampler(config.vocab_size, comm.device, grammars),
            loader.config.quant != "none" and not engine_config.enforce_eager,
            tracer,
        )
        blocks = BlockManager(
            memory.num_blocks, capacity.block_size, config.windows, engine_config.enable_prefix_caching
        )
        return cls(
            EngineParts(
                config=loader.config,
                generation_config=checkpoint.generation_config,
                engine_config=engine_config,
                tokenizer=tokenizer,
                scheduler=Scheduler(limits, blocks),
                executor=executor,
                grammars=grammars,
                memory=memory,
                pooling=pooling,
                ops=ops,
            ),
            tracer,
        )

    def submit(
        self,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        listener: Listener,
        *,
        request_id: str | None = None,
        priority: int = 0,
        timeout: float | None = None,
        cache_salt: str = "",
        beams: BeamParams | None = None,
        pooling: PoolingParams | None = None,
    ) -> str:
        """Queues a request and returns its id. `listener` gets its deltas, the last one with `finished`.

        `timeout` is in seconds from now. With `pooling`, the last delta has the prompt's embedding, and nothing is
        generated: `params` must be the default ones. Raises ValueError for what can't be run, QueueFullError (a
        ValueError) where too many wait, and RuntimeError when the engine has stopped.
        """
        request = self._request(prompt_token_ids, params, request_id, priority, timeout, cache_salt, beams, pooling)
        processor = OutputProcessor(request, self.parts.tokenizer, self._finish_sequence)
        with self._lock:
            if self._failure is not None or self._stopping:
                raise RuntimeError(f"the engine has stopped: {self._failure or 'it was shut down'}")
            self.parts.scheduler.add(request)
            if self._tracer is not None:
                listener = RequestTrace(self._tracer, request, listener)
            self._processors[id(request)] = (processor, listener)
            self._lock.notify_all()
        return request.request_id

    def pooling_params(self, method: Pooling | None, normalize: bool = True) -> PoolingParams:
        """With the checkpoint's own method where none is given. Raises ValueError where that is not known here."""
        method = self.parts.pooling if method is None else method
        if method is None:
            raise ValueError(
                "this checkpoint wants a pooling that there is not here: give pooling 'last' or 'mean', though it was "
                "trained for neither"
            )
        return PoolingParams(method=method, normalize=normalize)

    @property
    def failure(self) -> str | None:
        """Why the engine takes no more requests; None while nothing has gone wrong."""
        return self._failure

    def statistics(self) -> EngineStatistics:
        scheduler = self.parts.scheduler
        with self._lock:
            blocks = scheduler.blocks.utilization
            return EngineStatistics(
                num_running=scheduler.num_running,
                num_waiting=scheduler.num_waiting,
                cache_usage=blocks.in_use / max(1, blocks.in_use + blocks.cached + blocks.empty),
                num_preemptions=scheduler.num_preemptions,
                num_prefix_query_tokens=scheduler.num_prefix_query_tokens,
                num_prefix_hit_tokens=scheduler.num_prefix_hit_tokens,
                num_blocks=self.parts.memory.num_blocks[0],
                num_steps_by_size=tuple(self._steps_by_size),
                num_step_tokens=self._step_tokens,
            )

    def cancel(self, request_id: str) -> None:
        """Ends a request; its listener gets a last delta. Without effect for one that is unknown or has ended."""
        with self._lock:
            self.parts.scheduler.cancel(request_id)
            self._lock.notify_all()

    def shutdown(self) -> None:
        """Cancels what runs, lets the listeners know, and ends the threads. May be called again."""
        with self._lock:
            self._stopping = True
            for processor, _ in self._processors.values():
                self.parts.scheduler.cancel(processor.request.request_id)
            self._lock.notify_all()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _request(
        self,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        request_id: str | None,
        priority: int,
        timeout: float | None,
        cache_salt: str,
        beams: BeamParams | None,
        pooling: PoolingParams | None,
    ) -> Request:
        vocab_size = self.parts.config.vocab_size
        try:
            prompt = tuple(map(operator.index, prompt_token_ids))
        except TypeError as error:
            raise ValueError(f"the prompt is not a list of token ids: {error}") from error
        if not prompt:
            raise ValueError("the prompt is empty: it needs at least one token")
        wrong = next((token for token in prompt if not 0 <= token < vocab_size), None)
        if wrong is not None:
            raise ValueError(
                f"the prompt has the token {wrong}: the model's vocabulary goes from 0 to {vocab_size - 1}"
            )
        room = self.max_model_len - len(prompt)
        if pooling is not None:
            if params != SamplingParams() or beams is not None:
                raise ValueError("an embedding takes no sampling params or beams: leave them out")
            if room < 0:
                raise PromptTooLongError(
                    f"the prompt has {len(prompt)} tokens, but max_model_len is {self.max_model_len}: shorten it"
                )
        elif room < 1:
            raise PromptTooLongError(
                f"the prompt has {len(prompt)} tokens, but max_model_len is {self.max_model_len}, which must hold "
                "at least one more: shorten the prompt"
            )
        if params.n > self.parts.engine_config.max_num_seqs:
            raise ValueError(
                f"n is {params.n}, but max_num_seqs is {self.parts.engine_config.max_num_seqs}: ask for fewer, or "
                "start with more"
            )
        if timeout is not None and not timeout >= 0:
            raise ValueError(f"timeout is {timeout}: it must be seconds from now, or None")
        validate(params, vocab_size)
        if params.guided is not None:
            self.parts.grammars.compile(params.guided)
        with self._lock:
            seed = self._seeds.getrandbits(62) if params.seed is None else params.seed
        return Request(
            request_id=f"request-{next(self._request_ids)}" if request_id is None else request_id,
            prompt_token_ids=prompt,
            params=params,
            max_tokens=0 if pooling is not None else min(params.max_tokens or room, room),
            seed=seed,
            eos_token_ids=_eos_token_ids(self.parts.generation_config, self.parts.tokenizer),
            priority=priority,
            deadline=None if timeout is None else time.monotonic() + timeout,
            cache_salt=self._rotary_salt(len(prompt)) + b"|" + cache_salt.encode(),
            beams=beams,
            bad_word_ids=self._bad_word_ids(params.bad_words),
            pooling=pooling,
        )

    def _rotary_salt(self, prompt_length: int) -> bytes:
        """Keeps prompts apart whose keys are rotated differently because of their length (see AttentionParams)."""
        scaling, trained = self.parts.config.rotary_scaling, self.parts.config.max_position_embeddings
        if scaling is not None and scaling.type == "dynamic" and prompt_length > trained:
            return b"%d" % prompt_length
        if scaling is not None and scaling.type == "longrope":
            return b"long" if prompt_length > (scaling.original_max_position_embeddings or trained) else b""
        return b""

    def _bad_word_ids(self, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        """Each word as it is encoded at the start of a text and after a space."""
        encode = self.parts.tokenizer.encode
        try:
            spelled = {tuple(encode(text, add_special_tokens=False)) for word in words for text in (word, f" {word}")}
        except ValueError as error:
            raise ValueError(f"bad_words can't be encoded: {error}") from error
        return tuple(sorted(ids for ids in spelled if ids))

    # ---- the planning thread

    def _run(self) -> None:
        in_flight: Future[StepResult] | None = None
        hangs = False
        try:
            while True:
                with self._lock:
                    while not (in_flight or self.parts.scheduler.has_work or self._stopping):
                        self._lock.wait()
                    if self._stopping and not self.parts.scheduler.has_work and in_flight is None:
                        break
                    start = time.monotonic()
                    plan = self.parts.scheduler.plan(start)
                self._trace("plan", start, 0 if plan is None else len(plan.rows))
                in_flight = self._advance(plan, in_flight)
        except BaseException as error:  # whatever ends this thread, nobody must wait for it forever
            hangs = isinstance(error, StepTimeout)
            self._fail(error)
        finally:
            self.parts.executor.shutdown(wait=not hangs)
            if self._tracer is not None:
                self._tracer.close()

    def _advance(self, plan: StepPlan | None, in_flight: Future[StepResult] | None) -> Future[StepResult] | None:
        """Starts the plan behind the step that runs, then takes over that one's result."""
        if plan is not None and (count := plan.num_tokens) > 0:
            self._steps_by_size[min((count - 1).bit_length(), _STEP_SIZES - 1)] += 1
            self._step_tokens += count
        started = None if plan is None else self.parts.executor.submit(plan)
        result = _NOTHING if in_flight is None else result_within(in_flight, self.parts.engine_config.step_timeout)
        start = time.monotonic()
        with self._lock:
            events = self.parts.scheduler.commit(result)
        self._trace("commit", start, len(result.tokens))
        start = time.monotonic()
        self._deliver(events)
        self._trace("deliver", start, len(events))
        return started

    def _deliver(self, events: list[Event]) -> None:
        by_request: dict[int, list[Event]] = {}
        for event in events:
            by_request.setdefault(id(event.request), []).append(event)
        for key, its_events in by_request.items():
            known = self._processors.get(key)
            if known is None:
                continue
            processor, listener = known
            try:
                delta = processor.process(its_events)
            except Exception as error:  # of one request's text: no reason to end the others
                _log.exception("request %s: its output can't be made", processor.request.request_id)
                delta = RequestDelta(processor.request.request_id, finished=True, error=_text_of(error))
            else:
                failed = delta.error is not None and not isinstance(delta.error, Unsatisfiable)
                if failed and processor.request.beams is None:  # beams also fail when they are aborted
                    _log.error("request %s failed: %s", delta.request_id, delta.error)
            if delta.finished:
                with self._lock:
                    del self._processors[key]
                    if delta.error is not None:
                        self.parts.scheduler.cancel_request(processor.request)
            if not _call(listener, delta) and not delta.finished:
                with self._lock:
                    del self._processors[key]
                    self.parts.scheduler.cancel_request(processor.request)

    def _trace(self, name: str, start: float, count: int) -> None:
        """Something that this thread did with so many things, until now."""
        if self._tracer is not None and count > 0:
            self._tracer.span("engine", name, start, time.monotonic(), {"count": count})

    def _finish_sequence(self, sequence_id: int) -> None:
        with self._lock:
            self.parts.scheduler.finish(sequence_id, "stop")

    def _fail(self, error: BaseException) -> None:
        with self._lock:
            self._failure = _text_of(error)
            left = list(self._processors.values())
            self._processors.clear()
        if left or not isinstance(error, ExecutorEnded):  # that is how a process ends that did not close its engine
            ids = ", ".join(processor.request.request_id for processor, _ in left)
            _log.error("the engine has failed; requests that it ran or held: %s", ids or "none", exc_info=error)
        for processor, listener in left:
            _call(listener, RequestDelta(processor.request.request_id, finished=True, error=self._failure))


def _call(listener: Listener, delta: RequestDelta) -> bool:
    """Whether the listener took the delta. Its errors are its caller's, such as an event loop that is closed."""
    try:
        listener(delta)
    except Exception:
        _log.exception("request %s: its listener failed, so it is cancelled", delta.request_id)
        return False
    return True


def _text_of(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def _eos_token_ids(generation_config: GenerationConfig, tokenizer: Tokenizer) -> frozenset[int]:
    """Those that either file names: some chat models name the end of a turn in only one of them."""
    own = () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)
    return frozenset((*generation_config.eos_token_ids, *own))
