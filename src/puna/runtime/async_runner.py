"""AsyncModelRunner: steps on a device that works behind the host's back; launched one behind the other, read later."""

from __future__ import annotations

import functools
import itertools
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Final, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from puna.layers.pieces import torch_dtype
from puna.models import LLaMAForCausalLM
from puna.models.llama import LLaMADecoderLayer
from puna.ops.triton_tuning import Tuning
from puna.runtime.accelerator import Accelerator, Event, NotRecordable
from puna.runtime.device_clock import DeviceClock
from puna.runtime.device_sampling import Columns, PlainBatches, PlainRows, choose
from puna.runtime.kv_pool import KVPool
from puna.runtime.model_runner import ModelRunner
from puna.runtime.sampler import Sampler
from puna.runtime.step_buffers import StepBuffers, StepInputs
from puna.runtime.step_graph import CudaStepGraph, bucket_for, padded_mixed, table_widths
from puna.runtime.tracing import Tracer
from puna.scheduling.block_allocator import DUMMY_BLOCK
from puna.scheduling.step_plan import StepPlan, StepResult, StepRow

# How a step ends: on the device with its tokens, all of them the likeliest ones or not, or with its hidden states.
_Ending = Literal["greedy", "drawn", "hidden"]
_log = logging.getLogger(__name__)
_NOTHING: Final = StepResult((), {}, {}, {})
_LONG_PROMPT: Final = 1024
# Tokens up to which steps with prompts are captured: of an 8B model in FP8 an H200 multiplies as many in the time that
# the host needs to launch a step of 32 layers kernel by kernel (docs/gpu.md). Beyond it, padding would save nothing.
_CAPTURED_TOKENS: Final = 2048
# Capturing takes as long as several steps: a size must have come that often before, and only so many ever are captured.
_UNCAPTURED_STEPS: Final = 2
_MOST_MIXED: Final = 128
# Steps whose tokens the host may not have read: the one that runs, the one behind it, and one that is being read.
_OUTCOMES: Final = 3


class _Bucket(NamedTuple):
    """What captured steps are told apart by: tokens, rows, the width of block tables, and how they end."""

    tokens: int
    rows: int
    width: int
    ending: _Ending

    @property
    def is_mixed(self) -> bool:
        return self.tokens > self.rows


class PendingStep:
    """A step that was launched. Its result is made in the order of the steps, in whatever thread asks first."""

    def __init__(self, finish: Callable[[], StepResult], before: PendingStep | None) -> None:
        self._finish: Callable[[], StepResult] | None = finish
        self._before = before
        self._lock = threading.Lock()
        self._result: StepResult | None = None
        self._error: BaseException | None = None

    def result(self) -> StepResult:
        """Waits for the device. Raises what went wrong there, or with a step before."""
        with self._lock:
            if self._finish is not None:
                try:
                    if self._before is not None:
                        self._before.result()
                    self._result = self._finish()
                except BaseException as error:
                    self._error = error
                self._finish = self._before = None
        if self._error is not None:
            raise self._error
        assert self._result is not None
        return self._result


class _Outcome:
    """Pinned memory for one step's tokens and their rows' highest logits, and the step that has it."""

    def __init__(self, buffers: StepBuffers, accelerator: Accelerator) -> None:
        self.bytes = accelerator.pinned(buffers.outcome.numel())
        numbers = self.bytes.numpy()
        self.highest = numbers[: 4 * buffers.max_rows].view(np.float32)
        first = buffers.chosen.data_ptr() - buffers.outcome.data_ptr()
        self.tokens = numbers[first : first + 8 * buffers.max_rows].view(np.int64)
        self.step: PendingStep | None = None


class AsyncModelRunner(ModelRunner):
    """`launch` queues a step on the device and returns before it has run; `execute` is both, launching and waiting.

    The device chooses the tokens by itself where that takes nothing but logits and numbers (PlainRows), and the next
    step takes them from where it left them. Other steps, with penalties, grammars, log-probabilities, beams or pooling,
    are launched as early, but wait in `launch` for the steps before and for their own logits.

    Steps and `launch` belong to one thread; results may be asked for in another. `tuning` chooses among variants of
    kernels, with measurements before the first step and before steps are captured; None: their defaults.
    """

    def __init__(
        self,
        model: LLaMAForCausalLM,
        pool: KVPool,
        buffers: StepBuffers,
        sampler: Sampler,
        accelerator: Accelerator,
        use_buckets: bool = False,
        tracer: Tracer | None = None,
        tuning: Tuning | None = None,
    ) -> None:
        super().__init__(model, pool, buffers, sampler, use_buckets, tracer)
        self._accelerator = accelerator
        self._widths = table_widths(buffers.max_blocks, buffers.block_size)
        self._plain = PlainBatches(sampler)
        self._captured: dict[_Bucket, CudaStepGraph] = {}
        self._times: Counter[_Bucket] = Counter()  # that steps with prompts came and were not captured
        most = min(_CAPTURED_TOKENS, buffers.max_tokens)
        self._most_tokens = most - most % 16
        self._outcomes = [_Outcome(buffers, accelerator) for _ in range(_OUTCOMES)]
        self._latest: PendingStep | None = None
        self._places: dict[int, int] = {}  # in `chosen`, of the sequences that the latest step chose for
        self._clock = None if tracer is None else DeviceClock(accelerator)
        self._tuning = Tuning() if tuning is None else tuning

    def execute(self, plan: StepPlan) -> StepResult:
        return self.launch(plan).result()

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> PendingStep:
        """Starts one step behind those that were launched before."""
        with self._tuning.used(measure=False):
            return self._launch(plan)

    def _launch(self, plan: StepPlan) -> PendingStep:
        self._accelerator.use()
        self._take_notice(plan)
        if not plan.rows:
            return self._pending(lambda: _NOTHING)
        began = None if self._clock is None else self._clock.mark()
        self.pool.copy_blocks(plan.copies)
        plain = self._plain.of(plan.rows)
        if plain is None:
            return self._run_with_host(plan, began)
        return self._launch_plain(plan, plain, began)

    def capture_steps(self, count: int | None = None) -> None:
        """Captures the largest step with prompts, then `count` of those in which every row has one token, or all.

        The largest come first, in whose memory all others find room, whenever they are captured: in the other order
        each would need some more.
        """
        if not self._buckets:
            return
        endings: tuple[_Ending, ...] = ("drawn", "greedy")
        one = StepPlan((self._dummy_row(1),))
        steps = [
            (one, _Bucket(rows, rows, width, ending))
            for rows, width, ending in itertools.product(self._buckets[::-1], self._widths[::-1], endings)
        ][:count]
        largest = self.largest_mixed()
        mixed = padded_mixed(largest.num_tokens, len(largest.rows), self.buffers.max_rows, self._most_tokens)
        if mixed is not None and self._has_room(largest, mixed[0], self._widths[-1]):
            steps.insert(0, (largest, _Bucket(*mixed, self._widths[-1], "drawn")))
        with torch.inference_mode():
            self._accelerator.use()
            for plan, bucket in steps:
                if self._buckets:  # else something can't be captured
                    draws = {"temperature": np.zeros(len(plan.rows), dtype=np.float32)}
                    self._run_bucket(bucket.ending, bucket, self._fill_bucket(plan, bucket, draws))

    def largest_prefill(self) -> StepPlan:
        """As many tokens and as many rows as a step can have, all in the dummy block and all chosen for."""
        return self._largest(self.buffers.max_tokens, self.buffers.max_rows)

    def largest_mixed(self) -> StepPlan:
        """The largest step with prompts that is captured."""
        num_rows = min(self.buffers.max_rows, max(1, self._most_tokens // 2))
        return self._largest(max(num_rows, self._most_tokens - 1), num_rows)

    def largest_decode(self) -> StepPlan:
        return StepPlan((self._dummy_row(1),) * self.buffers.max_rows)

    def _largest(self, num_tokens: int, num_rows: int) -> StepPlan:
        left, lengths = num_tokens - num_rows, []
        for _ in range(num_rows):
            lengths.append(1 + min(left, self.buffers.max_length - 1))
            left -= lengths[-1] - 1
        return StepPlan(tuple(self._dummy_row(length) for length in lengths))

    def small_steps(self) -> tuple[StepPlan, ...]:
        """A prompt, and one that goes on behind what is cached, both of an odd number of tokens.

        Kernels are compiled for them as for the largest steps, so that no request has to wait for that.
        """
        count = min(3, self.buffers.max_tokens, self.buffers.max_length - 1)
        row = self._dummy_row(count + 1)
        cached = row._replace(first_position=1, token_ids=row.token_ids[1:])
        return StepPlan((self._dummy_row(count),)), StepPlan((cached,))

    @torch.inference_mode()
    def rehearse(self, plan: StepPlan, tune: bool = False) -> None:
        """Runs a step whose tokens nobody wants, for the memory that it takes; with `tune`, to choose its kernels."""
        self._accelerator.use()
        columns = {"temperature": np.ones(len(plan.rows), dtype=np.float32)}
        with self._tuning.used(measure=tune):
            # Kernels may divide their work, and what they keep of it, by the width of the tables.
            self._run("drawn", self.buffers.fill(plan, width=self.buffers.max_blocks, draws=columns))

    @torch.inference_mode()
    def tune_prompts(self) -> None:
        """Has attention of single long prompts measured: of powers of two, and of a token less, which libraries may
        take another way. The largest prefill alone would tell of its own length."""
        config, layer = self.model.config, self.model.layers[0]
        assert isinstance(layer, LLaMADecoderLayer)
        attention = layer.attention
        longest = min(self.buffers.max_tokens, self.buffers.max_length)
        if self._tuning.timer is None or longest < _LONG_PROMPT:
            return
        self._accelerator.use()
        heads = (config.num_heads, config.num_kv_heads, config.num_kv_heads)
        packed = torch.randn((longest, sum(heads), config.head_size), device=self._accelerator.device)
        parts = packed.to(torch_dtype(config.dtype)).split(heads, dim=1)  # type: ignore[no-untyped-call]
        with self._tuning.used():
            for power in range(_LONG_PROMPT.bit_length() - 1, longest.bit_length()):
                for count in (1 << power, (1 << power) - 1):
                    query, key, value = (part[:count] for part in parts)
                    attention.ops.prompt_attention(
                        query, key, value, (count,), attention.scale, attention.sliding_window
                    )

    def _dummy_row(self, length: int) -> StepRow:
        blocks = (DUMMY_BLOCK,) * -(-length // self.buffers.block_size)
        return StepRow(-1, 0, (0,) * length, (blocks,) * len(self.model.config.windows), 1, (-1,))

    def _launch_plain(self, plan: StepPlan, plain: PlainRows, began: Event | None) -> PendingStep:
        ending: _Ending = "greedy" if plain.is_greedy else "drawn"
        self._run_bucket(ending, *self._fill(plan, plain, ending))
        self._places = plain.places
        outcome = self._outcomes[0]
        self._outcomes.append(self._outcomes.pop(0))
        if outcome.step is not None:
            outcome.step.result()
        self._accelerator.copy(outcome.bytes, self.buffers.outcome)
        ended = self._accelerator.record(timed=self._clock is not None)

        def finish() -> StepResult:
            ended.synchronize()
            self._trace_step(plan, began, ended)
            start, count = time.monotonic(), len(plain.sequence_ids)
            result = plain.take_over(outcome.tokens[:count].tolist(), outcome.highest[:count])
            if self._tracer is not None:
                self._tracer.span("results", "read", start, time.monotonic(), {"tokens": count})
            return result

        outcome.step = self._pending(finish)
        return outcome.step

    def _run_with_host(self, plan: StepPlan, began: Event | None) -> PendingStep:
        """A step for which the host has to do something between logits and tokens."""
        if any(row.pooling is not None for row in plan.rows):
            result = self._pool_and_choose(plan)
        else:
            result = self._choose(plan, self._logits(plan))
        if began is not None:
            ended = self._accelerator.record(timed=True)
            ended.synchronize()
            self._trace_step(plan, began, ended)
        sampled = [sequence_id for row in plan.rows for sequence_id in row.sampled_ids]
        self._places = {sequence_id: place for place, sequence_id in enumerate(sampled)}
        if sampled:
            self.buffers.chosen[: len(sampled)].copy_(torch.tensor(self.sampler.last_tokens(sampled)))
        return self._pending(lambda: result)

    def _trace_step(self, plan: StepPlan, began: Event | None, ended: Event) -> None:
        if self._tracer is not None and self._clock is not None and began is not None:
            times = self._clock.times(began, ended)
            self._tracer.span("gpu", "step", *times, {"tokens": plan.num_tokens, "sequences": len(plan.rows)})

    def _logits(self, plan: StepPlan) -> Tensor:
        bucket, inputs = self._fill(plan, None, "hidden")
        if bucket is None:
            return self._forward(inputs)
        hidden = self._run_bucket("hidden", bucket, inputs)
        return self.model.logits(hidden, inputs.logits_ids[: sum(row.wants_logits for row in plan.rows)])

    def _choose(self, plan: StepPlan, logits: Tensor) -> StepResult:
        # What the sampler knows of its sequences must be up to date.
        if self._latest is not None:
            self._latest.result()
        return super()._choose(plan, logits)

    def _last_token(self, sequence_id: int) -> int:
        return self._places[sequence_id]

    def _pending(self, finish: Callable[[], StepResult]) -> PendingStep:
        self._latest = PendingStep(finish, self._latest)
        return self._latest

    def _fill(self, plan: StepPlan, plain: PlainRows | None, ending: _Ending) -> tuple[_Bucket | None, StepInputs]:
        longest = max(len(block_ids) for row in plan.rows for block_ids in row.block_ids)
        width = next(width for width in self._widths if width >= longest)
        draws = None if plain is None else plain.draws(plan.rows)
        bucket = self._bucket_for(plan, width, ending)
        if bucket is None:
            return None, self.buffers.fill(plan, self._last_token, width=width, draws=draws)
        return bucket, self._fill_bucket(plan, bucket, draws)

    def _fill_bucket(self, plan: StepPlan, bucket: _Bucket, draws: Columns | None) -> StepInputs:
        tokens = bucket.tokens if bucket.is_mixed else None
        return self.buffers.fill(
            plan, self._last_token, bucket.rows, num_tokens=tokens, width=bucket.width, draws=draws
        )

    def _bucket_for(self, plan: StepPlan, width: int, ending: _Ending) -> _Bucket | None:
        """None for a step that is not captured, or not yet."""
        if not self._buckets:
            return None
        if plan.num_tokens == len(plan.rows):
            rows = bucket_for(len(plan.rows), self._buckets)
            return None if rows is None else _Bucket(rows, rows, width, ending)
        size = padded_mixed(plan.num_tokens, len(plan.rows), self.buffers.max_rows, self._most_tokens)
        if ending == "hidden" or size is None or not self._has_room(plan, size[0], width):
            return None
        bucket = _Bucket(*size, width, ending)
        if bucket in self._captured:
            return bucket
        self._times[bucket] += 1
        num_mixed = sum(captured.is_mixed for captured in self._captured)
        return bucket if self._times[bucket] > _UNCAPTURED_STEPS and num_mixed < _MOST_MIXED else None

    def _has_room(self, plan: StepPlan, num_tokens: int, width: int) -> bool:
        """Whether one row can take all tokens that are added."""
        return num_tokens - plan.num_tokens <= width * self.buffers.block_size

    def _run_bucket(self, ending: _Ending, bucket: _Bucket | None, inputs: StepInputs) -> Tensor:
        """What `_run` does, from a captured step where there is a bucket."""
        if bucket is None:
            return self._run(ending, inputs)
        try:
            graph = self._captured.get(bucket) or self._capture(bucket, inputs)
        except NotRecordable as reason:
            self._buckets = ()
            _log.warning("steps are not captured, which costs time: %s", reason)
            return self._run(ending, inputs)
        return graph.run(inputs)

    def _capture(self, bucket: _Bucket, inputs: StepInputs) -> CudaStepGraph:
        # The step runs before it is captured, and would then go on from the tokens that it chose itself.
        chosen = self.buffers.chosen.clone()
        try:
            with self._tuning.used():  # it measures in the run before, and never while it is captured
                graph = CudaStepGraph(functools.partial(self._run, bucket.ending), inputs, self._accelerator)
        finally:
            self.buffers.chosen.copy_(chosen)
        self._captured[bucket] = graph
        return graph

    def _run(self, ending: _Ending, inputs: StepInputs) -> Tensor:
        """Queues what a step computes; its tokens, if it comes to these, are left in the buffers."""
        if self._angle_tables is None:
            self._angle_tables = self._make_angle_tables()
        if self._angle_tables:
            cos, sin = (table.index_select(0, inputs.position_ids) for table in self._angle_tables)
            inputs = inputs.with_angles((cos, sin))
        hidden = self._hidden_states(inputs)
        if ending == "hidden":
            return hidden
        logits, draws = self.model.logits(hidden, inputs.logits_ids), inputs.draws
        assert draws is not None
        if len(logits) == 0:
            return hidden
        tokens, highest = choose(logits, draws, is_greedy=ending == "greedy")
        self.buffers.highest[: len(tokens)].copy_(highest)
        # A row of NaN has no token, and nothing that is none may be looked up in the next step.
        torch.clamp(tokens, 0, logits.shape[1] - 1, out=self.buffers.chosen[: len(tokens)])
        return self.buffers.chosen
