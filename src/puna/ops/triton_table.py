"""Which ops the Triton kernels have, for which devices and sizes; the choice that TritonBackend passes on."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

from puna.ops import (
    OpSpec,
    triton_attention,
    triton_dense,
    triton_experts,
    triton_fp8,
    triton_linear,
    triton_norm,
    triton_panels,
    triton_pointwise,
    triton_prompt,
    triton_rotary,
)
from puna.ops.triton_device import capability


def _always(spec: OpSpec) -> str | None:
    return None


def _attends(spec: OpSpec) -> str | None:
    if spec.head_size % 4 or spec.head_size > 256:
        return f"heads of {spec.head_size} numbers: the kernel takes multiples of 4 up to 256"
    return None


def _rotates(spec: OpSpec) -> str | None:
    if spec.head_size % 2 or spec.head_size > 512:
        return f"heads of {spec.head_size} numbers: the kernel takes even sizes up to 512"
    return None


def _has_fp8(spec: OpSpec) -> str | None:
    if capability(spec.device) < (8, 9):
        return "the GPU has no FP8: that needs compute capability 8.9"
    return None


@dataclass(frozen=True)
class _Kernel:
    """A launcher, for a spec the reason why it does not serve it, or None, and the one of the deterministic mode, if
    that is another."""

    launcher: Callable[..., Any]
    refusal: Callable[[OpSpec], str | None] = _always
    deterministic: Callable[..., Any] | None = None


def _with_mode(launcher: Callable[..., Any], refusal: Callable[[OpSpec], str | None] = _always) -> _Kernel:
    """Of a launcher that takes `deterministic`."""
    return _Kernel(launcher, refusal, functools.partial(launcher, deterministic=True))


_KERNELS: Final = MappingProxyType(
    {
        "embedding": _Kernel(triton_pointwise.embedding),
        "add": _Kernel(triton_pointwise.add),
        "rms_norm": _Kernel(triton_norm.rms_norm),
        "add_rms_norm": _Kernel(triton_norm.add_rms_norm),
        "rms_norm_scaled": _Kernel(triton_norm.rms_norm_scaled, _has_fp8),
        "add_rms_norm_scaled": _Kernel(triton_norm.add_rms_norm_scaled, _has_fp8),
        "quantize_rows": _Kernel(triton_pointwise.quantize_rows, _has_fp8),
        "gated_activation": _Kernel(triton_pointwise.gated_activation),
        "gated_activation_scaled": _Kernel(triton_pointwise.gated_activation_scaled, _has_fp8),
        "linear": _with_mode(triton_dense.linear),
        "gated_linear": _with_mode(triton_dense.gated_linear),
        "panel_linear": _with_mode(triton_linear.panel_linear),
        "panel_gated_linear": _with_mode(triton_linear.panel_gated_linear),
        "panel_embedding": _Kernel(triton_panels.panel_embedding),
        "scaled_linear": _with_mode(triton_fp8.scaled_linear, _has_fp8),
        "scaled_gated_linear": _with_mode(triton_fp8.scaled_gated_linear, _has_fp8),
        "paged_attention": _with_mode(triton_attention.paged_attention, _attends),
        "prompt_attention": _with_mode(triton_prompt.prompt_attention, _attends),
        "rotary": _Kernel(triton_rotary.rotary, _rotates),
        "rotate_and_store": _Kernel(triton_rotary.rotate_and_store, _rotates),
        "route_experts": _Kernel(triton_experts.route_experts),
        "experts": _with_mode(triton_experts.experts),
        "panel_experts": _with_mode(triton_experts.panel_experts),
    }
)


def function(op: str, spec: OpSpec) -> Callable[..., Any] | str:
    """The launcher of an op, or the reason why there is none for this spec."""
    kernel = _KERNELS.get(op)
    if kernel is None:
        return f"there is no kernel for {op}"
    if spec.deterministic and kernel.deterministic is not None:
        return kernel.refusal(spec) or kernel.deterministic
    return kernel.refusal(spec) or kernel.launcher
