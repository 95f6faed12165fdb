"""Which weights an engine runs with on its device, and what it can't be asked for there."""

from __future__ import annotations

import importlib.util
import logging

import torch

from puna.checkpoints import Checkpoint, EngineDirectory
from puna.config import EngineConfig, LLaMAConfig
from puna.distributed import Communicator
from puna.layers.pieces import torch_dtype
from puna.models import LLaMAForCausalLM, model_loader
from puna.models.loading import ModelLoader
from puna.ops import OpSpec, choose, cpu
from puna.ops.scaled import FP8

_log = logging.getLogger(__name__)


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
    refusal = _gpu_refusal(comm) if device.type == "cuda" else _cpu_refusal(comm, config, engine_config)
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


def _check_gpu(
    loader: ModelLoader[LLaMAForCausalLM], comm: Communicator, quantization: str | None, engine_config: EngineConfig
) -> None:
    """Says which ops of the model have no kernel here, and refuses what would then be wrong or not be worth it."""
    config = loader.config
    spec = OpSpec(
        device=comm.device,
        dtype=torch_dtype(config.dtype),
        head_size=config.head_size,
        differentiable=False,
        deterministic=config.deterministic,
    )
    missing = {one.op: "; ".join(one.refusals) for one in choose(spec)[1] if one.backend == "reference"}
    if engine_config.kv_cache_dtype == "int8":
        for op in ("rotate_and_store", "paged_attention"):
            if op in missing:
                raise ValueError(
                    f"kv_cache_dtype is 'int8', but {op} has no kernel for it ({missing[op]}): leave it out"
                )
    if quantization == "fp8" and "scaled_linear" in missing:
        raise ValueError(f"quantization is 'fp8', but {missing['scaled_linear']}: use int8")
    needed = ["add", "add_rms_norm", "embedding", "gated_activation", "paged_attention", "rms_norm", "rotate_and_store"]
    if torch.uint8 in loader.parameter_dtypes:
        needed.append("panel_linear")
    if FP8 in loader.parameter_dtypes:
        needed.extend(("quantize_rows", "scaled_linear"))
    for op in needed:
        if op in missing:
            _log.warning("%s runs on the reference op, which is slow (%s)", op, missing[op])
