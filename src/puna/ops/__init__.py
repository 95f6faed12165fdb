"""The op list: what each op computes, which backends offer it, and the choice among them with its reasons.

Layers never call a backend by name. They ask `table(OpSpec(...))` once, when they are built, and call the functions of
the `OpTable` that comes back. Shapes use these letters: T tokens, B sequences, S query length, L key length, H query
heads, K key/value heads, D head size, E hidden, F mlp hidden, N outputs of a linear layer, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from puna.ops import cpu, reference
from puna.ops.panels import Panels
from puna.ops.scaled import InputScaling, ScaledRows, ScaledWeight


@dataclass(frozen=True, kw_only=True)
class OpSpec:
    """What a backend is told before it says whether it supports an op.

    differentiable: gradients must flow through the op, as in training.
    deterministic: a token's result must not depend on what it is computed together with, to the bit, also on devices
        where that costs time. What the compiled CPU kernels give always.
    """

    device: torch.device
    dtype: torch.dtype
    head_size: int
    differentiable: bool = True
    deterministic: bool = False


class PagedAttention(Protocol):
    def __call__(
        self,
        query: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        block_tables: Tensor,
        query_starts: Tensor,
        sequence_lengths: Tensor,
        scale: float,
        sliding_window: int | None,
    ) -> Tensor: ...


class RotateAndStore(Protocol):
    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cos_sin: tuple[Tensor, Tensor],
        key_cache: Tensor,
        value_cache: Tensor,
        slot_mapping: Tensor,
    ) -> tuple[Tensor, Tensor]: ...


class PromptAttention(Protocol):
    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        lengths: Sequence[int],
        scale: float,
        sliding_window: int | None,
    ) -> Tensor: ...


class DenseAttention(Protocol):
    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_mask: Tensor | None,
        scale: float,
        sliding_window: int | None,
    ) -> Tensor: ...


class Experts(Protocol):
    def __call__(
        self,
        x: Tensor,
        router_logits: Tensor,
        gate_up: Sequence[Tensor | ScaledWeight],
        proj: Sequence[Tensor | ScaledWeight],
        experts_per_token: int,
        activation: str,
    ) -> Tensor: ...


class PanelExperts(Protocol):
    def __call__(
        self,
        x: Tensor,
        router_logits: Tensor,
        gate_up: Sequence[Panels],
        proj: Sequence[Panels],
        experts_per_token: int,
        activation: str,
    ) -> Tensor: ...


@dataclass(frozen=True)
class OpTable:
    """The chosen function for each op. The reference backend's docstrings say what each one computes.

    embedding(token_ids [...], weight [V, E]) -> [..., E]; also any other choice of rows of a matrix
    panel_embedding(token_ids [...], panels of [V, E], dtype) -> [..., E]
    linear(x [..., E], weight [N, E], bias [N] or None, dtype of the result) -> [..., N]
    gated_linear(x [..., E], weight [2 F, E], bias [2 F] or None, name of the activation) -> [..., F]
    panel_linear(x [..., E], panels of [N, E], bias [N] or None, dtype of the result) -> [..., N]
    panel_gated_linear(x [..., E], panels of [2 F, E], bias [2 F] or None, name of the activation) -> [..., F]
    scaled_linear(x of rows [..., E], weight of [N, E], bias [N] or None, dtype of the result) -> [..., N]
    scaled_gated_linear(x of rows [..., E], weight of [2 F, E], bias [2 F] or None, name of the activation, scaling of
        the result or None) -> [..., F] in the dtype that x had, or rows [..., F] in FP8
    quantize_rows(x [..., E], scaling) -> rows [..., E] in FP8
    rms_norm_scaled, add_rms_norm_scaled, gated_activation_scaled: these ops, with quantize_rows of their result
    add(a [..., E], b [..., E]) -> [..., E]
    rms_norm(x [..., E], weight [E], epsilon) -> [..., E]
    add_rms_norm(x [..., E], residual [..., E], weight [E], epsilon) -> sum [..., E], norm of the sum [..., E]
    rotary(x [..., heads, D], cos [..., D / 2], sin [..., D / 2]) -> [..., heads, D]
    gated_activation(gate_up [..., 2 F], name of the activation) -> [..., F]
    attention(query [B, H, S, D], key [B, K, L, D], value, key_mask [B, L] or None, scale, window) -> [B, H, S, D]
    rotate_and_store(query [T, H, D], key [T, K, D], value [T, K, D], (cos, sin) [T, D / 2] each, key_cache [blocks, K,
        block size, D], value_cache, slot_mapping [T]) -> rotated query and key, perhaps in the memory of the given ones
    prompt_attention(query [T, H, D], key [T, K, D], value, lengths of the prompts, scale, window) -> [T, H, D]
    paged_attention(query [T, H, D], caches, block_tables [B, blocks], query_starts [B + 1], sequence_lengths [B],
        scale, window) -> [T, H, D]
    route_experts(router_logits [T, experts], experts per token) -> weights [T, k], expert indices [T, k]
    panel_experts(x [T, E], router_logits [T, experts], gate_up panels and proj panels of each expert, experts per
        token, name of the activation) -> [T, E]
    experts: the same with weights in rows, [2 F, E] and [E, F] each, plain or in FP8
    """

    embedding: Callable[[Tensor, Tensor], Tensor]
    panel_embedding: Callable[[Tensor, Panels, torch.dtype], Tensor]
    linear: Callable[[Tensor, Tensor, Tensor | None, torch.dtype], Tensor]
    gated_linear: Callable[[Tensor, Tensor, Tensor | None, str], Tensor]
    panel_linear: Callable[[Tensor, Panels, Tensor | None, torch.dtype], Tensor]
    panel_gated_linear: Callable[[Tensor, Panels, Tensor | None, str], Tensor]
    scaled_linear: Callable[[ScaledRows, ScaledWeight, Tensor | None, torch.dtype], Tensor]
    scaled_gated_linear: Callable[
        [ScaledRows, ScaledWeight, Tensor | None, str, InputScaling | None], Tensor | ScaledRows
    ]
    quantize_rows: Callable[[Tensor, InputScaling], ScaledRows]
    add: Callable[[Tensor, Tensor], Tensor]
    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    add_rms_norm: Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]
    rms_norm_scaled: Callable[[Tensor, Tensor, float, InputScaling], ScaledRows]
    add_rms_norm_scaled: Callable[[Tensor, Tensor, Tensor, float, InputScaling], tuple[Tensor, ScaledRows]]
    rotary: Callable[[Tensor, Tensor, Tensor], Tensor]
    gated_activation: Callable[[Tensor, str], Tensor]
    gated_activation_scaled: Callable[[Tensor, str, InputScaling], ScaledRows]
    attention: DenseAttention
    rotate_and_store: RotateAndStore
    prompt_attention: PromptAttention
    paged_attention: PagedAttention
    route_experts: Callable[[Tensor, int], tuple[Tensor, Tensor]]
    panel_experts: PanelExperts
    experts: Experts


OP_NAMES: tuple[str, ...] = tuple(field.name for field in dataclasses.fields(OpTable))


class Backend(Protocol):
    """A set of functions for some of the ops. `function` gives one, or the reason why it is not supported."""

    @property
    def name(self) -> str: ...

    def function(self, op: str, spec: OpSpec) -> Callable[..., Any] | str: ...


class ReferenceBackend:
    """Plain torch, for every op on every device: the oracle, the fallback and the differentiable one."""

    name = "reference"

    def function(self, op: str, spec: OpSpec) -> Callable[..., Any] | str:
        found: Callable[..., Any] = getattr(reference, op)
        return found


class CompiledBackend:
    """The kernels in csrc/, for inference on the CPU."""

    name = "compiled"

    def function(self, op: str, spec: OpSpec) -> Callable[..., Any] | str:
        if not cpu.compiled():
            return "the kernels are not built: install puna with a C++ compiler at hand"
        if spec.differentiable:
            return "the kernels have no gradients"
        if op in _REFERENCE_ONLY:
            return "not part of the packed path on the CPU"
        if spec.head_size > 256:
            return f"heads of {spec.head_size} numbers are more than the 256 of the kernels"
        found: Callable[..., Any] = getattr(cpu, op)
        return found


# What only the dense path, weights in rows and FP8 use, which are there for training, as the oracle, and for GPUs.
_REFERENCE_ONLY = (
    "linear",
    "gated_linear",
    "attention",
    "route_experts",
    "prompt_attention",
    "experts",
    "scaled_linear",
    "scaled_gated_linear",
    "quantize_rows",
    "rms_norm_scaled",
    "add_rms_norm_scaled",
    "gated_activation_scaled",
)


class TritonBackend:
    """The kernels in triton_*.py, for inference on NVIDIA GPUs; each module's FUNCTIONS are the ops that it has."""

    name = "triton"

    def function(self, op: str, spec: OpSpec) -> Callable[..., Any] | str:
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed"
        if spec.differentiable:
            return "the kernels have no gradients"
        from puna.ops import triton_table

        return triton_table.function(op, spec)


@dataclass(frozen=True)
class Choice:
    """Which backend serves an op, and why the ones that come before it do not."""

    op: str
    backend: str
    refusals: tuple[str, ...]


def backends_for(device: torch.device) -> tuple[Backend, ...]:
    """The backends of a device, the preferred one first. The last one, the reference, supports everything."""
    first: Backend = TritonBackend() if device.type == "cuda" else CompiledBackend()
    return (first, ReferenceBackend()) if device.type in ("cuda", "cpu") else (ReferenceBackend(),)


def dense_layout(device: torch.device) -> Literal["panels", "rows"]:
    """How a device's kernels want weights that are not in groups: in the panels of the CPU's, or as plain matrices."""
    return "panels" if device.type == "cpu" else "rows"


def choose(spec: OpSpec, backends: Iterable[Backend] | None = None) -> tuple[OpTable, tuple[Choice, ...]]:
    """Picks for each op the first backend that supports it, and reports the choices.

    Raises ValueError where no backend supports an op, with what each one said.
    """
    backends = tuple(backends_for(spec.device) if backends is None else backends)
    functions: dict[str, Callable[..., Any]] = {}
    choices = []
    for op in OP_NAMES:
        refusals: list[str] = []
        for backend in backends:
            answer = backend.function(op, spec)
            if not isinstance(answer, str):
                functions[op] = answer
                choices.append(Choice(op, backend.name, tuple(refusals)))
                break
            refusals.append(f"{backend.name}: {answer}")
        else:
            raise ValueError(f"no backend supports {op} for {spec}: {'; '.join(refusals) or 'there is none'}")
    return OpTable(**functions), tuple(choices)


def table(spec: OpSpec) -> OpTable:
    """The functions that a layer of this spec calls."""
    return choose(spec)[0]
