"""StepBuffers: fixed storage that every step's plan is copied into, and the tensors that the packed model takes."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final, NamedTuple, NoReturn

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from puna.layers.params import AttentionParams, CacheTables
from puna.runtime.accelerator import Accelerator, Event
from puna.runtime.block_tables import BlockTables
from puna.scheduling.block_allocator import DUMMY_BLOCK
from puna.scheduling.step_plan import PENDING_TOKEN, StepPlan, StepRow

# Of each part: a line of the CPU's cache; GPU kernels are compiled for addresses that are multiples of 16.
_ALIGNMENT: Final = 64
_TORCH_DTYPES: Final = MappingProxyType(
    {np.int64: torch.int64, np.int32: torch.int32, np.float64: torch.float64, np.float32: torch.float32}
)

Ints = npt.NDArray[Any]


@dataclass(frozen=True)
class Draws:
    """How the device chooses tokens by itself, an entry for each row of logits [R]; see `device_sampling.choose`.

    temperature float32, 0 where the likeliest is taken; top_k int64 in 1..V; top_p float64; min_p float32; seeds int64,
    the bits of unsigned numbers; positions int64, the number of output tokens so far.
    """

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    seeds: Tensor
    positions: Tensor


@dataclass(frozen=True)
class StepInputs:
    """Views of the buffers for one step of T tokens and B rows, valid until the next one.

    tokens int64 [T], or with `token_places` int64 [T] a longer one, in which these say where each token stands.
    position_ids int64 [T]; logits_ids int64 [R], the tokens whose logits are wanted. `draws`: on devices that choose.
    """

    tokens: Tensor
    position_ids: Tensor
    logits_ids: Tensor
    attention_params: AttentionParams
    token_places: Tensor | None = None
    draws: Draws | None = None

    @property
    def input_ids(self) -> Tensor:
        """int64 [T]."""
        return self.tokens if self.token_places is None else self.tokens.index_select(0, self.token_places)

    def with_angles(self, cos_sin: tuple[Tensor, Tensor]) -> StepInputs:
        """The same with these rotary angles of the tokens."""
        params = dataclasses.replace(self.attention_params, cos_sin=cos_sin)
        return dataclasses.replace(self, attention_params=params)


class StepSize(NamedTuple):
    """Of what a step takes: tokens, rows, rows of logits, and the width of its block tables."""

    tokens: int
    rows: int
    logits: int
    blocks: int


class StepBuffers:
    """Room for `max_tokens` tokens of `max_rows` sequences with `max_blocks` cache blocks each.

    `num_windows` is how many different windows the model's layers have: each has cache tables of its own. All that a
    step takes lies in one piece of memory. On the CPU that is the storage of the tensors that the model sees; for an
    accelerator it is pinned, one of two in turn, and goes over in a single copy. Steps that are padded to the same
    bucket come in the same tensors, so that a recorded one can be replayed.

    An accelerator chooses tokens by itself, and goes on from them before the host knows them. `chosen` int64 [max_rows]
    and `highest` float32 [max_rows] are where it leaves a step's tokens and the highest logits of their rows, and what
    the next step's tokens are taken from; `outcome` are the bytes of both, for one copy to the host.

    With `reports_prompts`, steps of nothing but whole prompts say so (AttentionParams.prompt_lengths).
    """

    def __init__(
        self,
        max_tokens: int,
        max_rows: int,
        max_blocks: int,
        block_size: int,
        accelerator: Accelerator | None = None,
        num_windows: int = 1,
        reports_prompts: bool = False,
    ) -> None:
        self.max_rows, self.max_blocks, self.block_size = max_rows, max_blocks, block_size
        self.max_tokens = max(max_tokens, max_rows)
        self.max_length = max_blocks * block_size  # tokens of one sequence
        self._num_windows, self._reports_prompts = num_windows, reports_prompts
        self._accelerator = accelerator
        self._tables = BlockTables(max_rows, max_blocks, num_windows)
        # A row more for padding: see `fill`.
        largest = StepSize(self.max_tokens, max_rows + 1, self.max_tokens, max_blocks)
        num_bytes = _parts(largest, num_windows, accelerator is not None)[-1].end
        if accelerator is None:
            self._storage = torch.zeros(num_bytes, dtype=torch.uint8)
            self._sides = [_Side(self._storage)]
        else:
            before, self._num_chosen = _aligned(4 * max_rows), _aligned(8 * max_rows) // 8
            both = before + 8 * self._num_chosen
            storage = torch.zeros(both + num_bytes, dtype=torch.uint8, device=accelerator.device)
            self.outcome = storage[:both]
            self.highest = storage[: 4 * max_rows].view(torch.float32)
            # Just before the tokens of a plan, so that one gathering finds both.
            self._chosen_and_given = storage[before:].view(torch.int64)
            self.chosen = self._chosen_and_given[:max_rows]
            self._storage = storage[both:]
            self._sides = [_Side(accelerator.pinned(num_bytes)) for _ in range(2)]
        self._kept: dict[StepSize, StepInputs] = {}

    def fill(
        self,
        plan: StepPlan,
        pending_token: Callable[[int], int] = int,
        num_rows: int | None = None,
        *,
        num_tokens: int | None = None,
        width: int | None = None,
        draws: Mapping[str, npt.NDArray[Any]] | None = None,
    ) -> StepInputs:
        """Copies a plan in. `pending_token` gives the token last chosen for a sequence; with an accelerator, its place
        in `chosen`.

        With `num_rows`, rows of one token in the dummy block are added up to that count; all of the plan's must be of
        one token too, unless `num_tokens` says up to which count there are tokens: the last one of the added rows takes
        what the others leave, for which its blocks must have room. There are as many logits_ids as rows then, or
        max_rows: those of any tokens follow the ones that are wanted. `width` is that of the block tables; None: as
        wide as needed, or with `num_rows` as all can be. `draws` has the columns of Draws, for the rows whose logits
        are wanted, if an accelerator is to choose their tokens.

        Raises ValueError for an empty plan, and for a row whose blocks have no room for its tokens.
        """
        rows = plan.rows
        if not rows:
            raise ValueError("the plan has no tokens: there is nothing to run")
        count = len(rows)
        tokens = [token for row in rows for token in row.token_ids]
        total = len(tokens)
        firsts = np.array([row.first_position for row in rows])
        prompt_lengths = np.array([row.prompt_length for row in rows])
        counts = np.array([len(row.token_ids) for row in rows]) if total > count else np.ones(count, np.int64)
        places, num_blocks = self._tables.places(rows)
        lengths = firsts + counts
        if (lengths > num_blocks * self.block_size).any():
            _raise_no_room(rows, num_blocks.tolist(), self.block_size)
        ends = counts.cumsum()
        of_row: Ints | slice = slice(None)
        positions = firsts
        if total > count:
            of_row = np.arange(count).repeat(counts)
            positions = np.arange(total) + (lengths - ends)[of_row]
        wanted = _wanted(rows, ends)

        if width is None:
            width = int(num_blocks.max()) if num_rows is None else self.max_blocks
        size = StepSize(total, count, len(wanted), width)
        if num_rows is not None:
            size = StepSize(num_tokens or num_rows, num_rows, min(num_rows, self.max_rows), width)
        side = self._sides[0]
        self._sides.reverse()
        side.wait()
        host = side.views(size, self._parts_of(size), keep=num_rows is not None)
        host["tokens"][:total] = tokens
        pending = [b for b, row in enumerate(rows) if row.token_ids[-1] == PENDING_TOKEN]
        if self._accelerator is not None:
            # Tokens of the plan, but where others take their places just below.
            host["token_places"][:] = np.arange(self._num_chosen, self._num_chosen + size.tokens)
        if pending:
            known = host["tokens" if self._accelerator is None else "token_places"]
            known[ends[pending] - 1] = [pending_token(rows[b].sequence_id) for b in pending]
        host["position_ids"][:total] = positions
        host["rotary_lengths"][:total] = np.maximum(positions + 1, prompt_lengths[of_row])
        host["query_starts"][0] = 0
        host["query_starts"][1 : count + 1] = ends
        host["sequence_lengths"][:count] = lengths
        host["logits_ids"][: len(wanted)] = wanted
        blocks, offsets = np.divmod(positions, self.block_size)
        for i, table in enumerate(self._tables.arrays):
            host[f"slot_mapping{i}"][:total] = table[places[of_row], blocks] * np.int64(self.block_size) + offsets
            host[f"block_tables{i}"][:count] = table[places, :width]
        if draws is not None:
            for name, column in draws.items():
                host[name][: len(column)] = column
                host[name][len(column) :] = 0  # for padded rows: greedy
        if num_rows is not None:
            self._pad(host, total, count, len(wanted), size)
        if self._accelerator is not None:
            num_bytes = self._parts_of(size)[-1].end
            self._accelerator.copy(self._storage[:num_bytes], side.bytes[:num_bytes])
            side.copied = self._accelerator.record()
        inputs = self._kept.get(size)
        if inputs is None:
            inputs = self._inputs(size)
            if num_rows is not None:
                self._kept[size] = inputs
        if self._reports_prompts and num_rows is None and not firsts.any():
            params = dataclasses.replace(inputs.attention_params, prompt_lengths=tuple(lengths.tolist()))
            inputs = dataclasses.replace(inputs, attention_params=params)
        return inputs

    def _pad(self, host: Mapping[str, Ints], num_tokens: int, count: int, num_wanted: int, size: StepSize) -> None:
        rest, added = slice(num_tokens, size.tokens), slice(count, size.rows)
        host["tokens"][rest] = host["position_ids"][rest] = 0
        host["rotary_lengths"][rest] = host["sequence_lengths"][added] = 1
        for i in range(self._num_windows):
            host[f"slot_mapping{i}"][rest] = DUMMY_BLOCK * self.block_size
            host[f"block_tables{i}"][added] = DUMMY_BLOCK
        if count < size.rows:
            last = num_tokens + size.rows - count - 1
            host["query_starts"][count : size.rows] = np.arange(num_tokens, last + 1)
            host["query_starts"][size.rows] = size.tokens
            host["sequence_lengths"][size.rows - 1] = size.tokens - last
        host["logits_ids"][num_wanted:] = np.arange(num_wanted, size.logits)

    def _parts_of(self, size: StepSize) -> tuple[_Part, ...]:
        return _parts(size, self._num_windows, self._accelerator is not None)

    def _inputs(self, size: StepSize) -> StepInputs:
        """The tensors of a step of that size, whatever is in them."""
        tensors = {
            part.name: self._storage[part.start : part.end_of_data].view(part.torch_dtype).view(part.shape)
            for part in self._parts_of(size)
        }
        tokens, token_places, draws = tensors["tokens"], None, None
        if self._accelerator is not None:
            tokens, token_places = self._chosen_and_given[: self._num_chosen + size.tokens], tensors["token_places"]
            draws = Draws(**{field.name: tensors[field.name] for field in dataclasses.fields(Draws)})
        windows = range(self._num_windows)
        return StepInputs(
            tokens=tokens,
            position_ids=tensors["position_ids"],
            logits_ids=tensors["logits_ids"],
            attention_params=AttentionParams(
                query_starts=tensors["query_starts"],
                sequence_lengths=tensors["sequence_lengths"],
                cache_tables=tuple(
                    CacheTables(tensors[f"block_tables{i}"], tensors[f"slot_mapping{i}"]) for i in windows
                ),
                rotary_lengths=tensors["rotary_lengths"],
            ),
            token_places=token_places,
            draws=draws,
        )


class _Side:
    """Storage that the host writes. On accelerators, `copied` is when it may be written again."""

    def __init__(self, storage: Tensor) -> None:
        self.bytes = storage
        self.copied: Event | None = None
        self._numbers = storage.numpy()
        self._kept: dict[StepSize, dict[str, Ints]] = {}

    def wait(self) -> None:
        if self.copied is not None:
            self.copied.synchronize()
            self.copied = None

    def views(self, size: StepSize, parts: tuple[_Part, ...], keep: bool) -> dict[str, Ints]:
        """The parts by their names, as arrays; with `keep` they are made once."""
        found = self._kept.get(size)
        if found is None:
            found = {
                part.name: self._numbers[part.start : part.end_of_data].view(part.dtype).reshape(part.shape)
                for part in parts
            }
            if keep:
                self._kept[size] = found
        return found


class _Part(NamedTuple):
    """Numbers in a step's storage: bytes start .. end_of_data, and up to `end` nothing."""

    name: str
    dtype: type[Any]
    shape: tuple[int, ...]
    start: int

    @property
    def torch_dtype(self) -> torch.dtype:
        return _TORCH_DTYPES[self.dtype]

    @property
    def end_of_data(self) -> int:
        return self.start + math.prod(self.shape) * np.dtype(self.dtype).itemsize

    @property
    def end(self) -> int:
        return _aligned(self.end_of_data)


@functools.lru_cache(maxsize=1024)
def _parts(size: StepSize, num_windows: int, chooses: bool) -> tuple[_Part, ...]:
    """Where the numbers of such a step are; with `chooses`, those for an accelerator that chooses tokens, too."""
    windows = range(num_windows)
    wanted: list[tuple[str, type[Any], tuple[int, ...]]] = [
        ("tokens", np.int64, (size.tokens,)),  # first, see `chosen`
        ("position_ids", np.int64, (size.tokens,)),
        ("rotary_lengths", np.int64, (size.tokens,)),
        *((f"slot_mapping{i}", np.int64, (size.tokens,)) for i in windows),
        ("logits_ids", np.int64, (size.logits,)),
        ("query_starts", np.int32, (size.rows + 1,)),
        ("sequence_lengths", np.int32, (size.rows,)),
    ]
    if chooses:
        wanted.append(("token_places", np.int64, (size.tokens,)))
        columns: dict[str, type[Any]] = {"temperature": np.float32, "top_p": np.float64, "min_p": np.float32}
        columns |= {"top_k": np.int64, "seeds": np.int64, "positions": np.int64}
        wanted += [(name, dtype, (size.logits,)) for name, dtype in columns.items()]
    wanted += [(f"block_tables{i}", np.int32, (size.rows, size.blocks)) for i in windows]
    parts: list[_Part] = []
    for name, dtype, shape in wanted:
        parts.append(_Part(name, dtype, shape, parts[-1].end if parts else 0))
    return tuple(parts)


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT


def _wanted(rows: Sequence[StepRow], ends: Ints) -> Ints:
    """The tokens whose logits are wanted: of a row that chooses the last one, of a scored one all."""
    if not any(row.logprob_targets for row in rows):
        found: Ints = ends[[bool(row.sampled_ids or row.num_candidates) for row in rows]] - 1
        return found
    each = [
        np.arange(end - (len(row.token_ids) if row.logprob_targets else row.wants_logits), end)
        for row, end in zip(rows, ends.tolist(), strict=True)
    ]
    return np.concatenate(each)


def _raise_no_room(rows: Sequence[StepRow], num_blocks: Sequence[int], block_size: int) -> NoReturn:
    for row, count in zip(rows, num_blocks, strict=True):
        if row.sequence_length > count * block_size:
            raise ValueError(
                f"sequence {row.sequence_id} has {row.sequence_length} tokens, but its {count} blocks hold "
                f"{count * block_size}"
            )
    raise RuntimeError("every row has room")
