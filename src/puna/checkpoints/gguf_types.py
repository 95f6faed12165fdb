"""The tensor types of GGUF files: their names and blocks, and the decoding of blocks into codes, scales and minimums.

Source: the block layouts of ggml (ggml-common.h), which the GGUF specification refers to. In the blocks of 256 values
(K) the scale of each group is itself a small integer times a float16 of the block; the product has at most 19 bits, so
it is exact in float32, and a `GroupQuantized` holds what the file does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

import numpy as np
import numpy.typing as npt
import torch

from puna.quantization.groups import GroupQuantized

_Bytes = npt.NDArray[np.uint8]
_Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class _Decoded:
    """Of m blocks: codes [m, values], scales and minimums [m, groups]."""

    codes: _Bytes
    scales: _Floats
    minimums: _Floats | None = None


@dataclass(frozen=True)
class TensorType:
    """`block_size` values lie in `block_bytes` bytes, 0 where puna does not support the type."""

    name: str
    block_size: int = 0
    block_bytes: int = 0
    group_size: int = 0
    zero: int = 0
    decode_blocks: Callable[[_Bytes], _Decoded] | None = None

    @property
    def is_supported(self) -> bool:
        return self.block_size > 0

    @property
    def is_quantized(self) -> bool:
        return self.decode_blocks is not None

    def decode(self, rows: _Bytes) -> GroupQuantized:
        """Bytes of whole blocks [n, blocks * block_bytes] -> a weight [n, blocks * block_size]."""
        if self.decode_blocks is None:
            raise ValueError(f"{self.name} is not a quantised type")
        count = rows.shape[0]
        decoded = self.decode_blocks(np.ascontiguousarray(rows).reshape(-1, self.block_bytes))
        minimums = None if decoded.minimums is None else torch.from_numpy(decoded.minimums).view(count, -1)
        return GroupQuantized(
            codes=torch.from_numpy(decoded.codes).view(count, -1),
            scales=torch.from_numpy(decoded.scales).view(count, -1),
            minimums=minimums,
            zero=self.zero,
            group_size=self.group_size,
        )


def _half(blocks: _Bytes, start: int) -> _Floats:
    """The float16 at a place of each block, [m, 1]."""
    return np.ascontiguousarray(blocks[:, start : start + 2]).view("<f2").astype(np.float32)


def _nibbles(packed: _Bytes, run: int) -> _Bytes:
    """[m, bytes] -> [m, 2 * bytes]: of each `run` bytes first all the low halves, then all the high ones."""
    parts = packed.reshape(len(packed), -1, run)
    codes = np.empty((len(packed), parts.shape[1], 2, run), dtype=np.uint8)
    np.bitwise_and(parts, 15, out=codes[:, :, 0])
    np.right_shift(parts, 4, out=codes[:, :, 1])
    return codes.reshape(len(packed), -1)


def _bit_pairs(packed: _Bytes) -> _Bytes:
    """[m, bytes] -> [m, 4 * bytes]: of each 32 bytes first all the lowest pairs of bits, then the next."""
    parts = packed.reshape(len(packed), -1, 1, 32)
    pairs: _Bytes = (parts >> np.array([0, 2, 4, 6], dtype=np.uint8)[:, None]) & np.uint8(3)
    return pairs.reshape(len(packed), -1)


def _bits(packed: _Bytes) -> _Bytes:
    """[m, 32] -> [m, 256]: first all the lowest bits, then the next."""
    bits: _Bytes = (packed[:, None, :] >> np.arange(8, dtype=np.uint8)[:, None]) & np.uint8(1)
    return bits.reshape(len(packed), -1)


def _q4_0(blocks: _Bytes) -> _Decoded:
    return _Decoded(_nibbles(blocks[:, 2:], 16), _half(blocks, 0))


def _q4_1(blocks: _Bytes) -> _Decoded:
    return _Decoded(_nibbles(blocks[:, 4:], 16), _half(blocks, 0), _half(blocks, 2))


def _five_bits(high: _Bytes, low: _Bytes) -> _Bytes:
    """The fifth bits of 32 values [m, 4], in the order of the values, and the others [m, 16]."""
    codes = _nibbles(low, 16)
    codes |= np.unpackbits(high, axis=1, bitorder="little") << np.uint8(4)
    return codes


def _q5_0(blocks: _Bytes) -> _Decoded:
    return _Decoded(_five_bits(blocks[:, 2:6], blocks[:, 6:]), _half(blocks, 0))


def _q5_1(blocks: _Bytes) -> _Decoded:
    return _Decoded(_five_bits(blocks[:, 4:8], blocks[:, 8:]), _half(blocks, 0), _half(blocks, 2))


def _q8_0(blocks: _Bytes) -> _Decoded:
    return _Decoded(blocks[:, 2:] ^ np.uint8(128), _half(blocks, 0))  # two's complement to an offset of 128


def _q2_k(blocks: _Bytes) -> _Decoded:
    scales = blocks[:, :16]
    return _Decoded(
        _bit_pairs(np.ascontiguousarray(blocks[:, 16:80])),
        _half(blocks, 80) * (scales & 15).astype(np.float32),
        -(_half(blocks, 82) * (scales >> 4).astype(np.float32)),
    )


def _q3_k(blocks: _Bytes) -> _Decoded:
    codes = _bit_pairs(np.ascontiguousarray(blocks[:, 32:96]))
    codes |= _bits(blocks[:, :32]) << np.uint8(2)
    # 16 scales of six bits: the low four as halves of bytes 0 to 7, the high two as pairs of bytes 8 to 11.
    scales = _nibbles(blocks[:, 96:104], 8)
    high = (blocks[:, None, 104:108] >> np.array([0, 2, 4, 6], dtype=np.uint8)[:, None]) & 3
    scales |= high.reshape(len(blocks), 16) << np.uint8(4)
    return _Decoded(codes, _half(blocks, 108) * (scales.astype(np.float32) - 32))


def _scales_and_minimums(packed: _Bytes) -> tuple[_Floats, _Floats]:
    """Eight scales and eight minimums of six bits each, from 12 bytes.

    The first four of each are the low bits of bytes 0 to 3 and 4 to 7; of the others the low four bits are the halves
    of bytes 8 to 11, and the high two bits the rest of bytes 0 to 3 and 4 to 7.
    """
    first, second, third = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = np.concatenate([first & 63, (third & 15) | ((first >> 6) << 4)], axis=1)
    minimums = np.concatenate([second & 63, (third >> 4) | ((second >> 6) << 4)], axis=1)
    return scales.astype(np.float32), minimums.astype(np.float32)


def _q4_k(blocks: _Bytes) -> _Decoded:
    scales, minimums = _scales_and_minimums(blocks[:, 4:16])
    return _Decoded(_nibbles(blocks[:, 16:], 32), _half(blocks, 0) * scales, -(_half(blocks, 2) * minimums))


def _q5_k(blocks: _Bytes) -> _Decoded:
    scales, minimums = _scales_and_minimums(blocks[:, 4:16])
    codes = _nibbles(blocks[:, 48:], 32)
    codes |= _bits(blocks[:, 16:48]) << np.uint8(4)
    return _Decoded(codes, _half(blocks, 0) * scales, -(_half(blocks, 2) * minimums))


def _q6_k(blocks: _Bytes) -> _Decoded:
    codes = _nibbles(blocks[:, :128], 64)
    codes |= _bit_pairs(np.ascontiguousarray(blocks[:, 128:192])) << np.uint8(4)
    scales = blocks[:, 192:208].view(np.int8).astype(np.float32)
    return _Decoded(codes, _half(blocks, 208) * scales)


# By the number in the file.
_SUPPORTED: Final[Mapping[int, TensorType]] = MappingProxyType(
    {
        0: TensorType("F32", 1, 4),
        1: TensorType("F16", 1, 2),
        2: TensorType("Q4_0", 32, 18, 32, 8, _q4_0),
        3: TensorType("Q4_1", 32, 20, 32, 0, _q4_1),
        6: TensorType("Q5_0", 32, 22, 32, 16, _q5_0),
        7: TensorType("Q5_1", 32, 24, 32, 0, _q5_1),
        8: TensorType("Q8_0", 32, 34, 32, 128, _q8_0),
        10: TensorType("Q2_K", 256, 84, 16, 0, _q2_k),
        11: TensorType("Q3_K", 256, 110, 16, 4, _q3_k),
        12: TensorType("Q4_K", 256, 144, 32, 0, _q4_k),
        13: TensorType("Q5_K", 256, 176, 32, 0, _q5_k),
        14: TensorType("Q6_K", 256, 210, 16, 32, _q6_k),
        30: TensorType("BF16", 1, 2),
    }
)
SUPPORTED_NAMES: Final = tuple(kind.name for kind in _SUPPORTED.values())

_OTHER_NAMES: Final = MappingProxyType(
    {
        9: "Q8_1",
        15: "Q8_K",
        16: "IQ2_XXS",
        17: "IQ2_XS",
        18: "IQ3_XXS",
        19: "IQ1_S",
        20: "IQ4_NL",
        21: "IQ3_S",
        22: "IQ2_S",
        23: "IQ4_XS",
        24: "I8",
        25: "I16",
        26: "I32",
        27: "I64",
        28: "F64",
        29: "IQ1_M",
        31: "Q4_0_4_4",
        32: "Q4_0_4_8",
        33: "Q4_0_8_8",
        34: "TQ1_0",
        35: "TQ2_0",
        39: "MXFP4",
        40: "NVFP4",
        41: "Q1_0",
    }
)


def tensor_type(number: int) -> TensorType:
    """The type of that number in a file; for one that puna does not decode only the name."""
    return _SUPPORTED.get(number) or TensorType(_OTHER_NAMES.get(number, f"type {number}"))
