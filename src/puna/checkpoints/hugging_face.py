"""HuggingFaceCheckpoint: a folder with config.json and weights in one or many safetensors files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from torch import Tensor

from puna.checkpoints.base import Checkpoint
from puna.checkpoints.safetensors_files import SafetensorsFiles
from puna.config import GenerationConfig, read_json_object

SINGLE_FILE: Final = "model.safetensors"
INDEX_FILE: Final = "model.safetensors.index.json"


class HuggingFaceCheckpoint(Checkpoint):
    """Opens the folder. Raises FileNotFoundError without config.json or weights, ValueError for damaged files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._config_fields = read_json_object(folder / "config.json")
        self._generation_config = GenerationConfig.from_hugging_face(folder)
        self._files = _open_weights(folder)

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
        return self._files.names

    def shape(self, name: str) -> tuple[int, ...]:
        return self._files.shape(name)

    def dtype(self, name: str) -> str:
        return self._files.dtype(name)

    def read(self, name: str, source: tuple[slice, ...]) -> Tensor:
        return self._files.read(name, source)


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
