"""Engine directories: a model's parameters in a file as they lie in memory, which is mapped at load and not read.

engine.json says what they are, weights.safetensors holds them, and beside these are the tokenizer's files and
generation_config.json. The header of the safetensors file is padded so that the data begins on a page, and tensors
whose size is a multiple of 64 bytes, as panels are, come first: so each of those begins at a multiple of 64, which the
kernels ask for, and the file has no holes, which the format forbids.
"""

from __future__ import annotations

import fcntl
import glob
import json
import math
import mmap
import os
import secrets
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, Literal

import torch
from torch import Tensor

from puna import __version__
from puna.checkpoints.base import Checkpoint
from puna.checkpoints.gguf_file import GGUFFile
from puna.checkpoints.writer import json_bytes, sync
from puna.config import GenerationConfig, read_json_object
from puna.config.fields import FieldReader
from puna.quantization import PANEL_LAYOUT

MANIFEST: Final = "engine.json"
WEIGHTS: Final = "weights.safetensors"
# The vocabulary of a model that came as a GGUF file: that file without its tensors.
GGUF_TOKENIZER: Final = "tokenizer.gguf"
FORMAT_VERSION: Final = 1

_KIND: Final = "puna engine"
_TARGET: Final = "cpu"
_ALIGNMENT: Final = 64
_PAGE: Final = 4096
_MOST_HEADER_BYTES: Final = 100_000_000  # as the safetensors library has it
_DTYPES: Final = MappingProxyType(
    {"U8": torch.uint8, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
)
_CODES: Final = MappingProxyType({dtype: code for code, dtype in _DTYPES.items()})
_TOKENIZER_FILES: Final = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "1_Pooling/config.json",
)


TensorKind = tuple[tuple[int, ...], torch.dtype]  # shape and dtype


@dataclass(frozen=True)
class StoredTensor:
    """`offset` in bytes from the start of the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, kw_only=True)
class EngineDescription:
    """What the manifest says of the model.

    `config_fields` are those of a config.json in the dtype that the model runs in. `weight_formats` has, by the names
    of a checkpoint's tensors, the formats of weights that have another one than `quantization` stands for;
    `cache_scales` and `cache_dtype` are those of Checkpoint.
    """

    source: str
    quantization: str
    config_fields: Mapping[str, Any]
    weight_formats: Mapping[str, str]
    cache_scales: Mapping[int, tuple[float, float]] = field(default_factory=dict)
    cache_dtype: Literal["fp8"] | None = None

    def manifest(self, weight_bytes: int) -> dict[str, Any]:
        return {
            "kind": _KIND,
            "version": FORMAT_VERSION,
            "puna_version": __version__,
            "source": self.source,
            "target": _TARGET,
            "byte_order": sys.byteorder,
            "panel_layout": PANEL_LAYOUT,
            "quantization": self.quantization,
            "files": {WEIGHTS: weight_bytes},
            "config": dict(self.config_fields),
            "weight_formats": dict(self.weight_formats),
            "cache_scales": {str(layer): list(scales) for layer, scales in self.cache_scales.items()},
            "cache_dtype": self.cache_dtype,
        }


class EngineDirectory(Checkpoint):
    """Opens the directory. Its tensors are the model's parameters under their own names, not a checkpoint's.

    Raises FileNotFoundError where a file is missing, and ValueError, with what to do, for one that this puna or this
    machine can't use and for damaged files. No tensor is read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        manifest = FieldReader(read_json_object(folder / MANIFEST), str(folder / MANIFEST))
        self.description = _read_description(manifest)
        self._remedy = _remedy(manifest)
        self._generation_config = GenerationConfig.from_hugging_face(folder)
        sizes = manifest.child("files")
        self._tensors = _read_header(folder / WEIGHTS, sizes.count(WEIGHTS) if sizes else 0, self._remedy)

    @property
    def config_fields(self) -> Mapping[str, Any]:
        return self.description.config_fields

    @property
    def config_source(self) -> str:
        return str(self.folder / MANIFEST)

    @property
    def generation_config(self) -> GenerationConfig:
        return self._generation_config

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(sorted(self._tensors))

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors[name].shape

    def dtype(self, name: str) -> str:
        return str(self._tensors[name].dtype).removeprefix("torch.")

    def stored_bytes(self, name: str) -> int:
        return self._tensors[name].num_bytes

    def read(self, name: str, source: tuple[slice, ...]) -> Tensor:
        return _view(self._pages(), self._tensors[name])[source].clone()

    @property
    def cache_dtype(self) -> Literal["fp8"] | None:
        return self.description.cache_dtype

    @property
    def cache_scales(self) -> Mapping[int, tuple[float, float]]:
        return self.description.cache_scales

    def check_numbers(self, quantization: str | None, dtype: str | None) -> None:
        """Raises ValueError where a caller asks for other numbers than the directory holds."""
        mine = self.description.quantization
        if quantization not in (None, "stored", mine):
            raise ValueError(
                f"{self.folder} was built as {mine}, so its quantization can't be {quantization!r}: leave it out, or "
                f"{self._remedy}"
            )
        fixed = self.config_fields["torch_dtype"]
        if dtype not in (None, fixed):
            raise ValueError(
                f"{self.folder} was built for {fixed}, so its dtype can't be {dtype}: leave it out, or {self._remedy}"
            )

    def check(self, wanted: Mapping[str, TensorKind]) -> None:
        """Raises ValueError unless the file has exactly these tensors, (shape, dtype) by name."""
        for name in sorted(self._tensors.keys() ^ wanted.keys()):
            where = "lacks" if name in wanted else "has a tensor that the model does not use:"
            raise ValueError(f"{self.folder / WEIGHTS} {where} {name}: {self._remedy}")
        for name, (shape, dtype) in wanted.items():
            stored = self._tensors[name]
            if (stored.shape, stored.dtype) != (shape, dtype):
                raise ValueError(
                    f"{self.folder / WEIGHTS}: {name} is {stored.dtype} {list(stored.shape)}, and the model needs "
                    f"{dtype} {list(shape)}: {self._remedy}"
                )

    def map(self, wanted: Mapping[str, TensorKind]) -> dict[str, Tensor]:
        """The tensors as views of the mapped file, which processes share as long as none writes to one.

        Raises ValueError as `check` does. A tensor may be written to: the page is copied then, and the file stays as it
        is. (In a map that can only be read, a write would end the process instead.)
        """
        self.check(wanted)
        pages = self._pages()
        return {name: _view(pages, self._tensors[name]) for name in wanted}

    def _pages(self) -> mmap.mmap:
        with (self.folder / WEIGHTS).open("rb") as file:
            pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        pages.madvise(mmap.MADV_WILLNEED)  # what is not in memory yet is read ahead
        return pages


@contextmanager
def writing_engine(
    target: Path,
    description: EngineDescription,
    parameters: Mapping[str, TensorKind],
    other_files: Mapping[str, bytes],
) -> Iterator[dict[str, Tensor]]:
    """Gives the storage for a model's parameters: views, zero at first, of the file that is written.

    At the end of the block the directory appears under its name as a whole. Until then everything is in a hidden
    directory beside it, which goes away after an error; one that a killed process left goes with the next build of the
    same name. Raises ValueError where there is something at `target` already, other than an empty directory.
    """
    _check_target(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(target)
    staging = target.parent / f".{target.name}.building-{secrets.token_hex(6)}"
    staging.mkdir()
    lock = os.open(staging, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)  # says that this process lives
        header, entries = _lay_out(parameters)
        size = len(header) + sum(entry.num_bytes for entry in entries.values())
        with (staging / WEIGHTS).open("w+b") as file:
            _reserve(file.fileno(), size, target)
            pages = mmap.mmap(file.fileno(), size)
        pages[: len(header)] = header
        yield {name: _view(pages, entry) for name, entry in entries.items()}
        pages.flush()
        for name, content in {**other_files, MANIFEST: json_bytes(description.manifest(size))}.items():
            (staging / name).parent.mkdir(exist_ok=True)
            (staging / name).write_bytes(content)
        for path in (*staging.rglob("*"), staging):
            sync(path)
        _check_target(target)
        os.rename(staging, target)  # takes the place of an empty directory, too
        sync(target.parent)
    finally:
        os.close(lock)
        shutil.rmtree(staging, ignore_errors=True)


def text_files(checkpoint: Checkpoint) -> dict[str, bytes]:
    """The files beside the weights: what the tokenizer reads, and what is recommended for generating."""
    folder = checkpoint.folder
    if folder.is_file():
        found = {GGUF_TOKENIZER: GGUFFile(folder).without_tensors("tokenizer.")}
    else:
        templates = (
            f"additional_chat_templates/{path.name}" for path in folder.glob("additional_chat_templates/*.jinja")
        )
        names = (*_TOKENIZER_FILES, *templates)
        found = {name: (folder / name).read_bytes() for name in names if (folder / name).is_file()}
    return {**found, "generation_config.json": json_bytes(checkpoint.generation_config.to_hugging_face())}


def _read_description(manifest: FieldReader) -> EngineDescription:
    """What the manifest says, after a check that this puna and this machine can use the rest."""
    if manifest.text("kind") != _KIND:
        raise manifest.error("kind", manifest.value("kind"), repr(_KIND))
    again = _remedy(manifest)
    mine = (
        ("version", FORMAT_VERSION, manifest.integer("version"), "format of engine directories"),
        ("target", _TARGET, manifest.text("target"), "target"),
        ("byte_order", sys.byteorder, manifest.text("byte_order"), "byte order"),
        ("panel_layout", PANEL_LAYOUT, manifest.integer("panel_layout"), "layout of weights"),
    )
    for name, here, there, meaning in mine:
        if here != there:
            raise ValueError(
                f"{manifest.source}: {name} is {there!r}, and the {meaning} of puna {__version__} on this machine is "
                f"{here!r} (it was built by puna {manifest.text('puna_version', '?')}): {again}"
            )
    config, formats = manifest.child("config"), manifest.child("weight_formats")
    if config is None:
        raise manifest.error("config", None, "an object, the fields of a config.json")
    names = {} if formats is None else {name: formats.text(name) for name in formats.fields}
    return EngineDescription(
        source=manifest.text("source"),
        quantization=manifest.text("quantization"),
        config_fields=config.fields,
        weight_formats=names,
        cache_scales=_read_cache_scales(manifest.child("cache_scales")),
        cache_dtype=_read_cache_dtype(manifest),
    )


def _read_cache_dtype(manifest: FieldReader) -> Literal["fp8"] | None:
    value = manifest.value("cache_dtype")  # which older directories lack
    if value not in (None, "fp8"):
        raise manifest.error("cache_dtype", value, "null or 'fp8'")
    return None if value is None else "fp8"


def _read_cache_scales(reader: FieldReader | None) -> dict[int, tuple[float, float]]:
    found: dict[int, tuple[float, float]] = {}
    for layer, pair in ({} if reader is None else reader.fields).items():
        if not (isinstance(pair, list) and len(pair) == 2 and all(type(n) is float and n > 0 for n in pair)):
            raise ValueError(
                f"{MANIFEST}: cache_scales of layer {layer} are {pair!r}: they must be two positive numbers"
            )
        found[int(layer)] = (pair[0], pair[1])
    return found


def _remedy(manifest: FieldReader) -> str:
    return f"build it again from its source (puna build {manifest.text('source', 'MODEL')} -o DIRECTORY)"


def _read_header(file: Path, size: int, remedy: str) -> dict[str, StoredTensor]:
    """Where each tensor is. Raises FileNotFoundError, and ValueError for a file that is not whole."""
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing: copy it too, or {remedy}")
    found = file.stat().st_size
    if found != size:
        raise ValueError(f"{file} has {found} bytes, and {MANIFEST} says {size}: copy it again, or {remedy}")
    damaged = ValueError(f"{file} is damaged: copy it again, or {remedy}")
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if not 2 <= length <= min(_MOST_HEADER_BYTES, found - 8) or (8 + length) % _ALIGNMENT:
            raise damaged
        try:
            entries = json.loads(opened.read(length))
            tensors = {name: _entry(fields, 8 + length) for name, fields in entries.items() if name != "__metadata__"}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise damaged from error
    end = 8 + length
    for tensor in sorted(tensors.values(), key=lambda tensor: tensor.offset):
        if tensor.offset != end:
            raise damaged
        end += tensor.num_bytes
    if end != found:
        raise damaged
    return tensors


def _entry(fields: Any, data_start: int) -> StoredTensor:
    shape = tuple(fields["shape"])
    first, last = fields["data_offsets"]
    if any(type(number) is not int or number < 0 for number in (*shape, first, last)):
        raise ValueError("no sizes")
    tensor = StoredTensor(_DTYPES[fields["dtype"]], shape, data_start + first)
    if first + tensor.num_bytes != last or tensor.offset % tensor.dtype.itemsize:
        raise ValueError("not the size of the shape")
    return tensor


def _lay_out(parameters: Mapping[str, TensorKind]) -> tuple[bytes, dict[str, StoredTensor]]:
    """The header, and where the tensors go: first those that keep the next one aligned, then by width of numbers."""

    def order(name: str) -> tuple[bool, int]:
        shape, dtype = parameters[name]
        return math.prod(shape) * dtype.itemsize % _ALIGNMENT != 0, -dtype.itemsize

    relative: dict[str, StoredTensor] = {}
    end = 0
    for name in sorted(parameters, key=order):
        shape, dtype = parameters[name]
        relative[name] = StoredTensor(dtype, tuple(shape), end)
        end += relative[name].num_bytes
    fields: dict[str, Any] = {
        name: {
            "dtype": _CODES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [entry.offset, entry.offset + entry.num_bytes],
        }
        for name, entry in relative.items()
    }
    text = json.dumps({"__metadata__": {"format": _KIND}, **fields}, separators=(",", ":")).encode()
    length = -(-(8 + len(text)) // _PAGE) * _PAGE - 8
    header = length.to_bytes(8, "little") + text.ljust(length)
    placed = {name: StoredTensor(e.dtype, e.shape, e.offset + len(header)) for name, e in relative.items()}
    return header, placed


def _view(pages: mmap.mmap, tensor: StoredTensor) -> Tensor:
    count = math.prod(tensor.shape)
    return torch.frombuffer(pages, dtype=tensor.dtype, count=count, offset=tensor.offset).view(tensor.shape)


def _reserve(descriptor: int, size: int, target: Path) -> None:
    """Gives the file its size. On a full disk this is the error, where a write into the map would end the process."""
    if sys.platform == "darwin":
        os.ftruncate(descriptor, size)
        return
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(target)) from error


def _check_target(target: Path) -> None:
    if target.is_dir() and not any(target.iterdir()):
        return
    if target.exists():
        raise ValueError(f"{target} exists already: give another directory, or remove it")


def _remove_abandoned(target: Path) -> None:
    """Removes what builds of this target left behind whose process was killed."""
    for path in target.parent.glob(f".{glob.escape(target.name)}.building-*"):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:  # another one is at work
            continue
        finally:
            os.close(descriptor)
        shutil.rmtree(path, ignore_errors=True)
