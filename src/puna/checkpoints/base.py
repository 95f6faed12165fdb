"""What every kind of checkpoint offers: config fields, and tensors under Hugging Face's names."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from puna.config import GenerationConfig
from puna.quantization.quantized import Quantized


class Checkpoint(ABC):
    """A model's files. Opening one reads no tensor values; `read` reads one tensor, or a part of it.

    `folder` holds the files, those of the tokenizer too; a GGUF file, which has everything in it, stands for its own.
    """

    folder: Path

    @property
    def source(self) -> str:
        """What to call it in messages."""
        return str(self.folder)

    @property
    @abstractmethod
    def config_fields(self) -> Mapping[str, Any]:
        """The fields as a Hugging Face config.json has them."""

    @property
    @abstractmethod
    def config_source(self) -> str:
        """The file that the fields are from, for messages."""

    @property
    @abstractmethod
    def generation_config(self) -> GenerationConfig: ...

    @property
    @abstractmethod
    def names(self) -> tuple[str, ...]:
        """The tensors' names, sorted."""

    @abstractmethod
    def shape(self, name: str) -> tuple[int, ...]: ...

    @abstractmethod
    def dtype(self, name: str) -> str:
        """ "float32", "bfloat16" or "float16", or the format's own name for any other."""

    @abstractmethod
    def read(self, name: str, source: tuple[slice, ...]) -> Tensor:
        """The slices `source` (one an axis, with both ends) of a tensor, on the CPU, in the stored dtype; in float32
        where `is_quantized`."""

    def stored_bytes(self, name: str) -> int | None:
        """How many bytes a tensor takes in the file; None where it follows from shape and `dtype`."""
        return None

    def is_quantized(self, name: str) -> bool:
        """Whether a tensor is stored as codes with scales, which `dtype` then names the format of."""
        return False

    def read_quantized(self, name: str, source: tuple[slice, ...]) -> Quantized | None:
        """The same slices of a matrix as it is stored quantised; None where it is not, or where they cut a group or a
        block."""
        return None

    def check_readable(self) -> None:
        """Raises ValueError, with the remedy, where weights are quantised in a way that puna does not read."""
        return

    @property
    def cache_dtype(self) -> Literal["fp8"] | None:
        """What the makers say that keys and values are to be kept in; None where they say nothing."""
        return None

    @property
    def cache_scales(self) -> Mapping[int, tuple[float, float]]:
        """By layer, what its keys and its values are divided by before an FP8 cache holds them, if that is not 1."""
        return {}
