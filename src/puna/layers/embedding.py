"""Embedding: token ids to vectors, with the vocabulary split over the tensor-parallel ranks."""

from __future__ import annotations

import torch
from torch import Tensor

from puna.config import LLaMAConfig
from puna.distributed import Communicator
from puna.layers.pieces import Piece, PiecewiseModule, op_table, parameter_piece, torch_dtype
from puna.quantization.dense import random_matrix


class Embedding(PiecewiseModule):
    """token ids [...] -> [..., hidden_size]. Each rank holds ceil(vocab_size / tp_size) rows, the last ones padded."""

    def __init__(self, config: LLaMAConfig, comm: Communicator) -> None:
        super().__init__()
        self.vocab_size = config.vocab_size
        self.rows = -(-config.vocab_size // comm.mapping.tp_size)
        self.first = self.rows * comm.mapping.tp_rank
        self.weight = random_matrix(self.rows, config.hidden_size, torch_dtype(config.dtype))
        self.ops = op_table(config, comm)
        self.comm = comm

    def forward(self, token_ids: Tensor) -> Tensor:
        if self.comm.mapping.tp_size == 1:
            return self.ops.embedding(token_ids, self.weight)
        # A row that another rank holds counts as zero here; the sum over the ranks fills it in.
        local = token_ids - self.first
        inside = (local >= 0) & (local < self.rows)
        rows = self.ops.embedding(torch.where(inside, local, 0), self.weight)
        return self.comm.all_reduce(rows * inside.unsqueeze(-1).to(rows.dtype))

    def pieces(self) -> list[Piece]:
        return [vocabulary_piece(self.weight, self.first, self.vocab_size)]

    def extra_repr(self) -> str:
        return f"{self.vocab_size}, {self.weight.shape[1]}"


def vocabulary_piece(weight: Tensor, first: int, vocab_size: int) -> Piece:
    """The piece "weight" for this rank's rows of a matrix with one row a token, from token `first` on.

    The rows of `weight` past the end of the vocabulary are padding, which is set to zero.
    """
    real = max(0, min(weight.shape[0], vocab_size - first))
    source = slice(min(first, vocab_size), min(first, vocab_size) + real)
    piece = parameter_piece("weight", weight, vocab_size, source, slice(0, real))

    def write(tensor: Tensor) -> None:
        piece.write(tensor)
        with torch.no_grad():
            weight[real:].zero_()

    return Piece(piece.name, piece.full_shape, piece.source, write, piece.read)
