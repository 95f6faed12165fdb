"""Group, sequences that run in the same steps; and WaitingQueue, the order in which waiting ones start."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterator
from typing import Final

from puna.scheduling.beams import BeamSearch
from puna.scheduling.sequence import Request, Sequence


class Group:
    """Sequences that run in the same steps: the beams of a prompt, or one sequence by itself.

    `seats` is how many sequences it takes or will take: all n of a request before its prompt is computed, since they
    begin together. `is_introduced`: the sampler knows its sequence. `waits_for_result`: what beams do next depends on
    what all of them found, and a prompt that was pooled has nothing left to compute.
    """

    __slots__ = (
        "arrival",
        "beam_search",
        "is_introduced",
        "is_overdue",
        "queued_at",
        "request",
        "seats",
        "sequences",
        "urgency",
        "waits_for_result",
    )

    def __init__(self, request: Request, sequence: Sequence, arrival: int, seats: int) -> None:
        self.request = request
        self.sequences = [sequence]
        self.arrival = arrival
        self.seats = seats
        self.queued_at = 0
        self.is_overdue = False
        self.is_introduced = False
        self.waits_for_result = False
        # Lower goes first: overdue ones, then by priority and arrival, and the first of n sequences before the others.
        self.urgency = (True, request.priority, arrival, sequence.index)
        self.beam_search: BeamSearch | None = None
        if request.beams is not None:
            ends = frozenset[int]() if request.params.ignore_eos else request.eos_token_ids
            self.beam_search = BeamSearch(request.beams, ends, request.max_tokens)

    def mark_overdue(self) -> None:
        self.is_overdue = True
        self.urgency = (False, 0, self.arrival, self.urgency[3])

    @property
    def num_new(self) -> int:
        """Tokens that are known or chosen, and not computed yet."""
        return sum(sequence.num_tokens - sequence.num_computed for sequence in self.sequences)

    @property
    def is_scored(self) -> bool:
        """Whether the log-probabilities of the tokens that come next are wanted."""
        first = self.sequences[0]
        return self.request.params.prompt_logprobs is not None and first.num_computed < first.prompt_length

    def counts(self, budget: int) -> list[int]:
        """Tokens that each sequence may compute within the budget. Beams reach their ends in one step, or not yet."""
        new = [sequence.num_tokens - sequence.num_computed for sequence in self.sequences]
        if sum(new) <= budget:
            return new
        share = budget // len(new)
        return [min(count - (len(new) > 1), share) for count in new]


# How many entries of a queue may be out of date before they are sorted out, however few groups wait.
_SPARE_ENTRIES: Final = 64


class WaitingQueue:
    """Waiting groups, the most urgent first. One that has waited for `max_skips` plans is overdue."""

    def __init__(self, max_skips: int) -> None:
        self._max_skips = max_skips
        self._groups: dict[Group, None] = {}
        # A heap by urgency and a queue by time over the same groups; entries that no longer hold are skipped.
        self._by_urgency: list[tuple[tuple[bool, int, int, int], int, Group]] = []
        self._by_time: deque[tuple[int, Group]] = deque()

    def __len__(self) -> int:
        return len(self._groups)

    def __iter__(self) -> Iterator[Group]:
        return iter(self._groups)

    def push(self, group: Group, num_plans: int) -> None:
        """Queues a group; `num_plans` counts the plans so far."""
        group.queued_at = num_plans
        self._groups[group] = None
        heapq.heappush(self._by_urgency, (group.urgency, num_plans, group))
        self._by_time.append((num_plans, group))

    def first(self) -> Group | None:
        """The most urgent group; it stays in the queue."""
        while self._by_urgency:
            _, queued_at, group = self._by_urgency[0]
            if self._holds(group, queued_at):
                return group
            heapq.heappop(self._by_urgency)
        return None

    def remove(self, group: Group) -> None:
        """Without effect for a group that does not wait."""
        if group not in self._groups:
            return
        del self._groups[group]
        # Entries that no longer hold would keep prompts alive: for long where ever more urgent ones come before them.
        if len(self._by_urgency) + len(self._by_time) > 4 * len(self._groups) + 2 * _SPARE_ENTRIES:
            self._by_urgency = [entry for entry in self._by_urgency if self._holds(entry[2], entry[1])]
            heapq.heapify(self._by_urgency)
            self._by_time = deque(entry for entry in self._by_time if self._holds(entry[1], entry[0]))
        elif not self._groups:
            self._by_urgency.clear()
            self._by_time.clear()

    def mark_overdue(self, num_plans: int) -> None:
        while self._by_time and num_plans - self._by_time[0][0] > self._max_skips:
            queued_at, group = self._by_time.popleft()
            if self._holds(group, queued_at):
                group.mark_overdue()
                heapq.heappush(self._by_urgency, (group.urgency, queued_at, group))

    def _holds(self, group: Group, queued_at: int) -> bool:
        return group in self._groups and group.queued_at == queued_at
