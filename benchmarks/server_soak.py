"""`puna serve` under clients of every kind for minutes or hours, and what is left of them afterwards.

Processes of server_soak_clients.py send random requests: streamed or not, completions, chat, tools, guided texts,
log-probabilities, nonsense. They leave in the middle of answers, and are killed (SIGKILL) now and then. Some requests
have known answers, which a quiet server gave first: they must get the same text every time. Between rounds all clients
are gone, and the server must be as it was after the warm-up: no block in use, as many tasks, threads and file
descriptors, and as much memory. At its end SIGTERM must give exit code 0. Otherwise this exits with 1.

Run: python benchmarks/server_soak.py [--minutes 30] [--concurrency 32] [--seed 0] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import queue
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from server_soak_clients import CHAT, COMPLETIONS, MESSAGES, MODEL
from soak import make_model

CLIENTS: Final = Path(__file__).with_name("server_soak_clients.py")
TEMPLATE: Final = (
    "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}{% for m in messages %}[{{ m.role }}]{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}{% endfor %}[a]"
)
CONTEXT: Final = 1024
# 16 sequences, and blocks for an eighth of what they may want; a queue that 32 clients fill at times.
SERVE: Final = ("--max-num-seqs", "16", "--kv-cache-memory", "128KiB", "--max-queue", "24")
CLIENTS_PER_PROCESS: Final = 8
NUM_REFERENCES: Final = 24
WARM_UP: Final = 0.25  # of the time
MOST_GROWTH: Final = 0.03  # of memory, from the end of the warm-up to the end


@dataclass(frozen=True)
class Sample:
    """The server at rest. `memory`: bytes that are resident."""

    seconds: float
    memory: int
    descriptors: int
    threads: int
    tasks: int
    running: int
    waiting: int
    blocks: float

    def left_over(self, baseline: Sample) -> dict[str, float]:
        """What there is more of than at the baseline."""
        names = ("descriptors", "threads", "tasks", "running", "waiting", "blocks")
        return {n: getattr(self, n) - getattr(baseline, n) for n in names if getattr(self, n) > getattr(baseline, n)}


@dataclass
class Report:
    minutes: float
    concurrency: int
    seed: int
    requests: int = 0
    ends: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    kills: int = 0
    preemptions: int = 0
    generated_tokens: int = 0
    samples: list[Sample] = field(default_factory=list)
    baseline: Sample | None = None
    left_over: dict[str, float] = field(default_factory=dict)
    memory_growth: float = 0.0
    tracebacks: int = 0
    exit_code: int | None = None

    @property
    def is_good(self) -> bool:
        found = self.wrong or self.left_over or self.tracebacks or self.exit_code or self.baseline is None
        return not found and self.memory_growth <= MOST_GROWTH


class Server:
    """A `puna serve` process. Its log goes to a file of the folder."""

    def __init__(self, folder: Path) -> None:
        self.log = folder / "server.log"
        command = [sys.executable, "-m", "puna", "serve", "--model", str(folder), "--port", "0"]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen([*command, "--served-model-name", MODEL, *SERVE], stderr=log)
        self.url = self._wait_until_ready()
        self.started = time.monotonic()

    def _wait_until_ready(self) -> str:
        for _ in range(1200):
            found = re.search(r"ready on (http://[\d.:]+)", self.log.read_text())
            if found:
                return found[1]
            if self.process.poll() is not None:
                break
            time.sleep(0.1)
        self.process.kill()
        raise RuntimeError(f"the server did not start:\n{self.log.read_text()}")

    def get(self, path: str, body: dict[str, Any] | None = None) -> bytes:
        """Over a connection of its own, which is closed then."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"content-type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            found: bytes = answer.read()
            return found

    def metric(self, name: str) -> float:
        return _metric(self.get("/metrics").decode(), name)

    def sample(self) -> Sample:
        metrics = self.get("/metrics").decode()
        folder = Path(f"/proc/{self.process.pid}")
        status = dict(line.split(":", 1) for line in (folder / "status").read_text().splitlines())
        return Sample(
            seconds=round(time.monotonic() - self.started, 1),
            memory=int(status["VmRSS"].split()[0]) * 1024,
            descriptors=len(list((folder / "fd").iterdir())),
            threads=int(status["Threads"]),
            tasks=int(_metric(metrics, "puna:event_loop_tasks")),
            running=int(_metric(metrics, "vllm:num_requests_running")),
            waiting=int(_metric(metrics, "vllm:num_requests_waiting")),
            blocks=_metric(metrics, "vllm:kv_cache_usage_perc"),
        )

    def at_rest(self, baseline: Sample | None) -> Sample:
        """Once nothing is left, or else as it is after a minute."""
        end, before = time.monotonic() + 60, None
        while True:
            now = self.sample()
            if baseline is None:
                # The first one: nothing runs, and nothing more falls away.
                if before is not None and not (now.running or now.waiting or now.blocks) and not before.left_over(now):
                    return now
                before = now
                time.sleep(1)
            elif not now.left_over(baseline):
                return now
            if time.monotonic() > end:
                return now
            time.sleep(0.1)


def _metric(text: str, name: str) -> float:
    return sum(float(value) for value in re.findall(rf"^{name}(?:{{.*}})? (\S+)$", text, re.MULTILINE))


class Crowd:
    """Processes of clients; what they tell comes to `lines`."""

    def __init__(self, url: str, references: Path, chooser: random.Random) -> None:
        self.lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._url = url
        self._references = references
        self._chooser = chooser
        self._running: list[tuple[subprocess.Popen[str], threading.Thread]] = []

    def add(self, clients: int) -> None:
        command = [sys.executable, str(CLIENTS), self._url, str(self._chooser.random()), str(clients)]
        process = subprocess.Popen(
            [*command, str(self._references)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        thread = threading.Thread(target=self._listen, args=(process,))
        thread.start()
        self._running.append((process, thread))

    def kill_one(self) -> None:
        process, thread = self._running.pop(self._chooser.randrange(len(self._running)))
        process.kill()
        self._join(process, thread)

    def end(self) -> int:
        """Ends all: some are killed, which are counted, and some may finish what they do."""
        killed = [process for process, _ in self._running if self._chooser.random() < 0.5]
        for process, _ in self._running:
            if process in killed:
                process.kill()
            elif process.stdin is not None:
                process.stdin.close()
        for process, thread in self._running:
            self._join(process, thread)
            if process.returncode != (-signal.SIGKILL if process in killed else 0):
                self.lines.put(json.dumps({"kind": "process", "end": "wrong", "detail": f"exit {process.returncode}"}))
        self._running.clear()
        return len(killed)

    def _join(self, process: subprocess.Popen[str], thread: threading.Thread) -> None:
        try:
            process.wait(400)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        thread.join()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()

    def _listen(self, process: subprocess.Popen[str]) -> None:
        for line in process.stdout or ():
            self.lines.put(line)


def make_references(server: Server, chooser: random.Random) -> list[dict[str, Any]]:
    """Requests whose answers never change, with these answers, which a quiet server gives one by one."""
    found = []
    for number in range(NUM_REFERENCES):
        body: dict[str, Any] = {"model": MODEL, "max_tokens": chooser.randint(1, 80), "ignore_eos": True}
        body |= {"temperature": 0} if number % 2 else {"seed": number, "temperature": 0.8, "top_p": 0.9}
        text = "".join(chooser.choice("abc ü€") for _ in range(chooser.randint(1, 200)))
        path = CHAT if number % 3 == 0 else COMPLETIONS
        body |= {"messages": [*MESSAGES, {"role": "user", "content": text}]} if path == CHAT else {"prompt": text}
        (choice,) = json.loads(server.get(path, body))["choices"]
        answer = choice["message"]["content"] if path == CHAT else choice["text"]
        found.append({"path": path, "body": body, "text": answer})
    return found


@contextmanager
def running_server(folder: Path, report: Report) -> Iterator[Server]:
    server = Server(folder)
    try:
        yield server
        server.process.terminate()
        report.exit_code = server.process.wait(60)
    finally:
        server.process.kill()
        server.process.wait()
        log = server.log.read_text(errors="replace")
        report.tracebacks = log.count("Traceback")
        if report.tracebacks:
            report.wrong.append(log[log.index("Traceback") :][:3000])


def soak(folder: Path, minutes: float, concurrency: int, seed: int) -> Report:
    report, chooser = Report(minutes, concurrency, seed), random.Random(seed)
    make_model(folder, CONTEXT, TEMPLATE)
    round_seconds = min(60.0, minutes * 60 / 8)
    with running_server(folder, report) as server:
        references = folder / "references.json"
        references.write_text(json.dumps(make_references(server, chooser)))
        crowd = Crowd(server.url, references, chooser)
        end = server.started + minutes * 60
        while time.monotonic() < end - 1:
            _round(crowd, report, concurrency, min(end, time.monotonic() + round_seconds), chooser)
            sample = server.at_rest(report.baseline)
            report.samples.append(sample)
            print(
                f"{report.requests:7} requests, {report.kills:4} kills, {_shown(sample)}", file=sys.stderr, flush=True
            )
            if report.baseline is None and sample.seconds >= WARM_UP * minutes * 60:
                report.baseline = sample
            elif report.baseline is not None:
                report.left_over = sample.left_over(report.baseline) or report.left_over
                report.memory_growth = sample.memory / report.baseline.memory - 1
        report.preemptions = int(server.metric("vllm:num_preemptions_total"))
        report.generated_tokens = int(server.metric("vllm:generation_tokens_total"))
    return report


def _round(crowd: Crowd, report: Report, concurrency: int, end: float, chooser: random.Random) -> None:
    """Clients until `end`, of whom some are killed on the way and at the end."""
    for first in range(0, concurrency, CLIENTS_PER_PROCESS):
        crowd.add(min(CLIENTS_PER_PROCESS, concurrency - first))
    next_kill = time.monotonic() + chooser.uniform(2, 10)
    while (now := time.monotonic()) < end:
        if now > next_kill:
            crowd.kill_one()
            crowd.add(CLIENTS_PER_PROCESS)
            report.kills += 1
            next_kill = now + chooser.uniform(2, 20)
        _count(crowd, report)
        time.sleep(0.05)
    report.kills += crowd.end()
    _count(crowd, report)


def _count(crowd: Crowd, report: Report) -> None:
    while not crowd.lines.empty():
        found = json.loads(crowd.lines.get())
        report.requests += 1
        report.kinds[found["kind"]] += 1
        report.ends[found["end"]] += 1
        if found["end"] == "wrong" and len(report.wrong) < 20:
            report.wrong.append(f"{found['kind']}: {found['detail']}")
            print(report.wrong[-1], file=sys.stderr, flush=True)


def _shown(sample: Sample) -> str:
    blocks = f"{sample.blocks:.0%} of blocks, {sample.running} running, {sample.waiting} waiting"
    counts = f"{sample.descriptors} descriptors, {sample.threads} threads, {sample.tasks} tasks"
    return f"{sample.seconds:6.0f} s: {sample.memory / 2**20:.1f} MiB, {counts}, {blocks}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--concurrency", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        report = soak(Path(folder), arguments.minutes, arguments.concurrency, arguments.seed)
    found = json.dumps(vars(report) | {"is_good": report.is_good}, indent=2, default=vars)
    print(found)
    if arguments.json:
        arguments.json.write_text(found + "\n")
    sys.exit(not report.is_good)


if __name__ == "__main__":
    main()
