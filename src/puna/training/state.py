"""A training run on disk: one safetensors file with the weights, the optimiser's moments and, as JSON, the rest."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from puna.checkpoints.writer import sync

STATE_FILE: Final = "training_state.safetensors"
_MOMENTS: Final = ("exp_avg", "exp_avg_sq")
_PARTIAL: Final = ".writing-"  # also what puna.checkpoints.writer begins its names with


def save_state(
    folder: Path, model: nn.Module, optimizer: torch.optim.AdamW, step: int, settings: Mapping[str, Any]
) -> None:
    """Writes the run after `step` steps, in place of what the folder had; a kill at any moment leaves one of the two.

    There is no random state: what a step sees follows from its number (see TrainingWindows), and the model has no
    dropout.
    """
    tensors: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        tensors[f"weight/{name}"] = parameter.detach()
        for moment in _MOMENTS:
            if parameter in optimizer.state:
                tensors[f"{moment}/{name}"] = optimizer.state[parameter][moment]
    metadata = {"puna": json.dumps({"step": step, "settings": dict(settings)})}
    partial = folder / f"{_PARTIAL}{STATE_FILE}"
    save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, partial, metadata=metadata)
    _move_into_place(partial, folder / STATE_FILE)


def write_file(file: Path, content: bytes) -> None:
    """Writes a small file so that there is either all of it or what was there before."""
    partial = file.with_name(f"{_PARTIAL}{file.name}")
    partial.write_bytes(content)
    _move_into_place(partial, file)


def remove_partial_files(folder: Path) -> None:
    """Removes what a process that was killed while it wrote to the folder has left there."""
    for partial in folder.glob(f"{_PARTIAL}*"):
        if partial.is_dir():
            shutil.rmtree(partial, ignore_errors=True)
        else:
            partial.unlink(missing_ok=True)


def has_state(folder: Path) -> bool:
    return (folder / STATE_FILE).is_file()


def load_state(folder: Path, model: nn.Module, optimizer: torch.optim.AdamW, settings: Mapping[str, Any]) -> int:
    """Fills the model and the optimiser with what `save_state` wrote, and returns the number of steps done.

    Raises ValueError for a damaged file and for a run with other settings, naming the first that differs.
    """
    file = folder / STATE_FILE
    try:
        with safe_open(file, framework="pt") as handle:
            metadata = json.loads((handle.metadata() or {})["puna"])
            _check_settings(file, metadata["settings"], settings)
            step = int(metadata["step"])
            for name, parameter in model.named_parameters():
                with torch.no_grad():
                    parameter.copy_(handle.get_tensor(f"weight/{name}"))
                if step > 0:
                    count = torch.tensor(float(step), device=parameter.device)
                    moments = {m: handle.get_tensor(f"{m}/{name}").to(parameter.device) for m in _MOMENTS}
                    optimizer.state[parameter] = {"step": count, **moments}
    except (SafetensorError, OSError, KeyError) as error:
        raise ValueError(f"{file} is damaged or of another version of puna ({error}): start a new run") from error
    return step


def _move_into_place(partial: Path, file: Path) -> None:
    sync(partial)
    os.replace(partial, file)
    sync(file.parent)


def _check_settings(file: Path, saved: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Raises ValueError where a run would go on with something else than what it began with."""
    for name, value in given.items():
        if saved.get(name) != value:
            raise ValueError(
                f"{file} is of a run with {name} {saved.get(name)!r}, and now it is {value!r}: resume with the same "
                "settings, or start a new run in another folder"
            )
