"""What puna does on one H200: against TensorRT-LLM's published throughput, and against what the device can do at most.

Run `PYTHONPATH=src python benchmarks/gpu_h200.py --out FOLDER [--parts limits,single,...] [--rows 128/128,...]` where
there is a GPU and nothing else runs. Each call adds its parts to FOLDER/gpu_h200.json and writes the page and the plot
anew, so that several calls of a few minutes make up the whole. A part that fails is reported, and the others go on.
`--dry-run` tries the script on the CPU with a tiny model; its numbers mean nothing.

Random weights of the model's shape, made on the device. All requests are queued at once, have exactly the lengths of
their row and random tokens, and go on past any end of text, as in the published runs; how many of them is in the table.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

from gpu_parts import report, runs, startup
from gpu_parts.agreement import agreement
from gpu_parts.arithmetic import Limits
from gpu_parts.beside import beside
from gpu_parts.settings import SHAPES, setting_of

from puna.ops import OP_NAMES, OpSpec, TritonBackend

Results = Iterator[dict[str, Any]]
# In the order of what matters if time runs out.
PARTS: Final = ("limits", "single", "offline", "startup", "deterministic", "beside", "trace", "agreement")
NAME: Final = "gpu_h200"


class Benchmark:
    """One call's parts, each of which gives results one after another."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.device = torch.device("cpu" if arguments.dry_run else "cuda")
        self.shape = "tiny" if arguments.dry_run else arguments.shape
        self.setting = setting_of(self.shape, self.device)
        if arguments.rows:
            wanted = arguments.rows.split(",")
            known = {row.name: row for row in self.setting.rows}
            unknown = [name for name in wanted if name not in known]
            if unknown:
                raise SystemExit(f"--rows has {', '.join(unknown)}: the rows are {', '.join(known)}")
            self.setting = dataclasses.replace(self.setting, rows=tuple(known[name] for name in wanted))
        self.deadline = time.monotonic() + arguments.seconds
        self.out = Path(arguments.out)
        self.out.mkdir(parents=True, exist_ok=True)
        self.path = self.out / f"{NAME}.json"
        self.found: dict[str, Any] = json.loads(self.path.read_text()) if self.path.exists() else {}
        self.found["about"] = about(self.shape, self.device)

    def time_left(self) -> float:
        return self.deadline - time.monotonic()

    def run(self) -> bool:
        """Whether all parts went well."""
        functions: dict[str, Callable[[], Results]] = {name: getattr(self, name) for name in PARTS}
        went_well = True
        for name in self.arguments.parts.split(","):
            start, results = time.monotonic(), self.kept(name)
            part: dict[str, Any] = {"results": results}
            self.found[name] = part
            try:
                for result in functions[name]():
                    results.append(result)
                    print(name, json.dumps(result), flush=True)
                    self.save()
            except Exception as error:  # the others go on
                import traceback

                traceback.print_exc()
                part["failed"] = f"{type(error).__name__}: {error}"[:1000]
                went_well = False
            part["seconds"] = time.monotonic() - start
            self.save()
        return went_well

    def kept(self, name: str) -> list[dict[str, Any]]:
        """Of an earlier call: rows of throughput that this one does not run again."""
        if name != "offline":
            return []
        again = {row.name for row in self.setting.rows}
        return [row for row in self.found.get(name, {}).get("results", []) if row["row"] not in again]

    def save(self) -> None:
        self.path.write_text(json.dumps(self.found, indent=1) + "\n")
        self.path.with_suffix(".md").write_text(report.page(self.found))

    def measured(self) -> Limits:
        """The limits that this or an earlier call measured."""
        results = self.found.get("limits", {}).get("results", [])
        return Limits(**results[0]) if results else runs.measured_limits(self.device, self.arguments.dry_run)

    def limits(self) -> Results:
        yield dataclasses.asdict(runs.measured_limits(self.device, self.arguments.dry_run))

    def single(self) -> Results:
        usual = [(quantization, False) for quantization in ("bf16", "fp8", "int4", "int8")]
        for quantization, overlap in (*usual, ("fp8", True), ("int4", True), ("bf16", True)):
            what = {"weights": quantization, "overlap": overlap}
            if self.time_left() < 30 and not self.arguments.dry_run:
                yield what | {"skipped": f"{self.time_left():.0f} s left"}
                continue
            try:
                yield runs.single(self.setting, quantization, self.measured(), overlap_kernels=overlap)
            except Exception as error:  # another format may do
                yield what | {"failed": f"{type(error).__name__}: {error}"[:500]}

    def trace(self) -> Results:
        steps = ((2, False), (2, True)) if self.arguments.dry_run else ((1, False), (1, True), (256, False))
        for batch, overlap in steps:
            yield runs.traced(self.setting, "fp8", batch, "auto", self.out, overlap_kernels=overlap)

    def offline(self) -> Results:
        own = self.arguments
        yield from runs.offline(self.setting, "fp8", own.kv_cache, self.measured(), own.row_seconds, self.time_left)

    def startup(self) -> Results:
        for capture in ("lazy",) if self.arguments.dry_run else ("lazy", "eager"):
            yield startup.measure(self.shape, str(self.device), "fp8", capture)

    def deterministic(self) -> Results:
        yield runs.deterministic_cost(self.setting, "fp8", self.arguments.row_seconds)

    def agreement(self) -> Results:
        for dtype in ("float32", "bfloat16"):
            yield agreement(self.device, dtype, 4 if self.arguments.dry_run else 64)

    def beside(self) -> Results:
        yield from beside(self.setting, self.time_left)


def about(shape: str, device: torch.device) -> dict[str, Any]:
    def version(package: str) -> str:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return "none"

    return {
        "shape": shape,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "dry_run": device.type == "cpu",
        "torch": torch.__version__,
        "triton": version("triton"),
        "transformers": version("transformers"),
        "commit": commit(),
        "command": " ".join(sys.argv),
        "date": time.strftime("%Y-%m-%d"),
        "processors": os.cpu_count(),
    }


def commit() -> str:
    """Of these sources; machines that are lent often have a copy without its history, or no git."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parent)
    except OSError:
        return "unknown"
    return found.stdout.strip() or "unknown"


def leave_out(ops: frozenset[str]) -> None:
    """Has torch compute these ops from now on, so that one kernel that is broken does not keep all else from being
    measured. Raises SystemExit for what is no op."""
    if unknown := ops - set(OP_NAMES):
        raise SystemExit(f"--without has {', '.join(sorted(unknown))}: the ops are {', '.join(OP_NAMES)}")
    function = TritonBackend.function

    def others(backend: TritonBackend, op: str, spec: OpSpec) -> Callable[..., Any] | str:
        return "left out" if op in ops else function(backend, op, spec)

    TritonBackend.function = others  # type: ignore[method-assign]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="gpu_results", help="folder for results, which are added to what is there")
    parser.add_argument("--parts", default=",".join(PARTS), help=f"some of {','.join(PARTS)}")
    parser.add_argument("--rows", default="", help="of the offline part, such as 128/128,1000/1000; all if not given")
    parser.add_argument("--shape", default=SHAPES[0], choices=SHAPES)
    parser.add_argument("--kv-cache", default="fp8", choices=("auto", "fp8", "int8"), help="of the offline part")
    parser.add_argument("--row-seconds", type=float, default=40, help="about how long a row of throughput may take")
    parser.add_argument("--seconds", type=float, default=540, help="after which no more rows are begun")
    parser.add_argument("--without", default="", help="ops to leave to torch, where kernels are broken: add,experts")
    parser.add_argument("--dry-run", action="store_true", help="a tiny model on the CPU: does the script work?")
    arguments = parser.parse_args()
    unknown = [name for name in arguments.parts.split(",") if name not in PARTS]
    if unknown:
        parser.error(f"--parts has {', '.join(unknown)}: the parts are {', '.join(PARTS)}")
    if arguments.without:
        leave_out(frozenset(arguments.without.split(",")))
    # Tracing kernels of CUDA graphs fails where the tracer is set up a second time.
    os.environ.setdefault("TEARDOWN_CUPTI", "0")
    os.environ.setdefault("DISABLE_CUPTI_LAZY_REINIT", "1")
    benchmark = Benchmark(arguments)
    went_well = benchmark.run()
    print(report.page(benchmark.found))
    try:
        report.plot(benchmark.found, benchmark.path.with_suffix(".svg"))
    except (ImportError, ValueError) as error:
        print(f"no plot: {error}")
    sys.exit(0 if went_well else 1)


if __name__ == "__main__":
    main()
