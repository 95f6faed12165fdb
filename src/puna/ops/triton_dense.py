"""Linear layers over plain matrices on GPUs: our kernel for few rows and in deterministic mode, torch's for the rest.

cuBLAS chooses a kernel, and so an order of sums, by the number of rows, and may add up parts of the inputs in any
order.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from puna.ops import reference, triton_tuning
from puna.ops.triton_device import multiprocessors
from puna.ops.triton_matrix import TILES, USUAL_TILES, Tile, launch, ranked_tiles
from puna.ops.triton_pointwise import gated_activation

_LIBRARY: Final = "library"
_APART: Final = "apart"
# Rows up to which our kernel is the default: by count it keeps up with the memory there, in one launch.
_FEW_ROWS: Final = 32
# Rows up to which it is worth measuring.
_MEASURED_ROWS: Final = 64
# Deterministic mode: the tile depends on the weight alone. 64 outputs a program where that is what gives most of an
# H200's 132 multiprocessors one; float32 is multiplied without tensor cores, which would round it to tf32.
_NARROW: Final = TILES["64x64"]
_WIDE: Final = TILES["128x64"]
_FLOAT32: Final = Tile(64, 32, 128, stages=3)
_WIDE_OUTPUTS: Final = 128 * 132
# What loads of 16 bytes ask of a row.
_ALIGNMENT: Final = 16


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, *, deterministic: bool = False
) -> Tensor:
    """reference.linear, with sums in float32 that are rounded once; which tile, or torch's own kernel, is a matter of
    measurement.

    deterministic: in one tile for any number of rows, so that a row's bits do not depend on the others. Raises
    ValueError where x, the weight and the bias are not of one dtype.
    """
    _check(x, weight, bias)
    if deterministic and _has_kernel(x):
        return launch(x, weight, bias, dtype, _one_tile(weight)).values
    variants = _tiles(x, weight)
    if not variants:
        return _library(x, weight, bias, dtype)

    def run(variant: str) -> Tensor:
        if variant == _LIBRARY:
            return _library(x, weight, bias, dtype)
        return launch(x, weight, bias, dtype, TILES[variant]).values

    default = variants[0] if _rows(x) <= _FEW_ROWS else _LIBRARY
    shape = (_rows(x), *weight.shape, str(x.dtype), str(dtype))
    return run(triton_tuning.current().choose("linear/1", shape, default, (*variants, _LIBRARY), run))


def gated_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, *, deterministic: bool = False
) -> Tensor:
    """reference.gated_linear: few rows in one launch.

    deterministic: as in linear.
    """
    _check(x, weight, bias)
    if deterministic and _has_kernel(x):
        return launch(x, weight, bias, x.dtype, _one_tile(weight), activation).values

    def run(variant: str) -> Tensor:
        if variant == _APART:
            return gated_activation(linear(x, weight, bias, x.dtype), activation)
        return launch(x, weight, bias, x.dtype, TILES[variant], activation).values

    variants = _tiles(x, weight)
    if not variants:
        return run(_APART)
    default = variants[0] if _rows(x) <= _FEW_ROWS else _APART
    shape = (_rows(x), *weight.shape, str(x.dtype))
    return run(triton_tuning.current().choose("gated_linear/1", shape, default, (*variants, _APART), run))


def _check(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if weight.dtype != x.dtype or (bias is not None and bias.dtype != x.dtype):
        found = ", ".join(str(part.dtype) for part in (x, weight, bias) if part is not None)
        raise ValueError(f"a linear layer of {found}: they must be of one dtype")


def _has_kernel(x: Tensor) -> bool:
    return x.dtype in (torch.bfloat16, torch.float16, torch.float32)


def _rows(x: Tensor) -> int:
    return triton_tuning.bucket(x.numel() // x.shape[-1])


def _tiles(x: Tensor, weight: Tensor) -> tuple[str, ...]:
    """The tiles that are worth measuring; none where the kernel is not."""
    outputs, inputs = weight.shape
    row_bytes = inputs * weight.element_size()
    if x.dtype not in (torch.bfloat16, torch.float16) or _rows(x) > _MEASURED_ROWS or row_bytes % _ALIGNMENT:
        return ()
    return ranked_tiles(USUAL_TILES, _rows(x), outputs, row_bytes, False, multiprocessors(x.device))


def _one_tile(weight: Tensor) -> Tile:
    if weight.dtype == torch.float32:
        return _FLOAT32
    return _WIDE if weight.shape[0] >= _WIDE_OUTPUTS else _NARROW


def _library(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """torch's own kernel. On GPUs it has the sums in float32 too, of 16-bit matrices, and without a bias."""
    if dtype != torch.float32 or x.dtype not in (torch.bfloat16, torch.float16) or x.device.type != "cuda":
        return reference.linear(x, weight, bias, dtype)
    y = torch.mm(x.reshape(-1, x.shape[-1]), weight.t(), out_dtype=dtype).view(*x.shape[:-1], weight.shape[0])
    return y if bias is None else y + bias
