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
    """A loaded model. Prompts are lists of random token ids; nothing is stopped early."""

    def run(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> tuple[float, float]:
        """Computes all prompts, then further tokens of each, all together, up to `new_tokens`.

        Returns the seconds until every sequence had its first token, and the seconds of one step after that.
        """
        ...

    def score(self, tokens: Sequence[int]) -> list[float] | None:
        """The natural logarithm of each token's probability after those before it, from the second one on; None where
        the engine does not tell."""
        ...


def memory_bytes() -> dict[str, int]:
    """The peak of the resident memory so far, and what of the present one is no file's page."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {name: int(fields[key].split()[0]) * 1024 for name, key in (("peak", "VmHWM"), ("anonymous", "RssAnon"))}


def serve(load: Callable[[dict[str, Any]], PeerEngine]) -> None:
    """Loads what the first argument's JSON object says, and answers commands until stdin ends.

    The settings say file, threads, batch (the most sequences), context (tokens of each) and vocab_size, and what an
    engine has of its own. {"prompt_tokens", "new_tokens", "batch"} -> {"prefill_seconds", "step_seconds"};
    {"score": tokens} -> {"logprobs"}; {} -> {"peak", "anonymous"} in bytes.
    """
    # Engines print what they like to stdout; the answers keep the pipe to themselves.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    settings = json.loads(sys.argv[1])
    chooser = random.Random(0)
    tokens = range(settings["vocab_size"] - 2)  # the last two are special
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
            print(json.dumps(memory_bytes()), file=answers, flush=True)
            continue
        if "score" in command:
            print(json.dumps({"logprobs": engine.score(command["score"])}), file=answers, flush=True)
            continue
        prompts = [chooser.choices(tokens, k=command["prompt_tokens"]) for _ in range(command["batch"])]
        prefill, step = engine.run(prompts, command["new_tokens"])
        print(json.dumps({"prefill_seconds": prefill, "step_seconds": step}), file=answers, flush=True)
