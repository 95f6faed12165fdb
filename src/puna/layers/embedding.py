"""Embedding: token ids to vectors, with the vocabulary split over the tensor-parallel ranks."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from puna.config import LLaMAConfig
from puna.distributed import Communicator
from puna.layers.pieces import Piece, PiecewiseModule, layer_format, op_table, torch_dtype
from puna.quantization import Quantized, WeightFormat, vocabulary_format


class Embedding(PiecewiseModule):
    """token ids [...] -> [..., hidden_size]. Each rank holds ceil(vocab_size / tp_size) rows, the last ones padded."""

    def __init__(self, config: LLaMAConfig, comm: Communicator) -> None:
        super().__init__()
        self.vocab_size, self.hidden_size = config.vocab_size, config.hidden_size
        self.rows = -(-config.vocab_size // comm.mapping.tp_size)
        self.first = self.rows * comm.mapping.tp_rank
        self.dtype = torch_dtype(config.dtype)
        self.ops = op_table(config, comm)
        self.config, self.comm = config, comm
        self.format: WeightFormat
        self._store_as(vocabulary_format(config.quant))

    def _store_as(self, format_name: str) -> None:
        self.format = layer_format(format_name, self.rows, self.hidden_size, self.config, self.comm)
        for name, parameter in self.format.create_parameters().items():
            self.register_parameter(name, parameter)

    def weights(self) -> dict[str, nn.Parameter]:
        return {name: self.get_parameter(name) for name in self.format.parameter_names}

    def forward(self, token_ids: Tensor) -> Tensor:
        if self.comm.mapping.tp_size == 1:
            return self.format.embedding(self.ops, token_ids, self.weights(), self.dtype)
        # A row that another rank holds counts as zero here; the sum over the ranks fills it in.
        local = token_ids - self.first
        inside = (local >= 0) & (local < self.rows)
        rows = self.format.embedding(self.ops, torch.where(inside, local, 0), self.weights(), self.dtype)
        return self.comm.all_reduce(rows * inside.unsqueeze(-1).to(rows.dtype))

    def pieces(self) -> list[Piece]:
        real = max(0, min(self.rows, self.vocab_size - self.first))
        source = slice(min(self.first, self.vocab_size), min(self.first, self.vocab_size) + real)
        rows, padding = slice(0, self.rows), self.rows - real

        def write(dense: Tensor) -> None:
            self.format.write(self.weights(), rows, F.pad(dense, (0, 0, 0, padding)) if padding else dense)

        def write_quantized(quantized: Quantized) -> None:
            self.format.write_quantized(self.weights(), rows, quantized.padded(padding) if padding else quantized)

        def read() -> Tensor:
            return self.format.read(self.weights(), slice(0, real))

        shape, columns = (self.vocab_size, self.hidden_size), slice(0, self.hidden_size)
        return [Piece("weight", shape, (source, columns), write, read, write_quantized, self._store_as)]

    def extra_repr(self) -> str:
        return f"{self.vocab_size}, {self.hidden_size}, format={self.format.name}"
