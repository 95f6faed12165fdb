"""RandomCheckpoint: a model of any shape with random weights, made as they are read; nothing is on disk."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from puna.checkpoints import Checkpoint
from puna.config import GenerationConfig, LLaMAConfig
from puna.layers.pieces import torch_dtype
from puna.models import MODELS

# Every tensor is cut from one block of random numbers that is repeated without end. A prime, so that a row of a matrix
# does not come again before its width has gone through all of the block; small enough for the cache.
_BLOCK: Final = 1_048_573
_DEVIATION: Final = 0.02  # of LLaMA's weights when training starts


class RandomCheckpoint(Checkpoint):
    """Tensors of the given names and shapes, normal with the deviation 0.02; norms are around 1. `seed` decides all."""

    def __init__(self, config: LLaMAConfig, shapes: Mapping[str, tuple[int, ...]], seed: int = 0) -> None:
        self.folder = Path("random weights")
        self._config_fields = config.to_hugging_face()
        self._dtype = config.dtype
        self._shapes = dict(sorted(shapes.items()))
        self._seed = seed
        values = torch.randn(_BLOCK, generator=torch.Generator().manual_seed(seed)) * _DEVIATION
        self._block = values.to(torch_dtype(config.dtype))

    @property
    def config_fields(self) -> Mapping[str, Any]:
        return self._config_fields

    @property
    def config_source(self) -> str:
        return "the shape of the random weights"

    @property
    def generation_config(self) -> GenerationConfig:
        return GenerationConfig()

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def dtype(self, name: str) -> str:
        return self._dtype

    def read(self, name: str, source: tuple[slice, ...]) -> Tensor:
        shape = self._shapes[name]
        rows, width = source[0], shape[1] if len(shape) == 2 else 1
        # The tensor starts anywhere in the block, so that two of one shape differ.
        start = zlib.crc32(name.encode(), self._seed) + rows.start * width
        flat = _repeated(self._block, start % _BLOCK, (rows.stop - rows.start) * width)
        if len(shape) == 2:
            return flat.view(-1, width)[:, source[1]]
        return flat.add_(1) if name.endswith("norm.weight") else flat


def _repeated(block: Tensor, start: int, count: int) -> Tensor:
    """`count` values of the block's endless repetition, from its value `start` on."""
    result = torch.empty(count, dtype=block.dtype)
    done = 0
    while done < count:
        piece = block[start : start + count - done]
        result[done : done + len(piece)] = piece
        done += len(piece)
        start = 0
    return result


def random_checkpoint(config: LLaMAConfig, seed: int = 0) -> RandomCheckpoint:
    """A checkpoint that `load_model` and `Engine.from_pretrained` take: every weight is random, in `config.dtype`.

    It has no tokenizer; see `puna.engine.token_ids`. Raises ValueError for a config that its architecture's config.json
    can't say.
    """
    with torch.device("meta"):
        model = MODELS[config.architecture](config)
    return RandomCheckpoint(config, {name: piece.full_shape for name, piece in model.pieces()}, seed)
