"""HuggingFaceCheckpoint: a folder with config.json and weights in one or many safetensors files, perhaps in FP8."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Literal

from torch import Tensor

from puna.checkpoints.base import Checkpoint
from puna.checkpoints.fp8 import Fp8Tensors, read_cache_dtype, read_scheme
from puna.checkpoints.safetensors_files import SafetensorsFiles
from puna.config import GenerationConfig, read_json_object
from puna.quantization.quantized import Quantized

SINGLE_FILE: Final = "model.safetensors"
INDEX_FILE: Final = "model.safetensors.index.json"


class HuggingFaceCheckpoint(Checkpoint):
    """Opens the folder. Raises FileNotFoundError without config.json or weights, ValueError for damaged files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._config_fields = read_json_object(folder / "config.json")
        self._generation_config = GenerationConfig.from_hugging_face(folder)
        self._refusal: ValueError | None = None
        self._cache_dtype: Literal["fp8"] | None = None
        scheme = None
        try:
            scheme = read_scheme(self._config_fields, folder)
            self._cache_dtype = read_cache_dtype(self._config_fields, folder)
        except ValueError as error:  # files that can be described all the same
            self._refusal = error
        self._files = _open_weights(folder)
        self._fp8 = Fp8Tensors(self._files, scheme, str(folder))
        self._names = tuple(name for name in self._files.names if name not in self._fp8.companions)

    @property
    def config_fields(self) -> Mapping[str, Any]:
        return self._config_fields

    @property
    def config_source(self) -> str:
        return str(self.folder / "config.json")

    @property
    def generation_config(self) -> GenerationConfig:
        return self._generation_config

    @property
    def names(self) -> tuple[str, ...]:
        return self._names

    def shape(self, name: str) -> tuple[int, ...]:
        return self._files.shape(name)

    def dtype(self, name: str) -> str:
        return self._fp8.format(name) if name in self._fp8 else self._files.dtype(name)

    def stored_bytes(self, name: str) -> int | None:
        return self._fp8.stored_bytes(name) if name in self._fp8 else None

    def is_quantized(self, name: str) -> bool:
        return name in self._fp8

    def read(self, name: str, source: tuple[slice, ...]) -> Tensor:
        return self._fp8.read_dense(name, source) if name in self._fp8 else self._files.read(name, source)

    def read_quantized(self, name: str, source: tuple[slice, ...]) -> Quantized | None:
        return self._fp8.read(name, source) if name in self._fp8 else None

    def check_readable(self) -> None:
        if self._refusal is not None:
            raise self._refusal

    @property
    def cache_dtype(self) -> Literal["fp8"] | None:
        return self._cache_dtype

    @property
    def cache_scales(self) -> Mapping[int, tuple[float, float]]:
        return self._fp8.cache_scales


def index_files(index: Path) -> list[str]:
    """The names of the files that an index speaks of. Raises ValueError for a broken index."""
    return sorted(set(_weight_map(index).values()))


def _weight_map(index: Path) -> dict[str, str]:
    """Which file each tensor is in. The names are of files beside the index, whatever someone wrote into it."""
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index}: weight_map must be an object that names the file of each tensor: fetch it again")
    for file in weight_map.values():
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise ValueError(f"{index}: weight_map names {file!r}: it must be a .safetensors file in the same folder")
    return weight_map


def _open_weights(folder: Path) -> SafetensorsFiles:
    # The single file goes first, as in transformers: who saves a model over a sharded one leaves the old index behind.
    if (folder / SINGLE_FILE).is_file():
        return SafetensorsFiles([folder / SINGLE_FILE])
    if (folder / INDEX_FILE).is_file():
        return _open_indexed(folder / INDEX_FILE)
    # Some folders also have the weights in their makers' own layout, as consolidated*.safetensors.
    files = sorted(file for file in folder.glob("*.safetensors") if not file.name.startswith("consolidated"))
    if files:
        return SafetensorsFiles(files)
    pickles = sorted(file.name for kind in ("*.bin", "*.pth", "*.pt") for file in folder.glob(kind))
    if pickles:
        raise ValueError(
            f"{folder} holds pickled weights ({pickles[0]}), which can run code when they are read: convert them to "
            "safetensors (transformers: model.save_pretrained), or fetch the safetensors version"
        )
    raise FileNotFoundError(f"{folder} has no *.safetensors files: give the folder that holds the weights")


def _open_indexed(index: Path) -> SafetensorsFiles:
    weight_map = _weight_map(index)
    paths = [index.parent / name for name in sorted(set(weight_map.values()))]
    absent = [file.name for file in paths if not file.is_file()]
    if absent:
        raise FileNotFoundError(f"{index.parent} lacks {', '.join(absent)}, which {index.name} names: fetch it")
    files = SafetensorsFiles(paths)
    for name, file in weight_map.items():
        if name not in files.names or files.file(name).name != file:
            raise ValueError(f"{index} says that {name} is in {file}, which does not hold it: fetch both files again")
    return files
