"""The plain torch version of every op: the oracle, the fallback and the differentiable one. Shape letters: see ops."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from puna.ops.panels import Panels
from puna.ops.scaled import FP8, FP8_MAX, SCALE_BLOCK, InputScaling, ScaledRows, ScaledWeight

# Elements of keys that paged_attention gathers at a time: 16 MiB in float32, and as much for the values.
MAX_GATHERED: Final = 1 << 22


def embedding(token_ids: Tensor, weight: Tensor) -> Tensor:
    """Rows of `weight` [V, E] for `token_ids` [...] -> [..., E]. Raises IndexError for an id outside of 0..V-1."""
    return F.embedding(token_ids, weight)


def panel_embedding(token_ids: Tensor, panels: Panels, dtype: torch.dtype) -> Tensor:
    """The same from panels of [V, E] -> [..., E] in `dtype`."""
    return F.embedding(token_ids, panels.dequantize(0, panels.outputs)).to(dtype)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """x [..., E] @ weight [N, E] transposed, plus bias [N], all of one dtype -> [..., N] in `dtype`.

    Here the result has x's dtype before it is turned into a wider one, as it has in Hugging Face's models: anything
    else would cost a copy of the weight. Kernels of ours round their sums, which are in float32, once.
    """
    return F.linear(x, weight, bias).to(dtype)


def gated_linear(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """activation(gate) * up, where gate and up are the two halves of linear's result [..., 2 F] -> [..., F]."""
    return gated_activation(linear(x, weight, bias, x.dtype), activation)


def panel_linear(x: Tensor, panels: Panels, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """x [..., E] @ a weight [N, E] in panels, plus bias [N] -> [..., N] in `dtype`; the sums are in float32.

    Compiled kernels also round x to int8, in groups of 32, where the weight is in groups.
    """
    weight = panels.dequantize(0, panels.outputs)
    return F.linear(x.float(), weight, None if bias is None else bias.float()).to(dtype)


def panel_gated_linear(x: Tensor, panels: Panels, bias: Tensor | None, activation: str) -> Tensor:
    """activation(gate) * up, where gate and up are the two halves of panel_linear's result [..., 2 F] -> [..., F]."""
    return gated_activation(panel_linear(x, panels, bias, torch.float32), activation).to(x.dtype)


def quantize_rows(x: Tensor, scaling: InputScaling) -> ScaledRows:
    """x [..., E] rounded to e4m3 as `scaling` says: x / scale in float32, to the nearest, ties to even, at most 448."""
    wide = x.float()
    if scaling.static is not None:
        scales = divisor = scaling.static
    elif scaling.blocks:
        padded = F.pad(wide, (0, -wide.shape[-1] % SCALE_BLOCK))
        blocks = padded.view(*wide.shape[:-1], padded.shape[-1] // SCALE_BLOCK, SCALE_BLOCK)
        scales = _fp8_scale(blocks.abs().amax(-1))
        divisor = scales.repeat_interleave(SCALE_BLOCK, dim=-1)[..., : wide.shape[-1]]
    else:
        scales = divisor = _fp8_scale(wide.abs().amax(-1, keepdim=True))
    return ScaledRows((wide / divisor).clamp(-FP8_MAX, FP8_MAX).to(FP8), scales, x.dtype)


def _fp8_scale(highest: Tensor) -> Tensor:
    """The scale that puts the highest absolute value at 448; of zeros any will do that divides.

    A product, since torch divides by a Python number on GPUs, and only there, by multiplying with its inverse.
    """
    return highest.clamp(min=1e-12) * (1 / FP8_MAX)


def scaled_linear(x: ScaledRows, weight: ScaledWeight, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """x [..., E] @ weight [N, E] transposed, plus bias [N] -> [..., N] in `dtype`; the sums are in float32."""
    return F.linear(x.dequantize(), weight.dequantize(), None if bias is None else bias.float()).to(dtype)


def scaled_gated_linear(
    x: ScaledRows, weight: ScaledWeight, bias: Tensor | None, activation: str, scaling: InputScaling | None
) -> Tensor | ScaledRows:
    """activation(gate) * up, where gate and up are the two halves of scaled_linear's result [..., 2 F] in the dtype
    that x had -> [..., F] in that dtype, or rounded by quantize_rows."""
    gate_up = scaled_linear(x, weight, bias, x.dtype)
    if scaling is not None:
        return gated_activation_scaled(gate_up, activation, scaling)
    return gated_activation(gate_up, activation)


def add(a: Tensor, b: Tensor) -> Tensor:
    """a + b, of one shape."""
    return a + b


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """x / sqrt(mean(x^2) + epsilon) * weight over the last axis, the mean in float32 (Zhang and Sennrich, 2019)."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
    return weight * wide.to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """x + residual, and the rms_norm of that sum."""
    total = x + residual
    return total, rms_norm(total, weight, epsilon)


def rms_norm_scaled(x: Tensor, weight: Tensor, epsilon: float, scaling: InputScaling) -> ScaledRows:
    """rms_norm, rounded by quantize_rows."""
    return quantize_rows(rms_norm(x, weight, epsilon), scaling)


def add_rms_norm_scaled(
    x: Tensor, residual: Tensor, weight: Tensor, epsilon: float, scaling: InputScaling
) -> tuple[Tensor, ScaledRows]:
    """x + residual, and the rms_norm of that sum, rounded by quantize_rows."""
    total, normalized = add_rms_norm(x, residual, weight, epsilon)
    return total, quantize_rows(normalized, scaling)


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the pair (i, i + D/2) of every head by its angle (RoFormer, Su et al., 2021).

    x [..., heads, D]; cos and sin float32 [..., D / 2], one row a token. The rounding follows Hugging Face's: the
    angles are rounded to x's dtype before the products.
    """
    cos, sin = cos.unsqueeze(-2).to(x.dtype), sin.unsqueeze(-2).to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def gated_activation(gate_up: Tensor, activation: str) -> Tensor:
    """activation(gate) * up, where gate_up [..., 2 F] holds gate first (GLU variants, Shazeer, 2020) -> [..., F]."""
    gate, up = gate_up.chunk(2, dim=-1)
    if activation == "silu":
        return F.silu(gate) * up
    if activation == "gelu":
        return F.gelu(gate) * up
    if activation == "gelu_pytorch_tanh":
        return F.gelu(gate, approximate="tanh") * up
    if activation == "relu":
        return F.relu(gate) * up
    raise ValueError(f"activation is {activation!r}: use silu, gelu, gelu_pytorch_tanh or relu")


def gated_activation_scaled(gate_up: Tensor, activation: str, scaling: InputScaling) -> ScaledRows:
    """gated_activation, rounded by quantize_rows."""
    return quantize_rows(gated_activation(gate_up, activation), scaling)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    scale: float,
    sliding_window: int | None,
) -> Tensor:
    """Causal attention of the last S of L positions over all L: query [B, H, S, D], key and value [B, K, L, D].

    Query i stands at position L - S + i; it sees the positions up to its own, with `sliding_window` only that many of
    them, and of these the ones where `key_mask` [B, L] is true. A query that sees nothing (padding) gets an arbitrary
    finite result. -> [B, H, S, D]
    """
    queries, keys = query.shape[2], key.shape[2]
    grouped = query.shape[1] != key.shape[1]
    windowed = sliding_window is not None and keys > sliding_window
    if key_mask is None and not windowed and queries in (1, keys):
        return F.scaled_dot_product_attention(query, key, value, is_causal=queries > 1, scale=scale, enable_gqa=grouped)
    query_positions = torch.arange(keys - queries, keys, device=query.device)[:, None]
    key_positions = torch.arange(keys, device=query.device)[None, :]
    visible = key_positions <= query_positions
    if sliding_window is not None:
        visible = visible & (key_positions > query_positions - sliding_window)
    if key_mask is not None:
        visible = visible & key_mask[:, None, None, :]
    # The lowest finite number instead of -inf: a row of padding that sees nothing must not turn into NaN, which would
    # reach the gradients of the others.
    bias = torch.where(visible, 0.0, torch.finfo(query.dtype).min).to(query.dtype)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scale, enable_gqa=grouped)


def store_kv(key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor) -> None:
    """Writes key and value [T, K, D] into the caches [blocks, K, block size, D]; slot = block * block size + offset.

    What is beyond the largest number of an FP8 cache becomes that number.
    """
    block_size = key_cache.shape[2]
    blocks, offsets = slot_mapping // block_size, slot_mapping % block_size
    if key_cache.dtype == FP8:
        key, value = (part.clamp(-FP8_MAX, FP8_MAX) for part in (key, value))
    key_cache[blocks, :, offsets] = key.to(key_cache.dtype)
    value_cache[blocks, :, offsets] = value.to(value_cache.dtype)


def rotate_and_store(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos_sin: tuple[Tensor, Tensor],
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
) -> tuple[Tensor, Tensor]:
    """rotary of query [T, H, D] and key [T, K, D], which are returned; store_kv of that key and value [T, K, D].

    Other backends may overwrite query and key with what they return.
    """
    query, key = rotary(query, *cos_sin), rotary(key, *cos_sin)
    store_kv(key, value, key_cache, value_cache, slot_mapping)
    return query, key


def prompt_attention(
    query: Tensor, key: Tensor, value: Tensor, lengths: Sequence[int], scale: float, sliding_window: int | None
) -> Tensor:
    """Causal attention of whole prompts to themselves: query [T, H, D], key and value [T, K, D], the tokens of one
    sequence of `lengths` after another -> [T, H, D]."""
    output = torch.empty_like(query)
    start = 0
    for length in lengths:
        rows = slice(start, start + length)
        q, k, v = (part[rows].transpose(0, 1).unsqueeze(0) for part in (query, key, value))
        output[rows] = attention(q, k, v, None, scale, sliding_window).squeeze(0).transpose(0, 1)
        start += length
    return output


def paged_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    query_starts: Tensor,
    sequence_lengths: Tensor,
    scale: float,
    sliding_window: int | None,
) -> Tensor:
    """Causal attention of each sequence's newest tokens over its cached keys and values (vLLM, Kwon et al., 2023).

    Rows query_starts[b] .. query_starts[b + 1] of query [T, H, D] are the last tokens of sequence b, which has
    sequence_lengths[b] tokens in the blocks block_tables[b], those rows' own included. Entries of block_tables past a
    sequence's end must name blocks too, but what is in them does not matter. -> [T, H, D]
    """
    output = torch.empty_like(query)
    starts, lengths = query_starts.tolist(), sequence_lengths.tolist()
    # Sequences of one query, most of most steps, go together for the sake of speed: neighbours in length, and no more
    # than keep the gathered keys small.
    single = sorted((b for b in range(len(lengths)) if starts[b + 1] - starts[b] == 1), key=lengths.__getitem__)
    while single:
        per_sequence = lengths[single[-1]] * key_cache.shape[1] * key_cache.shape[3]
        together = single[-max(1, MAX_GATHERED // per_sequence) :]
        single = single[: -len(together)]
        rows = torch.tensor([starts[b] for b in together], device=query.device)
        tables, own_lengths = block_tables[together], sequence_lengths[together]
        output[rows] = _single_queries(query[rows], key_cache, value_cache, tables, own_lengths, scale, sliding_window)
    for b, length in enumerate(lengths):
        if starts[b + 1] - starts[b] == 1:
            continue
        rows_of_b = slice(starts[b], starts[b + 1])
        blocks = block_tables[b, : -(-length // key_cache.shape[2])]
        # [blocks, K, block size, D] -> [1, K, length, D]
        key, value = (
            cache[blocks].transpose(0, 1).flatten(1, 2)[:, :length].to(query.dtype).unsqueeze(0)
            for cache in (key_cache, value_cache)
        )
        one = attention(query[rows_of_b].transpose(0, 1).unsqueeze(0), key, value, None, scale, sliding_window)
        output[rows_of_b] = one.squeeze(0).transpose(0, 1)
    return output


def _single_queries(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    lengths: Tensor,
    scale: float,
    sliding_window: int | None,
) -> Tensor:
    """paged_attention for sequences of one query each: query [B, H, D] -> [B, H, D]."""
    longest = int(lengths.max())
    positions = torch.arange(longest, device=query.device)
    visible = positions < lengths[:, None]
    if sliding_window is not None:
        visible = visible & (positions >= lengths[:, None] - sliding_window)
    # [B, blocks, K, block size, D] -> [B, K, longest, D]
    blocks = block_tables[:, : -(-longest // key_cache.shape[2])]
    key, value = (
        cache[blocks].transpose(1, 2).flatten(2, 3)[:, :, :longest].to(query.dtype)
        for cache in (key_cache, value_cache)
    )
    grouped = query.shape[1] != key.shape[1]
    one = F.scaled_dot_product_attention(
        query.unsqueeze(2), key, value, attn_mask=visible[:, None, None], scale=scale, enable_gqa=grouped
    )
    return one.squeeze(2)


def route_experts(router_logits: Tensor, experts_per_token: int) -> tuple[Tensor, Tensor]:
    """The weights and indices of the experts with the highest probability, renormalised to sum to one (Mixtral, 2024).

    router_logits [T, experts] -> float32 weights [T, experts_per_token], int64 indices [T, experts_per_token]
    """
    probabilities = torch.softmax(router_logits.float(), dim=-1)
    weights, indices = torch.topk(probabilities, experts_per_token, dim=-1)
    return weights / weights.sum(dim=-1, keepdim=True), indices


def panel_experts(
    x: Tensor,
    router_logits: Tensor,
    gate_up: Sequence[Panels],
    proj: Sequence[Panels],
    experts_per_token: int,
    activation: str,
) -> Tensor:
    """The weighted sum of each token's experts: x [T, E], router_logits [T, experts] -> [T, E], summed in float32.

    Expert i is proj[i] (panels of [E, F]) of the gated activation of gate_up[i] (panels of [2 F, E]).
    """
    weights, indices = route_experts(router_logits, experts_per_token)
    total = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for number, (first, second) in enumerate(zip(gate_up, proj, strict=True)):
        rows, place = torch.where(indices == number)
        if rows.numel():
            inner = panel_gated_linear(x[rows], first, None, activation)
            total.index_add_(0, rows, panel_linear(inner, second, None, torch.float32) * weights[rows, place, None])
    return total.to(x.dtype)


def experts(
    x: Tensor,
    router_logits: Tensor,
    gate_up: Sequence[Tensor | ScaledWeight],
    proj: Sequence[Tensor | ScaledWeight],
    experts_per_token: int,
    activation: str,
) -> Tensor:
    """panel_experts with weights in rows: gate_up[i] is [2 F, E], proj[i] [E, F]; those in FP8 take their inputs
    rounded by row, or by block where the weight has blocks."""
    weights, indices = route_experts(router_logits, experts_per_token)
    total = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for number, (first, second) in enumerate(zip(gate_up, proj, strict=True)):
        rows, place = torch.where(indices == number)
        if rows.numel():
            inner = gated_activation(_row_linear(x[rows], first), activation)
            total.index_add_(0, rows, _row_linear(inner, second).float() * weights[rows, place, None])
    return total.to(x.dtype)


def _row_linear(x: Tensor, weight: Tensor | ScaledWeight) -> Tensor:
    if isinstance(weight, Tensor):
        return linear(x, weight, None, x.dtype)
    return scaled_linear(quantize_rows(x, InputScaling(blocks=weight.has_blocks)), weight, None, x.dtype)
