"""Makes the calls of test_fuzz.py in a process of its own, which a call may take down with it.

Each line of the input is a call as JSON, each line of the output what came of it: "ok", the name of an exception, or
what is wrong about the result. Arguments are plain values, or described by an object with one key: "tensor", "panels",
"dtype", "float", "address".
"""

from __future__ import annotations

import ctypes
import json
import math
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from puna import _kernels
from puna.ops import cpu, reference
from puna.ops.panels import PanelFormat, Panels

# Results of these are compared with the reference's.
COMPARED = ("embedding", "add", "rms_norm", "add_rms_norm", "rotary", "gated_activation")


def tensor_of(spec: dict[str, Any]) -> Tensor:
    """shape, dtype; values: numbers to repeat, else random; layout: how it lies in memory; device.

    The memory ends where the tensor does, so that a sanitizer sees the first byte too far.
    """
    shape, dtype = tuple(spec["shape"]), getattr(torch, spec["dtype"])
    layout = spec.get("layout", "contiguous")
    if spec.get("device", "cpu") != "cpu":
        return torch.empty(shape, dtype=dtype, device=spec["device"])
    if layout == "misaligned":
        size = math.prod(shape) * dtype.itemsize
        room = bytearray(max(size, 1) + 1)
        return (
            torch.frombuffer(room, dtype=dtype, offset=1, count=math.prod(shape)).view(shape)
            if size
            else _fill(shape, spec)
        )
    if layout == "expanded":
        return _fill((1, *shape[1:]) if shape else shape, spec).expand(shape)
    if layout == "expanded last":
        return _fill((*shape[:-1], 1) if shape else shape, spec).expand(shape)
    if layout == "transposed" and len(shape) > 1:
        return _fill((shape[1], shape[0], *shape[2:]), spec).transpose(0, 1)
    if layout == "last first" and len(shape) > 1:
        return _fill((*shape[:-2], shape[-1], shape[-2]), spec).transpose(-1, -2)
    if layout == "every second" and shape:
        return _fill((*shape[:-1], 2 * shape[-1]), spec)[..., ::2]
    if layout == "wide rows" and shape:
        return _fill((*shape[:-1], shape[-1] + 3), spec)[..., 3:]
    return _fill(shape, spec)


def _fill(shape: tuple[int, ...], spec: dict[str, Any]) -> Tensor:
    dtype = getattr(torch, spec["dtype"])
    count = math.prod(shape)
    values = spec.get("values")
    if values:
        return (
            torch.tensor((values * (count // len(values) + 1))[:count]).clamp(-(2**63), 2**63 - 1).to(dtype).view(shape)
        )
    numbers = torch.randn(count, generator=torch.Generator().manual_seed(count))
    return (numbers if dtype.is_floating_point else numbers.mul(20)).to(dtype).view(shape)


def panels_of(spec: dict[str, Any]) -> Panels:
    dtype = spec.get("dtype")
    form = PanelFormat(
        dtype=None if dtype is None else getattr(torch, dtype),
        bits=spec["bits"],
        group_size=spec.get("group_size", 32),
        minimums=spec.get("minimums", False),
    )
    shape = form.buffer_shape(spec["outputs"], spec["inputs"])
    data = {"shape": shape, "dtype": "uint8", "values": list(range(7, 250, 3)), **spec.get("data", {})}
    if data.get("layout", "contiguous") != "contiguous" or data.get("device"):
        return Panels(tensor_of(data), form, spec["outputs"], spec["inputs"])
    size = math.prod(data["shape"])
    room = torch.empty(size + 64, dtype=torch.uint8)
    start = -room.data_ptr() % 64 + data.get("off", 0)
    at = min(start, 64)
    room[at : at + size] = _fill((size,), data).to(torch.uint8)
    part = room[at : at + size].view(tuple(data["shape"]))
    return Panels(part.to(getattr(torch, data["dtype"])), form, spec["outputs"], spec["inputs"])


class Arguments:
    """Descriptions to values; keeps what addresses are of."""

    def __init__(self) -> None:
        self.kept: list[object] = []

    def value(self, spec: Any) -> Any:
        if isinstance(spec, list):
            return [self.value(part) for part in spec]
        if not isinstance(spec, dict):
            return spec
        (kind, inner), *_ = spec.items()
        if kind == "tensor":
            return tensor_of(inner)
        if kind == "panels":
            return panels_of(inner)
        if kind == "dtype":
            return getattr(torch, inner)
        if kind == "float":
            return float(inner)
        # An address of so many bytes, on a 64-byte boundary but for `off`.
        room = (ctypes.c_char * (inner["bytes"] + 128))()
        self.kept.append(room)
        start = ctypes.addressof(room)
        return start + -start % 64 + inner.get("off", 0)


def recorded(code: str) -> str:
    """What comes of `code` with two recordings and a call that works; the call must work afterwards as well."""
    numbers = torch.ones(1000)

    def work() -> None:
        y = cpu.add(numbers, numbers)
        if not torch.equal(y, numbers + numbers):
            raise AssertionError("the call was not made")

    found = "ok"
    try:
        exec(code, {"r": _kernels.Recording(), "other": _kernels.Recording(), "work": work})
    except Exception as error:
        found = type(error).__name__
    work()
    return found


def outcome(call: dict[str, Any]) -> str:
    if "code" in call:
        return recorded(call["code"])
    arguments = Arguments()
    values = {name: arguments.value(spec) for name, spec in call["arguments"].items()}
    function: Callable[..., Any] = getattr(_kernels if call["raw"] else cpu, call["function"])
    try:
        result = function(**values)
    except Exception as error:
        return type(error).__name__
    if call["raw"] or call["function"] not in COMPARED:
        return "ok"
    try:
        expected = getattr(reference, call["function"])(**values)
    except Exception as error:
        return f"the reference raises {type(error).__name__}: {error}"
    pairs = zip(result, expected, strict=True) if isinstance(result, tuple) else [(result, expected)]
    for got, right in pairs:
        # The reference adds axes of one where an argument has them.
        if got.numel() != right.numel() or got.dtype != right.dtype:
            return f"{got.dtype} {list(got.shape)} instead of {right.dtype} {list(right.shape)}"
        if not torch.allclose(got.float(), right.float().view(got.shape), rtol=0.05, atol=0.05, equal_nan=True):
            return "other numbers than the reference's"
    return "ok"


def main() -> None:
    _kernels.set_threads(2)
    for line in sys.stdin:
        print(outcome(json.loads(line)), flush=True)


if __name__ == "__main__":
    main()
