"""KVPool: the paged cache, one pair of tensors for each of this rank's layers."""

from __future__ import annotations

import torch

from puna.config import LLaMAConfig
from puna.distributed import Communicator
from puna.layers.linear import Segment
from puna.layers.params import KeyValueCacheParams
from puna.layers.pieces import torch_dtype


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
