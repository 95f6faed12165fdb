"""GGUFCheckpoint: a model in llama.cpp's file format, its tensors under Hugging Face's names and in their row order."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from puna.checkpoints.base import Checkpoint
from puna.checkpoints.gguf_config import EMBEDDING, HEAD, ROPE_FACTORS, config_fields
from puna.checkpoints.gguf_file import GGUFFile, TensorEntry
from puna.checkpoints.gguf_types import SUPPORTED_NAMES
from puna.checkpoints.gguf_vocabulary import read_generation_config
from puna.checkpoints.rotary_order import rows_of_halves
from puna.config import GenerationConfig
from puna.quantization.groups import GroupQuantized

_TOP: Final = MappingProxyType(
    {EMBEDDING: "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight", HEAD: "lm_head.weight"}
)
_LAYER: Final = MappingProxyType(
    {
        "attn_norm": "input_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "attn_q_norm": "self_attn.q_norm",
        "attn_k_norm": "self_attn.k_norm",
        "ffn_norm": "post_attention_layernorm",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
        "ffn_gate_inp": "block_sparse_moe.gate",
    }
)
_EXPERT: Final = MappingProxyType({"ffn_gate": "w1", "ffn_down": "w2", "ffn_up": "w3"})
_LAYER_NAME: Final = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
# One tensor for each expert, as files had them until the spring of 2024.
_SPLIT_EXPERT_NAME: Final = re.compile(r"blk\.(\d+)\.(ffn_gate|ffn_down|ffn_up)\.(\d+)\.weight")
_SHARD_NAME: Final = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")

_FLOATS: Final = MappingProxyType({"F32": "float32", "F16": "float16", "BF16": "bfloat16"})
# Rows are decoded so many values at a time: steps in between stay in the cache (three times as fast as whole matrices),
# and what is needed beside the result stays small.
_CHUNK_VALUES: Final = 1 << 19


@dataclass(frozen=True)
class _Source:
    """Where a tensor of ours is: in one of a file's, or in one expert's rows of it."""

    entry: TensorEntry
    shape: tuple[int, ...]
    first_row: int = 0
    is_rotated: bool = False


class GGUFCheckpoint(Checkpoint):
    """Opens a .gguf file, or the first of a split model; `folder` is the path of the file.

    Raises FileNotFoundError for a missing part, and ValueError for a damaged file, an architecture that puna does not
    run, and tensors of a type that it does not read.
    """

    def __init__(self, path: Path) -> None:
        self.folder = path
        self._file, entries = _open_parts(path)
        for name, entry in entries.items():
            if not entry.type.is_supported:
                raise ValueError(
                    f"{path}: {name} is stored as {entry.type.name}, which puna does not read: take a file with "
                    f"{', '.join(SUPPORTED_NAMES)}, such as a Q4_K_M or Q8_0 one"
                )
            if entry.type.is_quantized and len(entry.shape) == 1:
                raise ValueError(f"{path}: {name} is a vector stored as {entry.type.name}: the file is damaged")
        self._fields = config_fields(self._file, entries)
        self._head_size = self._fields["head_dim"]
        # llama.cpp's llama rotates neighbouring channels, its other architectures the halves as Hugging Face's do.
        is_rotated = self._file.value("general.architecture") == "llama"
        self._sources = _name_tensors(entries, is_rotated)

    @property
    def config_fields(self) -> Mapping[str, Any]:
        return self._fields

    @property
    def config_source(self) -> str:
        return str(self.folder)

    @cached_property
    def _generation_config(self) -> GenerationConfig:
        return read_generation_config(self._file)

    @property
    def generation_config(self) -> GenerationConfig:
        return self._generation_config

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(sorted(self._sources))

    def shape(self, name: str) -> tuple[int, ...]:
        return self._sources[name].shape

    def dtype(self, name: str) -> str:
        type_name = self._sources[name].entry.type.name
        return _FLOATS.get(type_name, type_name)

    def stored_bytes(self, name: str) -> int:
        where = self._sources[name]
        return where.entry.num_bytes * math.prod(where.shape) // math.prod(where.entry.shape)  # an expert's part

    def is_quantized(self, name: str) -> bool:
        return self._sources[name].entry.type.is_quantized

    def read(self, name: str, source: tuple[slice, ...]) -> Tensor:
        """In float32 for quantised types: what the `gguf` package's dequantisation gives, to the bit."""
        where = self._sources[name]
        kind = where.entry.type
        if not kind.is_quantized:
            return self._read_floats(where, source)
        columns, size = source[1], kind.block_size
        blocks = slice(columns.start // size, -(-columns.stop // size))
        inside = slice(columns.start - blocks.start * size, columns.stop - blocks.start * size)
        result = torch.empty(source[0].stop - source[0].start, columns.stop - columns.start)
        for place, rows in self._row_chunks(where, source[0]):
            result[place] = kind.decode(_blocks(rows, blocks, kind.block_bytes)).dequantize()[:, inside]
        return result

    def read_quantized(self, name: str, source: tuple[slice, ...]) -> GroupQuantized | None:
        where = self._sources[name]
        kind = where.entry.type
        columns = source[1] if len(source) > 1 else slice(0, 0)
        group = kind.group_size
        if not kind.is_quantized or columns.start % group or columns.stop % group:
            return None
        blocks = slice(columns.start // kind.block_size, -(-columns.stop // kind.block_size))
        codes_inside = slice(
            columns.start - blocks.start * kind.block_size, columns.stop - blocks.start * kind.block_size
        )
        groups_inside = slice(codes_inside.start // group, codes_inside.stop // group)
        rows_count, width = source[0].stop - source[0].start, columns.stop - columns.start
        codes = torch.empty(rows_count, width, dtype=torch.uint8)
        scales = torch.empty(rows_count, width // group)
        minimums: Tensor | None = None
        for place, rows in self._row_chunks(where, source[0]):
            part = kind.decode(_blocks(rows, blocks, kind.block_bytes))
            codes[place], scales[place] = part.codes[:, codes_inside], part.scales[:, groups_inside]
            if part.minimums is not None:
                minimums = torch.empty_like(scales) if minimums is None else minimums
                minimums[place] = part.minimums[:, groups_inside]
        return GroupQuantized(codes, scales, minimums, kind.zero, group)

    def _read_floats(self, where: _Source, source: tuple[slice, ...]) -> Tensor:
        rows = where.entry.rows()
        if len(where.shape) == 1:
            rows = rows.reshape(where.shape[0], -1)  # one value a row, so that a rotated bias is reordered as well
        size = where.entry.type.block_bytes
        columns = source[1] if len(source) > 1 else slice(0, 1)
        index = self._stored_rows(where, source[0])
        part = np.ascontiguousarray(rows[index, columns.start * size : columns.stop * size])
        dtype = getattr(torch, _FLOATS[where.entry.type.name])
        # A copy of its own: ascontiguousarray gives back a part that lies in one piece as it is, still mapped.
        values = torch.from_numpy(np.array(part)).view(dtype)
        return values.view([axis.stop - axis.start for axis in source])

    def _stored_rows(self, where: _Source, wanted: slice) -> slice | npt.NDArray[np.int64]:
        """Which rows of the file's tensor hold these rows of ours."""
        if not where.is_rotated:
            return slice(where.first_row + wanted.start, where.first_row + wanted.stop)
        return rows_of_halves(where.shape[0], self._head_size)[wanted].numpy()

    def _row_chunks(self, where: _Source, wanted: slice) -> Iterator[tuple[slice, npt.NDArray[np.uint8]]]:
        """The stored bytes of some rows at a time, and their place among those that are wanted."""
        stored, index = where.entry.rows(), self._stored_rows(where, wanted)
        step = max(1, _CHUNK_VALUES // max(1, where.shape[-1]))
        count = wanted.stop - wanted.start
        for start in range(0, count, step):
            place = slice(start, min(start + step, count))
            if isinstance(index, slice):
                yield place, stored[index.start + place.start : index.start + place.stop]
            else:
                yield place, stored[index[place]]


def _blocks(rows: npt.NDArray[np.uint8], blocks: slice, block_bytes: int) -> npt.NDArray[np.uint8]:
    return rows[:, blocks.start * block_bytes : blocks.stop * block_bytes]


def _open_parts(path: Path) -> tuple[GGUFFile, dict[str, TensorEntry]]:
    """The first file of a model, which has the metadata, and the tensors of all its files."""
    first = GGUFFile(path)
    count = first.value("split.count", 1)
    if count <= 1:
        return first, dict(first.tensors)
    named = _SHARD_NAME.fullmatch(path.name)
    if named is None or int(named[3]) != count:
        raise ValueError(f"{path} is one of {count} parts: give it the name that it had, ...-00001-of-{count:05d}.gguf")
    if first.value("split.no", 0) != 0:
        raise ValueError(f"{path} is not the first part: give {named[1]}-00001-of-{count:05d}.gguf")
    entries = dict(first.tensors)
    for number in range(2, count + 1):
        part = path.with_name(f"{named[1]}-{number:05d}-of-{count:05d}.gguf")
        if not part.is_file():
            raise FileNotFoundError(f"{path.name} is the first of {count} parts, and there is no {part}: fetch it")
        for name, entry in GGUFFile(part).tensors.items():
            if name in entries:
                raise ValueError(f"{name} is in {entries[name].file} and in {part}: fetch the parts again")
            entries[name] = entry
    return first, entries


def _name_tensors(entries: Mapping[str, TensorEntry], is_rotated: bool) -> dict[str, _Source]:
    """The tensors under our names; those that are nothing of ours keep theirs, for the loader to refuse."""
    has_experts = "blk.0.ffn_gate_inp.weight" in entries
    sources: dict[str, _Source] = {}
    for name, entry in entries.items():
        if name == ROPE_FACTORS:  # a part of the config
            continue
        layer, split = _LAYER_NAME.fullmatch(name), _SPLIT_EXPERT_NAME.fullmatch(name)
        if split is not None:
            ours = f"model.layers.{split[1]}.block_sparse_moe.experts.{split[3]}.{_EXPERT[split[2]]}.weight"
            sources[ours] = _Source(entry, entry.shape)
        elif layer is not None and layer[2] in _LAYER:
            part = _LAYER[layer[2]]
            rotated = is_rotated and layer[2] in ("attn_q", "attn_k")
            sources[f"model.layers.{layer[1]}.{part}.{layer[3]}"] = _Source(entry, entry.shape, is_rotated=rotated)
        elif layer is not None and has_experts and layer[2].removesuffix("_exps") in _EXPERT and len(entry.shape) == 3:
            part = _EXPERT[layer[2].removesuffix("_exps")]
            experts, rows, columns = entry.shape
            for expert in range(experts):
                ours = f"model.layers.{layer[1]}.block_sparse_moe.experts.{expert}.{part}.{layer[3]}"
                sources[ours] = _Source(entry, (rows, columns), first_row=expert * rows)
        else:
            sources[_TOP.get(name, name)] = _Source(entry, entry.shape)
    return sources
