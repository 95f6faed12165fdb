"""Which weights and ops an engine runs with on its device, and what it can't be asked for there."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Sequence
from typing import Final

from puna.checkpoints import Checkpoint, EngineDirectory
from puna.config import CacheDtype, EngineConfig, LLaMAConfig
from puna.distributed import Communicator
from puna.layers.pieces import torch_dtype
from puna.models import LLaMAForCausalLM, model_loader
from puna.models.loading import ModelLoader
from puna.models.packed_ops import packed_ops
from puna.ops import Choice, CompiledBackend, OpSpec, ReferenceBackend, choose, cpu

_log = logging.getLogger(__name__)

# What a cache in int8 needs kernels for, and one in FP8; the last one has none on GPUs without FP8.
_CACHE_OPS: Final = ("rotate_and_store", "paged_attention")
_FP8_CACHE_OPS: Final = (*_CACHE_OPS, "quantize_rows")


def weights_loader(
    checkpoint: Checkpoint,
    config: LLaMAConfig,
    comm: Communicator,
    quantization: str | None,
    engine_config: EngineConfig,
) -> ModelLoader[LLaMAForCausalLM]:
    """Weights for the device's kernels where these can run the model, else plain matrices for the reference ops.

    Raises ValueError for a `quantization` or a type of the cache that needs kernels which are not there.
    """
    device = comm.device
    refusal = _refusal(comm, config, engine_config)
    if refusal is not None:
        for name, value in (("quantization", quantization), ("kv_cache_dtype", engine_config.kv_cache_dtype)):
            if value not in (None, "auto"):
                raise ValueError(f"{name} is {value!r}, but {refusal}: leave it out")
        if isinstance(checkpoint, EngineDirectory) and cpu.compiled():
            raise ValueError(
                f"{checkpoint.source} has its weights as the compiled kernels want them, but {refusal}: change that, "
                f"or load {checkpoint.description.source}"
            )
        if device.type in ("cpu", "cuda"):
            _log.warning("%s: everything runs on the reference ops, many times slower", refusal)
        return model_loader(checkpoint, config.dtype, comm=comm, deterministic=engine_config.deterministic)
    if device.type == "cpu" and engine_config.kv_cache_dtype == "fp8":
        raise ValueError("kv_cache_dtype is 'fp8', but there are no kernels for FP8 on the CPU: use int8")
    loader = model_loader(
        checkpoint,
        config.dtype,
        comm=comm,
        quantization=quantization or "stored",
        deterministic=engine_config.deterministic,
    )
    if device.type == "cuda":
        _check_gpu(loader, comm, quantization, engine_config)
    return loader


def _refusal(comm: Communicator, config: LLaMAConfig, engine_config: EngineConfig) -> str | None:
    """Why the device's kernels can't run the model at all, if that is so."""
    return _gpu_refusal(comm) if comm.device.type == "cuda" else _cpu_refusal(comm, config, engine_config)


def _cpu_refusal(comm: Communicator, config: LLaMAConfig, engine_config: EngineConfig) -> str | None:
    if comm.device.type != "cpu":
        return f"there are no kernels for {comm.device}"
    if not cpu.compiled():
        return "the compiled kernels are not installed"
    if engine_config.block_size % 16:
        return f"the compiled kernels need a block_size that is a multiple of 16, not {engine_config.block_size}"
    if config.head_size > 256:
        return f"the compiled kernels take heads of up to 256 numbers, not {config.head_size}"
    return None


def _gpu_refusal(comm: Communicator) -> str | None:
    return (
        None if importlib.util.find_spec("triton") else f"the kernels for {comm.device} need triton, which is missing"
    )


def resolved_cache_dtype(
    checkpoint: Checkpoint, config: LLaMAConfig, comm: Communicator, engine_config: EngineConfig
) -> CacheDtype:
    """`kv_cache_dtype`, where "auto" is FP8 if the checkpoint's makers say so and the device has kernels for it."""
    asked = engine_config.kv_cache_dtype
    if asked != "auto" or checkpoint.cache_dtype is None or comm.device.type != "cuda" or _gpu_refusal(comm):
        return asked
    if any(choice.op in _FP8_CACHE_OPS and choice.refusals for choice in choose(_spec(config, comm))[1]):
        return asked
    _log.info(
        "keys and values are kept in FP8, as %s says: kv_cache_dtype=%r would keep them in the model's dtype",
        checkpoint.source,
        config.dtype,
    )
    return "fp8"


def op_choices(
    loader: ModelLoader[LLaMAForCausalLM], comm: Communicator, engine_config: EngineConfig, reports_prompts: bool
) -> tuple[Choice, ...]:
    """What serves each op that the model calls in the engine; see `in_words`."""
    refusal = _refusal(comm, loader.config, engine_config)
    used = packed_ops(loader.model, reports_prompts)
    choices = [one for one in choose(_spec(loader.config, comm))[1] if one.op in used]
    if refusal is not None:  # then weights are as the reference takes them, whatever else there is
        choices = [Choice(one.op, ReferenceBackend.name, (refusal,)) for one in choices]
    return tuple(choices)


def in_words(choices: Sequence[Choice]) -> str:
    """Choices in a line: how many the preferred backend serves, and which ones another serves, and why."""
    others: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    preferred: dict[str, list[str]] = {}
    for one in choices:
        if one.refusals:
            others.setdefault((one.backend, one.refusals), []).append(one.op)
        else:
            preferred.setdefault(one.backend, []).append(one.op)
    lines = []
    for backend, ops in preferred.items():
        details = f" ({cpu.level()})" if backend == CompiledBackend.name else ""
        lines.append(f"{backend}{details} for {'all ' if len(ops) == len(choices) else ''}{len(ops)}")
    for (backend, refusals), ops in others.items():
        which = f"all {len(ops)}" if len(ops) == len(choices) else ", ".join(ops)
        lines.append(f"{backend} for {which} ({'; '.join(refusals)})")
    return "; ".join(lines)


def _spec(config: LLaMAConfig, comm: Communicator) -> OpSpec:
    return OpSpec(
        device=comm.device,
        dtype=torch_dtype(config.dtype),
        head_size=config.head_size,
        differentiable=False,
        deterministic=config.deterministic,
    )


def _check_gpu(
    loader: ModelLoader[LLaMAForCausalLM], comm: Communicator, quantization: str | None, engine_config: EngineConfig
) -> None:
    """Says which ops of the model have no kernel here, and refuses what would then be wrong or not be worth it."""
    missing = {one.op: "; ".join(one.refusals) for one in choose(_spec(loader.config, comm))[1] if one.refusals}
    cache = engine_config.kv_cache_dtype
    for op in {"int8": _CACHE_OPS, "fp8": _FP8_CACHE_OPS}.get(cache, ()):
        if op in missing:
            raise ValueError(
                f"kv_cache_dtype is {cache!r}, but {op} has no kernel for it ({missing[op]}): leave it out"
            )
    if quantization == "fp8" and "scaled_linear" in missing:
        raise ValueError(f"quantization is 'fp8', but {missing['scaled_linear']}: use int8")
    for op in sorted(packed_ops(loader.model, reports_prompts=False) & missing.keys()):
        _log.warning("%s runs on the reference op, which is slow (%s)", op, missing[op])
