"""puna beside llama.cpp, transformers and OpenVINO GenAI on this machine's processor, with the same weights.

Each engine runs in a process of its own that stays alive, and they take turns: every round measures one thing with all
of them one after another, so that what the machine does to one it does to all. Shown are medians of the rates, and of
the ratios within a round with their range. Weights are random, in the shape of a real model.

Run: make bench, which makes the peers' environment and then runs python benchmarks/cpu_peers.py
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent / "peers"))

from make_model import write_folder
from report import draw, markdown, write_section

from puna import LLaMAConfig
from puna.cli.bench_run import ProbeProcess
from puna.config.presets import PRESETS
from puna.planning.roofline import MachineLimit, Work, decode_work, prefill_work

ROOT = Path(__file__).parent.parent
CONTEXT = 1024
# By name: the prompt's and the new tokens of a run, and how many sequences at once.
MEASUREMENTS = {
    "decode": {"prompt_tokens": 64, "new_tokens": 33, "batch": 1},
    "prefill": {"prompt_tokens": 512, "new_tokens": 1, "batch": 1},
    "decode of 8": {"prompt_tokens": 64, "new_tokens": 25, "batch": 8},
}
# By what puna calls the format: the type of the GGUF file.
GGUF_TYPES = {"int8": "Q8_0", "int4": "Q4_0", "bf16": "BF16"}
# What differs more than this is no comparison. Activations are rounded to 8 bits by some engines and not by others.
LARGEST_DIFFERENCE = 0.5  # of a token's log-probability, in nats


@dataclass(frozen=True)
class Engine:
    """How to start one; `formats` and `measurements` are those that it can do."""

    name: str
    script: str
    from_folder: bool = False
    settings: dict[str, Any] = field(default_factory=dict)
    formats: tuple[str, ...] = tuple(GGUF_TYPES)
    measurements: tuple[str, ...] = tuple(MEASUREMENTS)


PEERS = (
    Engine("llama.cpp", "llama_cpp_worker.py"),
    Engine("transformers", "transformers_worker.py", from_folder=True, formats=("bf16",)),
    Engine("OpenVINO GenAI", "openvino_worker.py", formats=("int8", "int4"), measurements=("decode", "prefill")),
)


class Worker:
    """A started engine. Raises RuntimeError, with the end of what it printed, where it does not come up or dies."""

    def __init__(self, engine: Engine, python: str, settings: dict[str, Any]) -> None:
        self.engine = engine
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115  # closed in close()
        environment = {**os.environ, "OMP_NUM_THREADS": str(settings["threads"])}
        environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "src"), environment.get("PYTHONPATH", "")])
        self._process = subprocess.Popen(
            [python, str(ROOT / "benchmarks" / "peers" / engine.script), json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=environment,
        )
        self.started = self._answer()

    def ask(self, command: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        print(json.dumps(command), file=self._process.stdin, flush=True)
        return self._answer()

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
        self._log.close()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            self._log.seek(0)
            raise RuntimeError(f"{self.engine.name} ended: {self._log.read()[-500:]}")
        answer: dict[str, Any] = json.loads(line)
        return answer


class Benchmark:
    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.config = shape(arguments.shape)
        self.folder = arguments.cache / arguments.shape.replace("/", "_").removesuffix(".json")
        puna = Engine("puna", "puna_worker.py", from_folder=arguments.puna_from == "folder")
        self.engines = (puna, *(one for one in PEERS if one.name in arguments.engines))

    def prepare(self) -> None:
        """Writes what is not in the cache yet."""
        if not (self.folder / "config.json").is_file():
            print(f"writing {self.folder}", file=sys.stderr)
            write_folder(self.folder, self.config)
        for kind in (GGUF_TYPES[one] for one in self.arguments.formats):
            file = self.folder / f"{kind}.gguf"
            if not file.is_file():
                print(f"writing {file}", file=sys.stderr)
                script, unfinished = ROOT / "benchmarks" / "peers" / "make_model.py", file.with_suffix(".tmp")
                command = [self.arguments.peers_python, str(script), str(self.folder), str(unfinished), kind]
                subprocess.run(command, check=True)
                unfinished.rename(file)

    def start(self, engine: Engine, form: str, batch: int) -> Worker:
        settings = {
            **engine.settings,
            "file": str(self.folder if engine.from_folder else self.gguf(form)),
            "threads": self.arguments.threads,
            "batch": batch,
            "context": CONTEXT,
            "vocab_size": self.config.vocab_size,
        }
        if engine.name == "puna" and engine.from_folder:
            settings["quantization"] = None if form == "bf16" else form
        python = sys.executable if engine.name == "puna" else self.arguments.peers_python
        return Worker(engine, python, settings)

    def gguf(self, form: str) -> Path:
        return self.folder / f"{GGUF_TYPES[form]}.gguf"

    def of_format(self, form: str, probes: ProbeProcess) -> dict[str, Any]:
        """Everything about one format."""
        print(form, file=sys.stderr)
        resources = {}
        engines = []
        for engine in self.engines:
            if form not in engine.formats:
                continue
            try:
                resources[engine.name] = self.resources(engine, form)
                engines.append(engine)
            except RuntimeError as error:
                print(f"left out: {error}", file=sys.stderr)
        workers = {}
        try:
            for engine in engines:
                workers[engine.name] = self.start(engine, form, max(one["batch"] for one in MEASUREMENTS.values()))
            differences = self.differences(list(workers.values()))
            measured = {
                name: self.rounds(
                    name, [one for one in workers.values() if name in one.engine.measurements], form, probes
                )
                for name in MEASUREMENTS
            }
        finally:
            for worker in workers.values():
                worker.close()
        return {"resources": resources, "differences": differences, "measurements": measured}

    def resources(self, engine: Engine, form: str) -> dict[str, float]:
        """Medians of fresh processes with one sequence, after a prefill and a decode. The file is in the page cache."""
        ready, peak = [], []
        for _ in range(self.arguments.loads):
            worker = self.start(engine, form, 1)
            for name in ("prefill", "decode"):
                worker.ask(MEASUREMENTS[name])
            ready.append(worker.started["ready_seconds"])
            peak.append(worker.ask({})["peak"])
            worker.close()
        return {"ready_seconds": statistics.median(ready), "peak_memory_bytes": statistics.median(peak)}

    def differences(self, workers: list[Worker]) -> dict[str, float]:
        """How far the log-probabilities of 64 tokens are from puna's at most.

        Raises RuntimeError where that is too far: what computes something else is not timed.
        """
        tokens = random.Random(1).choices(range(self.config.vocab_size - 2), k=64)
        found = {one.engine.name: one.ask({"score": tokens})["logprobs"] for one in workers}
        ours = found.pop("puna")
        result = {}
        for name, theirs in found.items():
            if theirs is None:
                continue
            result[name] = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
            if not result[name] <= LARGEST_DIFFERENCE:
                raise RuntimeError(f"{name} computes something else: log-probabilities differ by {result[name]:.3f}")
        return result

    def rounds(self, name: str, workers: list[Worker], form: str, probes: ProbeProcess) -> dict[str, Any]:
        command = MEASUREMENTS[name]
        rates: dict[str, list[float]] = {one.engine.name: [] for one in workers}
        shares: dict[str, list[float]] = {one.engine.name: [] for one in workers}
        for turn in range(-1, self.arguments.pairs):  # the first one warms up
            probe = probes.measure()
            limit = MachineLimit(read_bandwidth=probe.read_bandwidth, operations=probe.operations)
            first = turn % len(workers)  # each begins in its turn
            for worker in (*workers[first:], *workers[:first]):
                answer = worker.ask(command)
                seconds = answer["prefill_seconds"] if name == "prefill" else answer["step_seconds"]
                tokens = command["prompt_tokens"] if name == "prefill" else command["batch"]
                if turn >= 0:
                    rates[worker.engine.name].append(tokens / seconds)
                    shares[worker.engine.name].append(100 * limit.least_seconds(self.work(name, form)) / seconds)
            shown = ", ".join(f"{one} {values[-1]:.1f}" for one, values in rates.items() if values)
            print(f"{form} {name} {turn + 1}/{self.arguments.pairs}: {shown}", file=sys.stderr)
        ratios = {
            one: [ours / theirs for ours, theirs in zip(rates["puna"], values, strict=True)]
            for one, values in rates.items()
            if one != "puna"
        }
        return {
            "tokens_per_second": {one: statistics.median(values) for one, values in rates.items()},
            "percent_of_limit": {one: statistics.median(values) for one, values in shares.items()},
            "ratios": {one: [statistics.median(values), min(values), max(values)] for one, values in ratios.items()},
            "rounds": rates,
        }

    def work(self, name: str, form: str) -> Work:
        """The least that any engine must do for one prefill, or for one step of decoding."""
        command, weights = MEASUREMENTS[name], self.gguf(form).stat().st_size
        if name == "prefill":
            return prefill_work(self.config, weights, command["batch"], command["prompt_tokens"])
        context = command["prompt_tokens"] + command["new_tokens"] // 2
        return decode_work(self.config, weights, command["batch"], context)

    def run(self) -> dict[str, Any]:
        self.prepare()
        versions = json.loads(
            subprocess.run(
                [self.arguments.peers_python, "-c", _VERSIONS], check=True, capture_output=True, text=True
            ).stdout
        )
        with ProbeProcess(self.arguments.threads, None) as probes:
            before = probes.measure()
            formats = {form: self.of_format(form, probes) for form in self.arguments.formats}
        return {
            "date": time.strftime("%Y-%m-%d"),
            "machine": processor(),
            "shape": self.arguments.shape,
            "threads": self.arguments.threads,
            "pairs": self.arguments.pairs,
            "versions": versions,
            "limit": {"read_bytes_per_second": before.read_bandwidth, **before.operations},
            "formats": formats,
        }


_VERSIONS = """
import importlib.metadata, json
names = ("llama-cpp-python", "transformers", "torch", "openvino-genai")
found = {}
for name in names:
    try:
        found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        pass
print(json.dumps(found))
"""


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def shape(name: str) -> LLaMAConfig:
    return PRESETS[name] if name in PRESETS else LLaMAConfig.from_hugging_face(name)


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers-python", default=str(ROOT / ".venv-peers" / "bin" / "python"))
    parser.add_argument("--shape", default="llama-3.2-1b", help="a preset of puna bench --random, or a config.json")
    parser.add_argument("--formats", nargs="+", choices=GGUF_TYPES, default=list(GGUF_TYPES))
    parser.add_argument("--engines", nargs="*", default=[one.name for one in PEERS], help="the peers; puna always runs")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=7, help="rounds of each measurement")
    parser.add_argument("--loads", type=int, default=3, help="fresh processes for load time and memory")
    parser.add_argument("--puna-from", choices=("gguf", "folder"), default="gguf", help="folder: quantised at load")
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "puna-benchmark")
    parser.add_argument("--out", type=Path, default=ROOT / "docs", help="folder for the page, the numbers and the plot")
    return parser.parse_args(words)


def main() -> None:
    arguments = parse()
    if not math.isfinite(arguments.pairs) or arguments.pairs < 1:
        raise SystemExit("--pairs must be at least 1")
    load = os.getloadavg()[0]
    if load > 0.5:
        print(
            f"other programs use this machine (load average {load:.1f}): the figures will not mean much",
            file=sys.stderr,
        )
    results = {"load_average": load, **Benchmark(arguments).run()}
    (arguments.out / "images").mkdir(parents=True, exist_ok=True)
    (arguments.out / "cpu_peers.json").write_text(json.dumps(results, indent=1) + "\n")
    table = markdown(results)
    write_section(arguments.out / "cpu_peers.md", table)
    draw(results, arguments.out / "images" / "cpu_peers.svg")
    print(table)


if __name__ == "__main__":
    main()
