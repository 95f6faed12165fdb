"""Calls of the linear layers' launchers with tensors of an 8B and a 1B model's sizes, for sm90.py to compile."""

from __future__ import annotations

import torch

from puna.ops import triton_dense, triton_linear, triton_panels
from puna.ops.panels import PanelFormat, Panels
from puna.ops.triton_linear import TILES

INT4 = PanelFormat(bits=4)
# What weights come in: int8 in groups of 16 has no minimums.
FORMATS = tuple(
    PanelFormat(bits=bits, group_size=group, minimums=minimums)
    for bits, group, minimums in (
        (4, 32, False),
        (4, 32, True),
        (4, 16, False),
        (4, 16, True),
        (8, 32, False),
        (8, 32, True),
        (8, 16, False),
    )
)


def panels_of(form: PanelFormat, outputs: int, inputs: int) -> Panels:
    return Panels(torch.empty(form.buffer_shape(outputs, inputs), dtype=torch.uint8), form, outputs, inputs)


def panel_tiles() -> None:
    """Every tile, as the down projection of an 8B model."""
    panels = panels_of(INT4, 4096, 14336)
    for tile in TILES.values():
        x = torch.empty(tile.rows, 14336, dtype=torch.bfloat16)
        triton_linear.launch(x, panels, None, torch.bfloat16, tile)


def panel_formats() -> None:
    """Every format for one token; float16, float32, the gated layer of an 8B model and a layer of a 1B model."""
    x = torch.empty(1, 4096, dtype=torch.bfloat16)
    for form in FORMATS:
        triton_linear.panel_linear(x, panels_of(form, 4096, 4096), None, torch.bfloat16)
    for dtype in (torch.float16, torch.float32):
        triton_linear.panel_linear(x.to(dtype), panels_of(INT4, 4096, 4096), None, dtype)
    triton_linear.panel_gated_linear(x, panels_of(INT4, 28672, 4096), None, "silu")


def small_panels() -> None:
    x = torch.empty(1, 2048, dtype=torch.bfloat16)
    triton_linear.panel_linear(x, panels_of(INT4, 2048, 2048), None, torch.bfloat16)
    triton_linear.panel_gated_linear(x, panels_of(PanelFormat(bits=8), 16384, 2048), None, "silu")


def whole_weights() -> None:
    for form in FORMATS:
        panels = panels_of(form, 4096, 4096)
        triton_panels.dequantize(panels, 0, 4096, torch.bfloat16)
        triton_panels.panel_embedding(torch.empty(8, dtype=torch.int64), panels, torch.bfloat16)


def dense() -> None:
    """Deterministic mode: qkv and gate/up of an 8B model, the down projection of a 1B model, and float32."""
    for outputs, inputs, dtype in (
        (6144, 4096, torch.bfloat16),
        (28672, 4096, torch.float16),
        (2048, 8192, torch.bfloat16),
        (4096, 4096, torch.float32),
    ):
        for rows in (1, 512):
            x, weight = torch.empty(rows, inputs, dtype=dtype), torch.empty(outputs, inputs, dtype=dtype)
            triton_dense.linear(x, weight, None, dtype, deterministic=True)
