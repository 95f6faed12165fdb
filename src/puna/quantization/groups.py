"""GroupQuantized: a matrix as checkpoints hold it quantised: codes, and a scale (and minimum) a group along K."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class GroupQuantized:
    """A weight [n outputs, K inputs] whose groups of `group_size` inputs share a scale and, perhaps, a minimum.

    weight = scales * (codes - zero) + minimums

    `codes` is uint8 [n, K], also where the code has fewer bits; `scales` and `minimums` are float32
    [n, K / group_size], `minimums` None where every one is 0; `zero`, from 0 to 255, is the code of the value 0 in a
    format without minimums (8 for Q4_0, 128 for Q8_0), and nearly always 0 beside minimums.

    Raises ValueError for tensors of other dtypes or shapes, on several devices, or a size that has no whole groups.
    """

    codes: Tensor
    scales: Tensor
    minimums: Tensor | None
    zero: int
    group_size: int

    def __post_init__(self) -> None:
        codes = self.codes
        if codes.dtype != torch.uint8 or codes.dim() != 2:
            raise ValueError(f"codes must be uint8 [n, K], not {codes.dtype} {list(codes.shape)}")
        if not 0 <= self.zero <= 255:
            raise ValueError(f"zero is {self.zero}: it is a code, so it must be from 0 to 255")
        rows, columns = codes.shape
        if self.group_size < 1 or columns % self.group_size:
            raise ValueError(f"groups of {self.group_size} do not divide the {columns} columns of the codes")
        groups = [rows, columns // self.group_size]
        for name, values in (("scales", self.scales), ("minimums", self.minimums)):
            if values is None:
                continue
            if values.dtype != torch.float32 or list(values.shape) != groups:
                raise ValueError(f"{name} must be float32 {groups}, not {values.dtype} {list(values.shape)}")
            if values.device != codes.device:
                raise ValueError(f"{name} are on {values.device} and codes on {codes.device}: move them to one device")

    @property
    def shape(self) -> tuple[int, int]:
        """(n, K) of the weight."""
        return self.codes.shape[0], self.codes.shape[1]

    def rows(self, index: slice | Tensor) -> GroupQuantized:
        """The rows that a slice, or a tensor of row numbers, chooses; a slice gives views, a tensor copies."""
        minimums = None if self.minimums is None else self.minimums[index]
        return GroupQuantized(self.codes[index], self.scales[index], minimums, self.zero, self.group_size)

    def padded(self, count: int) -> GroupQuantized:
        """The same with `count` rows of zeros behind it."""
        codes = F.pad(self.codes, (0, 0, 0, count), value=self.zero)
        scales = F.pad(self.scales, (0, 0, 0, count))
        minimums = None if self.minimums is None else F.pad(self.minimums, (0, 0, 0, count))
        return GroupQuantized(codes, scales, minimums, self.zero, self.group_size)

    def dequantize(self) -> Tensor:
        """The weight, float32 [n, K]: one product and, with minimums, one sum a value, each rounded to float32."""
        rows, columns = self.shape
        # Differences of codes are small integers, so they are exact in float32.
        values = self.codes.to(torch.float32).view(rows, columns // self.group_size, self.group_size)
        if self.zero:
            values -= self.zero
        values *= self.scales.unsqueeze(-1)
        if self.minimums is not None:
            values += self.minimums.unsqueeze(-1)
        return values.view(rows, columns)
