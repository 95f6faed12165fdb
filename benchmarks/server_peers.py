"""puna's server beside llama.cpp's: the same requests to both, with the same weights, 1, 8 and 32 clients at once.

Both servers read the same GGUF file (random weights in a known shape) and stay alive; in every round each one gets the
same requests, one server after the other, and each begins in its turn. Clients stream, and ask again as soon as they
have an answer; texts all have the same length. Shown are medians over the rounds, and of the rounds' ratios with their
range. The client is `puna bench serve`'s and runs on the same machine.

Run: make bench-server, which makes the peers' environment, compiles llama-server, and runs
python benchmarks/server_peers.py --llama-server FILE
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

from cpu_peers import processor
from matplotlib.figure import Figure
from servers import ROOT, SHAPES, ServerProcess, closed_load, model_folder, puna_command

from puna.cli.load_report import LoadReport

MARK, END = "<!-- measured: benchmarks/server_peers.py writes from here -->", "<!-- to here -->"
GGUF_TYPE = "Q8_0"
# Of each shape: tokens of a prompt, tokens of an answer, and how often each client asks in a round.
LOADS = {"smollm2-135m": (64, 32, 2), "llama-3.2-1b": (32, 32, 1)}
LATENCIES = ("ttft", "itl", "e2el")


class Benchmark:
    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments

    def file(self, shape: str) -> Path:
        """The GGUF file, written where it is not in the cache yet."""
        folder = model_folder(shape, self.arguments.cache)
        file = folder / f"{GGUF_TYPE}.gguf"
        if not file.is_file():
            print(f"writing {file}", file=sys.stderr)
            script, unfinished = ROOT / "benchmarks" / "peers" / "make_model.py", file.with_suffix(".tmp")
            command = [self.arguments.peers_python, str(script), str(folder), str(unfinished), GGUF_TYPE]
            subprocess.run(command, check=True)
            unfinished.rename(file)
        return file

    def start(self, shape: str) -> list[ServerProcess]:
        arguments, file, most = self.arguments, str(self.file(shape)), max(self.arguments.clients)
        inputs, outputs, _ = LOADS[shape]
        threads = str(arguments.threads)
        # What both must hold: so many texts of that length. llama.cpp divides -c among its slots.
        length = inputs + outputs + 16
        llama = [
            *(str(arguments.llama_server), "-m", file, "--host", "127.0.0.1", "-t", threads, "-tb", threads),
            *("-np", str(most), "-c", str(length * most), "-cb", "--no-webui"),
        ]
        puna = puna_command(file, arguments.threads, most, "--dtype", "bfloat16", "--max-model-len", str(length))
        found = [ServerProcess("puna", puna, "/ready")]
        try:
            found.append(ServerProcess("llama.cpp", llama, "/health"))
        except BaseException:
            found[0].close()
            raise
        return found

    def measure(self, shape: str, clients: int, servers: list[ServerProcess]) -> dict[str, Any]:
        inputs, outputs, times = LOADS[shape]
        vocab_size = SHAPES[shape].vocab_size
        for server in servers:  # what happens once, such as steps of this size
            server.run(closed_load("bench", clients, clients, 4, 4, seed=-1), vocab_size)
        rounds: dict[str, list[dict[str, float]]] = {server.name: [] for server in servers}
        for turn in range(self.arguments.rounds):
            load = closed_load("bench", clients, times * max(clients, 2), inputs, outputs, seed=turn, warmup=0)
            for server in servers if turn % 2 else servers[::-1]:
                rounds[server.name].append(self.numbers(server.run(load, vocab_size), outputs))
            shown = ", ".join(f"{name} {found[-1]['output_throughput']:.1f}" for name, found in rounds.items())
            print(f"{shape} {clients} clients, {turn + 1}/{self.arguments.rounds}: {shown} tokens/s", file=sys.stderr)
        ours, theirs = rounds["puna"], rounds["llama.cpp"]
        ratios = [a["output_throughput"] / b["output_throughput"] for a, b in zip(ours, theirs, strict=True)]
        medians = {
            name: {key: statistics.median(one[key] for one in found) for key in found[0]}
            for name, found in rounds.items()
        }
        return {**medians, "ratio": [statistics.median(ratios), min(ratios), max(ratios)], "rounds": rounds}

    def numbers(self, report: LoadReport, outputs: int) -> dict[str, float]:
        if report.total_output_tokens != outputs * report.completed:
            raise RuntimeError(f"answers of {report.total_output_tokens / report.completed} tokens, not {outputs}")
        found = {
            "output_throughput": report.output_throughput,
            "client_cpu_share": report.client_cpu_seconds / report.duration,
        }
        for name in LATENCIES:
            found |= {f"p{p}_{name}_ms": report.latencies[name].percentile(p) for p in (50, 99)}
        return found

    def run(self, shape: str) -> dict[str, Any]:
        load = os.getloadavg()[0]
        if load > 0.5:
            print(f"other programs use this machine (load average {load:.1f})", file=sys.stderr)
        servers = self.start(shape)
        try:
            inputs, outputs, _ = LOADS[shape]
            found = {str(clients): self.measure(shape, clients, servers) for clients in self.arguments.clients}
        finally:
            for server in servers:
                server.close()
        what = {"input_len": inputs, "output_len": outputs, "rounds": self.arguments.rounds, "load_average": load}
        return {**what, "clients": found}


def version(llama_server: Path) -> str:
    done = subprocess.run([str(llama_server), "--version"], capture_output=True, text=True, check=True)
    return next(
        line.removeprefix("version: ") for line in (done.stderr + done.stdout).splitlines() if "version" in line
    )


def markdown(results: dict[str, Any]) -> str:
    lines = [
        f"{results['date']}, {results['machine']}, {results['threads']} threads, which the client shares; llama.cpp "
        f"{results['llama.cpp']}; {GGUF_TYPE} files of random weights. Times in milliseconds.",
    ]
    for shape, found in results["shapes"].items():
        lines += [
            "",
            f"{shape}, prompts of {found['input_len']} tokens, answers of {found['output_len']}, medians of "
            f"{found['rounds']} rounds; load average before it: {found['load_average']:.1f}.",
            "",
            "| clients | server | tokens/s | TTFT p50 | p99 | ITL p50 | p99 | E2EL p50 | p99 | ratio (range) |",
            "|---|---|---|---|---|---|---|---|---|---|",
        ]
        for clients, measured in found["clients"].items():
            ratio, low, high = measured["ratio"]
            for name in ("puna", "llama.cpp"):
                numbers = measured[name]
                cells = [f"{numbers[f'p{p}_{one}_ms']:,.0f}" for one in LATENCIES for p in (50, 99)]
                last = f"**{ratio:.2f}** ({low:.2f}-{high:.2f})" if name == "puna" else ""
                rate = f"{numbers['output_throughput']:,.1f}"
                lines.append(f"| {' | '.join([clients, name, rate, *cells, last])} |")
    return "\n".join(lines)


def write_section(page: Path, text: str) -> None:
    """Puts the text between the page's marks."""
    old = page.read_text(encoding="utf-8") if page.is_file() else "# puna's server beside llama.cpp's\n"
    if MARK not in old or END not in old:
        old = f"{old.rstrip()}\n\n{MARK}\n{END}\n"
    head, _, rest = old.partition(MARK)
    page.write_text(f"{head}{MARK}\n{text}\n{END}{rest.partition(END)[2]}", encoding="utf-8")


def draw(results: dict[str, Any], file: Path) -> None:
    """A row for each shape: throughput, and the median and the 99th percentile of two latencies, by clients."""
    shapes = results["shapes"]
    figure = Figure(figsize=(10.5, 2.9 * len(shapes) + 0.4), layout="constrained")
    colors = {"puna": "tab:blue", "llama.cpp": "tab:orange"}
    panels = (("output tokens/s", ""), ("time to first token, ms", "ttft"), ("inter-token latency, ms", "itl"))
    for row, (shape, found) in zip(figure.subplots(len(shapes), 3, squeeze=False), shapes.items(), strict=True):
        clients = list(found["clients"])
        for axes, (title, latency) in zip(row, panels, strict=True):
            for offset, (name, color) in zip((-0.2, 0.2), colors.items(), strict=True):
                places = [place + offset for place in range(len(clients))]
                numbers = [found["clients"][one][name] for one in clients]
                key = f"p50_{latency}_ms" if latency else "output_throughput"
                values = [one[key] for one in numbers]
                bars = axes.bar(places, values, width=0.36, color=color, label=f"{name}{', p50' if latency else ''}")
                axes.bar_label(bars, [f"{value:,.0f}" for value in values], padding=2, fontsize="x-small")
                if latency:
                    highest = [one[f"p99_{latency}_ms"] for one in numbers]
                    axes.scatter(places, highest, color=color, marker="_", s=120, label=f"{name}, p99")
            axes.set_xticks(range(len(clients)), clients)
            axes.set(xlabel="clients", ylabel=title)
            axes.set_yscale("log" if latency else "linear")
            axes.margins(y=0.2)
            axes.spines[["top", "right"]].set_visible(False)
            axes.tick_params(labelsize="small")
        row[1].set_title(f"{shape}, {found['input_len']} tokens in, {found['output_len']} out", fontsize="medium")
        row[0].legend(fontsize="x-small", loc="upper left")
        row[2].legend(fontsize="x-small", loc="upper left")
    figure.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama-server", type=Path, required=True, metavar="FILE")
    parser.add_argument("--peers-python", default=str(ROOT / ".venv-peers" / "bin" / "python"), help="has gguf")
    parser.add_argument("--shapes", nargs="+", choices=LOADS, default=list(LOADS))
    parser.add_argument("--clients", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "puna-benchmark")
    parser.add_argument("--keep", action="store_true", help="keep the other shapes' numbers of the last run")
    parser.add_argument("--out", type=Path, default=ROOT / "docs", help="folder for the page, the numbers and the plot")
    arguments = parser.parse_args()
    numbers = arguments.out / "server_peers.json"
    shapes = json.loads(numbers.read_text())["shapes"] if arguments.keep and numbers.is_file() else {}
    benchmark = Benchmark(arguments)
    shapes |= {shape: benchmark.run(shape) for shape in arguments.shapes}
    results = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": processor(),
        "threads": arguments.threads,
        "llama.cpp": version(arguments.llama_server),
        "shapes": {shape: shapes[shape] for shape in LOADS if shape in shapes},
    }
    (arguments.out / "images").mkdir(parents=True, exist_ok=True)
    numbers.write_text(json.dumps(results, indent=1) + "\n")
    table = markdown(results)
    write_section(arguments.out / "server_peers.md", table)
    draw(results, arguments.out / "images" / "server_peers.svg")
    print(table)


if __name__ == "__main__":
    main()
