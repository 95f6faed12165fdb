"""BatchOutput: a batch's results on disk, so that a run may be killed at any moment and lose or repeat nothing.

A result is a line of the output file, written whole and synced before it counts; what a kill leaves of a line is cut
off by the next run. Which input and settings the results belong to stands in a second file beside it.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from puna.cli.errors import say

_SIDE_SUFFIX: Final = ".run.json"


class BatchOutput:
    """The output file, open and locked until `close`. `done` holds the indices of the results that are in it.

    `belongs_to` describes the run. Raises ValueError where the file is in use, is another run's, or no run's at all.
    """

    def __init__(self, file: Path, belongs_to: Mapping[str, Any]) -> None:
        self._file = file
        self._side = file.with_name(file.name + _SIDE_SUFFIX)
        try:
            self._descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        except FileNotFoundError as error:
            raise ValueError(f"--output is {str(file)!r}, but there is no folder {str(file.parent)!r}") from error
        try:
            self._lock()
            self._claim(belongs_to)
            self.done = self._read()
        except BaseException:
            os.close(self._descriptor)
            raise

    def append(self, results: Sequence[Mapping[str, Any]]) -> None:
        """Adds a line for each result; when this returns they are on the disk."""
        if not results:
            return
        lines = "".join(json.dumps(result, ensure_ascii=False) + "\n" for result in results)
        # Half a surrogate pair can be written in JSON's own way only.
        content = memoryview(lines.encode("utf-8", errors="backslashreplace"))
        while content:
            content = content[os.write(self._descriptor, content) :]
        os.fsync(self._descriptor)
        self.done.update(result["index"] for result in results)

    def close(self) -> None:
        os.close(self._descriptor)

    def _lock(self) -> None:
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"another run is writing to {self._file}: wait for it, or choose another --output"
            ) from error

    def _claim(self, belongs_to: Mapping[str, Any]) -> None:
        """Writes whose the file is, or checks it. The note is there before the first result is."""
        if self._side.is_file():
            try:
                found = json.loads(self._side.read_text(encoding="utf-8"))
            except ValueError as error:
                raise ValueError(f"{self._side} is damaged: remove it and {self._file} to start anew") from error
            wanted = json.loads(json.dumps(belongs_to))
            if found != wanted:
                different = [name for name in wanted if not isinstance(found, dict) or found.get(name) != wanted[name]]
                raise ValueError(
                    f"{self._file} has the results of another run ({', '.join(different) or 'format'} differs): choose "
                    f"another --output, or remove it and {self._side.name}"
                )
            return
        if os.fstat(self._descriptor).st_size > 0:
            raise ValueError(
                f"{self._file} exists, and no {self._side.name} beside it says whose it is: choose another --output"
            )
        new = self._side.with_name(self._side.name + ".new")
        with new.open("w", encoding="utf-8") as side:
            side.write(json.dumps(belongs_to, indent=2, ensure_ascii=False) + "\n")
            side.flush()
            os.fsync(side.fileno())
        new.replace(self._side)
        _sync_folder(self._side.parent)

    def _read(self) -> set[int]:
        """The indices in the file; cuts off a last line that was not finished."""
        done: set[int] = set()
        good = 0  # bytes of whole lines
        with self._file.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                index = _index_of(line)
                if index is None:
                    if lines.read(1):  # not the last one
                        raise ValueError(f"{self._file}, line {number}: not a result of puna: choose another --output")
                    break
                if index in done:
                    raise ValueError(f"{self._file}, line {number}: the result of prompt {index} stands there twice")
                done.add(index)
                good += len(line)
        if good < os.fstat(self._descriptor).st_size:
            say("warning", f"the last line of {self._file} was not finished, and is done again")
            os.ftruncate(self._descriptor, good)
            os.fsync(self._descriptor)
        return done


def _index_of(line: bytes) -> int | None:
    """None for a line that is not a whole result."""
    if not line.endswith(b"\n"):
        return None
    try:
        fields = json.loads(line)
    except ValueError:
        return None
    index = fields.get("index") if isinstance(fields, dict) else None
    return index if type(index) is int else None


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
