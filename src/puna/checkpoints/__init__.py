"""Checkpoint: a model's files on disk, read tensor by tensor; and the choice of the reader for a path or a hub id."""

from __future__ import annotations

from pathlib import Path

from puna.checkpoints.base import Checkpoint
from puna.checkpoints.engine_directory import MANIFEST, EngineDirectory
from puna.checkpoints.gguf import GGUFCheckpoint
from puna.checkpoints.hub import resolve_path
from puna.checkpoints.hugging_face import HuggingFaceCheckpoint
from puna.checkpoints.meta import MetaCheckpoint
from puna.checkpoints.writer import write_checkpoint


def open_checkpoint(path: str | Path | Checkpoint) -> Checkpoint:
    """Finds the checkpoint (see `resolve_path`), and reads its config and its tensors' names and shapes, no values.

    One that is open already is returned as it is.

    Raises FileNotFoundError where there is none, and ValueError for one that is damaged, pickled or of an unknown kind.
    """
    if isinstance(path, Checkpoint):
        return path
    folder = resolve_path(path)
    if folder.is_file():
        return GGUFCheckpoint(folder)
    if (folder / MANIFEST).is_file():
        return EngineDirectory(folder)
    if (folder / "params.json").is_file() and not (folder / "config.json").is_file():
        return MetaCheckpoint(folder)
    return HuggingFaceCheckpoint(folder)


__all__ = ["Checkpoint", "EngineDirectory", "open_checkpoint", "resolve_path", "write_checkpoint"]
