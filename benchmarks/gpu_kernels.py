"""The largest kernels of an 8B model's decode steps, each launched twice, for a profiler to look at.

`ncu --clock-control none --section SpeedOfLight python benchmarks/gpu_kernels.py` where there is a GPU; see
scripts/gpu_run.sh. Random numbers, as zeros run faster. The second launch of each is the one to read.
"""

from __future__ import annotations

import torch

from puna.ops import triton_attention, triton_dense, triton_fp8
from puna.ops.panels import PanelFormat, Panels
from puna.ops.scaled import FP8, ScaledRows, ScaledWeight
from puna.ops.triton_linear import panel_linear

HEADS, KV_HEADS, SIZE, BLOCK = 32, 8, 128, 16
HIDDEN, INNER = 4096, 14336


def attention(sequences: int, context: int, device: torch.device) -> None:
    """Decoding over an FP8 cache."""
    blocks = sequences * context // BLOCK
    key_cache, value_cache = (
        torch.randn((blocks, KV_HEADS, BLOCK, SIZE), device=device, dtype=torch.bfloat16).to(FP8) for _ in range(2)
    )
    tables = torch.randperm(blocks, device=device).to(torch.int32).view(sequences, -1)
    starts = torch.arange(sequences + 1, device=device, dtype=torch.int32)
    lengths = torch.full((sequences,), context, device=device, dtype=torch.int32)
    query = torch.randn((sequences, HEADS, SIZE), device=device, dtype=torch.bfloat16)
    for _ in range(2):
        triton_attention.paged_attention(query, key_cache, value_cache, tables, starts, lengths, SIZE**-0.5, None)


def fp8_linear(rows: int, outputs: int, inputs: int, device: torch.device) -> None:
    x = torch.randn((rows, inputs), device=device).to(FP8)
    weight = torch.randn((outputs, inputs), device=device).to(FP8)
    scaled = ScaledRows(x, torch.rand((rows, 1), device=device), torch.bfloat16)
    for _ in range(2):
        triton_fp8.scaled_linear(
            scaled, ScaledWeight(weight, torch.rand((outputs, 1), device=device)), None, torch.bfloat16
        )


def gated_linear(rows: int, device: torch.device) -> None:
    """Gate, up and activation in bfloat16."""
    x, weight = (torch.randn((n, HIDDEN), device=device, dtype=torch.bfloat16) for n in (rows, 2 * INNER))
    for _ in range(2):
        triton_dense.gated_linear(x, weight, None, "silu")


def int4_linear(rows: int, outputs: int, inputs: int, device: torch.device) -> None:
    form = PanelFormat(bits=4)
    blocks = torch.randint(0, 256, (*form.buffer_shape(outputs, inputs),), dtype=torch.uint8, device=device)
    scales = blocks.view(blocks.shape[0], -1, form.block_bytes)[:, :, :64].view(torch.float16)
    scales.copy_(torch.rand(scales.shape, device=device) * 0.01)
    x = torch.randn((rows, inputs), device=device, dtype=torch.bfloat16)
    for _ in range(2):
        panel_linear(x, Panels(blocks, form, outputs, inputs), None, torch.bfloat16)


def main() -> None:
    device = torch.device("cuda")
    for sequences, context in ((1, 4096), (1024, 1152)):
        attention(sequences, context, device)
    for rows in (1, 1024):
        fp8_linear(rows, 2 * INNER, HIDDEN, device)
    gated_linear(1, device)
    int4_linear(1, HIDDEN, INNER, device)
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
