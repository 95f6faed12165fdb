"""FP8 checkpoints: what their makers' configs say, and which tensors of a folder are in FP8 with which scales.

Three styles are read, whose weights are e4m3 numbers times `weight_scale` (or `weight_scale_inv`, which is no inverse):
compressed-tensors (llm-compressor), ModelOpt, and "fp8" (DeepSeek's and Qwen3's blocks, and AutoFP8). The files' own
shapes and dtypes say how each weight is scaled, and which are not in FP8; a config only has to promise nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, Literal

import torch
from torch import Tensor

from puna.checkpoints.safetensors_files import SafetensorsFiles
from puna.config import read_json_object
from puna.config.fields import FieldReader
from puna.ops.scaled import SCALE_BLOCK, ScaledWeight
from puna.quantization.quantized import Fp8Quantized

MODELOPT_FILE: Final = "hf_quant_config.json"
_STORED_AS: Final = "F8_E4M3"
_REMEDY: Final = (
    "puna reads FP8 of compressed-tensors, ModelOpt and the method 'fp8'; use one of these, a GGUF file, or the "
    "checkpoint's float32, bfloat16 or float16 original"
)
# Beside a weight, and beside an attention layer's parts in the names that these had over the years.
_WEIGHT_SCALES: Final = ("weight_scale", "weight_scale_inv")
_KEY_SCALES: Final = ("k_scale", "k_proj.k_scale", "k_proj.output_scale", "kv_scale")
_VALUE_SCALES: Final = ("v_scale", "v_proj.v_scale", "v_proj.output_scale", "kv_scale")
_UNUSED_SCALES: Final = ("q_scale", "q_proj.q_scale", "q_proj.output_scale", "prob_scale", "prob_output_scale")
_ATTENTION: Final = re.compile(r"model\.layers\.(\d+)\.self_attn\.(.+)")
_MODELOPT: Final = MappingProxyType({"FP8": True, "FP8_PER_CHANNEL_PER_TOKEN": False})


@dataclass(frozen=True)
class Fp8Scheme:
    """What a config says: `static_inputs` whether weights come with a scale for their inputs; None where some may."""

    static_inputs: bool | None


def read_scheme(fields: Mapping[str, Any], folder: Path) -> Fp8Scheme | None:
    """The scheme that a config.json, or ModelOpt's file beside it, names; None for weights that are not quantised.

    Raises ValueError, with the remedy, for every other kind of quantisation.
    """
    quantization = _quantization(fields, folder)
    if quantization is None:
        return None
    method = quantization.text("quant_method", "unnamed")
    if method == "compressed-tensors":
        return _compressed_tensors(quantization)
    if method == "modelopt":
        return _modelopt(quantization)
    if method == "fp8":
        return _fp8(quantization)
    raise ValueError(f"{quantization.source}: the quantization method {method!r} is not supported: {_REMEDY}")


def read_cache_dtype(fields: Mapping[str, Any], folder: Path) -> Literal["fp8"] | None:
    """What the same files say of keys and values, if `read_scheme` takes them; None where they say nothing."""
    quantization = _quantization(fields, folder)
    if quantization is None:
        return None
    scheme, algorithm = quantization.value("kv_cache_scheme"), quantization.value("kv_cache_quant_algo")
    is_fp8 = isinstance(scheme, dict) or scheme == "static" or str(algorithm).upper() == "FP8"
    return "fp8" if is_fp8 else None


def _quantization(fields: Mapping[str, Any], folder: Path) -> FieldReader | None:
    """What is said of the quantisation in config.json or else in ModelOpt's file, which has no other method."""
    found = FieldReader(fields, str(folder / "config.json")).child("quantization_config")
    if found is not None or not (folder / MODELOPT_FILE).is_file():
        return found
    found = FieldReader(read_json_object(folder / MODELOPT_FILE), str(folder / MODELOPT_FILE)).child("quantization")
    return None if found is None else FieldReader({**found.fields, "quant_method": "modelopt"}, found.source)


def _compressed_tensors(reader: FieldReader) -> Fp8Scheme | None:
    groups = reader.child("config_groups")
    _check_cache(reader.child("kv_cache_scheme"))
    sparsity = reader.child("sparsity_config")
    if sparsity is not None:
        _require(sparsity, {"format": (None, "dense")})
    _require(reader, {"transform_config": (None, {})})
    if groups is None:  # only the cache is quantised
        return None
    static = set()
    for name in groups.fields:
        group = groups.child(name)
        weights = None if group is None else group.child("weights")
        if group is None or weights is None:
            raise groups.error(name, groups.value(name), "an object with weights")
        _require(reader, {"format": (None, "float-quantized", "naive-quantized")})
        _require(weights, {"num_bits": (8,), "type": ("float",), "symmetric": (None, True), "dynamic": (None, False)})
        _require(weights, {"strategy": ("tensor", "channel", "block")})
        if weights.value("strategy") == "block":
            _require(weights, {"block_structure": ([SCALE_BLOCK, SCALE_BLOCK], f"{SCALE_BLOCK}x{SCALE_BLOCK}")})
        inputs = group.child("input_activations")
        if inputs is None:
            raise ValueError(
                f"{group.source}: input_activations is null, but puna multiplies FP8 weights with FP8 inputs: quantise "
                "with the scheme FP8_DYNAMIC, or use the original with quantization='fp8'"
            )
        _require(inputs, {"num_bits": (8,), "type": ("float",), "symmetric": (None, True), "dynamic": (True, False)})
        if inputs.value("dynamic", False):
            _require(inputs, {"strategy": ("group",) if weights.value("strategy") == "block" else ("token",)})
            _require(inputs, {"group_size": (None, SCALE_BLOCK)})
        else:
            _require(inputs, {"strategy": ("tensor",)})
        if group.child("output_activations") is not None:
            raise _unsupported(group, "output_activations")
        static.add(not inputs.value("dynamic", False))
    return Fp8Scheme(static.pop() if len(static) == 1 else None)


def _modelopt(reader: FieldReader) -> Fp8Scheme | None:
    for name in ("kv_cache_quant_algo", "kv_cache_scheme"):
        cache = reader.value(name)
        if isinstance(cache, str) and cache.upper() != "FP8":
            raise _unsupported(reader, name)
        if isinstance(cache, dict):
            _check_cache(reader.child(name))
    algorithm = reader.value("quant_algo")
    if algorithm is None:  # only the cache is quantised
        return None
    if algorithm not in _MODELOPT:
        raise _unsupported(reader, "quant_algo")
    return Fp8Scheme(_MODELOPT[str(algorithm)])


def _fp8(reader: FieldReader) -> Fp8Scheme:
    _require(reader, {"fmt": (None, "e4m3"), "scale_fmt": (None, "float"), "activation_scheme": ("dynamic", "static")})
    _require(reader, {"weight_block_size": (None, [SCALE_BLOCK, SCALE_BLOCK])})
    _require(reader, {"kv_cache_scheme": (None, "static")})
    return Fp8Scheme(reader.value("activation_scheme") == "static")


def _check_cache(scheme: FieldReader | None) -> None:
    if scheme is not None:
        _require(scheme, {"num_bits": (8,), "type": ("float",), "strategy": (None, "tensor"), "dynamic": (None, False)})


def _require(reader: FieldReader, choices: Mapping[str, tuple[object, ...]]) -> None:
    for name, allowed in choices.items():
        if reader.value(name) not in allowed:
            raise _unsupported(reader, name)


def _unsupported(reader: FieldReader, name: str) -> ValueError:
    return ValueError(f"{reader.source}: {name} is {reader.value(name)!r}, which is not supported: {_REMEDY}")


@dataclass(frozen=True)
class _Entry:
    """The tensors beside a weight: its scales, of this kind ("fp8" for one a tensor or a channel), and its inputs'."""

    scales: str
    input_scale: str | None
    format: str


class Fp8Tensors:
    """The weights of a folder that are in FP8; `companions` are the names of the scales, which are no model's weights.

    Raises ValueError for weights without scales, or with scales of another shape.
    """

    def __init__(self, files: SafetensorsFiles, scheme: Fp8Scheme | None, source: str) -> None:
        self._files, self._source = files, source
        names = set(files.names)
        self._entries = {
            name: self._entry(name, names, scheme)
            for name in files.names
            if scheme is not None and files.dtype(name) == _STORED_AS
        }
        self._cache_names = dict(self._find_cache_scales(names))
        companions = {entry.scales for entry in self._entries.values()}
        companions |= {name for scales in self._cache_names.values() for name in scales}
        for name in names:
            attention = _ATTENTION.fullmatch(name)
            if attention is not None and attention[2] in _UNUSED_SCALES:
                companions.add(name)
            # Some makers write the scales of inputs that are rounded anew, row by row.
            if name.endswith(".input_scale") and f"{name.removesuffix('input_scale')}weight" in self._entries:
                companions.add(name)
        self.companions = frozenset(companions)

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def format(self, name: str) -> str:
        """The name of the weight format that holds the tensor as it is."""
        return self._entries[name].format

    def stored_bytes(self, name: str) -> int:
        rows, columns = self._files.shape(name)
        return rows * columns + 4 * torch.Size(self._files.shape(self._entries[name].scales)).numel()

    def read_dense(self, name: str, source: tuple[slice, ...]) -> Tensor:
        """The slices in float32."""
        values = self._files.read(name, source).float()
        if self._entries[name].format != "fp8-block":
            return values * self._scales(name, source)
        rows, columns = source
        scales = self._scales(name, source)
        scales = scales.repeat_interleave(SCALE_BLOCK, 0)[rows.start % SCALE_BLOCK :][: values.shape[0]]
        return values * scales.repeat_interleave(SCALE_BLOCK, 1)[:, columns.start % SCALE_BLOCK :][:, : values.shape[1]]

    def read(self, name: str, source: tuple[slice, ...]) -> Fp8Quantized | None:
        """The slices as they are; None where they cut a block."""
        entry = self._entries[name]
        if entry.format == "fp8-block" and cuts_blocks(source, self._files.shape(name)):
            return None
        input_scale = None if entry.input_scale is None else self._single(entry.input_scale).view(1)
        return Fp8Quantized(ScaledWeight(self._files.read(name, source), self._scales(name, source)), input_scale)

    @property
    def cache_scales(self) -> dict[int, tuple[float, float]]:
        """See Checkpoint.cache_scales."""
        read = {
            layer: (self._single(key).item(), self._single(value).item())
            for layer, (key, value) in self._cache_names.items()
        }
        return {layer: scales for layer, scales in read.items() if scales != (1.0, 1.0)}

    def _entry(self, name: str, names: set[str], scheme: Fp8Scheme | None) -> _Entry:
        base = name.removesuffix("weight")
        scales = next((base + suffix for suffix in _WEIGHT_SCALES if base + suffix in names), None)
        shape = self._files.shape(name)
        if scales is None or len(shape) != 2 or not name.endswith(".weight"):
            raise ValueError(
                f"{self._source}: {name} is in FP8, but has no {base}weight_scale: fetch the files again, or {_REMEDY}"
            )
        rows, columns = shape
        found = self._files.shape(scales)
        blocks = (-(-rows // SCALE_BLOCK), -(-columns // SCALE_BLOCK))
        is_row_scale = found in ((), (1,), (1, 1), (rows,), (rows, 1))
        if not is_row_scale and found != blocks:
            raise ValueError(
                f"{self._source}: {scales} has the shape {list(found)}: for {name} of {list(shape)} it must be one "
                f"number, {[rows, 1]}, or {list(blocks)} for blocks of {SCALE_BLOCK}x{SCALE_BLOCK}"
            )
        if not is_row_scale:
            return _Entry(scales, None, "fp8-block")
        own = f"{base}input_scale"
        if scheme is None or scheme.static_inputs is False or (scheme.static_inputs is None and own not in names):
            return _Entry(scales, None, "fp8")
        if own not in names:
            raise ValueError(
                f"{self._source}: {name} must have a scale for its inputs, but there is no {own}: fetch the files again"
            )
        return _Entry(scales, own, "fp8-static")

    def _find_cache_scales(self, names: set[str]) -> Iterator[tuple[int, tuple[str, str]]]:
        prefixes = {match[1] for match in map(_ATTENTION.fullmatch, names) if match is not None}
        for layer in sorted(prefixes, key=int):
            prefix = f"model.layers.{layer}.self_attn."
            key, value = (
                next((prefix + suffix for suffix in suffixes if prefix + suffix in names), None)
                for suffixes in (_KEY_SCALES, _VALUE_SCALES)
            )
            if key is not None and value is not None:
                yield int(layer), (key, value)

    def _scales(self, name: str, source: tuple[slice, ...]) -> Tensor:
        """float32 [1], [n, 1], or of all blocks that the slices touch."""
        scales, (rows, columns) = self._entries[name].scales, source
        shape = self._files.shape(scales)
        if self._entries[name].format == "fp8-block":
            touched = tuple(slice(part.start // SCALE_BLOCK, -(-part.stop // SCALE_BLOCK)) for part in (rows, columns))
            return self._files.read(scales, touched).float()
        if torch.Size(shape).numel() == 1:
            return self._single(scales).view(1)
        return self._files.read(scales, (rows, *(slice(0, 1) for _ in shape[1:]))).float().view(-1, 1)

    def _single(self, name: str) -> Tensor:
        """A scale that stands alone, float32. Raises ValueError for one that can't be a scale."""
        shape = self._files.shape(name)
        value = self._files.read(name, tuple(slice(0, size) for size in shape)).float()
        if value.numel() != 1 or not 0 < value.item() < float("inf"):
            raise ValueError(f"{self._source}: {name} is {value.tolist()}: it must be one positive number")
        return value


def cuts_blocks(source: tuple[slice, ...], shape: tuple[int, ...]) -> bool:
    """Whether slices of a matrix begin or end inside of a block of scales."""
    return any(
        part.start % SCALE_BLOCK or (part.stop % SCALE_BLOCK and part.stop != size)
        for part, size in zip(source, shape, strict=True)
    )
