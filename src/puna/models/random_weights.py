"""RandomCheckpoint: a model of any shape with random weights, made as they are read; nothing is on disk."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import torch
from torch import Tensor

from puna.checkpoints import Checkpoint
from puna.config import GenerationConfig, LLaMAConfig
from puna.layers.pieces import torch_dtype
from puna.models import MODELS
from puna.quantization import GroupQuantized

# Every tensor is cut from one block of random numbers that is repeated without end. A prime, so that a row of a matrix
# does not come again before its width has gone through all of the block; small enough for the cache.
_BLOCK: Final = 1_048_573
_DEVIATION: Final = 0.02  # of LLaMA's weights when training starts


# The quantised types that can be made, by the name of the format: bits of a code and the type that GGUF has for it.
_CODES: Final[Mapping[str, tuple[int, str]]] = MappingProxyType({"int8": (8, "Q8_0"), "int4": (4, "Q4_0")})
_GROUP: Final = 32


class RandomCheckpoint(Checkpoint):
    """Tensors of the given names and shapes, normal with the deviation 0.02; norms are around 1. `seed` decides all.

    They are made on `device`: on a GPU none of them passes through the host's memory. What is read is there too.

    With a `quantization` of int8 or int4 the matrices are made as codes and scales in groups of 32, like GGUF's Q8_0
    and Q4_0: loaded as they are stored, no matrix is ever held as floats.
    """

    def __init__(
        self,
        config: LLaMAConfig,
        shapes: Mapping[str, tuple[int, ...]],
        seed: int = 0,
        quantization: str | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.folder = Path("random weights")
        self._config_fields = config.to_hugging_face()
        self._dtype = config.dtype
        self._shapes = dict(sorted(shapes.items()))
        self._seed = seed
        values = torch.randn(_BLOCK, generator=torch.Generator().manual_seed(seed)) * _DEVIATION
        # Drawn on the host, so that every device has the same ones.
        values = values.to(device)
        self._block = values.to(torch_dtype(config.dtype))
        self._bits, self._type = _CODES.get(quantization or "", (0, ""))
        if self._bits:
            # Codes reach as far as 2.5 deviations; scales differ by a quarter, and are numbers of float16.
            zero = 1 << (self._bits - 1)
            scale = 2.5 * _DEVIATION / zero
            self._codes = (values / scale).round_().add_(zero).clamp_(0, 2 * zero - 1).to(torch.uint8)
            self._scales = (scale * (1 + values / (4 * _DEVIATION)).abs_()).to(torch.float16).to(torch.float32)

    @property
    def holds_codes(self) -> bool:
        """Whether there are matrices as codes and scales."""
        return any(map(self.is_quantized, self._shapes))

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
        return self._type if self.is_quantized(name) else self._dtype

    def is_quantized(self, name: str) -> bool:
        shape = self._shapes[name]
        return self._bits > 0 and len(shape) == 2 and shape[1] % _GROUP == 0

    def read(self, name: str, source: tuple[slice, ...]) -> Tensor:
        if self.is_quantized(name):
            # Whole rows: the columns may cut a group.
            return self._groups(name, source[0]).dequantize()[:, source[1]]
        shape = self._shapes[name]
        rows = self._cut(self._block, name, source[0], shape[1] if len(shape) == 2 else 1)
        if len(shape) == 2:
            return rows[:, source[1]]
        return rows.view(-1).add_(1) if name.endswith("norm.weight") else rows.view(-1)

    def read_quantized(self, name: str, source: tuple[slice, ...]) -> GroupQuantized | None:
        if not self.is_quantized(name) or any(end % _GROUP for end in (source[1].start, source[1].stop)):
            return None
        whole = self._groups(name, source[0])
        columns, groups = source[1], slice(source[1].start // _GROUP, source[1].stop // _GROUP)
        return dataclasses.replace(whole, codes=whole.codes[:, columns], scales=whole.scales[:, groups])

    def _groups(self, name: str, rows: slice) -> GroupQuantized:
        columns = self._shapes[name][1]
        return GroupQuantized(
            codes=self._cut(self._codes, name, rows, columns),
            scales=self._cut(self._scales, name, rows, columns // _GROUP),
            minimums=None,
            zero=1 << (self._bits - 1),
            group_size=_GROUP,
        )

    def _cut(self, block: Tensor, name: str, rows: slice, width: int) -> Tensor:
        """Rows of so many values, out of the endless repetition of the block."""
        # Each tensor starts somewhere else, so that two of one shape differ.
        start = (zlib.crc32(name.encode(), self._seed) + rows.start * width) % _BLOCK
        result = torch.empty((rows.stop - rows.start) * width, dtype=block.dtype, device=block.device)
        done = 0
        while done < len(result):
            piece = block[start : start + len(result) - done]
            result[done : done + len(piece)] = piece
            done += len(piece)
            start = 0
        return result.view(-1, width)


def random_checkpoint(
    config: LLaMAConfig, seed: int = 0, quantization: str | None = None, device: torch.device | str = "cpu"
) -> RandomCheckpoint:
    """A checkpoint that `load_model` and `Engine.from_pretrained` take: every weight is random, in `config.dtype` or,
    if asked, quantised (see RandomCheckpoint), made on the device where the model will be.

    It has no tokenizer; see `puna.engine.token_ids`. Raises ValueError for a config that its architecture's config.json
    can't say.
    """
    with torch.device("meta"):
        model = MODELS[config.architecture](config)
    shapes = {name: piece.full_shape for name, piece in model.pieces()}
    return RandomCheckpoint(config, shapes, seed, quantization, device)
