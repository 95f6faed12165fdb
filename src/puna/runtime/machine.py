"""What this process may use of the machine, and has used: processors and memory, within its cgroups' limits."""

from __future__ import annotations

import math
import os
import resource
import sys
from pathlib import Path


def usable_cpus() -> int:
    """The processors that this process may keep busy: those of its affinity mask, within its cgroup's quota."""
    quota = cpu_quota()
    return affinity_cpus() if quota is None else max(1, min(affinity_cpus(), math.ceil(quota)))


def affinity_cpus() -> int:
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpu_quota(membership: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> float | None:
    """The processors' worth of time that this process's cgroups allow, None without a limit; versions 1 and 2.

    A limit on any group around this one holds as well. Within a container the path named in `membership` may not exist
    under `root`, which then is the container's own group.
    """
    try:
        lines = membership.read_text().splitlines()
    except OSError:  # not Linux
        return None
    limits: list[float] = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        base = root / controllers if controllers else root
        group = base / path.lstrip("/")
        for folder in (group, *group.parents):
            limit = _version_1_limit(folder) if controllers else _version_2_limit(folder)
            if limit is not None:
                limits.append(limit)
            if folder == base:
                break
    return min(limits, default=None)


def _version_2_limit(folder: Path) -> float | None:
    words = _words(folder / "cpu.max")
    return int(words[0]) / int(words[1]) if len(words) == 2 and words[0] != "max" else None


def _version_1_limit(folder: Path) -> float | None:
    quota, period = _words(folder / "cpu.cfs_quota_us"), _words(folder / "cpu.cfs_period_us")
    return int(quota[0]) / int(period[0]) if quota and period and int(quota[0]) > 0 else None


def _words(file: Path) -> list[str]:
    try:
        return file.read_text().split()
    except OSError:
        return []


def peak_memory_bytes() -> int:
    """The most memory that this process has held so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB


def available_host_memory(
    meminfo: Path = Path("/proc/meminfo"),
    membership: Path = Path("/proc/self/cgroup"),
    root: Path = Path("/sys/fs/cgroup"),
) -> int:
    """The smaller of what the kernel calls available and what this process's cgroups (versions 1 and 2) have left.

    Raises ValueError where the system tells nothing; then the cache's size must be given.
    """
    left: list[int] = []
    for line in _file_lines(meminfo):
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            left.append(int(value.split()[0]) * 1024)
    for line in _file_lines(membership):
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        base = root / "memory" if controllers else root
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if controllers else ("memory.max", "memory.current")
        group = base / path.lstrip("/")
        for folder in (group, *group.parents):
            limit, used = (_number(folder / name) for name in names)
            if limit is not None and used is not None:
                left.append(max(0, limit - used))
            if folder == base:
                break
    if not left:
        raise ValueError("this system does not tell how much memory is free: give kv_cache_memory")
    return min(left)


def _number(file: Path) -> int | None:
    words = _words(file)
    return int(words[0]) if len(words) == 1 and words[0].isdigit() else None


def _file_lines(file: Path) -> list[str]:
    try:
        return file.read_text().splitlines()
    except OSError:
        return []
