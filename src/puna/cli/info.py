"""`puna info`: what a model is, what it needs and whether puna runs it, from headers alone; or what the machine has."""

from __future__ import annotations

import json
import platform
from typing import TYPE_CHECKING, Annotated, Any

import typer

from puna import __version__
from puna.cli.options import DtypeName
from puna.runtime.machine import affinity_cpus, cpu_quota

if TYPE_CHECKING:
    from puna.cli.model_report import ModelReport


def info(
    path: Annotated[
        str | None,
        typer.Argument(
            metavar="[MODEL]", help="A folder, GGUF file, hub id (which is downloaded) or 'demo'; none: this machine."
        ),
    ] = None,
    dtype: Annotated[
        DtypeName | None, typer.Option(help="Number type to work out the memory for; the checkpoint's if not given.")
    ] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Write one JSON object.")] = False,
) -> None:
    """Show a model's architecture, size, memory and whether it is supported, without loading it.

    Without a model: the versions and what puna may use of this machine.
    """
    if path is None:
        if dtype is not None:
            raise ValueError("--dtype is for a model's memory: give the model as well")
        machine = _machine()
        print(json.dumps(machine) if json_output else "\n".join(_machine_lines(machine)))
        return

    from puna.cli.model_report import report_on

    report = report_on(path, dtype.value if dtype else None)
    print(json.dumps(report.as_json(), ensure_ascii=False) if json_output else "\n".join(_model_lines(report)))


def _machine() -> dict[str, Any]:
    import torch

    from puna.ops.cpu import compiled, cpu_features, level, levels

    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return {
        "puna": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "compiled_kernels": compiled(),
        "cpu_features": list(cpu_features()),
        "cpu_level": level(),
        "cpu_levels": list(levels()),
        "cpus": affinity_cpus(),
        "cpu_quota": cpu_quota(),
        "threads": torch.get_num_threads(),
        "accelerator": None if accelerator is None else accelerator.type,
        "accelerators": 0 if accelerator is None else torch.accelerator.device_count(),
    }


def _machine_lines(machine: dict[str, Any]) -> list[str]:
    quota, features = machine["cpu_quota"], machine["cpu_features"]
    accelerator = f"{machine['accelerators']} x {machine['accelerator']}" if machine["accelerator"] else "none"
    rows = [
        ("puna", machine["puna"]),
        ("python", machine["python"]),
        ("torch", machine["torch"]),
        ("compiled kernels", "yes" if machine["compiled_kernels"] else "no: everything runs on the reference ops"),
        ("kernel level", _level_line(machine["cpu_level"], machine["cpu_levels"])),
        ("cpu features", " ".join(features) if features else "unknown without compiled kernels"),
        ("cpus", f"{machine['cpus']}" + (f", of which a quota allows {quota:g}" if quota is not None else "")),
        ("threads", str(machine["threads"])),
        ("accelerators", accelerator),
    ]
    return _aligned(rows)


def _level_line(level: str | None, levels: list[str]) -> str:
    if level is None:
        return "none"
    why = "the best of" if level == levels[0] else "chosen by PUNA_CPU_LEVEL out of"
    return f"{level} ({why} what this processor runs: {', '.join(levels)})"


def _model_lines(report: ModelReport) -> list[str]:
    lines = _aligned([*report.rows, ("supported", "yes" if report.problem is None else f"no ({report.problem})")])
    parts = [*report.parameters, *(part for part in report.memory if part not in report.parameters)]
    if parts:
        wide = max(map(len, parts))
        kind = f"memory in {report.dtype}" if report.dtype else "as stored"
        lines += ["", f"{'':{wide}}  {'parameters':>12}  {kind:>18}"]
        for part in parts:
            count, size = report.parameters.get(part), report.memory.get(part)
            shown = ("" if count is None else _count(count), "" if size is None else _size(size))
            lines.append(f"{part:{wide}}  {shown[0]:>12}  {shown[1]:>18}".rstrip())
    if report.key_value_bytes_per_token is not None and report.context is not None:
        lines += [
            "",
            f"KV cache: {_size(report.key_value_bytes_per_token)} a token, "
            f"{_size(report.key_value_bytes_per_token * report.context)} for the whole context of {report.context}",
        ]
    return lines


def _aligned(rows: list[tuple[str, str]]) -> list[str]:
    wide = max(len(name) for name, _ in rows)
    return [f"{name:{wide}}  {value}" for name, value in rows]


def _count(number: int) -> str:
    for unit, size in (("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if number >= size:
            return f"{number / size:.2f} {unit}"
    return str(number)


def _size(number: int) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if number >= size:
            return f"{number / size:.2f} {unit}"
    return f"{number} B"
