"""Panels: how compiled kernels want the weight of a linear layer, and how rows get in and out of that layout.

A panel holds 32 outputs (rows of the weight), lane by lane, the inputs in order; the last panel is padded with zeros.
Dense panels hold float32, bfloat16 (inputs in pairs) or float16. Group panels hold blocks of 32 inputs: float16 scales,
float16 minimums where the format has them, then codes of 8 or 4 bits; csrc/kernels/args.h and docs/cpu_kernels.md have
the order of the bytes. Letters: N outputs, E inputs, P panels, B blocks of 32 inputs, G groups of the inputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

LANES: Final = 32
BLOCK: Final = 32
# The number of this layout, for files that hold panels: another order of bytes is another number.
PANEL_LAYOUT: Final = 1


@dataclass(frozen=True)
class PanelFormat:
    """What the numbers of a panel are: dense of `dtype` where `bits` is 0, else codes in groups of 16 or 32 inputs.

    weight = scale * (code - zero), zero being 128 or 8, or with `minimums` scale * code + minimum.
    """

    dtype: torch.dtype | None = None
    bits: int = 0
    group_size: int = BLOCK
    minimums: bool = False

    def __post_init__(self) -> None:
        dense = self.bits == 0 and self.dtype in (torch.float32, torch.bfloat16, torch.float16)
        grouped = self.bits in (4, 8) and self.dtype is None and self.group_size in (16, 32)
        if not dense and not grouped:
            raise ValueError(f"{self} is not a format of panels: use float32, bfloat16, float16, or 4 or 8 bits")

    @property
    def zero(self) -> int:
        """The code that stands for a weight of zero where there are no minimums."""
        return 0 if self.minimums else 1 << (self.bits - 1)

    @property
    def block_bytes(self) -> int:
        """Bytes of 32 outputs x 32 inputs, group formats only."""
        groups = BLOCK // self.group_size
        return LANES * (2 * groups * (1 + self.minimums) + BLOCK * self.bits // 8)

    def panel_bytes(self, inputs: int) -> int:
        """Bytes of 32 outputs."""
        if self.bits:
            return -(-inputs // BLOCK) * self.block_bytes
        if self.dtype == torch.float32:
            return inputs * LANES * 4
        return (inputs + inputs % 2 * (self.dtype == torch.bfloat16)) * LANES * 2

    def buffer_shape(self, outputs: int, inputs: int) -> tuple[int, int]:
        """The shape of the uint8 tensor for a weight [outputs, inputs]."""
        return -(-outputs // LANES), self.panel_bytes(inputs)


@dataclass(frozen=True)
class Panels:
    """A weight [outputs, inputs]: `data` uint8 of `format.buffer_shape`, contiguous."""

    data: Tensor
    format: PanelFormat
    outputs: int
    inputs: int

    def write_dense(self, first: int, rows: Tensor) -> None:
        """Puts rows [n, E] of a dense format at `first`."""
        width = self._dense_width()
        if rows.shape[1] < width:
            rows = torch.nn.functional.pad(rows, (0, width - rows.shape[1]))
        rows = rows.to(self.format.dtype).contiguous()
        self._put(self._dense_cells(), first, rows.view(_cell_dtype(self.format)))

    def read_dense(self, first: int, count: int) -> Tensor:
        """Rows [count, E] of a dense format."""
        cells = self._take(self._dense_cells(), first, count)
        return cells.view(self.format.dtype)[:, : self.inputs]  # type: ignore[arg-type]  # a dense format has a dtype

    def write_groups(self, first: int, codes: Tensor, scales: Tensor, minimums: Tensor | None) -> None:
        """Puts rows of a group format at `first`: codes uint8 [n, 32 B], scales and minimums [n, G]."""
        count, blocks = codes.shape[0], codes.shape[1] // BLOCK
        if self.format.bits == 8:
            quads = codes.contiguous().view(torch.int32).view(count, blocks, 8)
        else:
            nibbles = codes.view(count, blocks, 4, 2, 4)
            quads = (nibbles[:, :, :, 0] | nibbles[:, :, :, 1] << 4).view(torch.int32).view(count, blocks, 4)
        scale_cells, minimum_cells, code_cells = self._group_cells()
        self._put(code_cells, first, quads)
        groups = BLOCK // self.format.group_size
        self._put(scale_cells, first, scales.to(torch.float16).view(count, blocks, groups))
        if minimum_cells is not None and minimums is not None:
            self._put(minimum_cells, first, minimums.to(torch.float16).view(count, blocks, groups))

    def read_groups(self, first: int, count: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Codes uint8 [count, 32 B], scales and minimums float32 [count, G] of a group format."""
        scale_cells, minimum_cells, code_cells = self._group_cells()
        codes = self._take(code_cells, first, count).contiguous().view(torch.uint8)
        if self.format.bits == 4:
            codes = torch.stack((codes.view(-1, 4) & 15, codes.view(-1, 4) >> 4), dim=1)
        scales = self._take(scale_cells, first, count).flatten(1).float()
        minimums = None if minimum_cells is None else self._take(minimum_cells, first, count).flatten(1).float()
        return codes.reshape(count, -1), scales, minimums

    def dequantize(self, first: int, count: int) -> Tensor:
        """Rows as float32 [count, E], of any format."""
        if not self.format.bits:
            return self.read_dense(first, count).float()
        codes, scales, minimums = self.read_groups(first, count)
        grouped = codes.float().view(count, -1, self.format.group_size)
        if minimums is None:
            weight = (grouped - self.format.zero) * scales.unsqueeze(-1)
        else:
            weight = grouped * scales.unsqueeze(-1) + minimums.unsqueeze(-1)
        return weight.view(count, -1)[:, : self.inputs]

    def clear_padding(self) -> None:
        """Sets the rows past the last output to zero."""
        used = self.outputs % LANES
        if used:
            for cells in self._group_cells() if self.format.bits else (self._dense_cells(),):
                if cells is not None:
                    cells[-1].flatten(0, 1)[used:] = 0

    def _dense_width(self) -> int:
        return self.inputs + (self.inputs % 2 if self.format.dtype == torch.bfloat16 else 0)

    def _dense_cells(self) -> Tensor:
        """[P, 2, 16, cells], a cell being a number, or a pair of bfloat16."""
        cells = self.data.view(_cell_dtype(self.format))
        return cells.view(cells.shape[0], -1, 2, 16).permute(0, 2, 3, 1)

    def _group_cells(self) -> tuple[Tensor, Tensor | None, Tensor]:
        """Scales and minimums float16 [P, 2, 16, B, groups], codes as int32 quads [P, 2, 16, B, 8 or 4]."""
        blocks = self.data.view(self.data.shape[0], -1, self.format.block_bytes)
        groups = BLOCK // self.format.group_size
        size = 2 * LANES * groups

        def halves(start: int) -> Tensor:
            part = blocks[:, :, start : start + size].view(torch.float16)
            return part.view(*part.shape[:2], groups, 2, 16).permute(0, 3, 4, 1, 2)

        start = size * (1 + self.format.minimums)
        quads = blocks[:, :, start:].view(torch.int32)
        codes = quads.view(*quads.shape[:2], self.format.bits, 2, 16).permute(0, 3, 4, 1, 2)
        return halves(0), halves(size) if self.format.minimums else None, codes

    def _put(self, cells: Tensor, first: int, rows: Tensor) -> None:
        """cells[row] = rows, where row counts through the first three axes."""
        whole = rows.shape[0] // LANES * LANES if first % LANES == 0 else 0
        if whole:
            panel = first // LANES
            cells[panel : panel + whole // LANES] = rows[:whole].reshape(-1, 2, 16, *rows.shape[1:])
        if whole < rows.shape[0]:
            cells[_lanes(first + whole, rows.shape[0] - whole)] = rows[whole:]

    def _take(self, cells: Tensor, first: int, count: int) -> Tensor:
        return cells[_lanes(first, count)]


def _lanes(first: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
    rows = torch.arange(first, first + count)
    return rows // LANES, rows % LANES // 16, rows % 16


def _cell_dtype(form: PanelFormat) -> torch.dtype:
    return torch.float16 if form.dtype == torch.float16 else torch.int32
