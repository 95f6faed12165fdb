"""Whole processes: one that is killed at any moment, and two that share a run's work under torchrun."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from puna.cli import main
from puna.models import load_model
from puna.training.state import STATE_FILE

SOURCE = Path(__file__).resolve().parents[2] / "src"
MAIN = "import sys; from puna.cli import main; sys.exit(main())"


def command(text_file: Path, out: Path, **flags: object) -> list[str]:
    values: dict[str, object] = {
        "data": text_file,
        "out": out,
        "hidden-size": 32,
        "num-layers": 1,
        "num-heads": 4,
        "num-kv-heads": 2,
        "mlp-hidden-size": 48,
        "vocab-size": 300,
        "context": 32,
        "steps": 12,
        "threads": 1,
        "batch-size": 4,
        "warmup-steps": 2,
        "save-dtype": "float32",
        "save-every": 2,
        **flags,
    }
    return ["train", *(word for name, value in values.items() for word in (f"--{name}", str(value)))]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SOURCE)}


def run(arguments: list[str], launcher: tuple[str, ...] = ("-c", MAIN)) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *launcher, *arguments], capture_output=True, text=True, check=False, env=environment()
    )


def summary_of(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_killed_run_goes_on_to_the_same_end(text_file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """SIGKILL in the middle of training: the files that are there then can be read, and the end is the same."""
    arguments = command(text_file, tmp_path / "killed", steps=60, **{"save-every": 4})
    process = subprocess.Popen(
        [sys.executable, "-c", MAIN, *arguments], stderr=subprocess.PIPE, text=True, env=environment()
    )
    assert process.stderr is not None
    for line in process.stderr:
        if (match := re.match(r"step (\d+)/60:", line)) and int(match[1]) >= 9:
            break
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    saved = load_file(tmp_path / "killed" / STATE_FILE)
    assert all(tensor.isfinite().all() for tensor in saved.values())
    load_model(tmp_path / "killed")

    resumed = run([*arguments, "--resume", "--json"])
    started = re.search(r"(\d+) of 60 steps done", resumed.stderr)
    assert started is not None, resumed.stderr
    assert 8 <= int(started[1]) < 60, "a kill costs no more than the steps since the last checkpoint"
    assert main([*command(text_file, tmp_path / "straight", steps=60, **{"save-every": 0}), "--json"]) == 0
    ours, theirs = summary_of(resumed), json.loads(capfd.readouterr().out)
    assert (ours["loss"], ours["held_out"]) == (theirs["loss"], theirs["held_out"])
    for name, tensor in load_file(tmp_path / "straight" / "model.safetensors").items():
        assert torch.equal(tensor, load_file(tmp_path / "killed" / "model.safetensors")[name]), name
    assert not list((tmp_path / "killed").glob(".writing-*"))


def test_two_processes_share_the_work_of_one(
    text_file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python")
    assert main([*command(text_file, tmp_path / "alone"), "--json"]) == 0
    together = run([sys.executable, "-c", MAIN, *command(text_file, tmp_path / "together"), "--json"], launcher)
    ours, theirs = summary_of(together), json.loads(capfd.readouterr().out)
    assert together.stdout.count("\n") == 1, "one process reports"
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
    assert ours["held_out"]["text.txt"] == pytest.approx(theirs["held_out"]["text.txt"], rel=1e-5)
    other = load_file(tmp_path / "together" / "model.safetensors")
    for name, tensor in load_file(tmp_path / "alone" / "model.safetensors").items():
        # Adam's first steps divide by tiny squares: what is a rounding error in a gradient is more in a weight.
        assert float((tensor - other[name]).abs().max()) < 1e-3 * float(tensor.abs().max()), name


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data", "nowhere.txt"], "nowhere.txt is not a file"),
        (
            ["--init", "somewhere", "--hidden-size", "64"],
            "--init brings a model with its own sizes: leave out --hidden",
        ),
        (["--tokenizer", "somewhere", "--vocab-size", "300"], "leave out --vocab-size"),
        (["--held-out", "a.txt", "--eval-fraction", "0.1"], "leave out --eval-fraction"),
        (["--dtype", "float16"], "'float16'"),
    ],
)
def test_command_line_refuses_in_one_line(
    capfd: pytest.CaptureFixture[str], text_file: Path, tmp_path: Path, flags: list[str], message: str
) -> None:
    assert main(["train", "--data", str(text_file), "--out", str(tmp_path / "out"), *flags]) == 2
    error = capfd.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()
