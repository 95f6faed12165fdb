"""How the benchmark talks to an engine's process: a JSON object a line, commands on stdin and answers on stdout."""

from __future__ import annotations

import json
import os
import random
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol


class PeerEngine(Protocol):
    """A loaded model. Prompts are lists of random token ids; nothing is decoded to text or stopped early."""

    def run(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> tuple[float, float]:
        """Computes all prompts, then `new_tokens - 1` further tokens of each, all together.

        Returns the seconds until every sequence had its first token, and the seconds of the steps after that.
        """
        ...


def memory_bytes() -> dict[str, int]:
    """The peak of the resident memory so far, and what of the present one is no file's page."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {name: int(fields[key].split()[0]) * 1024 for name, key in (("peak", "VmHWM"), ("anonymous", "RssAnon"))}


def serve(load: Callable[[dict[str, Any]], PeerEngine], vocab_size: Callable[[dict[str, Any]], int]) -> None:
    """Loads what the first argument's JSON object says, and answers commands until stdin ends.

    {"prompt_tokens", "new_tokens", "batch"} -> {"prefill_seconds", "decode_seconds"}; {} -> {"memory"}.
    """
    # Engines print what they like to stdout; the answers keep the pipe to themselves.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    settings = json.loads(sys.argv[1])
    chooser = random.Random(0)
    tokens = range(vocab_size(settings) - 2)
    start = time.perf_counter()
    engine = load(settings)
    loaded = time.perf_counter() - start
    # Loading may leave work for the first step (pages that are read then, buffers that are made then).
    engine.run([[1]], 2)
    ready = time.perf_counter() - start
    print(json.dumps({"load_seconds": loaded, "ready_seconds": ready}), file=answers, flush=True)
    for line in sys.stdin:
        command = json.loads(line)
        if not command:
            print(json.dumps({"memory": memory_bytes()}), file=answers, flush=True)
            continue
        prompts = [chooser.choices(tokens, k=command["prompt_tokens"]) for _ in range(command["batch"])]
        prefill, decode = engine.run(prompts, command["new_tokens"])
        print(json.dumps({"prefill_seconds": prefill, "decode_seconds": decode}), file=answers, flush=True)


def config_vocab_size(settings: dict[str, Any]) -> int:
    size: int = json.loads((Path(settings["folder"]) / "config.json").read_text())["vocab_size"]
    return size
