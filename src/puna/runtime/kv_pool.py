"""KVPool: the paged cache, one pair of tensors for each of this rank's layers; and the memory there is for it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from puna.config import LLaMAConfig
from puna.distributed import Communicator
from puna.layers.linear import Segment
from puna.layers.params import KeyValueCacheParams
from puna.layers.pieces import torch_dtype
from puna.runtime.machine import available_host_memory


class KVPool:
    """Keys and values [blocks, K, block size, D] for each layer, in the model's dtype, zero at first.

    The heads come before the positions of a block, so that what one head attends to in a block is one run of memory.
    Raises ValueError for sizes below one.
    """

    def __init__(self, config: LLaMAConfig, comm: Communicator, num_blocks: int, block_size: int = 16) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"num_blocks is {num_blocks} and block_size {block_size}: both must be at least 1")
        self.num_blocks, self.block_size = num_blocks, block_size
        kv_heads = Segment("k", config.num_kv_heads, config.head_size).local_units(comm.mapping)
        shape = (num_blocks, kv_heads, block_size, config.head_size)
        layers = comm.mapping.pp_layers(config.num_layers)
        self.key_caches, self.value_caches = (
            [torch.zeros(shape, dtype=torch_dtype(config.dtype), device=comm.device) for _ in layers] for _ in range(2)
        )

    def params(self) -> KeyValueCacheParams:
        """The pool as the model takes it."""
        return KeyValueCacheParams(key_caches=self.key_caches, value_caches=self.value_caches)

    def copy_blocks(self, copies: Sequence[tuple[int, int]]) -> None:
        """Copies the content of blocks, (from, to) each, in all layers; all are read before any is written."""
        if not copies:
            return
        sources, targets = (list(blocks) for blocks in zip(*copies, strict=True))
        for cache in (*self.key_caches, *self.value_caches):
            cache[targets] = cache[sources]


def available_memory(device: torch.device) -> int:
    """Bytes that can still be allocated on a device. Raises ValueError where the system does not tell."""
    if device.type == "cpu":
        return available_host_memory()
    free, _ = torch.cuda.mem_get_info(device)
    return free
