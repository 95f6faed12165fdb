"""benchmarks/gpu_h200.py: its arithmetic is that of the yardstick, and the whole script runs on the CPU."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

import pytest
import torch

BENCHMARKS: Final = Path(__file__).resolve().parent.parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import gpu_h200  # noqa: E402
from gpu_parts import arithmetic, report, trace  # noqa: E402

from puna.config.presets import PRESETS  # noqa: E402
from puna.ops import OpSpec, ReferenceBackend, TritonBackend, choose  # noqa: E402

LLAMA: Final = PRESETS["llama-3.1-8b"]
# As an H200 was once seen to be; FP8 as GPU.md has it.
LIMITS: Final = arithmetic.Limits(bandwidth=4.3e12, bfloat16=790e12, fp8=1.3e15)
# Layers in FP8 with a float32 scale for each output; embedding and lm_head in bfloat16.
FP8_BYTES: Final = 6_979_321_856 + 7_000_000 + 2 * 2 * 525_336_576


def row(name: str) -> arithmetic.Row:
    return next(one for one in arithmetic.ROWS_8B if one.name == name)


def floor(name: str, at_once: int = 1024) -> arithmetic.Floor:
    weights = arithmetic.effective_weights(LLAMA, FP8_BYTES, "fp8")
    limits = LIMITS.of(is_fp8=True)
    return arithmetic.offline_floor(LLAMA, weights, row(name), at_once, limits, "fp8", head_in_bfloat16=True)


def test_short_requests_are_bound_by_arithmetic() -> None:
    found = floor("128/128")
    assert found.limited_by == "computing"
    # 6.98e9 weights are multiplied in FP8 for each token, 0.53e9 of lm_head in bfloat16 for each that comes out: 3.7
    # TFLOP a request, and 1 % more for attention.
    expected = 2 * 6.98e9 * 256 / 1.3e15 + 2 * 0.525e9 * 128 / 790e12
    assert found.computing_seconds / 1024 == pytest.approx(expected, rel=0.02)
    assert found.tokens_per_second == pytest.approx(43_500, rel=0.02)


def test_long_outputs_are_bound_by_reading() -> None:
    found = floor("128/2048")
    assert found.limited_by == "reading"
    # 8 GB of weights and 1,024 caches of 1,152 tokens of 64 KiB: 85 GB a step.
    step = (8.04e9 + 1024 * 1152 * 65536) / 4.3e12
    assert found.seconds / 2047 == pytest.approx(step, rel=0.01)
    assert found.tokens_per_second == pytest.approx(1024 / step, rel=0.01)


def test_a_format_without_a_measured_rate_counts_as_bfloat16() -> None:
    limits = arithmetic.Limits(bandwidth=1.0, bfloat16=2.0, fp8=None)
    assert limits.of(is_fp8=True).operations["int8"] == 2.0
    assert LIMITS.of(is_fp8=False).operations["int8"] == 790e12


def test_as_many_requests_as_fit_the_time() -> None:
    short = row("128/128")
    assert arithmetic.requests_for(short, 40, 1024) == 27911 * 40 // 128
    assert arithmetic.requests_for(short, 1e9, 1024) == 30_000
    assert arithmetic.requests_for(row("20000/2000"), 1, 87) == 87  # a full batch, however long that takes
    assert row("20000/2000").expected_seconds(87) == pytest.approx(96.5, abs=0.1)


def test_phases_leave_ramp_up_and_drain_out_apart() -> None:
    # Half the rate for a second, 100 tokens a bin for eight, half the rate for one more.
    bins = {index: 100 if 20 <= index < 180 else 50 for index in range(200)}
    found = arithmetic.phases(bins, 0.05, first_end=1.0, last_begin=9.0, end=10.0)
    assert found.steady_tokens_per_second == pytest.approx(2000)
    assert found.tokens_per_second == pytest.approx(1800)
    assert (found.ramp_up_seconds, found.drain_out_seconds) == (1.0, 1.0)
    assert arithmetic.phases(bins, 0.05, first_end=9.0, last_begin=1.0, end=10.0).steady_tokens_per_second is None


def event(name: str, start: float, length: float, category: str = "kernel") -> dict[str, Any]:
    return {"ph": "X", "cat": category, "name": name, "ts": start, "dur": length}


def test_idle_time_is_what_no_kernel_covers() -> None:
    events = [
        event("void gemm<float, 128>(int)", 0, 40),
        event("void gemm<float, 64>(int)", 30, 20),  # overlaps
        event("_attention_kernel", 60, 30),
        event("Memcpy HtoD (Pinned -> Device)", 70, 30, "gpu_memcpy"),
        event("aten::mm", 0, 1000, "cpu_op"),
        {"ph": "M", "name": "process_name"},
    ]
    found = trace.device_times(events)
    assert found.span == 100
    assert found.idle_share == pytest.approx(0.1)
    assert found.kernels == (("gemm", 60, 2), ("_attention_kernel", 30, 1), ("Memcpy HtoD", 30, 1))
    with pytest.raises(ValueError, match="kernel"):
        trace.device_times(events[-1:])


def test_page_tells_what_failed(tmp_path: Path) -> None:
    results = [{"row": "128/128", "tokens_per_second": 30_000.0, "published": 27_911, "floor": 44_000.0}]
    found = {
        "about": {"shape": "llama-3.1-8b", "device": "H200"},
        "offline": {"results": results},
        "beside": {"results": [{"what": "static", "tokens_per_second": 81.25}], "failed": "ImportError: no"},
    }
    page = report.page(found)
    assert "| 128/128 | 30,000 | 27,911 | 44,000 |" in page
    assert "Failed: `ImportError: no`" in page
    pytest.importorskip("matplotlib")
    report.plot(found, tmp_path / "plot.svg")
    assert "128/128" in (tmp_path / "plot.svg").read_text()
    with pytest.raises(ValueError, match="no row"):
        report.plot({}, tmp_path / "none.svg")


def test_broken_kernels_can_be_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TritonBackend, "function", TritonBackend.function)
    spec = OpSpec(device=torch.device("cpu"), dtype=torch.bfloat16, head_size=128, differentiable=False)
    gpu_h200.leave_out(frozenset(["add", "rms_norm"]))
    found = {one.op: one.backend for one in choose(spec, (TritonBackend(), ReferenceBackend()))[1]}
    assert (found["add"], found["rms_norm"], found["add_rms_norm"]) == ("reference", "reference", "triton")
    with pytest.raises(SystemExit, match="--without has matmul: the ops are"):
        gpu_h200.leave_out(frozenset(["matmul"]))


def test_stages_without_a_gpu_fail_and_say_so(tmp_path: Path) -> None:
    script = BENCHMARKS.parent / "scripts" / "gpu_run.sh"
    hidden = {"PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": "", "HOME": "/nowhere", "TMPDIR": str(tmp_path)}
    command = [str(script), str(tmp_path / "out"), "test", "ncu", "nonsense"]
    done = subprocess.run(command, env=os.environ | hidden, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.endswith("failed: test ncu nonsense\n")
    for name, reason in (("test", "torch sees no NVIDIA GPU here"), ("nonsense", "there is no stage nonsense")):
        assert reason in (tmp_path / "out" / f"{name}.log").read_text()
    assert (tmp_path / "gpu_run_home").is_dir()
    text = script.read_text()
    stages = re.findall(r"^    ([a-z]+[-0-9]*)\)", text, re.MULTILINE)
    told = re.findall(r"^#   ([a-z]+(?:-1)?)", text, re.MULTILINE)
    assert [stage for stage in stages if stage not in ("offline-2", "offline-3")] == told


def test_every_part_runs_dry(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCHMARKS / "gpu_h200.py"), "--dry-run", "--out", str(tmp_path)]
    parts = "limits,single,offline,startup,deterministic,trace,agreement"
    done = subprocess.run([*command, "--parts", parts], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "gpu_h200.json").read_text())
    assert found["about"]["dry_run"] is True
    for name in parts.split(","):
        assert found[name]["results"], name
        assert not any("failed" in result for result in found[name]["results"]), found[name]
    rows = found["offline"]["results"]
    assert [one["row"] for one in rows] == ["2/2", "2/32"]
    assert all(one["percent_of_floor"] > 0 and one["requests"] == 6 for one in rows)
    assert {one["weights"] for one in found["single"]["results"]} == {"bf16", "fp8", "int4", "int8"}
    assert [(one["dtype"], one["alike"]) for one in found["agreement"]["results"]] == [("float32", 4), ("bfloat16", 4)]
    # A part that fails is told of; what an earlier call measured stays. It may be a machine without git, too.
    missing = (
        "import os, sys, runpy; os.environ['PATH'] = ''; sys.modules['transformers'] = None; "
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    script = f"import sys; sys.argv = {[command[1], *command[2:], '--parts', 'beside']!r}; {missing}"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stdout + done.stderr
    found = json.loads((tmp_path / "gpu_h200.json").read_text())
    assert "transformers" in found["beside"]["failed"]
    assert found["about"]["commit"] == "unknown"
    assert found["offline"]["results"] == rows
