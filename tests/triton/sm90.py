"""Compiles what launchers launch for an H100 or H200, on a machine without one: nothing runs, the cubins are read.

Run as a program, in a process of its own, since triton decides when it is imported whether it interprets:
python sm90.py MODULE.FUNCTION ... calls each function, which calls launchers with CPU tensors of real sizes, and prints
a JSON line for each kernel that they compiled: name, registers, bytes of spills and of shared memory, and how often the
machine code has the instructions that matter. Of kernels that start early (`sm90.py --overlap ...`) also what they do
before they wait.
"""

from __future__ import annotations

import collections
import hashlib
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import sass

REGISTERS = re.compile(r"REG:(\d+).*?STACK:(\d+).*?LOCAL:(\d+)")
# Tensor cores of Hopper (bf16, fp8), the older ones, asynchronous copies, TMA, spills to local memory; calling the next
# kernel, waiting for the one ahead, and prefetching for both.
INSTRUCTIONS = ("HGMMA", "QGMMA", "HMMA", "LDGSTS", "UTMALDG", "LDL", "STL", "PREEXIT", "ACQBULK", "UBLKPF")
MAX_SHARED = 232_448  # bytes that one block may have on Hopper


def _install() -> list[dict[str, Any]]:
    """Makes triton believe in an H200; what it would have loaded onto it is appended to the list that is returned."""
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia import driver as nvidia
    from triton.runtime import driver

    found: list[dict[str, Any]] = []
    tools = Path(nvidia.__file__).parent / "bin"

    class Utils:
        @staticmethod
        def load_binary(name: str, cubin: bytes, shared: int, device: int) -> tuple[int, int, int, int, int]:
            with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
                file.write(cubin)
                file.flush()
                usage, code = (
                    subprocess.run([tools / "cuobjdump", option, file.name], capture_output=True, text=True, check=True)
                    for option in ("-res-usage", "-sass")
                )
            registers, stack, local = map(int, REGISTERS.search(usage.stdout + usage.stderr).groups())  # type: ignore[union-attr]
            counts = collections.Counter(re.findall(r"\b(" + "|".join(INSTRUCTIONS) + r")\b", code.stdout))
            if "ACQBULK" in counts:
                counts["before_wait"] = sass.before_wait(code.stdout)  # type: ignore[assignment]
            found.append(
                {
                    "kernel": name,
                    "cubin": hashlib.sha256(cubin).hexdigest()[:12],
                    "code": hashlib.sha256(sass.instructions(code.stdout).encode()).hexdigest()[:12],
                    "registers": registers,
                    "stack": stack + local,
                    "shared": shared,
                    **counts,
                }
            )
            return 0, 0, registers, stack, 1024

        @staticmethod
        def get_device_properties(device: int) -> dict[str, int]:
            return {"max_shared_mem": MAX_SHARED, "multiprocessor_count": 132, "warpSize": 32, "max_num_regs": 65536}

    class Launcher:
        def __init__(self, source: object, metadata: object) -> None:
            pass

        def __call__(self, *arguments: object) -> None:
            pass

    class H200:
        utils = Utils()
        launcher_cls = Launcher

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return 0

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", 90, 32)

        def get_active_torch_device(self) -> object:
            import torch

            return torch.device("cpu")

    driver.set_active(H200())
    return found


def main(functions: list[str]) -> None:
    overlaps = functions[0] == "--overlap"
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise SystemExit("TRITON_INTERPRET is set: kernels would be interpreted, not compiled")
    found = _install()
    for function in functions[overlaps:]:
        module, _, name = function.rpartition(".")
        start = len(found)
        case = getattr(importlib.import_module(module), name)
        if overlaps:
            from puna.ops.triton_tuning import Tuning

            with Tuning(overlaps=True).used():
                case()
        else:
            case()
        for kernel in found[start:]:
            print(json.dumps({"case": function, **kernel}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
