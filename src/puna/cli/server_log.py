"""What `puna serve` writes to standard error: lines for people, or a JSON object a line and nothing else."""

from __future__ import annotations

import enum
import json
import logging
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

import typer

from puna.cli.errors import UNEXPECTED, USER_ERROR, message_of, say

_log = logging.getLogger(__name__)
_TEXT: Final = "%(asctime)s %(levelname)s %(name)s: %(message)s"


class LogFormat(str, enum.Enum):
    text = "text"
    json = "json"


class ServerLog:
    """Takes over the process's logging: every logger's lines come in one format, uvicorn's and torch's too."""

    def __init__(self, log_format: LogFormat) -> None:
        self._is_json = log_format is LogFormat.json
        handler = logging.StreamHandler()
        handler.setFormatter(_JsonFormatter() if self._is_json else logging.Formatter(_TEXT))
        root = logging.getLogger()
        root.handlers[:] = [handler]
        root.setLevel(logging.WARNING)
        logging.getLogger("puna").setLevel(logging.INFO)
        logging.captureWarnings(self._is_json)
        threading.excepthook = _log_thread

    def warn(self, message: str) -> None:
        if self._is_json:
            _log.warning(message)
        else:
            say("warning", message)

    def ready(self, url: str, model_name: str, seconds: Mapping[str, float]) -> None:
        """The times of the start as a table, or as one object, and where the server is."""
        if self._is_json:
            times = {name: round(value, 4) for name, value in seconds.items()}
            fields = {"message": "ready", "url": f"{url}/v1", "model": model_name, "seconds": times}
            _log.info("ready", extra={"fields": fields})
            return
        width = max(map(len, seconds))
        for name, value in seconds.items():
            print(f"{name:<{width}}  {value:7.2f} s", file=sys.stderr)
        print(f"ready on {url}/v1 as {model_name!r}", file=sys.stderr, flush=True)

    @contextmanager
    def errors(self) -> Iterator[None]:
        """What ends the server is an object, too; for people the command line has its own words."""
        try:
            yield
        except Exception as error:
            if not self._is_json or isinstance(error, typer.Exit):
                raise
            is_users = isinstance(error, ValueError | OSError)
            message = message_of(error) if is_users else f"{type(error).__name__}: {error}"
            _log.error(" ".join(message.split()))
            raise typer.Exit(USER_ERROR if is_users else UNEXPECTED) from None


class _JsonFormatter(logging.Formatter):
    """An object a line: time, level, logger, and the record's own fields or else its message."""

    def format(self, record: logging.LogRecord) -> str:
        found: dict[str, Any] = {
            "time": round(record.created, 3),
            "level": record.levelname.lower(),
            "logger": record.name,
        }
        found |= record.__dict__.get("fields") or {"message": record.getMessage()}
        if record.exc_info:
            found["traceback"] = self.formatException(record.exc_info)
        return json.dumps(found)


def _log_thread(what: threading.ExceptHookArgs) -> None:
    if what.exc_type is not SystemExit and what.exc_value is not None:
        name = "a thread" if what.thread is None else what.thread.name
        _log.error("%s has ended with an error", name, exc_info=what.exc_value)
