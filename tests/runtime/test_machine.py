"""Processors within affinity masks and cgroup quotas, read from files like the kernel's."""

from __future__ import annotations

from pathlib import Path

import pytest

from puna.runtime import machine


def write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


@pytest.mark.parametrize(
    ("membership", "files", "quota"),
    [
        ("0::/\n", {"cpu.max": "150000 100000\n"}, 1.5),
        ("0::/\n", {"cpu.max": "max 100000\n"}, None),
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000\n", "a/cpu.max": "400000 100000\n"}, 4.0),
        ("0::/a/b\n", {"a/b/cpu.max": "50000 100000\n", "a/cpu.max": "400000 100000\n"}, 0.5),
        ("0::/not/mounted/here\n", {"cpu.max": "200000 100000\n"}, 2.0),
        ("3:cpu:/job\n", {"cpu/job/cpu.cfs_quota_us": "300000\n", "cpu/job/cpu.cfs_period_us": "100000\n"}, 3.0),
        ("3:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        (
            "4:memory:/x\n3:cpu,cpuacct:/\n",
            {"cpu,cpuacct/cpu.cfs_quota_us": "250000\n", "cpu,cpuacct/cpu.cfs_period_us": "100000\n"},
            2.5,
        ),
        ("2:cpuset:/\n", {"cpuset/cpu.cfs_quota_us": "100000\n", "cpuset/cpu.cfs_period_us": "100000\n"}, None),
    ],
)
def test_cgroup_quota(tmp_path: Path, membership: str, files: dict[str, str], quota: float | None) -> None:
    write(tmp_path / "membership", membership)
    for name, text in files.items():
        write(tmp_path / "root" / name, text)
    assert machine.cpu_quota(tmp_path / "membership", tmp_path / "root") == quota


def test_no_cgroups_at_all(tmp_path: Path) -> None:
    assert machine.cpu_quota(tmp_path / "none", tmp_path) is None


@pytest.mark.parametrize(("quota", "cpus"), [(None, 8), (2.5, 3), (0.1, 1), (100.0, 8)])
def test_usable_cpus(monkeypatch: pytest.MonkeyPatch, quota: float | None, cpus: int) -> None:
    monkeypatch.setattr(machine, "affinity_cpus", lambda: 8)
    monkeypatch.setattr(machine, "cpu_quota", lambda: quota)
    assert machine.usable_cpus() == cpus


def test_peak_memory_counts_what_was_held() -> None:
    before = machine.peak_memory_bytes()
    size = before + 2**25
    held = bytearray(size)
    held[::4096] = bytes(len(held[::4096]))  # touches every page
    del held
    assert machine.peak_memory_bytes() >= size
