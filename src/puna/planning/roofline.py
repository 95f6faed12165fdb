"""What a step must read and compute, and the least time that a machine's measured limits allow for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from puna.config import LLaMAConfig
from puna.planning.memory import DTYPE_BYTES, ParameterCounts, key_value_bytes_per_token, parameter_counts

# Bytes of one weight of the quantised formats: a code, and its share of a group's scale of two bytes.
_QUANTIZED_BYTES: Final[Mapping[str, float]] = MappingProxyType({"int8": 34 / 32, "int4": 18 / 32})


@dataclass(frozen=True, kw_only=True)
class MachineLimit:
    """What a machine can do at most, as it was measured: bytes read a second, and operations a second by number type.

    A multiplication with its addition counts as two operations.
    """

    read_bandwidth: float
    operations: Mapping[str, float]

    def least_seconds(self, work: Work) -> float:
        """The longer of reading and computing: they can go on at once."""
        computing = sum(count / self.operations[kind] for kind, count in work.operations.items())
        return max(work.bytes_read / self.read_bandwidth, computing)


@dataclass(frozen=True, kw_only=True)
class Work:
    """The bytes that must come from memory, and the operations by the number type they are done in."""

    bytes_read: float
    operations: Mapping[str, float]


def weight_bytes(config: LLaMAConfig, quantization: str | None = None) -> float:
    """Bytes of all weights that one token's step reads: of an untied embedding one row is, which counts as nothing.

    Raises ValueError for a weight format whose size is not known.
    """
    counts = parameter_counts(config)
    return _in_matrices(counts) * _bytes_per_weight(config, quantization) + counts.norms * DTYPE_BYTES[config.dtype]


def prefill_work(config: LLaMAConfig, batch: int, prompt_tokens: int, quantization: str | None = None) -> Work:
    """Computing `batch` prompts up to their first new token.

    Every token goes through the layers, the last one of each prompt through the head, and attention is counted for the
    pairs of tokens that see each other.
    """
    counts = parameter_counts(config)
    head = config.vocab_size * config.hidden_size
    in_layers = _in_matrices(counts) - head
    tokens = batch * prompt_tokens
    pairs = batch * sum(_seen(config, position + 1) for position in range(prompt_tokens))
    return _work(
        config,
        quantization,
        bytes_read=weight_bytes(config, quantization),
        linear=2.0 * (in_layers * tokens + head * batch),
        pairs=pairs,
    )


def decode_work(config: LLaMAConfig, batch: int, context: int, quantization: str | None = None) -> Work:
    """One step of `batch` sequences, each with `context` tokens in the cache once the step's own is in it."""
    counts = parameter_counts(config)
    seen = batch * _seen(config, context)
    cache = seen / config.num_layers * key_value_bytes_per_token(config)
    return _work(
        config,
        quantization,
        bytes_read=_decode_weight_bytes(config, batch, quantization) + cache,
        linear=2.0 * batch * _in_matrices(counts),
        pairs=seen,
    )


def _decode_weight_bytes(config: LLaMAConfig, batch: int, quantization: str | None) -> float:
    """As `weight_bytes`, with all the experts that a batch reaches if each of its tokens picks at random."""
    total = weight_bytes(config, quantization)
    if not config.num_experts:
        return total
    counts = parameter_counts(config)
    reached = 1 - (1 - counts.active_expert_share) ** batch
    return total + counts.experts * (reached - counts.active_expert_share) * _bytes_per_weight(config, quantization)


def _work(config: LLaMAConfig, quantization: str | None, *, bytes_read: float, linear: float, pairs: float) -> Work:
    """`pairs`: of a token and one that it sees, over all layers; each is a product of q and k, and one with v."""
    operations: dict[str, float] = {}
    kind = "int8" if quantization in _QUANTIZED_BYTES else config.dtype
    operations[kind] = linear
    operations[config.dtype] = operations.get(config.dtype, 0.0) + 4.0 * pairs * config.num_heads * config.head_size
    return Work(bytes_read=bytes_read, operations=operations)


def _seen(config: LLaMAConfig, context: int) -> int:
    """The tokens that the last one of `context` sees, summed over the layers."""
    windows = (config.layer_window(layer) for layer in range(config.num_layers))
    return sum(context if window is None else min(context, window) for window in windows)


def _in_matrices(counts: ParameterCounts) -> int:
    """The parameters that one token is multiplied with; biases are among them."""
    head = counts.head or counts.embedding
    return counts.active - counts.embedding - counts.head - counts.norms + head


def _bytes_per_weight(config: LLaMAConfig, quantization: str | None) -> float:
    if quantization is None:
        return DTYPE_BYTES[config.dtype]
    if quantization not in _QUANTIZED_BYTES:
        known = ", ".join(_QUANTIZED_BYTES)
        raise ValueError(f"the weight format {quantization!r} has no known size: use {known}, or None")
    return _QUANTIZED_BYTES[quantization]
