"""What a user waits for before anything happens: import, --help, and loading a model; seconds and peak memory.

Run: python benchmarks/startup.py [MODEL]. Each figure is the median of several fresh processes.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys

REPEATS = 7


def measure(arguments: list[str]) -> tuple[float, float]:
    """Median wall seconds and peak resident MB of a fresh process."""
    seconds, megabytes = [], []
    for _ in range(REPEATS):
        # The peak of a child is only to be had from a process that has no other children.
        probe = (
            "import json, resource, subprocess, sys, time; start = time.perf_counter();"
            "subprocess.run(json.loads(sys.argv[1]), check=True, stdout=subprocess.DEVNULL);"
            "print(time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024)"
        )
        output = subprocess.run(
            [sys.executable, "-c", probe, json.dumps(arguments)], check=True, capture_output=True, text=True
        ).stdout
        elapsed, peak = map(float, output.split())
        seconds.append(elapsed)
        megabytes.append(peak)
    return statistics.median(seconds), statistics.median(megabytes)


def main() -> None:
    model = sys.argv[1] if len(sys.argv) > 1 else "demo"
    python = [sys.executable, "-c"]
    rows = {
        "python (nothing)": [*python, "pass"],
        "import puna": [*python, "import puna"],
        "puna --help": [sys.executable, "-m", "puna", "--help"],
        "import torch": [*python, "import torch"],
        f"load_model({model!r})": [*python, f"import puna; puna.load_model({model!r})"],
    }
    print(f"{'':24} {'seconds':>8} {'peak MB':>8}")
    for name, arguments in rows.items():
        seconds, megabytes = measure(arguments)
        print(f"{name:24} {seconds:8.2f} {megabytes:8.0f}")


if __name__ == "__main__":
    main()
