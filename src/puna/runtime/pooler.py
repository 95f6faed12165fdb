"""Pooler: makes one embedding of a prompt's hidden states, which come in chunks."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from puna.scheduling.pooling_params import PoolingParams
from puna.scheduling.step_plan import StepRow

# Tokens whose hidden states are held in float64 at a time.
_PART: Final = 64


class Pooler:
    """Keeps the sums of mean-pooled prompts that are computed in part.

    A sum is in float64 and takes one token after the other, so that its bits are the same however the prompt is cut.
    """

    def __init__(self) -> None:
        self._sums: dict[int, NDArray[np.float64]] = {}

    def __len__(self) -> int:
        return len(self._sums)

    def remove(self, sequence_id: int) -> None:
        """A sequence has ended. Without effect for one that is not here."""
        self._sums.pop(sequence_id, None)

    def pool(self, rows: Iterable[StepRow], hidden_states: Tensor) -> tuple[dict[int, array[float]], dict[int, str]]:
        """Takes in a step's rows, whose hidden states [T, E] lie one behind the other.

        -> embeddings (float32 [E]) of the sequences whose prompts end here, and why others will not get one.
        """
        embeddings: dict[int, array[float]] = {}
        errors: dict[int, str] = {}
        at = 0
        for row in rows:
            first, at = at, at + len(row.token_ids)
            if row.pooling is None:
                continue
            is_complete = row.sequence_length == row.prompt_length
            if row.pooling.method == "mean":
                self._add(row, hidden_states[first:at])
            if is_complete:
                found = self._pooled(row, row.pooling, hidden_states[at - 1])
                if np.isfinite(found).all():
                    embeddings[row.sequence_id] = array("f", _scaled(found, row.pooling).tobytes())
                else:
                    errors[row.sequence_id] = "the model's hidden states are NaN or infinite"
        return embeddings, errors

    def _add(self, row: StepRow, hidden_states: Tensor) -> None:
        if row.first_position == 0:  # also where a prompt is computed again
            self._sums[row.sequence_id] = np.zeros(hidden_states.shape[1])
        total = self._sums[row.sequence_id]
        for part in torch.split(hidden_states, _PART):
            for token in _float64(part):
                total += token

    def _pooled(self, row: StepRow, params: PoolingParams, last: Tensor) -> NDArray[np.float64]:
        if params.method == "last":
            return _float64(last)
        mean: NDArray[np.float64] = self._sums.pop(row.sequence_id) / row.prompt_length
        return mean


def _scaled(vector: NDArray[np.float64], params: PoolingParams) -> NDArray[np.float32]:
    length = np.sqrt(np.square(vector).sum())
    return (vector / length if params.normalize and length > 0 else vector).astype(np.float32)


def _float64(hidden_states: Tensor) -> NDArray[np.float64]:
    found: NDArray[np.float64] = hidden_states.to("cpu", torch.float64).numpy()
    return found
