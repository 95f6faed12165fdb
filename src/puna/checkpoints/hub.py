"""From what a user calls a model (a folder, a hub id, "demo") to a folder on this machine."""

from __future__ import annotations

import re
from pathlib import Path

# What a model needs, and no more: no pickles, no copies of the weights in other formats.
_WANTED = ("*.json", "*.jinja", "tokenizer.model", "*.safetensors")
_UNWANTED = ("original/*", "consolidated*.safetensors", "onnx/*")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def resolve_path(path: str | Path) -> Path:
    """The folder of a model: the path itself, the demo model's, or that of a hub id, downloaded first if needed.

    Raises FileNotFoundError where it is none of these or can't be downloaded, and ValueError for a file.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_file():
        raise ValueError(f"{path} is a file: give the folder that it is in, which also holds config.json")
    if str(path) == "demo":
        return Path(__file__).parent.parent / "demo"
    if not _HUB_ID.fullmatch(str(path)):
        raise FileNotFoundError(f"{path} is not a folder, nor the id of a model on the Hugging Face hub (owner/name)")
    return _download(str(path))


def _download(hub_id: str) -> Path:
    import huggingface_hub

    try:
        return Path(
            huggingface_hub.snapshot_download(hub_id, allow_patterns=list(_WANTED), ignore_patterns=list(_UNWANTED))
        )
    except Exception as error:
        raise FileNotFoundError(
            f"{hub_id} is not a folder here, and could not be downloaded from the Hugging Face hub "
            f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'})"
        ) from error
