"""What a checkpoint says of its embeddings: sentence-transformers' file about pooling."""

from __future__ import annotations

from pathlib import Path
from types import MappingProxyType
from typing import Final

from puna.config.fields import FieldReader, read_json_object
from puna.scheduling.pooling_params import Pooling

POOLING_FILE: Final = "1_Pooling/config.json"
# How sentence-transformers calls what puna has, as a flag that is true, and in a field that newer versions write.
_FLAGS: Final = MappingProxyType[str, Pooling]({"pooling_mode_lasttoken": "last", "pooling_mode_mean_tokens": "mean"})
_WORDS: Final = MappingProxyType[str, Pooling]({"lasttoken": "last", "mean": "mean"})


def recommended_pooling(folder: Path) -> Pooling | None:
    """ "last" for a checkpoint without the file; None where it wants something that puna has not.

    Raises ValueError for a file that is damaged or has fields of other types.
    """
    if not (folder / POOLING_FILE).is_file():
        return "last"
    reader = FieldReader(read_json_object(folder / POOLING_FILE), str(folder / POOLING_FILE))
    word = reader.value("pooling_mode")
    if word is not None:
        words = word if isinstance(word, list) else [word]
        return _WORDS.get(str(words[0])) if len(words) == 1 else None
    flags = [name for name in reader.fields if name.startswith("pooling_mode_") and reader.boolean(name, False)]
    return _FLAGS.get(flags[0]) if len(flags) == 1 else None  # several are several vectors, one behind the other
