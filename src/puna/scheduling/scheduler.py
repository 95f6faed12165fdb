"""Scheduler: which sequences run in the next step, with how many tokens and in which blocks.

Every step mixes single tokens of running sequences with chunks of prompts. Who comes first: requests that are overdue,
then by priority, then by arrival. That order decides who gets blocks: where there are none left, the last in it gives
its own back and is computed again later (preemption by recomputation; its full blocks stay cached while there is room).

No request starves. One that has waited for `max_skips` plans is overdue and comes before all that are not; so it
waits for at most `max_skips` plans and for the requests that were overdue before it or are running, each of which
ends within the context length.
"""

from __future__ import annotations

import heapq
import itertools
from dataclasses import dataclass
from operator import attrgetter
from typing import Final

from puna.scheduling.block_manager import BlockManager
from puna.scheduling.events import BeamEvent, Event, PromptEvent, SequenceEvent
from puna.scheduling.group import Group, WaitingQueue
from puna.scheduling.sequence import FinishReason, Request, Sequence
from puna.scheduling.step_plan import (
    PENDING_TOKEN,
    BlockCopy,
    NewSequence,
    StepPlan,
    StepResult,
    StepRow,
    TokenLogprobs,
)


class QueueFullError(ValueError):
    """More requests wait than `max_waiting` allows: try again later."""


@dataclass(frozen=True, kw_only=True)
class SchedulerLimits:
    """Raises ValueError where the numbers could never run a step."""

    max_num_seqs: int = 64
    max_num_batched_tokens: int = 2048
    max_waiting: int | None = None
    max_skips: int = 256
    # Tokens of a step whose logits are computed for prompt_logprobs: each takes a vocabulary's worth of memory.
    max_scored_tokens: int = 128

    def __post_init__(self) -> None:
        for name in ("max_num_seqs", "max_skips", "max_scored_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least 1")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens is {self.max_num_batched_tokens}: it must be at least max_num_seqs, "
                f"{self.max_num_seqs}, since every running sequence may need a token in a step"
            )
        if self.max_waiting is not None and self.max_waiting < 1:
            raise ValueError(f"max_waiting is {self.max_waiting}: it must be at least 1, or None for no limit")


_urgency = attrgetter("urgency")
_PENDING: Final = (PENDING_TOKEN,)


class _Step:
    """The plan in the making."""

    def __init__(self, now: float, budget: int, scored_budget: int) -> None:
        self.now = now
        self.budget = budget
        self.scored_budget = scored_budget
        self.rows: list[StepRow] = []
        self.copies: list[BlockCopy] = []
        self.groups: set[Group] = set()
        self.preempted = False

    def budget_of(self, group: Group) -> int:
        """The tokens that a group may compute, fewer where their log-probabilities are wanted."""
        return min(self.budget, self.scored_budget) if group.is_scored else self.budget


class Scheduler:
    """Plain bookkeeping: `add` and `cancel` at any time, then `plan`, run it somewhere, and `commit` what came out.

    One plan may be made while the one before it still runs; `commit` takes their results in the same order.
    """

    def __init__(self, limits: SchedulerLimits, blocks: BlockManager) -> None:
        self.limits = limits
        self.blocks = blocks
        self.num_preemptions = 0
        self.num_prefix_hit_tokens = 0
        self.num_prefix_query_tokens = 0
        self._sequence_ids = itertools.count()
        self._arrivals = itertools.count()
        self._num_plans = 0
        self._sequences: dict[int, Group] = {}
        self._groups_of: dict[str, list[Group]] = {}
        self._running: dict[Group, None] = {}
        self._waiting = WaitingQueue(limits.max_skips)
        self._deadlines: list[tuple[float, int, Request]] = []
        self._new: list[NewSequence] = []
        self._ended: list[int] = []
        self._events: list[Event] = []

    @property
    def num_running(self) -> int:
        return sum(len(group.sequences) for group in self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def has_work(self) -> bool:
        return bool(self._running or len(self._waiting) or self._events or self._ended)

    def add(self, request: Request) -> None:
        """Queues a request. Raises QueueFullError, or ValueError for one that could never run with these limits."""
        limits = self.limits
        if request.request_id in self._groups_of:
            raise ValueError(f"request_id {request.request_id!r} is in use: give every request its own")
        if not request.prompt_token_ids:
            raise ValueError("the prompt is empty: it needs at least one token")
        if request.num_sequences > limits.max_num_seqs:
            raise ValueError(
                f"the request needs {request.num_sequences} sequences at once, but max_num_seqs is "
                f"{limits.max_num_seqs}: ask for fewer, or start with more"
            )
        longest = len(request.prompt_token_ids) + request.max_tokens
        at_once = 1 if request.beams is None else request.num_sequences
        self.blocks.check_length(longest, at_once, limits.max_num_batched_tokens)
        if limits.max_waiting is not None and len(self._waiting) >= limits.max_waiting:
            raise QueueFullError(
                f"{len(self._waiting)} requests are waiting, which is the most allowed: try again later"
            )
        sequence = Sequence(next(self._sequence_ids), request)
        group = Group(request, sequence, next(self._arrivals), seats=request.num_sequences)
        self._register(group)
        self._waiting.push(group, self._num_plans)
        if request.deadline is not None:
            if len(self._deadlines) > 2 * len(self._groups_of) + 64:  # most are of requests that have ended
                self._deadlines = [entry for entry in self._deadlines if self._is_alive(entry[2])]
                heapq.heapify(self._deadlines)
            heapq.heappush(self._deadlines, (request.deadline, group.arrival, request))

    def cancel(self, request_id: str, reason: FinishReason = "abort") -> None:
        """Ends all of a request's sequences at once; without effect for one that is unknown or has ended."""
        for group in list(self._groups_of.get(request_id, ())):
            self._end(group, reason)

    def cancel_request(self, request: Request, reason: FinishReason = "abort") -> None:
        """The same for this very request, whose id another one may have by now."""
        if self._is_alive(request):
            self.cancel(request.request_id, reason)

    def finish(self, sequence_id: int, reason: FinishReason) -> None:
        """Ends one sequence, since its text has met a stop string; no event tells of it."""
        group = self._sequences.get(sequence_id)
        if group is not None:
            group.sequences[0].finish_reason = reason
            self._drop(group)

    def plan(self, now: float = 0.0) -> StepPlan | None:
        """The next step, or None where there is nothing to compute now. `now` is the clock that deadlines are in.

        When nothing runs any more, a last plan without rows tells the runner which sequences have ended.
        """
        self._expire(now)
        self._num_plans += 1
        self._waiting.mark_overdue(self._num_plans)
        step = _Step(now, self.limits.max_num_batched_tokens, self.limits.max_scored_tokens)
        # The tokens that users wait for come first; prompts share what is left of the budget.
        longer = []
        for group in sorted(self._running, key=_urgency):
            if group not in self._running:
                continue  # preempted meanwhile
            if group.num_new > len(group.sequences):
                longer.append(group)
            elif not self._plan_next_token(group, step):
                self._plan_running(group, step)
        for group in longer:
            if group in self._running:
                self._plan_running(group, step)
        if not step.preempted:
            self._admit(step)
        if not step.rows and (self._running or not self._ended):
            return None
        for group in step.groups:
            for sequence in group.sequences:
                if sequence.num_computed >= sequence.settle_at:
                    self.blocks.settle(sequence)
        plan = StepPlan(tuple(step.rows), tuple(step.copies), tuple(self._new), tuple(self._ended))
        self._new, self._ended = [], []
        return plan

    def commit(self, result: StepResult) -> list[Event]:
        """Takes over what a step chose, ends what is at its end, and returns all that happened since the last."""
        for sequence_id, error in result.errors.items():
            group = self._sequences.get(sequence_id)
            if group is not None:
                self._end(group, "error", error)
        for sequence_id, logprobs in result.prompt_logprobs.items():
            group = self._sequences.get(sequence_id)
            if group is not None:
                self._events.append(PromptEvent(group.request, logprobs))
        for sampled in result.tokens:
            group = self._sequences.get(sampled.sequence_id)
            if group is not None:
                self._append(group, sampled.token_id, sampled.logprobs)
        for sequence_id, embedding in result.embeddings.items():
            group = self._sequences.get(sequence_id)
            if group is not None:
                sequence = group.sequences[0]
                sequence.finish_reason = "stop"
                self._events.append(SequenceEvent(sequence, finish_reason="stop", embedding=embedding))
                self._drop(group)
        searching = {self._sequences[i]: None for i in result.candidates if i in self._sequences}
        for group in searching:
            self._advance_beams(group, result)
        events, self._events = self._events, []
        return events

    def check_integrity(self) -> None:
        """Raises RuntimeError where blocks or queues contradict each other; for tests and debugging."""
        groups = [*self._running, *self._waiting]
        sequences = [sequence for group in groups for sequence in group.sequences]
        self.blocks.check_integrity(sequences)
        if len(set(groups)) != len(groups) or {s.sequence_id for s in sequences} != self._sequences.keys():
            raise RuntimeError("the scheduler is corrupt: a group is in two queues, or a sequence in none")
        if set(groups) != {group for known in self._groups_of.values() for group in known}:
            raise RuntimeError("the scheduler is corrupt: requests and queues differ")

    # ---- planning

    def _plan_next_token(self, group: Group, step: _Step) -> bool:
        """A short way for what nearly every row is: one token of one sequence, in a block of its own that has room.

        Whether it could be taken; `_plan_running` takes the others.
        """
        sequence = group.sequences[0]
        position = sequence.num_computed
        if (
            step.budget == 0
            or group.beam_search is not None
            or not group.is_introduced
            or not self.blocks.is_within_own_block(sequence)
        ):
            return False
        if sequence.num_pending:
            if position + 1 - sequence.prompt_length >= sequence.request.max_tokens:
                return True  # the token that is on its way is the last one
            tokens = _PENDING
        elif position < len(sequence.token_ids):
            tokens = (sequence.token_ids[position],)
        else:
            return False
        step.groups.add(group)
        step.budget -= 1
        sequence.num_computed += 1
        sequence.num_pending += 1
        ids = (sequence.sequence_id,)
        step.rows.append(StepRow(ids[0], position, tokens, sequence.block_ids, sequence.prompt_length, ids))
        return True

    def _plan_running(self, group: Group, step: _Step) -> None:
        """Rows for a running group; where blocks are lacking, those of less urgent groups, or a shorter chunk."""
        if group.waits_for_result or step.budget_of(group) < len(group.sequences):
            return
        first = group.sequences[0]
        if first.num_pending and first.num_tokens - first.prompt_length >= first.request.max_tokens:
            return  # the token that is on its way is the last one
        counts = group.counts(step.budget_of(group))
        while (copies := self.blocks.reserve(group.sequences, counts)) is None:
            less_urgent = [other for other in self._running if other not in step.groups and other is not group]
            victim = max(less_urgent, key=lambda other: other.urgency, default=group)
            if victim.urgency > group.urgency:
                self._preempt(victim, step)
            elif group.num_new == len(group.sequences):
                self._preempt(group, step)
                return
            else:
                room = self.blocks.free_tokens(first) if len(counts) == 1 else 0
                if room == 0:
                    return  # rows planned already will free blocks, or give theirs back
                counts = [min(counts[0], room)]
        step.copies += copies
        self._add_rows(group, counts, step)

    def _add_rows(self, group: Group, counts: list[int], step: _Step) -> None:
        step.groups.add(group)
        for sequence, count in zip(group.sequences, counts, strict=True):
            if count == 0:
                continue
            first = sequence.num_computed
            tokens = sequence.token_ids[first : first + count]
            if len(tokens) < count:
                tokens.append(PENDING_TOKEN)
            sequence.num_computed += count
            step.budget -= count
            sampled_ids: tuple[int, ...] = ()
            num_candidates = 0
            if sequence.num_computed == sequence.num_tokens:
                if group.beam_search is not None:
                    num_candidates = group.beam_search.num_candidates
                    group.waits_for_result = True
                elif group.request.pooling is not None:
                    group.waits_for_result = True
                else:
                    sequence.num_pending += 1
                    sampled_ids = (sequence.sequence_id, *self._begin_output(group, step))
            num_logprobs, targets = sequence.request.params.prompt_logprobs, []
            if num_logprobs is not None:
                targets = sequence.token_ids[first + 1 : min(first + count + 1, sequence.prompt_length)]
                step.scored_budget -= count * bool(targets)
            step.rows.append(
                StepRow(
                    sequence.sequence_id,
                    first,
                    tuple(tokens),
                    sequence.block_ids,
                    sequence.prompt_length,
                    sampled_ids,
                    num_candidates,
                    tuple(targets),
                    num_logprobs or 0,
                    group.request.pooling,
                )
            )

    def _begin_output(self, group: Group, step: _Step) -> list[int]:
        """At a sequence's first sample: tells the sampler of it, and makes the other n - 1 of the request."""
        if group.is_introduced:
            return []
        request, twins = group.request, []
        for index in range(group.seats):
            if index > 0:
                twin = group.sequences[0].fork(next(self._sequence_ids), index)
                self.blocks.share(twin)
                own = Group(request, twin, group.arrival, seats=1)
                own.is_introduced = True
                if group.is_overdue:
                    own.mark_overdue()
                self._register(own)
                self._running[own] = None
                step.groups.add(own)
                twins.append(twin.sequence_id)
            # Each of the n draws from a stream of its own; the first one's is that of n = 1.
            known_as = twins[-1] if twins else group.sequences[0].sequence_id
            self._new.append(
                NewSequence(
                    known_as,
                    request.prompt_token_ids,
                    request.params,
                    request.seed + index,
                    request.eos_token_ids,
                    request.bad_word_ids,
                )
            )
        group.seats, group.is_introduced = 1, True
        return twins

    def _admit(self, step: _Step) -> None:
        """Starts waiting groups in order, until one does not fit: those behind it must not take what it waits for."""
        seats = sum(group.seats for group in self._running)
        while step.budget > 0 and (group := self._waiting.first()) is not None:
            if seats + group.seats > self.limits.max_num_seqs or step.budget_of(group) < len(group.sequences):
                return
            for sequence in group.sequences:
                self.blocks.begin(sequence)
            counts = group.counts(step.budget_of(group))
            # With nothing running there is nothing to wait for, and `add` made sure that it fits in the end.
            fits = not self._running or self.blocks.has_room(group.sequences, self.limits.max_num_batched_tokens)
            copies = self.blocks.reserve(group.sequences, counts) if fits else None
            if copies is None:
                for sequence in group.sequences:
                    self.blocks.release(sequence)
                return
            step.copies += copies
            self._waiting.remove(group)
            self._running[group] = None
            seats += group.seats
            for sequence in group.sequences:
                if sequence.started_at is None:  # else it was preempted, and looks for its own blocks
                    sequence.started_at, sequence.num_cached = step.now, sequence.num_computed
                    self.num_prefix_hit_tokens += sequence.num_computed
                    self.num_prefix_query_tokens += sequence.num_tokens
            self._add_rows(group, counts, step)

    def _preempt(self, group: Group, step: _Step) -> None:
        for sequence in group.sequences:
            self.blocks.release(sequence)
        del self._running[group]
        self._waiting.push(group, self._num_plans)
        self.num_preemptions += 1
        step.preempted = True

    # ---- results

    def _append(self, group: Group, token_id: int, logprobs: TokenLogprobs | None) -> None:
        sequence, request = group.sequences[0], group.request
        sequence.num_pending -= 1
        sequence.token_ids.append(token_id)
        reason: FinishReason | None = None
        ends = () if request.params.ignore_eos else request.eos_token_ids
        if token_id in request.params.stop_token_ids or token_id in ends:
            reason = "stop"
        elif len(sequence.token_ids) - sequence.prompt_length >= request.max_tokens:
            reason = "length"
        sequence.finish_reason = reason
        self._events.append(SequenceEvent(sequence, token_id, logprobs, reason))
        if reason is not None:
            self._drop(group)

    def _advance_beams(self, group: Group, result: StepResult) -> None:
        search = group.beam_search
        if search is None:
            raise RuntimeError(f"request {group.request.request_id!r} got candidates, but searches no beams")
        group.waits_for_result = False
        going_on = search.advance([result.candidates[sequence.sequence_id] for sequence in group.sequences])
        if not going_on:
            self._events.append(BeamEvent(group.request, tuple(search.finished)))
            self._drop(group)
            return
        parents = group.sequences
        group.sequences = []
        for continuation in going_on:
            sequence = parents[continuation.parent]
            if sequence in group.sequences:
                sequence = sequence.fork(next(self._sequence_ids), len(group.sequences))
                self._sequences[sequence.sequence_id] = group
                self.blocks.share(sequence)
            group.sequences.append(sequence)
        for sequence in parents:
            if sequence not in group.sequences:
                self.blocks.release(sequence)
                del self._sequences[sequence.sequence_id]
        for sequence, continuation in zip(group.sequences, going_on, strict=True):
            sequence.token_ids.append(continuation.token_id)

    # ---- queues

    def _register(self, group: Group) -> None:
        self._sequences[group.sequences[0].sequence_id] = group
        self._groups_of.setdefault(group.request.request_id, []).append(group)

    def _end(self, group: Group, reason: FinishReason, error: str | None = None) -> None:
        """Ends a group before its time, and tells of it."""
        if group.beam_search is not None:
            self._events.append(BeamEvent(group.request, tuple(group.beam_search.finished), reason, error))
        else:
            first = group.sequences[0]
            # Those of n that would have begun with the first one come to their ends too.
            others = [first.fork(next(self._sequence_ids), index) for index in range(1, group.seats)]
            for sequence in (first, *others):
                sequence.finish_reason = reason
                self._events.append(SequenceEvent(sequence, finish_reason=reason, error=error))
        self._drop(group)

    def _drop(self, group: Group) -> None:
        """Forgets a group that has ended; its full blocks stay cached."""
        for sequence in group.sequences:
            self.blocks.release(sequence)
            del self._sequences[sequence.sequence_id]
            if group.is_introduced or group.request.pooling is not None:
                self._ended.append(sequence.sequence_id)
        self._running.pop(group, None)
        self._waiting.remove(group)
        others = self._groups_of[group.request.request_id]
        others.remove(group)
        if not others:
            del self._groups_of[group.request.request_id]
        if not self._groups_of:
            self._deadlines.clear()

    def _expire(self, now: float) -> None:
        while self._deadlines and self._deadlines[0][0] <= now:
            self.cancel_request(heapq.heappop(self._deadlines)[2], "deadline")

    def _is_alive(self, request: Request) -> bool:
        groups = self._groups_of.get(request.request_id)
        return groups is not None and groups[0].request is request
