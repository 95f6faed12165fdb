"""What rounding costs: perplexity and KL divergence of a model in puna's formats, beside llama.cpp's of the same model.

python benchmarks/quantization_quality.py MODEL --data grimm.txt --data alice.txt [--peer-python PYTHON]

PYTHON is one that has llama-cpp-python (`make bench` makes one). Needs the `gguf` package, as the tests do.
The table goes to standard output, in Markdown; docs/quantization.md explains it.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from puna import Tokenizer, load_model
from puna.checkpoints import resolve_path
from puna.evaluation.compare import compare_models
from puna.evaluation.windows import sliding_windows

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent / "tests"))

from gguf_writer import write_gguf  # noqa: E402  # the path to it is known only now


def peer_perplexity(python: str, file: Path, windows: Sequence[tuple[list[int], int]], vocab_size: int) -> float:
    """llama.cpp's, of the last `count` tokens of each window."""
    context = max(len(tokens) for tokens, _ in windows)
    settings = {"file": str(file), "threads": 1, "batch": 1, "context": context, "vocab_size": vocab_size}
    command = [python, str(HERE / "peers" / "llama_cpp_worker.py"), json.dumps(settings)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdout.readline()
        nats: list[float] = []
        for tokens, count in windows:
            print(json.dumps({"score": tokens}), file=process.stdin, flush=True)
            nats += [-value for value in json.loads(process.stdout.readline())["logprobs"]][-count:]
        process.stdin.close()
    return math.exp(math.fsum(nats) / len(nats))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data", action="append", required=True, type=Path)
    parser.add_argument("--bytes", type=int, default=60_000, help="of each text, from its start")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--stride", type=int, default=256)
    parser.add_argument("--peer-python", help="a Python with llama-cpp-python; none: without its column")
    options = parser.parse_args()

    folder = resolve_path(options.model)
    tokenizer = Tokenizer.from_pretrained(folder)
    texts = [file.read_bytes()[: options.bytes].decode(errors="ignore") for file in options.data]
    encoded = [tokenizer.encode(text) for text in texts]
    cut = (window for ids in encoded for window in sliding_windows(ids, options.context, options.stride))
    windows = [(window.token_ids, window.num_scored) for window in cut]
    original = load_model(folder, "float32")
    print(f"{options.model}, {sum(map(len, encoded)):,} tokens, context {options.context}, stride {options.stride}\n")
    print("| weights | KL to float32, nats | same likeliest token | perplexity | llama.cpp's perplexity |")
    print("|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as scratch:
        rows: list[tuple[str, Path, str | None]] = [
            ("float32", folder, None),
            *((name, folder, name) for name in ("bf16", "int8", "int4")),
        ]
        files = {kind: write_gguf(folder, Path(scratch) / f"{kind}.gguf", kind) for kind in ("F32", "Q8_0", "Q4_0")}
        rows += [(f"{kind} of a GGUF file", files[kind], "stored") for kind in ("Q8_0", "Q4_0")]
        for name, path, quantization in rows:
            model = load_model(path, "float32", quantization=quantization)
            found = compare_models(original, model, encoded, options.context, options.stride)
            file = files["F32"] if name == "float32" else path
            peer = "-"
            if options.peer_python and file.suffix == ".gguf":
                peer = f"{peer_perplexity(options.peer_python, file, windows, original.config.vocab_size):.3f}"
            print(
                f"| {name} | {found.mean_kl:.2e} | {found.agreement:.2%} | {found.perplexity_b:.3f} | {peer} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
