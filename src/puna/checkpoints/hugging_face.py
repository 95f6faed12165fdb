"""HuggingFaceCheckpoint: a folder with config.json and weights in one or many safetensors files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from puna.checkpoints.base import Checkpoint
from puna.checkpoints.safetensors_files import SafetensorsFiles
from puna.config import GenerationConfig, read_json_object

_INDEX = "model.safetensors.index.json"


class HuggingFaceCheckpoint(Checkpoint):
    """Opens the folder. Raises FileNotFoundError without config.json or weights, ValueError for damaged files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._config_fields = read_json_object(folder / "config.json")
        self._files = SafetensorsFiles(_weight_files(folder))
        index = folder / _INDEX
        if index.is_file():
            _check_index(index, self._files)

    @property
    def config_fields(self) -> Mapping[str, Any]:
        return self._config_fields

    @property
    def config_source(self) -> str:
        return str(self.folder / "config.json")

    @property
    def generation_config(self) -> GenerationConfig:
        return GenerationConfig.from_hugging_face(self.folder)

    @property
    def names(self) -> tuple[str, ...]:
        return self._files.names

    def shape(self, name: str) -> tuple[int, ...]:
        return self._files.shape(name)

    def dtype(self, name: str) -> str:
        return self._files.dtype(name)

    def read(self, name: str, source: tuple[slice, ...]) -> Tensor:
        return self._files.read(name, source)


def _weight_files(folder: Path) -> list[Path]:
    index = folder / _INDEX
    if index.is_file():
        weight_map = read_json_object(index).get("weight_map")
        if not isinstance(weight_map, dict) or any(not isinstance(file, str) for file in weight_map.values()):
            raise ValueError(f"{index}: weight_map must be an object of file names: fetch the file again")
        if any(Path(name).name != name for name in weight_map.values()):
            raise ValueError(f"{index}: weight_map names a file outside of the folder")
        files = [folder / name for name in sorted(set(weight_map.values()))]
        absent = [file.name for file in files if not file.is_file()]
        if absent:
            raise FileNotFoundError(f"{folder} lacks {', '.join(absent)}, which {_INDEX} names: fetch it")
        return files
    # Some folders also have the weights in their makers' own layout, as consolidated*.safetensors.
    files = sorted(file for file in folder.glob("*.safetensors") if not file.name.startswith("consolidated"))
    if files:
        return files
    pickles = sorted(file.name for kind in ("*.bin", "*.pth", "*.pt") for file in folder.glob(kind))
    if pickles:
        raise ValueError(
            f"{folder} holds pickled weights ({pickles[0]}), which can run code when they are read: convert them to "
            "safetensors (transformers: model.save_pretrained), or fetch the safetensors version"
        )
    raise FileNotFoundError(f"{folder} has no *.safetensors files: give the folder that holds the weights")


def _check_index(index: Path, files: SafetensorsFiles) -> None:
    named = read_json_object(index)["weight_map"]
    absent = sorted(named.keys() - set(files.names))
    if absent:
        raise ValueError(f"{index} names {absent[0]}, which {named[absent[0]]} does not hold: fetch both files again")
