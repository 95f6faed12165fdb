"""SafetensorsFiles: tensors by name over several safetensors files, read without keeping the files in memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Final

from safetensors import SafetensorError, safe_open
from torch import Tensor

_DTYPES: Final = MappingProxyType({"F32": "float32", "BF16": "bfloat16", "F16": "float16"})


@dataclass(frozen=True)
class _Entry:
    file: Path
    shape: tuple[int, ...]
    dtype: str


class SafetensorsFiles:
    """Opens the files' headers. Raises ValueError for a damaged file and for a tensor that two files hold."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._entries: dict[str, _Entry] = {}
        for file in files:
            for name, entry in _header(file).items():
                if name in self._entries:
                    other = self._entries[name].file
                    raise ValueError(f"{name} is in {other} and in {file.name}: remove the file that does not belong")
                self._entries[name] = entry
        self.names = tuple(sorted(self._entries))

    def file(self, name: str) -> Path:
        return self._entries[name].file

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entries[name].shape

    def dtype(self, name: str) -> str:
        return self._entries[name].dtype

    def read(self, name: str, source: tuple[slice, ...]) -> Tensor:
        # The file is mapped anew for every tensor: the pages of a mapping that stayed would count as this process's
        # memory, and in the end the whole file would be there beside the weights.
        entry = self._entries[name]
        with safe_open(entry.file, framework="pt") as handle:
            tensor: Tensor = handle.get_slice(name)[source]
        return tensor


def _header(file: Path) -> dict[str, _Entry]:
    """The tensors of one file, after the library has checked that the file is whole."""
    if file.stat().st_size == 0:  # can't be mapped
        raise ValueError(f"{file} is empty: fetch the file again")
    try:
        with safe_open(file, framework="pt") as handle:
            names = list(handle.keys())
            slices = {name: handle.get_slice(name) for name in names}
            return {
                name: _Entry(file, tuple(part.get_shape()), _DTYPES.get(part.get_dtype(), part.get_dtype()))
                for name, part in slices.items()
            }
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged or incomplete ({error}): fetch the file again") from error
