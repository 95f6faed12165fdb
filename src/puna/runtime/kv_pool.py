"""KVPool: the paged cache, one pair of tensors for each of this rank's layers; and the memory there is for it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from puna.config import CacheDtype, LLaMAConfig
from puna.distributed import Communicator
from puna.layers.linear import Segment
from puna.layers.params import KeyValueCacheParams
from puna.layers.pieces import torch_dtype
from puna.ops.cpu import INT8_SCALE_BYTES
from puna.ops.pages import zero_pages
from puna.ops.scaled import FP8
from puna.runtime.machine import available_host_memory
from puna.scheduling.step_plan import BlockCopy


class KVPool:
    """Keys and values [blocks, K, block size, D] for each layer, in `dtype`, zero at first.

    The heads come before the positions of a block, so that what one head attends to in a block is one run of memory.
    `num_blocks` are those of the layers of each of `config.windows`. Raises ValueError for sizes below one.
    """

    def __init__(
        self,
        config: LLaMAConfig,
        comm: Communicator,
        num_blocks: Sequence[int],
        block_size: int = 16,
        dtype: CacheDtype = "auto",
    ) -> None:
        if len(num_blocks) != len(config.windows) or min(num_blocks) < 1 or block_size < 1:
            raise ValueError(
                f"num_blocks is {tuple(num_blocks)} and block_size {block_size}: give a number for each of the windows "
                f"{config.windows} that the model's layers have, and all of at least 1"
            )
        self.block_size = block_size
        kv_heads = Segment("k", config.num_kv_heads, config.head_size).local_units(comm.mapping)
        layers = comm.mapping.pp_layers(config.num_layers)
        window_ids = [config.window_idx(layer) for layer in layers]
        # The kernels keep the scales of int8 numbers in the same chunk, behind them.
        width = config.head_size + (INT8_SCALE_BYTES if dtype == "int8" else 0)
        stored = _stored_dtype(config, dtype)
        # The layers of a window lie in one piece, keys and values, so that a copy of blocks is one for all of them.
        self._pieces = [
            _zeros((2 * window_ids.count(i), count, kv_heads, block_size, width), stored, comm.device)
            for i, count in enumerate(num_blocks)
        ]
        parts = [iter(piece) for piece in self._pieces]
        pairs = [(next(parts[i]), next(parts[i])) for i in window_ids]
        self.key_caches, self.value_caches = ([pair[side] for pair in pairs] for side in range(2))

    def params(self) -> KeyValueCacheParams:
        """The pool as the model takes it."""
        return KeyValueCacheParams(key_caches=self.key_caches, value_caches=self.value_caches)

    def copy_blocks(self, copies: Sequence[BlockCopy]) -> None:
        """Copies the content of blocks in all layers that have them; all are read before any is written.

        On a device that is two kernels for each window, and nothing waits for it.
        """
        for window_idx in {copy.window_idx for copy in copies}:
            pairs = [(copy.source, copy.target) for copy in copies if copy.window_idx == window_idx]
            piece = self._pieces[window_idx]
            # As bytes where numbers have one: not every device has indexing for FP8.
            numbers = piece.view(torch.uint8) if piece.itemsize == 1 else piece
            sources, targets = _on_device(pairs, piece.device)
            numbers.index_copy_(1, targets, numbers.index_select(1, sources))


def _stored_dtype(config: LLaMAConfig, dtype: CacheDtype) -> torch.dtype:
    one_byte = {"int8": torch.int8, "fp8": FP8}
    return one_byte[dtype] if dtype in one_byte else torch_dtype(config.dtype if dtype == "auto" else dtype)


def _on_device(pairs: Sequence[tuple[int, int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """The first and the second numbers, int64. From memory that is not pinned, a copy would wait for the device."""
    both = torch.tensor(pairs, dtype=torch.int64).t().contiguous()
    if device.type == "cuda":
        both = both.pin_memory()
    first, second = both.to(device, non_blocking=True)
    return first, second


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """On the CPU these are pages that come into being when they are first touched: to fill 4 GiB with zeros takes two
    seconds of a start, and blocks that no sequence ever uses would be memory in use."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return zero_pages(math.prod(shape) * dtype.itemsize, parts=shape[0]).view(dtype).view(shape)


def available_memory(device: torch.device) -> int:
    """Bytes that can still be allocated on a device. Raises ValueError where the system does not tell."""
    if device.type == "cpu":
        return available_host_memory()
    free, _ = torch.cuda.mem_get_info(device)
    return free
