"""What a step must read and compute, and the least time that a machine's measured limits allow for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from puna.config import CacheDtype, LLaMAConfig
from puna.planning.memory import ParameterCounts, key_value_bytes_per_token, parameter_counts

# Weights of fewer bytes than this are codes, which are multiplied as 8-bit integers; floats have two or four.
_BYTES_OF_CODES = 1.5


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


def prefill_work(config: LLaMAConfig, weights: int, batch: int, prompt_tokens: int) -> Work:
    """Computing `batch` prompts up to their first new token, by a model whose weights take so many bytes.

    Every token goes through the layers, the last one of each prompt through the head, and attention is counted for the
    pairs of tokens that see each other.
    """
    counts, head = parameter_counts(config), config.vocab_size * config.hidden_size
    tokens = batch * prompt_tokens
    return _work(
        config,
        weights,
        bytes_read=_bytes_of_weights(config, weights, tokens),
        linear=2.0 * ((_multiplied(config, counts) - head) * tokens + head * batch),
        pairs=batch * sum(_seen(config, position + 1) for position in range(prompt_tokens)),
    )


def decode_work(
    config: LLaMAConfig, weights: int, batch: int, context: int, kv_cache_dtype: CacheDtype = "auto"
) -> Work:
    """One step of `batch` sequences, each with `context` tokens in the cache once the step's own is in it."""
    pairs = batch * _seen(config, context)
    return _work(
        config,
        weights,
        bytes_read=_bytes_of_weights(config, weights, batch)
        + pairs / config.num_layers * key_value_bytes_per_token(config, kv_cache_dtype),
        linear=2.0 * batch * _multiplied(config, parameter_counts(config)),
        pairs=pairs,
    )


def _bytes_of_weights(config: LLaMAConfig, weights: int, tokens: int) -> float:
    """Bytes of the weights that a step of so many tokens reads.

    An untied embedding's rows count as nothing; of the experts those are read that the tokens reach if each picks at
    random.
    """
    counts = parameter_counts(config)
    read: float = counts.total - (counts.embedding if counts.head else 0)
    read -= counts.experts * (1 - counts.active_expert_share) ** tokens
    return weights * read / counts.total


def _work(config: LLaMAConfig, weights: int, *, bytes_read: float, linear: float, pairs: int) -> Work:
    """`pairs`: of a token and one that it sees, over all layers; each is a product of q and k, and one with v."""
    quantized = weights < _BYTES_OF_CODES * parameter_counts(config).total
    operations: dict[str, float] = {"int8" if quantized else config.dtype: linear}
    attention = 4.0 * pairs * config.num_heads * config.head_size
    operations[config.dtype] = operations.get(config.dtype, 0.0) + attention
    return Work(bytes_read=bytes_read, operations=operations)


def _seen(config: LLaMAConfig, context: int) -> int:
    """The tokens that the last one of `context` sees, summed over the layers."""
    windows = (config.layer_window(layer) for layer in range(config.num_layers))
    return sum(context if window is None else min(context, window) for window in windows)


def _multiplied(config: LLaMAConfig, counts: ParameterCounts) -> int:
    """The parameters that one token is multiplied with (and biases, which are few)."""
    return counts.active - counts.embedding - counts.head - counts.norms + config.vocab_size * config.hidden_size
