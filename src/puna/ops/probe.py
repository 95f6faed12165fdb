"""How fast this machine reads memory and multiplies: short measurements, which benchmarks compare with.

With the compiled kernels these are bare loops of the instructions that the kernels are made of. Without them torch's
sums and matrix products stand in, which are the fastest that is there then.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

import torch

from puna.ops.pages import zero_pages

try:
    from puna import _kernels
except ImportError:
    _kernels = None  # type: ignore[assignment]

# Much more than the second-level caches hold. The third level of a large server may hold all of it, but in a virtual
# machine most of that belongs to others.
READ_BYTES: Final = 1 << 30
_LINE: Final = 64
_SECONDS: Final = 0.02  # for one measurement: long beside starting it, short beside other programs' turns
_REPEATS: Final = 5
_KINDS: Final[Mapping[str, int]] = MappingProxyType({"int8": 1, "bfloat16": 2, "float32": 3})


@dataclass(frozen=True, kw_only=True)
class Probe:
    """Bytes read a second; operations a second by number type, a multiplication and its addition being two.

    float16 is computed in float32, and so are the others where that is faster.
    """

    read_bandwidth: float
    operations: Mapping[str, float]


class Prober:
    """Measures on so many threads, each time that it is asked. Holds `read_bytes` of memory.

    It sets the threads and the level of its whole process, so it should have one of its own. Raises ValueError for a
    level that this processor can't run.
    """

    def __init__(self, threads: int, level: str | None = None, read_bytes: int = READ_BYTES) -> None:
        torch.set_num_threads(threads)
        if _kernels is not None:
            _kernels.set_threads(threads)
            if level is not None:
                _kernels.set_level(level)
        self._done = torch.zeros(threads, dtype=torch.float64)  # by each thread, as the kernel counts it
        # In pages as weights have them; written, or all of them would be one page of zeros.
        self._memory = zero_pages(read_bytes // 4 * 4).view(torch.int32).fill_(1)
        self._products = {kind: _calibrated(self._product(kind)) for kind in _KINDS}

    def measure(self) -> Probe:
        """Takes about half a second."""
        found = {kind: _best(product) for kind, product in self._products.items()}
        for kind in ("int8", "bfloat16"):  # whose numbers can be made float32 where that is faster
            found[kind] = max(found[kind], found["float32"])
        found["float16"] = found["float32"]
        return Probe(read_bandwidth=_best(self._read), operations=found)

    def _read(self) -> float:
        memory = self._memory
        if _kernels is None:
            memory.sum(dtype=torch.int32)
            return float(memory.nbytes)
        start = -memory.data_ptr() % _LINE
        _kernels.probe(0, memory.data_ptr() + start, memory.nbytes - start, 0, self._done.data_ptr())
        return float(self._done.sum())

    def _product(self, kind: str) -> Callable[[int], float]:
        """What does so many iterations and returns the operations."""
        if _kernels is None:
            return _matrix_product(kind)

        def run(iterations: int) -> float:
            _kernels.probe(_KINDS[kind], 0, 0, iterations, self._done.data_ptr())
            return float(self._done.sum())

        return run


def _matrix_product(kind: str) -> Callable[[int], float]:
    size = 512
    matrix = torch.ones(size, size, dtype=getattr(torch, kind))

    def run(iterations: int) -> float:
        for _ in range(iterations):
            _ = torch._int_mm(matrix, matrix) if kind == "int8" else matrix @ matrix
        return 2.0 * size**3 * iterations

    return run


def _calibrated(run: Callable[[int], float]) -> Callable[[], float]:
    """With as many iterations as take about _SECONDS."""
    iterations = 1
    while True:
        start = time.perf_counter()
        run(iterations)
        elapsed = time.perf_counter() - start
        if elapsed > _SECONDS / 4:
            count = max(1, round(iterations * _SECONDS / elapsed))
            return lambda: run(count)
        iterations *= 2


def _best(work: Callable[[], float]) -> float:
    """The most a second of several runs: other programs can only take from it."""
    rates = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        done = work()
        rates.append(done / (time.perf_counter() - start))
    return max(rates)
