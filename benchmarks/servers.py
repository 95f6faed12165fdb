"""Servers in processes of their own, their models, and loads on them; for server_overhead and server_peers."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "peers"))

from make_model import write_folder

from puna import LLaMAConfig
from puna.cli.load_client import Address, HttpClient
from puna.cli.load_report import LoadReport
from puna.cli.load_run import Lengths, Load, Prompts, run_load
from puna.config.presets import PRESETS

ROOT = Path(__file__).parent.parent
_LOADING = 300.0  # seconds
_SMALL = LLaMAConfig(
    num_layers=8,
    num_heads=6,
    num_kv_heads=2,
    head_size=64,
    hidden_size=384,
    mlp_hidden_size=1024,
    vocab_size=32_000,
    max_position_embeddings=2048,
    dtype="bfloat16",
    tie_embeddings=True,
)
SHAPES = {"26m": _SMALL, "smollm2-135m": PRESETS["smollm2-135m"], "llama-3.2-1b": PRESETS["llama-3.2-1b"]}


def model_folder(shape: str, cache: Path) -> Path:
    """Random weights in this shape, written where they are not in the cache yet."""
    folder = cache / shape
    if not (folder / "config.json").is_file():
        print(f"writing {folder}", file=sys.stderr)
        write_folder(folder, SHAPES[shape])
    return folder


@dataclass(frozen=True)
class CpuTime:
    """Seconds on a processor so far: of the thread that the process began with, and of the others."""

    first_thread: float
    others: float

    def __sub__(self, before: CpuTime) -> CpuTime:
        return CpuTime(self.first_thread - before.first_thread, self.others - before.others)


class ServerProcess:
    """A started server that is ready. Raises RuntimeError, with the end of what it printed, where none comes up."""

    def __init__(self, name: str, command: list[str], ready_path: str) -> None:
        """`command` gets `--port` and its number at its end."""
        self.name = name
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115  # closed in close()
        path = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
        self._process = subprocess.Popen(
            [*command, "--port", str(port)],
            stdout=self._log,
            stderr=self._log,
            env={**os.environ, "PYTHONPATH": path},
        )
        try:
            asyncio.run(self._wait(ready_path))
        except BaseException:
            self.close()
            raise

    def cpu_time(self) -> CpuTime:
        seconds = {}
        for task in Path(f"/proc/{self._process.pid}/task").iterdir():
            words = (task / "stat").read_text().rpartition(")")[2].split()
            seconds[int(task.name)] = (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")
        first = seconds.pop(self._process.pid)
        return CpuTime(first, sum(seconds.values()))

    def run(self, load: Load, vocab_size: int) -> LoadReport:
        """One load. Prompts are random token ids."""

        async def measure() -> LoadReport:
            client = HttpClient(Address.of(self.url))
            try:
                return LoadReport.of(
                    await run_load(client, load, Prompts(load, range(vocab_size - 2), 1.0), _ignore), {}
                )
            finally:
                client.close()

        report = asyncio.run(measure())
        if report.failed:
            raise RuntimeError(f"{self.name}: {report.failed} requests failed: {dict(report.errors)}")
        return report

    def close(self) -> None:
        self._process.terminate()
        self._process.wait()
        self._log.close()

    async def _wait(self, path: str) -> None:
        end = time.monotonic() + _LOADING
        while time.monotonic() < end and self._process.poll() is None:
            client = HttpClient(Address.of(self.url))
            try:
                if (await client.request("GET", path))[0] == 200:
                    return
            except OSError:
                pass
            finally:
                client.close()
            await asyncio.sleep(0.1)
        self._log.seek(0)
        raise RuntimeError(f"{self.name} did not get ready: {self._log.read()[-1000:]}")


def closed_load(
    model: str, clients: int, requests: int, input_length: int, output_length: int, seed: int, warmup: int | None = None
) -> Load:
    """So many requests, always `clients` at once; before that, as many to warm the server up if not told otherwise."""
    return Load(
        model=model,
        chat=False,
        input_lengths=Lengths("uniform", input_length, input_length),
        output_lengths=Lengths("uniform", output_length, output_length),
        concurrency=clients,
        num_requests=requests,
        warmup=clients if warmup is None else warmup,
        seed=seed,
    )


def puna_command(model: Path | str, threads: int, max_num_seqs: int, *more: str) -> list[str]:
    words = [sys.executable, "-m", "puna", "serve", "--model", str(model), "--served-model-name", "bench"]
    return [*words, "--threads", str(threads), "--max-num-seqs", str(max_num_seqs), *more]


def _ignore(count: int) -> None:
    pass
