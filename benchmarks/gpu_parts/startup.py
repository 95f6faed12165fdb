"""Start-up of a process of its own, in parts. Run as a program: prints a line of JSON; see `measure`."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any


def measure(shape: str, device: str, quantization: str, capture: str) -> dict[str, Any]:
    """Seconds from before the process was made: until Python ran, torch and puna were imported, the weights were there,
    the engine was ready (profiled, cache made, steps captured), and the first token of a prompt of 128 came."""
    command = [sys.executable, __file__, repr(time.time()), shape, device, quantization, capture]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    if done.returncode:
        raise RuntimeError(f"the process ended with {done.returncode}: {done.stderr[-1500:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    marks = [("Python", time.time())]
    _, begun, shape, device, quantization, capture = sys.argv
    import torch

    torch.zeros(1, device=device)
    marks.append(("import torch, first use of the device", time.time()))
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from gpu_parts.settings import setting_of

    from puna.cli.bench_run import run_batch
    from puna.config import EngineConfig
    from puna.engine.engine import Engine
    from puna.engine.token_ids import token_id_tokenizer
    from puna.models.random_weights import random_checkpoint

    marks.append(("import puna", time.time()))
    setting = setting_of(shape, torch.device(device))
    checkpoint = random_checkpoint(setting.config, device=device)
    loaded = [0.0]

    def progress(done: int, total: int) -> None:
        loaded[0] = time.time()

    engine = Engine.from_pretrained(
        checkpoint,
        device=device,
        quantization="bf16" if device == "cpu" else quantization,
        tokenizer=token_id_tokenizer(setting.config.vocab_size),
        engine_config=EngineConfig(max_model_len=setting.tokens(2048), max_num_seqs=setting.at_once, capture=capture),
        progress=progress,
    )
    marks += [("weights (random, made on the device)", loaded[0]), ("profile, cache, capture", time.time())]
    run_batch(engine, [[1] * setting.tokens(128)], 2)
    marks.append(("first tokens", time.time()))
    engine.shutdown()
    parts, last = {}, float(begun)
    for name, at in marks:
        parts[name] = at - last
        last = at
    print(json.dumps({"weights": quantization, "capture": capture, "total": last - float(begun), "parts": parts}))


if __name__ == "__main__":
    main()
