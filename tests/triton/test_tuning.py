"""Tuning: what is measured, when it is not, and that its file survives other processes and being cut off."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from puna.ops import triton_tuning
from puna.ops.triton_tuning import Tuning

SHAPE = (8, 4096, "bfloat16")


class Watch:
    """A timer that is told what calls take, by the order of the variants, and notes that it was asked."""

    def __init__(self, *seconds: float | None) -> None:
        self.seconds = list(seconds)
        self.asked = 0

    def __call__(self, calls: Sequence[Callable[[], object]]) -> list[float | None]:
        self.asked += 1
        assert [call() for call in calls] == ["ran a", "ran b", "ran c"][: len(calls)]
        return self.seconds


def choose(tuning: Tuning, shape: Sequence[int | str] = SHAPE, variants: Sequence[str] = ("a", "b", "c")) -> str:
    return tuning.choose("kernel/1", shape, "a", variants, lambda variant: f"ran {variant}")


def test_the_fastest_is_measured_once_and_found_in_the_file(tmp_path: Path) -> None:
    file, watch = tmp_path / "deep" / "tuning.json", Watch(3e-6, 1e-6, 2e-6)
    tuning = Tuning(file, watch)
    with tuning.used():
        assert triton_tuning.current() is tuning
        assert choose(tuning) == "b"
        assert choose(tuning) == "b"
    assert watch.asked == 1
    never = Watch()
    with Tuning(file, never).used():
        assert choose(triton_tuning.current()) == "b"
    assert never.asked == 0
    assert triton_tuning.current() is not tuning


def test_a_variant_that_fails_is_left_out(tmp_path: Path) -> None:
    tuning = Tuning(tmp_path / "t.json", Watch(None, 5e-6, None))
    with tuning.used():
        assert choose(tuning) == "b"
    hopeless = Tuning(tmp_path / "u.json", Watch(None, None, None))
    with hopeless.used():
        assert choose(hopeless) == "a"
    assert not (tmp_path / "u.json").exists()


def test_a_variant_may_ask_itself() -> None:
    """As a product with its activation apart does: it gets the default while it is timed, and its own choice later."""
    times = iter(((2e-6, 1e-6), (3e-6, 1e-6)))

    def timer(calls: Sequence[Callable[[], object]]) -> list[float | None]:
        for call in calls:
            call()
        return list(next(times))

    tuning, inner = Tuning(timer=timer), []

    def run(variant: str) -> None:
        if variant == "apart":
            asked = triton_tuning.current().choose("inner/1", SHAPE, "x", ("x", "y"), lambda variant: None)
            inner.append(asked)

    with tuning.used():
        chosen = tuning.choose("outer/1", SHAPE, "one", ("one", "apart"), run)
        run(chosen)
    assert chosen == "apart"
    assert inner == ["x", "y"]


def test_nothing_is_measured_without_being_told_nor_without_a_gpu(tmp_path: Path) -> None:
    watch = Watch(3e-6, 1e-6, 2e-6)
    tuning = Tuning(tmp_path / "t.json", watch)
    assert choose(tuning) == "a"
    with tuning.used(measure=False):
        assert choose(tuning) == "a"
    on_cpu = Tuning.of_device(torch.device("cpu"), tmp_path)
    with on_cpu.used():
        assert choose(on_cpu) == "a"
    assert choose(triton_tuning.current()) == "a"
    assert watch.asked == 0
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_measured_during_capture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watch = Watch(3e-6, 1e-6, 2e-6)
    tuning = Tuning(tmp_path / "t.json", watch)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with tuning.used():
        assert choose(tuning) == "a"
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        assert choose(tuning) == "b"
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        assert choose(tuning) == "b"  # known by now


def test_full_memory_leaves_the_default_and_writes_nothing(tmp_path: Path) -> None:
    def full(calls: Sequence[Callable[[], object]]) -> list[float | None]:
        raise torch.OutOfMemoryError("full")

    tuning = Tuning(tmp_path / "t.json", full)
    with tuning.used():
        assert choose(tuning) == "a"
    assert not (tmp_path / "t.json").exists()


def test_a_choice_that_is_no_variant_any_more_is_measured_again(tmp_path: Path) -> None:
    file = tmp_path / "t.json"
    with (old := Tuning(file, Watch(3e-6, 2e-6, 1e-6))).used():
        assert choose(old) == "c"
    with (new := Tuning(file, Watch(2e-6, 1e-6))).used():
        assert choose(new, variants=("a", "b")) == "b"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"\xff\xfe",
        b'{"choices": {}}',
        b'{"format": 0, "choices": {}}',
        b'{"format": 1, "choices": [1]}',
    ],
)
def test_a_broken_or_foreign_file_is_ignored_with_a_warning_and_rewritten(
    tmp_path: Path, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "t.json"
    file.write_bytes(content)
    tuning = Tuning(file, Watch(3e-6, 1e-6, 2e-6))
    assert "ignored" in caplog.text
    with tuning.used():
        assert choose(tuning) == "b"
    assert list(json.loads(file.read_text())["choices"].values()) == ["b"]


def test_a_folder_that_cant_be_written_costs_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "occupied").write_text("a file where the folder should be")
    tuning = Tuning(tmp_path / "occupied" / "t.json", Watch(3e-6, 1e-6, 2e-6))
    with tuning.used():
        assert choose(tuning) == "b"
    assert "can't be written" in caplog.text


def _write_some(file: Path, first: int) -> None:
    tuning = Tuning(file, Watch(3e-6, 1e-6, 2e-6))
    with tuning.used():
        for i in range(first, first + 20):
            choose(tuning, (i,))


def _write_some_without_a_gpu(file: Path, first: int) -> None:
    """In a process that was forked: if its parent has used a GPU, it must not ask anything of it."""
    torch.cuda.is_available = lambda: False
    _write_some(file, first)


def test_processes_do_not_lose_each_others_choices(tmp_path: Path) -> None:
    file = tmp_path / "t.json"
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_write_some_without_a_gpu, args=(file, 20 * i)) for i in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert len(json.loads(file.read_text())["choices"]) == 60


def test_a_process_that_is_killed_while_it_writes_leaves_a_whole_file_and_no_lock(tmp_path: Path) -> None:
    file = tmp_path / "t.json"
    _write_some(file, 0)
    script = f"""
        import os, sys, time
        from pathlib import Path
        from puna.ops import triton_tuning
        def stuck(descriptor):
            print("writing", flush=True)
            time.sleep(60)
        os.fsync = stuck
        tuning = triton_tuning.Tuning(Path({str(file)!r}), lambda calls: [1.0, 2.0])
        with tuning.used():
            tuning.choose("kernel/1", (99,), "a", ("a", "b"), lambda variant: None)
    """
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)], env=environment, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(json.loads(file.read_text())["choices"]) == 20
    start = time.monotonic()
    _write_some(file, 100)
    assert time.monotonic() - start < 30  # nobody holds the lock
    assert len(json.loads(file.read_text())["choices"]) == 40


def test_buckets_are_powers_of_two() -> None:
    assert [triton_tuning.bucket(n) for n in (1, 2, 3, 4, 5, 17, 64, 65)] == [1, 2, 4, 4, 8, 32, 64, 128]


def test_measured_on_a_gpu(device: torch.device, tmp_path: Path) -> None:
    tuning = Tuning.of_device(device, tmp_path)
    x = torch.randn(64, 64, device=device)

    def run(variant: str) -> torch.Tensor:
        if variant == "broken":
            raise RuntimeError("does not fit")
        return x.repeat(64 if variant == "long" else 1, 1) @ x

    with tuning.used():
        chosen = tuning.choose("kernel/1", (64,), "long", ("broken", "long", "short"), run)
    if device.type == "cuda":
        assert chosen in ("long", "short")
        (file,) = tmp_path.glob("*.json")
        assert Tuning(file).choose("kernel/1", (64,), "broken", ("broken", "long", "short"), run) == chosen
    else:
        assert chosen == "long"
