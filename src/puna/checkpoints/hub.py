"""From what a user calls a model (a folder, a GGUF file, a hub id, "demo") to a path on this machine."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import huggingface_hub  # it loads its parts when they are first used, so this costs a local model next to nothing
from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

from puna.checkpoints.engine_directory import MANIFEST
from puna.checkpoints.hugging_face import INDEX_FILE, SINGLE_FILE, index_files

# Exact names, since a pattern such as *.json also matches the files of every subfolder.
_SMALL_FILES = (
    "config.json",
    "params.json",
    "generation_config.json",
    INDEX_FILE,
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "1_Pooling/config.json",
)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_LATER_PART = re.compile(r"-(?!00001)\d{5}-of-\d{5}\.gguf$")
_HUB_FILE = re.compile(rf"({_HUB_ID.pattern}):([\w.-][\w./-]*\.gguf)")


def resolve_path(path: str | Path) -> Path:
    """The folder of a model: the path itself, the demo model's, or that of a hub id, downloaded first if needed.

    Or the path of a GGUF file: itself, the only one in a folder without config.json, or a hub's "owner/name:file.gguf".

    Raises FileNotFoundError where it is none of these or can't be downloaded, and ValueError for another file, and for
    a hub model that has no safetensors weights.
    """
    try:
        folder = Path(path).expanduser()
        # Many a working folder has a `demo` of its own; it is meant only if there is a model in it.
        is_model = any((folder / name).is_file() for name in ("config.json", "params.json", MANIFEST))
        if str(path) == "demo" and not is_model:
            return Path(__file__).parent.parent / "demo"
        if folder.is_dir():
            return folder if is_model else _only_gguf(folder)
        is_file = folder.is_file()
    except (OSError, RuntimeError) as error:  # a name that is too long, or "~name" of nobody here
        reason = error.strerror if isinstance(error, OSError) else error
        raise FileNotFoundError(f"{str(path)[:100]} is not a folder ({reason})") from error
    if is_file and folder.suffix == ".gguf":
        return folder
    if is_file:
        raise ValueError(f"{path} is a file: give the folder that it is in, which also holds config.json")
    if named := _HUB_FILE.fullmatch(str(path)):
        return _download_gguf(named[1], named[2])
    if not _HUB_ID.fullmatch(str(path)):
        raise FileNotFoundError(f"{path} is not a folder, nor the id of a model on the Hugging Face hub (owner/name)")
    return _download(str(path))


def _only_gguf(folder: Path) -> Path:
    """The one model among a folder's GGUF files, the first of its parts if it has several; else the folder itself."""
    files = [file for file in folder.glob("*.gguf") if not _LATER_PART.search(file.name)]
    return files[0] if len(files) == 1 else folder


def _download_gguf(hub_id: str, file: str) -> Path:
    """Fetches one GGUF file, and the other parts of a split one."""
    parts = re.sub(r"-\d{5}-of-(\d{5}\.gguf)$", r"-?????-of-\1", file)
    path = _snapshot(hub_id, (parts,)) / file
    if not path.is_file():
        raise FileNotFoundError(f"{hub_id} on the hub has no file {file}: look at its list of files")
    return path


def _download(hub_id: str) -> Path:
    """Fetches the small files, then the weights that they call for: no pickles, and no second copy in another format.

    Both steps name the same files each time, so that without a network they find what the last download left.
    """
    folder = _snapshot(hub_id, _SMALL_FILES)
    if (folder / INDEX_FILE).is_file():
        wanted = index_files(folder / INDEX_FILE)
    elif (folder / "params.json").is_file() and not (folder / "config.json").is_file():
        wanted = ["consolidated*.safetensors"]
    else:
        wanted = [SINGLE_FILE, "model-*-of-*.safetensors"]
    folder = _snapshot(hub_id, (*_SMALL_FILES, *wanted))
    if not any(folder.glob("*.safetensors")):
        raise ValueError(
            f"{hub_id} has no weights in safetensors files on the hub, and puna reads no pickles (.bin, .pth): convert "
            "them with transformers (model.save_pretrained), choose another copy of the model, or name its GGUF file "
            f"({hub_id}:FILE.gguf)"
        )
    return folder


def _snapshot(hub_id: str, names: tuple[str, ...]) -> Path:
    # One of its bars, which counts files, is drawn even where there is no terminal.
    quiet = not sys.stderr.isatty() and not are_progress_bars_disabled()
    if quiet:
        disable_progress_bars()
    try:
        return Path(huggingface_hub.snapshot_download(hub_id, allow_patterns=list(names)))
    # Its errors have no common base: those of the HTTP library in use, of the file system and its own.
    except Exception as error:
        reason = next(iter(str(error).splitlines()), "no message")
        raise FileNotFoundError(
            f"{hub_id} is not a folder here, and could not be downloaded from the Hugging Face hub "
            f"({type(error).__name__}: {reason})"
        ) from error
    finally:
        if quiet:
            enable_progress_bars()
