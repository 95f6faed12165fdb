"""ModelRunner: carries out step plans on one rank, from the plan's ids to the tokens that were chosen."""

from __future__ import annotations

import dataclasses
import logging
import time

import torch
from torch import Tensor

from puna.layers.pieces import torch_dtype
from puna.models import LLaMAForCausalLM
from puna.models.llama import LLaMAModel
from puna.ops import cpu
from puna.runtime.accelerator import NotRecordable
from puna.runtime.kv_pool import KVPool
from puna.runtime.pooler import Pooler
from puna.runtime.sampler import Sampler, candidates, token_logprobs
from puna.runtime.step_buffers import StepBuffers, StepInputs
from puna.runtime.step_graph import CpuStepGraph, EagerStepGraph, StepGraph, bucket_for, bucket_sizes
from puna.runtime.tracing import Tracer
from puna.scheduling.step_plan import PromptLogprobs, StepPlan, StepResult

_log = logging.getLogger(__name__)

# Of the tables of rotary angles: 131,072 positions of heads of 128. Without them a step computes its angles in torch,
# 0.1 to 0.4 ms of Python's and torch's code that the weights have driven out of the caches.
_MAX_ANGLE_BYTES = 1 << 26


class ModelRunner:
    """Owns a rank's model, cache, buffers, sampler and pooler. `execute` is called with one plan after the other.

    With `use_buckets`, steps in which every row has one token are padded to a bucket and run by its graph, which is
    recorded when the first such step comes.
    """

    def __init__(
        self,
        model: LLaMAForCausalLM,
        pool: KVPool,
        buffers: StepBuffers,
        sampler: Sampler,
        use_buckets: bool = False,
        tracer: Tracer | None = None,
    ) -> None:
        self.model = model
        self.pool = pool
        self.buffers = buffers
        self.sampler = sampler
        self.pooler = Pooler()
        self._tracer = tracer
        self._buckets = bucket_sizes(buffers.max_rows) if use_buckets else ()
        self._graphs: dict[int, StepGraph] = {}
        self._arena = cpu.Arena()  # one for all graphs: they run one after another
        self._angle_tables: tuple[Tensor, ...] | None = None
        self._records = cpu.compiled() and model.comm.device.type == "cpu" and model.config.quant != "none"

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> StepResult:
        """Runs one step. Sequences whose sampling fails are named in the result's errors."""
        self._take_notice(plan)
        if not plan.rows:
            return StepResult((), {}, {}, {})
        self.pool.copy_blocks(plan.copies)
        if any(row.pooling is not None for row in plan.rows):
            return self._pool_and_choose(plan)
        logits = self._logits(plan)
        start = time.monotonic()
        result = self._choose(plan, logits)
        if self._tracer is not None:
            self._tracer.span("steps", "sample", start, time.monotonic(), {"tokens": len(result.tokens)})
        return result

    def _take_notice(self, plan: StepPlan) -> None:
        """Of sequences that are new or have ended."""
        for ended in plan.ended_sequences:
            self.sampler.remove(ended)
            self.pooler.remove(ended)
        for new in plan.new_sequences:
            self.sampler.add(new)

    def _pool_and_choose(self, plan: StepPlan) -> StepResult:
        """A step that has prompts to pool: in Python, since a recorded one keeps nothing but its logits."""
        inputs = self.buffers.fill(plan, self._last_token)
        hidden = self._hidden_states(inputs)
        if not self.model.comm.mapping.is_last_pp_rank():
            return StepResult((), {}, {}, {})
        embeddings, errors = self.pooler.pool(plan.rows, hidden)
        result = StepResult((), {}, {}, {})
        if len(inputs.logits_ids):
            result = self._choose(plan, self.model.logits(hidden, inputs.logits_ids))
        return dataclasses.replace(result, embeddings=embeddings, errors=result.errors | errors)

    def _logits(self, plan: StepPlan) -> Tensor:
        """float32 [R, V], in the order of the rows; R counts all tokens of rows whose prompt is scored."""
        bucket = None
        if all(len(row.token_ids) == 1 for row in plan.rows):
            bucket = bucket_for(len(plan.rows), self._buckets)
        inputs = self.buffers.fill(plan, self._last_token, bucket)
        if bucket is None:
            return self._forward(inputs)
        if bucket not in self._graphs:
            self._graphs[bucket] = self._record(inputs)
        return self._graphs[bucket].run(inputs)[: sum(row.wants_logits for row in plan.rows)]

    def _record(self, inputs: StepInputs) -> StepGraph:
        if self._records:
            if self._angle_tables is None:
                self._angle_tables = self._make_angle_tables()
            forward, angles = (self._looking_up, None) if self._angle_tables else (self._forward, self._angles)
            try:
                return CpuStepGraph(forward, angles, inputs, self._arena)
            except NotRecordable as reason:
                self._records = False
                _log.warning("decode steps are not recorded, which costs time: %s", reason)
        return EagerStepGraph(self._forward)

    def _make_angle_tables(self) -> tuple[Tensor, ...]:
        """Cosines and sines of every position, [positions, D / 2] each; none where they depend on more than that, or
        would be larger than what they save is worth."""
        positions = self.buffers.max_length
        if self.model.rotary.depends_on_length or positions * self.model.config.head_size * 4 > _MAX_ANGLE_BYTES:
            return ()
        cos, sin = self.model.rotary(torch.arange(positions, device=self.model.comm.device))
        return cos, sin

    def _looking_up(self, inputs: StepInputs) -> Tensor:
        assert self._angle_tables
        cos, sin = (cpu.embedding(inputs.position_ids, table) for table in self._angle_tables)
        return self._forward(inputs.with_angles((cos, sin)))

    def _angles(self, inputs: StepInputs) -> tuple[Tensor, Tensor]:
        angles: tuple[Tensor, Tensor] = self.model.rotary(inputs.position_ids, inputs.attention_params.rotary_lengths)
        return angles

    def _last_token(self, sequence_id: int) -> int:
        return self.sampler.last_tokens([sequence_id])[0]

    def _forward(self, inputs: StepInputs) -> Tensor:
        """Logits [R, V] on the last pipeline rank, none on the others."""
        hidden = self._hidden_states(inputs)
        if not self.model.comm.mapping.is_last_pp_rank():
            return hidden.new_empty((0, self.model.config.vocab_size))
        return self.model.logits(hidden, inputs.logits_ids)

    def _hidden_states(self, inputs: StepInputs) -> Tensor:
        """[T, E] after this rank's layers, received from the pipeline rank before and sent to the next; on the last one
        after the norm."""
        comm, config = self.model.comm, self.model.config
        hidden = None
        if not comm.mapping.is_first_pp_rank():
            shape = (len(inputs.input_ids), config.hidden_size)
            empty = torch.empty(shape, dtype=torch_dtype(config.dtype), device=comm.device)
            hidden = comm.recv(empty, comm.mapping.prev_pp_rank())
        output = LLaMAModel.forward(  # without the head
            self.model,
            inputs.input_ids,
            inputs.position_ids,
            kv_cache_params=self.pool.params(),
            attention_params=inputs.attention_params,
            hidden_states=hidden,
        )
        assert isinstance(output, Tensor)
        if not comm.mapping.is_last_pp_rank():
            comm.send(output, comm.mapping.next_pp_rank())
        return output

    def _choose(self, plan: StepPlan, logits: Tensor) -> StepResult:
        found_candidates: dict[int, tuple[tuple[int, float], ...]] = {}
        errors: dict[int, str] = {}
        prompt_logprobs: dict[int, PromptLogprobs] = {}
        sampled_ids: list[int] = []
        sampled_rows: list[int] = []
        at = 0
        if logits.shape[0] == 0:
            return StepResult((), {}, {}, {})
        for row in plan.rows:
            if row.logprob_targets:
                targets = torch.tensor(row.logprob_targets, device=logits.device)
                scored = token_logprobs(logits[at : at + len(targets)], targets, row.num_logprobs)
                prompt_logprobs[row.sequence_id] = PromptLogprobs(row.first_position + 1, tuple(scored))
                at += len(row.token_ids) - 1
            if row.num_candidates:
                (found,) = candidates(logits[at : at + 1], row.num_candidates)
                found_candidates[row.sequence_id] = found
                if not found:
                    errors[row.sequence_id] = "the model's logits are NaN or infinite"
            sampled_ids += row.sampled_ids
            sampled_rows += [at] * len(row.sampled_ids)
            at += row.wants_logits
        if not sampled_ids:
            return StepResult((), found_candidates, prompt_logprobs, errors)
        if sampled_rows != list(range(logits.shape[0])):
            logits = logits[torch.tensor(sampled_rows, device=logits.device)]
        output = self.sampler.sample(logits, sampled_ids)
        return StepResult(output.tokens, found_candidates, prompt_logprobs, errors | output.errors)
