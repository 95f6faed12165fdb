"""What a device did, from the Chrome trace of torch's profiler: time by kernel, and the share with nothing to do."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

ON_DEVICE: Final = ("kernel", "gpu_memcpy", "gpu_memset")
ON_HOST: Final = ("cpu_op",)  # where there is no device, so that the script can be tried


@dataclass(frozen=True)
class DeviceTimes:
    """Microseconds. `kernels`: name, total and calls, the longest first; idle is the part of the span without any."""

    span: float
    idle_share: float
    kernels: tuple[tuple[str, float, int], ...]


def device_times(events: Iterable[Mapping[str, Any]], categories: tuple[str, ...] = ON_DEVICE) -> DeviceTimes:
    """Raises ValueError where nothing of these categories was recorded."""
    times: defaultdict[str, list[float]] = defaultdict(list)
    spans: list[tuple[float, float]] = []
    for event in events:
        if event.get("ph") == "X" and event.get("cat") in categories:
            start, length = float(event["ts"]), float(event["dur"])
            times[short_name(str(event["name"]))].append(length)
            spans.append((start, start + length))
    if not spans:
        raise ValueError(f"the trace has no {', '.join(categories)}")
    spans.sort()
    busy, reached = 0.0, spans[0][0]
    for start, end in spans:
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    span = reached - spans[0][0]
    kernels = sorted(((name, sum(parts), len(parts)) for name, parts in times.items()), key=lambda one: -one[1])
    return DeviceTimes(span, 1 - busy / span if span > 0 else 0.0, tuple(kernels))


def short_name(name: str) -> str:
    """A kernel's name without its template's arguments and parameters."""
    bare = re.sub(r"<.*|\(.*", "", name.removeprefix("void ")).strip()
    return (bare or name)[:60]
