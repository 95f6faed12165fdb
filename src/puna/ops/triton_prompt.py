"""Attention of whole prompts to themselves, without the cache: our kernel or PyTorch's own, as measured."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Sequence
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor

from puna.ops import triton_tuning
from puna.ops.triton_attention import packed_attention

try:
    from torch.nn.attention import varlen
except ImportError:  # before PyTorch 2.10
    varlen = None  # type: ignore[assignment]

# scaled_dot_product_attention gets prompts of multiples of so many tokens: see variants.
_PLANNED_LENGTHS: Final = 128


def prompt_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Sequence[int],
    scale: float,
    sliding_window: int | None,
    *,
    deterministic: bool = False,
) -> Tensor:
    """reference.prompt_attention -> [T, H, D]

    deterministic: with the bits of triton_attention.paged_attention's own over a cache of the query's dtype.
    """
    lengths = tuple(lengths)
    if deterministic:
        starts, counts = _on_device(lengths, query.device)
        return packed_attention(query, key, value, starts, counts, scale, sliding_window, deterministic=True)
    longest = max(lengths)
    if sliding_window is not None and sliding_window >= longest:
        sliding_window = None

    def run(variant: str) -> Tensor:
        return run_variant(variant, query, key, value, lengths, scale, sliding_window)

    names = variants(query, lengths, sliding_window)
    bucket = triton_tuning.bucket
    shape = (bucket(len(lengths)), bucket(longest), query.shape[1], key.shape[1], query.shape[2], str(query.dtype))
    # Where nothing was measured: one launch for many short prompts, PyTorch's kernels for few long ones.
    default = names[-1] if longest >= 1024 and len(lengths) <= 8 else "triton"
    return run(triton_tuning.current().choose("prompt_attention/1", (*shape, *names[1:]), default, names, run))


def variants(query: Tensor, lengths: tuple[int, ...], sliding_window: int | None) -> tuple[str, ...]:
    """Those that may serve these prompts, PyTorch's best guess last: these have no windows that are worth it, and
    "varlen" no float32.

    Of the library's, cuDNN's comes first on Hopper, and takes 20 to 40 ms of the host for each length and number of
    prompts that a thread has not had yet, to plan its kernel: so it gets lengths of which there are few.
    """
    if sliding_window is not None or query.device.type != "cuda":
        return ("triton",)
    if query.dtype == torch.float32 or not {"scale", "window_size"} <= _varlen_arguments():
        return ("triton", "library")
    if any(length % _PLANNED_LENGTHS for length in lengths) or len(set(lengths)) > 1:
        return ("triton", "varlen")
    return ("triton", "varlen", "library")


def run_variant(
    variant: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: tuple[int, ...],
    scale: float,
    sliding_window: int | None,
) -> Tensor:
    """prompt_attention by one of `variants`. Those of PyTorch's know no window."""
    if variant == "library":
        return _library(query, key, value, lengths, scale)
    starts, counts = _on_device(lengths, query.device)
    if variant == "varlen":
        longest = max(lengths)
        grouped = query.shape[1] != key.shape[1]
        more: dict[str, Any] = {"enable_gqa": grouped} if "enable_gqa" in _varlen_arguments() else {}
        result = varlen.varlen_attn(
            query, key, value, starts, starts, longest, longest, scale=scale, window_size=(-1, 0), **more
        )
        assert isinstance(result, Tensor)  # not a pair: nothing else was asked for
        return result
    return packed_attention(query, key, value, starts, counts, scale, sliding_window, deterministic=False)


@functools.cache
def _varlen_arguments() -> frozenset[str]:
    """What varlen_attn takes, which differs between PyTorch 2.10, 2.11 and 2.12. Before "enable_gqa" heads could share
    keys without a word."""
    return frozenset() if varlen is None else frozenset(inspect.signature(varlen.varlen_attn).parameters)


def _library(query: Tensor, key: Tensor, value: Tensor, lengths: tuple[int, ...], scale: float) -> Tensor:
    """scaled_dot_product_attention, which picks cuDNN's kernel or FlashAttention: one call for each run of prompts that
    are of one length."""
    grouped = query.shape[1] != key.shape[1]
    output = torch.empty_like(query, memory_format=torch.contiguous_format)
    first = start = 0
    while first < len(lengths):
        length, same = lengths[first], 1
        while first + same < len(lengths) and lengths[first + same] == length:
            same += 1
        rows = slice(start, start + same * length)
        q, k, v = (part[rows].view(same, length, *part.shape[1:]).transpose(1, 2) for part in (query, key, value))
        one = F.scaled_dot_product_attention(q, k, v, is_causal=length > 1, scale=scale, enable_gqa=grouped)
        output[rows] = one.transpose(1, 2).flatten(0, 1)
        first, start = first + same, rows.stop
    return output


# A step's layers all ask for the same lengths, and a copy to the GPU takes longer than some of the kernels.
@functools.lru_cache(maxsize=4)
def _on_device(lengths: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Where each sequence's tokens start, int32 [B + 1], and how many it has, int32 [B]."""
    counts = torch.tensor(lengths, dtype=torch.int32)
    starts = torch.zeros(len(lengths) + 1, dtype=torch.int32)
    starts[1:] = counts.cumsum(0)
    return starts.to(device), counts.to(device)
