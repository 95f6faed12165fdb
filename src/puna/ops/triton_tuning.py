"""Tuning: which of a kernel's variants is the fastest on this device, measured once and kept in a file.

A launcher that has several variants (tile sizes, implementations) asks for one of them by name::

    from puna.ops import triton_tuning

    def prompt_attention(query, key, value, lengths, scale, sliding_window):
        def run(variant: str) -> Tensor:
            return VARIANTS[variant](query, key, value, lengths, scale, sliding_window)

        shape = (triton_tuning.bucket(query.shape[0]), query.shape[1], key.shape[1], query.shape[2], str(query.dtype))
        default = "sdpa" if query.shape[0] > 2048 else "triton"
        return run(triton_tuning.current().choose("prompt_attention/1", shape, default, ("sdpa", "triton"), run))

The rules: `run` may be called many times on the same tensors, so it must not change its inputs, and what it returns
must not depend on the variant but for rounding. The number in the kernel's name goes up when its variants change in
speed, so that older measurements are forgotten. `default` must be good by itself: it is what runs where nothing may be
measured, which is on the CPU, while a graph is captured, and outside of `Tuning.used()`. In deterministic mode
launchers do not ask at all: the variant must not depend on a file.

Whoever runs the model makes a Tuning and holds it open around its warm-up, and around its steps::

    tuning = Tuning.of_device(device, folder)  # folder: where caches belong, None for ~/.cache/puna
    with tuning.used():
        model(...)
    with tuning.used(measure=False):  # known choices only, else defaults: no step takes a second because of it
        model(...)
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import statistics
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import torch

if sys.platform != "win32":
    import fcntl

_log = logging.getLogger(__name__)

_FORMAT: Final = 1
# Runs of each variant that are timed, in turns, and of which the median counts.
_ROUNDS: Final = 11
# What is overwritten before each run, so that the run finds nothing in the L2 cache (50 MB on Hopper), as in a model,
# where other layers' weights came between. It takes 60 us or more, in which the run's launches are queued: none of the
# time that is measured is Python's.
_FLUSHED_BYTES: Final = 1 << 28

# Times calls in seconds each; None for one that failed.
Timer = Callable[[Sequence[Callable[[], object]]], list[float | None]]


def bucket(rows: int) -> int:
    """The power of two that is not below `rows`: numbers of rows that share a choice."""
    return 1 << max(0, rows - 1).bit_length()


@dataclass
class Tuning:
    """The choices that are known for one kind of device. Made by `of_device`; may be used by several threads.

    file: where choices are kept; None for nowhere.
    timer: measures; None where nothing can be measured, so that defaults are used.
    overlaps: whether kernels start before the ones ahead of them have ended; see triton_overlap.
    """

    file: Path | None = None
    timer: Timer | None = None
    overlaps: bool = False
    _known: dict[str, str] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        if self.file is not None:
            self._known = _read(self.file)

    @classmethod
    def of_device(cls, device: torch.device, folder: Path | None = None, *, overlaps: bool = False) -> Tuning:
        """The tuning of a GPU, kept in `folder` in a file with the name of the device and the versions of the software;
        of any other device, defaults only."""
        if device.type != "cuda":
            return cls(overlaps=overlaps)
        if folder is None:
            try:
                folder = Path.home() / ".cache" / "puna"
            except RuntimeError as error:  # a user without a home
                _log.warning("what is measured of kernels is kept in no file: %s", error)
                return cls(None, lambda calls: _time(device, calls), overlaps)
        cuda = torch.version.cuda or "none"
        name = f"{torch.cuda.get_device_name(device)} torch {torch.__version__} cuda {cuda}"
        file = folder / f"tuning-{re.sub('[^A-Za-z0-9.]+', '-', name)}.json"
        return cls(file, lambda calls: _time(device, calls), overlaps)

    def choose(
        self,
        kernel: str,
        shape: Sequence[int | str],
        default: str,
        variants: Sequence[str],
        run: Callable[[str], object],
    ) -> str:
        """One of `variants`: the one in the file, else the fastest now where it may be measured, else `default`."""
        key = f"{kernel} {' '.join(map(str, shape))}"
        known = self._known.get(key)
        if known in variants:
            return known  # type: ignore[return-value]  # `in` does not narrow
        if self.timer is None or len(variants) < 2 or not _measures.get() or _captures():
            return default
        with self._lock:
            return self._measure(key, default, variants, run, self.timer)

    def _measure(
        self, key: str, default: str, variants: Sequence[str], run: Callable[[str], object], timer: Timer
    ) -> str:
        try:
            # Defaults, since what starts before the clock does would look too good.
            with _DEFAULTS.used(measure=False):
                times = timer([lambda variant=variant: run(variant) for variant in variants])  # type: ignore[misc]
        except torch.OutOfMemoryError:
            _log.warning("%s is not measured, since memory is full: %s is used", key, default)
            return default
        done = [(seconds, variant) for seconds, variant in zip(times, variants, strict=True) if seconds is not None]
        chosen = min(done)[1] if done else default
        report = ", ".join(f"{variant} {seconds * 1e6:.1f} us" for seconds, variant in sorted(done))
        _log.info("%s: %s", key, report or f"every variant failed; {default} is used")
        self._known[key] = chosen
        if done and self.file is not None:
            self._known = _merge(self.file, self._known, key)
        return chosen

    @contextlib.contextmanager
    def used(self, measure: bool = True) -> Iterator[None]:
        """Within it, this thread's launchers ask this tuning, which measures what it does not know if told to."""
        tuning, measures = _current.set(self), _measures.set(measure)
        try:
            yield
        finally:
            _current.reset(tuning)
            _measures.reset(measures)


_DEFAULTS: Final = Tuning()
_current: ContextVar[Tuning] = ContextVar("puna tuning", default=_DEFAULTS)
_measures: ContextVar[bool] = ContextVar("puna tuning measures", default=False)


def current() -> Tuning:
    """The tuning that launchers ask: of the innermost `used`, else one that knows nothing and gives defaults."""
    return _current.get()


def _captures() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _time(device: torch.device, calls: Sequence[Callable[[], object]]) -> list[float | None]:
    """Seconds of each call on the GPU, the median of some runs that take turns, each with a cold L2 cache."""
    works = [_runs(call) for call in calls]
    flushed = torch.empty(_FLUSHED_BYTES, dtype=torch.int8, device=device)
    times: list[list[tuple[torch.cuda.Event, torch.cuda.Event]]] = [[] for _ in calls]
    for _ in range(_ROUNDS):
        for call, works_, own in zip(calls, works, times, strict=True):
            if works_:
                events = _event(), _event()
                flushed.zero_()
                events[0].record()
                call()
                events[1].record()
                own.append(events)
    torch.cuda.synchronize(device)
    return [statistics.median(a.elapsed_time(b) for a, b in own) / 1000 if own else None for own in times]


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def _runs(call: Callable[[], object]) -> bool:
    """Calls it once, which compiles its kernels; False where it can't run here, as for want of shared memory."""
    try:
        call()
        torch.cuda.synchronize()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # triton and torch raise what they like for a kernel that does not fit the device
        _log.info("a variant is left out: %s", error)
        return False
    return True


def _read(file: Path) -> dict[str, str]:
    """The choices in a file; none where it is missing or is not one of ours."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if content["format"] == _FORMAT:
            choices = content["choices"]
            return {str(key): str(choice) for key, choice in choices.items()}
        reason = f"its format is {content['format']!r}, not {_FORMAT}"
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
    _log.warning("the measurements in %s are ignored and will be made again (%s)", file, reason)
    return {}


def _merge(file: Path, known: dict[str, str], key: str) -> dict[str, str]:
    """Adds the choice of `key` to what the file has by now, perhaps from other processes -> all that is known."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with _locked(file):
            merged = known | _read(file) | {key: known[key]}
            _replace(file, json.dumps({"format": _FORMAT, "choices": merged}, indent=1, sort_keys=True))
        return merged
    except OSError as error:
        _log.warning("%s can't be written, so kernels are measured again next time: %s", file, error)
        return known


@contextlib.contextmanager
def _locked(file: Path) -> Iterator[None]:
    """Holds a lock that other processes wait for; the system lets go of it when a process ends, however it ends."""
    with open(file.with_suffix(".lock"), "w") as lock:
        if sys.platform != "win32":
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _replace(file: Path, text: str) -> None:
    """The file is the old or the new one at every moment, also where power fails."""
    descriptor, name = tempfile.mkstemp(prefix=file.name, dir=file.parent)
    try:
        with open(descriptor, "w", encoding="utf-8") as temporary:
            temporary.write(text)
            temporary.flush()
            os.fsync(temporary.fileno())
        Path(name).replace(file)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
