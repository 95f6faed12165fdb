"""The compiled kernels as ops: tensors are checked here, and their addresses passed on; see puna.ops for each op.

Inside of `recording(...)` a thread's calls are not run but appended to a native list, and what they return lies in an
Arena, whose memory stays where it is, so that the list can be replayed. The weights and inputs must stay too.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import mmap
import weakref
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

from puna.ops.panels import LANES, PanelFormat, Panels

try:
    from puna import _kernels
except ImportError:  # a source tree that nothing was built in: everything runs on the reference ops
    _kernels = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from puna._kernels import Recording

_DTYPES: Final = MappingProxyType({torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3})
_ACTIVATIONS: Final = MappingProxyType({"silu": 1, "gelu": 2, "gelu_pytorch_tanh": 3, "relu": 4})
# Bytes that an int8 cache has for each position of a head beside the codes: a float32 scale.
INT8_SCALE_BYTES: Final = 4


def compiled() -> bool:
    """Whether the compiled kernels are installed."""
    return _kernels is not None


def cpu_features() -> tuple[str, ...]:
    """The instruction sets of this processor that kernels can use, such as "avx2"; empty without compiled kernels."""
    return () if _kernels is None else tuple(_kernels.cpu_features())


def levels() -> tuple[str, ...]:
    """The instruction levels of kernels that run here, the best first; empty without compiled kernels."""
    return () if _kernels is None else tuple(_kernels.supported_levels())


def level() -> str | None:
    """The level in use, or None without compiled kernels."""
    return None if _kernels is None else _kernels.level()


def set_level(name: str) -> None:
    """Chooses the level for the whole process. Raises ValueError for one that this processor cannot run."""
    _built().set_level(name)


def threads() -> int:
    """How many threads the kernels run on, 1 without compiled kernels."""
    return 1 if _kernels is None else _kernels.threads()


def set_threads(count: int) -> None:
    """Chooses how many threads the kernels of this process run on. Raises ValueError below 1 and above 1024."""
    if _kernels is not None:
        _kernels.set_threads(count)
    elif count < 1:
        raise ValueError(f"the number of threads is {count}: it must be at least 1")


class Arena:
    """Memory for what recorded ops return: it never moves, and what a tensor has left is used again for later ones.

    One arena may serve many recordings that are replayed one after another; it grows to what the largest one needs.
    """

    _CHUNK = 1 << 22
    _ALIGNMENT = 64

    def __init__(self) -> None:
        self._chunks: list[tuple[int, mmap.mmap]] = []  # (address, memory)
        self._free: list[tuple[int, int]] = []  # (address, bytes), by address
        self._kept: list[object] = []

    def keep(self, memory: object) -> None:
        """Keeps what a recorded kernel reads for as long as the arena."""
        self._kept.append(memory)

    def owns(self, tensor: Tensor) -> bool:
        """Whether a tensor's memory is this arena's."""
        return any(first <= tensor.data_ptr() < first + len(chunk) for first, chunk in self._chunks)

    def lent(self, tensor: Tensor) -> Tensor:
        """The same memory as a tensor that does not reserve it: for a result that is read before the next replay."""
        memory = (ctypes.c_char * (tensor.numel() * tensor.element_size())).from_address(tensor.data_ptr())
        return torch.frombuffer(memory, dtype=tensor.dtype).view(tensor.shape)

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        count = math.prod(shape)
        size = max(1, -(-count * dtype.itemsize // self._ALIGNMENT)) * self._ALIGNMENT
        address = self._take(size)
        # The tensor's storage keeps the ctypes array, so the array ends when the last view of the tensor does.
        memory = (ctypes.c_char * size).from_address(address)
        weakref.finalize(memory, self._give_back, address, size)
        return torch.frombuffer(memory, dtype=dtype, count=count).view(tuple(shape))

    def _take(self, size: int) -> int:
        for i, (address, free) in enumerate(self._free):
            if free >= size:
                self._free[i : i + 1] = [(address + size, free - size)] if free > size else []
                return address
        chunk = mmap.mmap(-1, max(size, self._CHUNK), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        start = ctypes.addressof(ctypes.c_char.from_buffer(chunk))
        self._chunks.append((start, chunk))
        self._give_back(start, len(chunk))
        return self._take(size)

    def _give_back(self, address: int, size: int) -> None:
        merged: list[tuple[int, int]] = []
        for start, length in sorted([*self._free, (address, size)]):
            if merged and sum(merged[-1]) == start and all(start != first for first, _ in self._chunks):
                merged[-1] = (merged[-1][0], merged[-1][1] + length)
            else:
                merged.append((start, length))
        self._free = merged


_arena: Final[ContextVar[Arena | None]] = ContextVar("puna_recording_arena", default=None)


@contextlib.contextmanager
def recording(arena: Arena) -> Iterator[Recording]:
    """Within it, this thread's calls are appended to the recording that it gives. Raises RuntimeError if nested."""
    record = _built().Recording()
    record.begin()
    token = _arena.set(arena)
    try:
        yield record
    finally:
        _arena.reset(token)
        record.end()


def embedding(token_ids: Tensor, weight: Tensor) -> Tensor:
    _check("weight", weight, weight.dtype, 2)
    ids = _ids(token_ids)
    vocabulary, inputs = weight.shape
    y = _empty((*token_ids.shape, inputs), weight.dtype)
    dtype = _number(weight.dtype)
    _built().embedding(
        ids.data_ptr(), weight.data_ptr(), y.data_ptr(), ids.numel(), vocabulary, inputs, weight.stride(0), False,
        dtype, 0, 1, 0, dtype,
    )  # fmt: skip
    return y


def panel_embedding(token_ids: Tensor, panels: Panels, dtype: torch.dtype) -> Tensor:
    ids = _ids(token_ids)
    y = _empty((*token_ids.shape, panels.inputs), dtype)
    _built().embedding(
        ids.data_ptr(), _panel_address(panels), y.data_ptr(), ids.numel(), panels.outputs, panels.inputs, 0, True,
        *_panel_numbers(panels.format), _number(dtype),
    )  # fmt: skip
    return y


def panel_linear(x: Tensor, panels: Panels, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    return _linear(x, panels, bias, dtype, panels.outputs, 0)


def panel_gated_linear(x: Tensor, panels: Panels, bias: Tensor | None, activation: str) -> Tensor:
    half = panels.outputs // 2
    if half % LANES:  # gate and up share a panel
        return gated_activation(panel_linear(x, panels, bias, x.dtype), activation)
    return _linear(x, panels, bias, x.dtype, half, _activation(activation))


def _linear(
    x: Tensor, panels: Panels, bias: Tensor | None, dtype: torch.dtype, outputs: int, activation: int
) -> Tensor:
    rows = _rows("x", x, panels.inputs)
    if bias is not None:
        _check("bias", bias, x.dtype, 1)
        if bias.numel() != panels.outputs:
            raise ValueError(f"bias has {bias.numel()} numbers, but the weight has {panels.outputs} outputs")
    y = _empty((*x.shape[:-1], outputs), dtype)
    _built().linear(
        rows.data_ptr(), _panel_address(panels), 0 if bias is None else bias.data_ptr(), y.data_ptr(),
        max(rows.stride(0), panels.inputs), outputs, rows.shape[0], panels.inputs, outputs,
        *_panel_numbers(panels.format), _number(x.dtype), _number(dtype), activation, activation != 0,
    )  # fmt: skip
    return y


def add(a: Tensor, b: Tensor) -> Tensor:
    if a.shape != b.shape or a.dtype != b.dtype:
        raise ValueError(f"add of {a.dtype} {list(a.shape)} and {b.dtype} {list(b.shape)}: they must be alike")
    _check_cpu("a", a)
    _check_cpu("b", b)
    a, b = a.contiguous(), b.contiguous()
    y = _empty(a.shape, a.dtype)
    _built().add(a.data_ptr(), b.data_ptr(), y.data_ptr(), a.numel(), _number(a.dtype))
    return y


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    _check("weight", weight, x.dtype, 1)
    size = weight.numel()
    y = _empty(x.shape, x.dtype)
    apart = x.dim() == 3 and x.stride(-2) >= size and (x.shape[0] == 1 or x.stride(0) >= size)
    if apart and x.stride(-1) == 1 and x.shape[-1] == size:
        _check_cpu("x", x)  # heads inside of wider rows
        outer, inner = x.shape[:2]
        strides = (max(x.stride(0), size), x.stride(1))
        address = x.data_ptr()
    else:
        rows = _rows("x", x, size)
        outer, inner, strides, address = rows.shape[0], 1, (max(rows.stride(0), size), 0), rows.data_ptr()
    _built().rms_norm(
        address, 0, weight.data_ptr(), 0, y.data_ptr(), outer, inner, size, *strides, epsilon, _number(x.dtype)
    )
    return y


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    if x.shape != residual.shape or x.dtype != residual.dtype:
        raise ValueError(f"x is {x.dtype} {list(x.shape)}, residual {residual.dtype} {list(residual.shape)}")
    _check("weight", weight, x.dtype, 1)
    size = weight.numel()
    rows, other = _rows("x", x, size), _rows("residual", residual, size).contiguous()
    total, y = _empty(x.shape, x.dtype), _empty(x.shape, x.dtype)
    _built().rms_norm(
        rows.data_ptr(), other.data_ptr(), weight.data_ptr(), total.data_ptr(), y.data_ptr(), rows.shape[0], 1, size,
        max(rows.stride(0), size), 0, epsilon, _number(x.dtype),
    )  # fmt: skip
    return total, y


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    heads, size = x.shape[-2:]
    flat = _heads("x", x.reshape(-1, heads, size))
    tokens = flat.shape[0]
    for name, angles in (("cos", cos), ("sin", sin)):
        if angles.shape != (*x.shape[:-2], size // 2):
            raise ValueError(f"{name} has the shape {list(angles.shape)}: {[*x.shape[:-2], size // 2]} is needed")
    cos, sin = cos.reshape(-1, size // 2).contiguous(), sin.reshape(-1, size // 2).contiguous()
    for name, angles in (("cos", cos), ("sin", sin)):
        _check(name, angles, torch.float32, 2)
    y = _empty(x.shape, x.dtype)
    _built().rotary(
        flat.data_ptr(), cos.data_ptr(), sin.data_ptr(), y.data_ptr(), tokens, heads, size,
        max(flat.stride(0), heads * size), size // 2, _number(x.dtype),
    )  # fmt: skip
    return y


def gated_activation(gate_up: Tensor, activation: str) -> Tensor:
    if gate_up.shape[-1] % 2:
        raise ValueError(f"gate_up has the shape {list(gate_up.shape)}: its last axis holds gates and as many ups")
    rows = _rows("gate_up", gate_up, gate_up.shape[-1]).contiguous()
    size = gate_up.shape[-1] // 2
    y = _empty((*gate_up.shape[:-1], size), gate_up.dtype)
    number = _activation(activation)
    _built().gated_activation(rows.data_ptr(), y.data_ptr(), rows.shape[0], size, number, _number(gate_up.dtype))
    return y


def store_kv(key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor) -> None:
    cache = _cache(key_cache, value_cache)
    _, kv_heads, _, head_size, _ = cache
    for name, part in (("key", key), ("value", value)):
        if part.shape != (slot_mapping.numel(), kv_heads, head_size):
            raise ValueError(
                f"{name} has the shape {list(part.shape)}: {[slot_mapping.numel(), kv_heads, head_size]} is needed"
            )
    key, value = _heads("key", key), _heads("value", value)
    if value.dtype != key.dtype:
        raise ValueError(f"key is {key.dtype} and value {value.dtype}: they must be alike")
    slots = _ids(slot_mapping)
    width = kv_heads * head_size
    _built().store_kv(
        key.data_ptr(), value.data_ptr(), slots.data_ptr(), key.shape[0], max(key.stride(0), width),
        max(value.stride(0), width), _number(key.dtype), key_cache.data_ptr(), value_cache.data_ptr(), *cache,
    )  # fmt: skip


def rotate_and_store(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos_sin: tuple[Tensor, Tensor],
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
) -> tuple[Tensor, Tensor]:
    query, key = rotary(query, *cos_sin), rotary(key, *cos_sin)
    store_kv(key, value, key_cache, value_cache, slot_mapping)
    return query, key


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
    cache = _cache(key_cache, value_cache)
    query = _heads("query", query)
    tokens, heads, size = query.shape
    if size != cache[3]:
        raise ValueError(f"query has heads of {size} numbers, the cache of {cache[3]}")
    for name, numbers, dims in (
        ("block_tables", block_tables, 2),
        ("query_starts", query_starts, 1),
        ("sequence_lengths", sequence_lengths, 1),
    ):
        _check(name, numbers, torch.int32, dims)
    sequences = sequence_lengths.numel()
    if block_tables.shape[0] != sequences or query_starts.numel() != sequences + 1:
        raise ValueError(
            f"{sequences} sequences need as many rows of block_tables ({block_tables.shape[0]}) and one more of "
            f"query_starts ({query_starts.numel()})"
        )
    # What is recorded is run with other numbers in these buffers later, which the engine answers for.
    if _arena.get() is None and int(query_starts[-1]) > tokens:
        raise ValueError(f"query has {tokens} tokens, but query_starts ends at {int(query_starts[-1])}")
    y = _empty((tokens, heads, size), query.dtype)
    width = block_tables.shape[1]
    _built().paged_attention(
        query.data_ptr(), y.data_ptr(), block_tables.data_ptr(), query_starts.data_ptr(), sequence_lengths.data_ptr(),
        sequences, heads, max(query.stride(0), heads * size), max(block_tables.stride(0), width), width,
        sliding_window or 0, scale, _number(query.dtype), key_cache.data_ptr(), value_cache.data_ptr(), *cache,
    )  # fmt: skip
    return y


def panel_experts(
    x: Tensor,
    router_logits: Tensor,
    gate_up: Sequence[Panels],
    proj: Sequence[Panels],
    experts_per_token: int,
    activation: str,
) -> Tensor:
    first, second, count = gate_up[0], proj[0], len(gate_up)
    for panels, like in (*((part, first) for part in gate_up), *((part, second) for part in proj)):
        if (panels.format, panels.outputs, panels.inputs) != (like.format, like.outputs, like.inputs):
            raise ValueError("the experts' weights have several shapes or formats: they must be alike")
    if len(proj) != count or (second.outputs, 2 * second.inputs) != (first.inputs, first.outputs):
        raise ValueError(
            f"{count} experts of gate_up [{first.outputs}, {first.inputs}] need as many of proj "
            f"[{first.inputs}, {first.outputs / 2:g}], not {len(proj)} of [{second.outputs}, {second.inputs}]"
        )
    rows = _rows("x", x, first.inputs).contiguous()
    logits = _rows("router_logits", router_logits, count).contiguous()
    if rows.dtype != logits.dtype or logits.shape[0] != rows.shape[0]:
        raise ValueError(f"router_logits is {logits.dtype} {list(logits.shape)}, for x {rows.dtype} {list(rows.shape)}")
    tables = [(ctypes.c_size_t * count)(*map(_panel_address, part)) for part in (gate_up, proj)]
    arena = _arena.get()
    if arena is not None:
        arena.keep(tables)
    y = _empty(x.shape, x.dtype)
    _built().experts(
        rows.data_ptr(), logits.data_ptr(), ctypes.addressof(tables[0]), ctypes.addressof(tables[1]), y.data_ptr(),
        rows.shape[0], first.inputs, second.inputs, count, experts_per_token, *_panel_numbers(first.format),
        *_panel_numbers(second.format), _activation(activation), _number(x.dtype),
    )  # fmt: skip
    return y


def argmax(x: Tensor) -> tuple[Tensor, Tensor]:
    """The lowest index of the largest number of each row of float32 [R, V], and that number -> int64 [R], float32 [R].

    A row with a NaN has NaN as its largest.
    """
    x = _logits(x)
    rows, size = x.shape
    indices, values = _empty((rows,), torch.int64), _empty((rows,), torch.float32)
    _built().argmax(x.data_ptr(), indices.data_ptr(), values.data_ptr(), rows, size, max(x.stride(0), size))
    return indices, values


def draw(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor | None,
    top_p: Tensor | None,
    min_p: Tensor | None,
    uniform: Tensor,
) -> tuple[Tensor, Tensor]:
    """A random token for each row of logits, float32 [R, V], and the row's highest logit -> int64 [R], float32 [R].

    temperature float32 above 0, top_k int64 in 1..V, top_p float64, min_p float32, uniform float64 in [0, 1): all [R].
    A row whose highest logit is not finite gets the token 0. `puna.runtime.sampling_ops.draw` says what is computed.
    """
    x = _logits(logits)
    rows, size = x.shape
    given = (
        ("temperature", temperature, torch.float32),
        ("top_k", top_k, torch.int64),
        ("top_p", top_p, torch.float64),
        ("min_p", min_p, torch.float32),
        ("uniform", uniform, torch.float64),
    )
    addresses = []
    for name, numbers, dtype in given:
        if numbers is None:
            addresses.append(0)
            continue
        _check(name, numbers, dtype, 1)
        if len(numbers) != rows:
            raise ValueError(f"{name} has {len(numbers)} numbers for {rows} rows of logits")
        addresses.append(numbers.data_ptr())
    tokens, highest = _empty((rows,), torch.int64), _empty((rows,), torch.float32)
    _built().draw(x.data_ptr(), *addresses, tokens.data_ptr(), highest.data_ptr(), rows, size, max(x.stride(0), size))
    return tokens, highest


def _built() -> Any:
    """The module, where it is needed. Raises RuntimeError where it is not built; tables of ops never lead there."""
    if _kernels is None:
        raise RuntimeError("the compiled kernels are not installed: install puna with a C++ compiler at hand")
    return _kernels


def _empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    arena = _arena.get()
    return torch.empty(shape, dtype=dtype) if arena is None else arena.empty(shape, dtype)


def _number(dtype: torch.dtype) -> int:
    number = _DTYPES.get(dtype, 3)
    if number == 3:
        raise ValueError(f"the dtype is {dtype}: the kernels take float32, bfloat16 and float16")
    return number


def _activation(name: str) -> int:
    if name not in _ACTIVATIONS:
        raise ValueError(f"activation is {name!r}: use {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]


def _check_cpu(name: str, tensor: Tensor) -> None:
    if tensor.device.type != "cpu":
        raise ValueError(f"{name} is on {tensor.device}: these kernels are for the CPU")


def _check(name: str, tensor: Tensor, dtype: torch.dtype, dims: int) -> None:
    """Raises ValueError unless the tensor has that dtype and number of axes, and a contiguous last one."""
    _check_cpu(name, tensor)
    if tensor.dtype != dtype or tensor.dim() != dims:
        raise ValueError(f"{name} is {tensor.dtype} {list(tensor.shape)}: {dtype} with {dims} axes is needed")
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise ValueError(f"{name} has the strides {tensor.stride()}: the last axis must be contiguous")
    if dims == 2 and tensor.shape[0] > 1 and tensor.stride(0) < tensor.shape[1]:
        raise ValueError(f"{name} has the strides {tensor.stride()}: its rows must not overlap")


def _logits(x: Tensor) -> Tensor:
    if x.dtype != torch.float32 or x.dim() != 2:
        raise ValueError(f"logits are {x.dtype} {list(x.shape)}: float32 with 2 axes is needed")
    return _rows("logits", x, x.shape[1])


def _rows(name: str, x: Tensor, size: int) -> Tensor:
    """x [..., size] as [rows, size] with contiguous rows, which may lie apart."""
    _check_cpu(name, x)
    if x.dim() == 0 or x.shape[-1] != size:
        raise ValueError(f"{name} has the shape {list(x.shape)}: the last axis must be {size}")
    rows = x if x.dim() == 2 else x.reshape(-1, size)
    if (size > 1 and rows.stride(1) != 1) or (rows.shape[0] > 1 and rows.stride(0) < size):
        rows = rows.contiguous()
    return rows


def _heads(name: str, x: Tensor) -> Tensor:
    """x [T, heads, D] with the heads of a token side by side; the tokens may lie apart."""
    _check_cpu(name, x)
    if x.dim() != 3:
        raise ValueError(f"{name} has the shape {list(x.shape)}: [tokens, heads, head size] is needed")
    _, heads, size = x.shape
    beside = (size == 1 or x.stride(2) == 1) and (heads == 1 or x.stride(1) == size)
    apart = x.shape[0] <= 1 or x.stride(0) >= heads * size
    return x if beside and apart else x.contiguous()


def _ids(ids: Tensor) -> Tensor:
    _check_cpu("ids", ids)
    if ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"ids are {ids.dtype}: int64 or int32 is needed")
    return ids.to(torch.int64).contiguous()


def _panel_address(panels: Panels) -> int:
    data = panels.data
    _check_cpu("the weight", data)
    if data.dtype != torch.uint8 or data.shape != panels.format.buffer_shape(panels.outputs, panels.inputs):
        shape = panels.format.buffer_shape(panels.outputs, panels.inputs)
        raise ValueError(f"the weight is {data.dtype} {list(data.shape)}: its format needs uint8 {list(shape)}")
    if not data.is_contiguous():
        raise ValueError("the weight's panels must be contiguous")
    return data.data_ptr()


def _panel_numbers(form: PanelFormat) -> tuple[int, int, int, int]:
    """dense, bits, groups, minimums as the kernels number them."""
    dense = 0 if form.dtype is None else _DTYPES[form.dtype]
    return dense, form.bits, 32 // form.group_size, int(form.minimums)


def _cache(keys: Tensor, values: Tensor) -> tuple[int, int, int, int, int]:
    """blocks, kv_heads, block_size, head_size, dtype of a layer's cache; see KVPool."""
    if keys.shape != values.shape or keys.dtype != values.dtype or keys.dim() != 4:
        raise ValueError(
            f"the caches are {keys.dtype} {list(keys.shape)} and {values.dtype} {list(values.shape)}: they must be "
            "alike, [blocks, heads, block size, head size]"
        )
    _check_cpu("the cache", keys)
    _check_cpu("the cache", values)
    if not keys.is_contiguous() or not values.is_contiguous():
        raise ValueError("the caches must be contiguous")
    if keys.dtype not in _DTYPES:
        raise ValueError(f"the cache is {keys.dtype}: use float32, bfloat16, float16 or int8")
    blocks, kv_heads, block_size, size = keys.shape
    size -= INT8_SCALE_BYTES if keys.dtype == torch.int8 else 0
    return blocks, kv_heads, block_size, size, _DTYPES[keys.dtype]
