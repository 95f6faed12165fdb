"""Writing a Hugging Face folder so that a killed process leaves no half-written file behind."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor


def write_checkpoint(
    folder: Path,
    config_fields: Mapping[str, Any],
    generation_fields: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    extra_files: Mapping[str, bytes],
) -> None:
    """Writes config.json, generation_config.json, model.safetensors and the extra files.

    Everything is first written into a hidden folder within and synced to disk; then each file is renamed into place,
    the weights last, so that every file is the old or the new one as a whole, and the weights of a new folder mean that
    it is complete. Other files in the folder stay.
    """
    folder.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=".writing-", dir=folder))
    try:
        files = {
            "config.json": json_bytes(config_fields),
            "generation_config.json": json_bytes({k: v for k, v in generation_fields.items() if v is not None}),
            **extra_files,
        }
        for name, content in files.items():
            (staging / name).write_bytes(content)
        save_file(dict(tensors), staging / "model.safetensors", metadata={"format": "pt"})
        # safetensors makes a file that its owner alone may read; it should be as the others are.
        shutil.copymode(staging / "config.json", staging / "model.safetensors")
        for name in (*files, "model.safetensors"):
            sync(staging / name)
        for name in (*files, "model.safetensors"):
            os.replace(staging / name, folder / name)
        sync(folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def json_bytes(fields: Mapping[str, Any]) -> bytes:
    return (json.dumps(fields, indent=2, ensure_ascii=False) + "\n").encode()


def sync(path: Path) -> None:
    """Waits until a file's or a folder's content is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
