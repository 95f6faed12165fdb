"""What serving costs: the same requests through puna.LLM and through `puna serve`, many streams at once, in turns.

Both engines live in processes of their own and have the same limits; each round runs the one and then the other. The
client that streams from the server runs on the same machine and takes its part of it. Weights are random, so that
texts have nothing in common.

Run: python benchmarks/server_overhead.py [--shapes 26m smollm2-135m llama-3.2-1b] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from servers import ROOT, SHAPES, ServerProcess, closed_load, model_folder, puna_command

from puna import LLM, SamplingParams
from puna.cli.load_run import Prompts


class Offline:
    """puna.LLM in a process of its own."""

    def __init__(self, settings: dict[str, Any]) -> None:
        path = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--offline", json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            # As the command line sets it: OpenMP's threads spin otherwise, which here costs the client its time.
            env={**os.environ, "PYTHONPATH": path, "OMP_WAIT_POLICY": "PASSIVE"},
        )

    def run(self, requests: int, seed: int) -> dict[str, float]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps([requests, seed]), file=self._process.stdin, flush=True)
        answer: dict[str, float] = json.loads(self._process.stdout.readline())
        return answer

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def offline(settings: dict[str, Any]) -> None:
    """The other side of Offline: answers until its input ends."""
    llm = LLM(
        settings["model"],
        max_num_seqs=settings["streams"],
        quantization=settings["quantization"],
        threads=settings["threads"],
    )
    for line in sys.stdin:
        requests, seed = json.loads(line)
        load = closed_load("bench", settings["streams"], requests, settings["input_len"], settings["output_len"], seed)
        prompts = Prompts(load, range(llm.engine.parts.config.vocab_size - 2), 1.0)
        drawn = [prompts.draw() for _ in range(settings["streams"] + requests)]
        params = SamplingParams(max_tokens=settings["output_len"], temperature=0, ignore_eos=True)
        asked = [{"prompt_token_ids": prompt} for prompt, _ in drawn if not isinstance(prompt, str)]
        llm.generate(asked[: settings["streams"]], params, show_progress=False)
        cpu, start = time.process_time(), time.perf_counter()
        outputs = llm.generate(asked[settings["streams"] :], params, show_progress=False)
        seconds = time.perf_counter() - start
        tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
        print(
            json.dumps({"rate": tokens / seconds, "cpu_seconds": time.process_time() - cpu, "tokens": tokens}),
            flush=True,
        )


def measure(shape: str, arguments: argparse.Namespace) -> dict[str, Any]:
    model = "demo" if shape == "demo" else str(model_folder(shape, arguments.cache))
    quantization = None if shape == "demo" else "int8"
    settings = {
        "model": model,
        "quantization": quantization,
        "streams": arguments.streams,
        "threads": arguments.threads,
        "input_len": arguments.input_len,
        "output_len": arguments.output_len,
    }
    more = [] if quantization is None else ["--quantization", quantization]
    vocab_size = 512 if shape == "demo" else SHAPES[shape].vocab_size
    rounds, rate = [], 0.0
    alone = Offline(settings)
    server = None
    try:
        server = ServerProcess("puna", puna_command(model, arguments.threads, arguments.streams, *more), "/ready")
        for turn in range(-1, arguments.rounds):  # the first one warms up
            # The warm-up's rate says how many requests take about as long as asked.
            batches = (
                1 if turn < 0 else max(2, round(rate * arguments.seconds / arguments.output_len / arguments.streams))
            )
            requests = batches * arguments.streams
            engine = alone.run(requests, turn + 1)
            load = closed_load(
                "bench", arguments.streams, requests, arguments.input_len, arguments.output_len, turn + 1
            )
            before = server.cpu_time()
            report = server.run(load, vocab_size)
            used = server.cpu_time() - before
            rate = report.output_throughput
            if turn < 0:
                continue
            tokens = report.total_output_tokens
            measured = tokens + arguments.streams * arguments.output_len  # the warm-up's are in the server's time, too
            rounds.append(
                {
                    "offline": engine["rate"],
                    "server": rate,
                    "ratio": rate / engine["rate"],
                    "offline_cpu_us_per_token": 1e6 * engine["cpu_seconds"] / engine["tokens"],
                    "loop_cpu_us_per_token": 1e6 * used.first_thread / measured,
                    "engine_cpu_us_per_token": 1e6 * used.others / measured,
                    "client_cpu_us_per_token": 1e6 * report.client_cpu_seconds / tokens,
                    "ttft_p99_ms": report.latencies["ttft"].percentile(99),
                    "itl_p99_ms": report.latencies["itl"].percentile(99),
                }
            )
            shown = ", ".join(f"{name} {value:,.2f}" for name, value in rounds[-1].items())
            print(f"{shape} {turn + 1}/{arguments.rounds}: {shown}", file=sys.stderr)
    finally:
        alone.close()
        if server is not None:
            server.close()
    medians = {name: statistics.median(one[name] for one in rounds) for name in rounds[0]}
    ratios = [one["ratio"] for one in rounds]
    return {**medians, "ratio_range": [min(ratios), max(ratios)], "rounds": rounds}


def table(results: dict[str, Any]) -> str:
    lines = [
        "| model | offline tokens/s | served tokens/s | served / offline (range) | loop us/token | client us/token |",
        "|---|---|---|---|---|---|",
    ]
    for shape, found in results.items():
        low, high = found["ratio_range"]
        lines.append(
            f"| {shape} | {found['offline']:,.0f} | {found['server']:,.0f} | **{found['ratio']:.2f}** "
            f"({low:.2f}-{high:.2f}) | {found['loop_cpu_us_per_token']:.0f} | {found['client_cpu_us_per_token']:.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--shapes", nargs="+", choices=["demo", *SHAPES], default=["26m", "smollm2-135m", "llama-3.2-1b"]
    )
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--input-len", type=int, default=32)
    parser.add_argument("--output-len", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4.0, help="of one run, about")
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "puna-benchmark")
    parser.add_argument("--json", type=Path, help="file for the results")
    parser.add_argument("--offline", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.offline is not None:
        offline(json.loads(arguments.offline))
        return
    results = {shape: measure(shape, arguments) for shape in arguments.shapes}
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
