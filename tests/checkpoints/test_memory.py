"""Loading needs no more memory than the final weights and the largest tensor, and does not import torch's compiler."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from puna.config import LLaMAConfig
from puna.models import LLaMAForCausalLM

MiB = 2**20

# What is not weights: the pages of torch's libraries that loading touches for the first time, the progress bar, the
# names and shapes of the tensors. Measured 8 MiB, whatever the size of the model; a tensor too many is 62 MiB here.
SLACK = 24 * MiB

# Prints the growth of resident memory over that of the process with everything imported. It reads the high-water mark
# from /proc, since that of getrusage starts with the size of the process that this one was forked from.
CHILD = """
import json, re, sys
import torch
from puna.models import load_model

def kilobytes(name):
    return int(re.search(name + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1])

before = kilobytes("VmRSS")
assert kilobytes("VmHWM") - before < 4096, "the imports alone had a higher peak"
model = load_model(sys.argv[1], sys.argv[2])
peak = kilobytes("VmHWM")
weights = sum(parameter.nbytes for parameter in model.parameters())
for number, (name, piece) in enumerate(model.pieces()):
    assert (piece.read() == number + 1).all(), name
heavy = [name for name in ("torch._dynamo", "sympy", "transformers") if name in sys.modules]
print(json.dumps({"growth": (peak - before) * 1024, "weights": weights, "heavy": heavy}))
"""


def write_large(folder: Path, tied: bool) -> int:
    """Writes a sharded bfloat16 model of 357 MiB, or 294 with tied embeddings; returns the largest tensor's size."""
    config = LLaMAConfig(
        num_layers=8,
        num_heads=16,
        num_kv_heads=4,
        head_size=64,
        hidden_size=1024,
        mlp_hidden_size=4096,
        vocab_size=32000,
        dtype="bfloat16",
        tie_embeddings=tied,
    )
    (folder / "config.json").write_text(json.dumps(config.to_hugging_face()))
    with torch.device("meta"):
        model = LLaMAForCausalLM(config)
    shards: list[dict[str, torch.Tensor]] = [{}]
    for number, (name, piece) in enumerate(model.pieces()):
        if sum(tensor.nbytes for tensor in shards[-1].values()) > 100 * MiB:
            shards.append({})
        shards[-1][name] = torch.full(piece.full_shape, number + 1, dtype=torch.bfloat16)
    for number, shard in enumerate(shards):
        save_file(shard, folder / f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors")
    return max(tensor.nbytes for shard in shards for tensor in shard.values())


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="needs /proc for a process's peak memory")
@pytest.mark.parametrize(("dtype", "tied"), [("bfloat16", False), ("float32", True)])
def test_peak_is_the_weights_and_the_largest_tensor(tmp_path: Path, dtype: str, tied: bool) -> None:
    largest = write_large(tmp_path, tied)
    child = subprocess.run(
        [sys.executable, "-c", CHILD, str(tmp_path), dtype], capture_output=True, text=True, timeout=120, check=False
    )
    assert child.returncode == 0, child.stderr
    result = json.loads(child.stdout)
    assert result["heavy"] == []
    assert result["weights"] > 290 * MiB * (2 if dtype == "float32" else 1)
    over = result["growth"] - result["weights"] - largest
    assert over <= SLACK, f"{over / MiB:.0f} MiB more than the weights and the largest tensor"
