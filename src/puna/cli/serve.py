"""`puna serve`: the OpenAI-compatible server on one model."""

from __future__ import annotations

import enum
import json
import logging
import os
import secrets
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from puna.cli.errors import say
from puna.cli.options import EngineFlags, ModelFlags, unbundle

if TYPE_CHECKING:
    from puna.engine.engine import Engine

_SERVER: Final = "Server"
_KEY_VARIABLE: Final = "PUNA_API_KEY"
_LOOPBACK: Final = ("127.", "localhost", "::1")


class LogFormat(str, enum.Enum):
    text = "text"
    json = "json"


class ReasoningParser(str, enum.Enum):
    auto = "auto"
    none = "none"


@unbundle
def serve(
    model_flags: ModelFlags,
    *,
    engine_flags: EngineFlags,
    max_num_seqs: Annotated[int, typer.Option(min=1, help="Texts that are generated at once.")] = 64,
    max_num_batched_tokens: Annotated[int, typer.Option(min=1, help="Tokens of one step, over all texts.")] = 2048,
    host: Annotated[
        str,
        typer.Option(help="Address to listen on; others than this machine's own need a key.", rich_help_panel=_SERVER),
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.", rich_help_panel=_SERVER)] = 8000,
    served_model_name: Annotated[
        str | None, typer.Option(help="The model's name for clients; MODEL if not given.", rich_help_panel=_SERVER)
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option(help=f"Key that clients must send. Safer: a file, or {_KEY_VARIABLE}.", rich_help_panel=_SERVER),
    ] = None,
    api_key_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Keys, one a line.", rich_help_panel=_SERVER)
    ] = None,
    max_queue: Annotated[
        int, typer.Option(min=1, help="Requests that may wait; more are refused with 429.", rich_help_panel=_SERVER)
    ] = 256,
    max_body_size: Annotated[
        str, typer.Option(metavar="SIZE", help="Largest request body.", rich_help_panel=_SERVER)
    ] = "16MiB",
    shutdown_timeout: Annotated[
        float, typer.Option(min=0, help="Seconds for running requests after SIGTERM.", rich_help_panel=_SERVER)
    ] = 30.0,
    reasoning_parser: Annotated[
        ReasoningParser,
        typer.Option(
            help="Whether what the chat template marks as reasoning goes into a field of its own.",
            rich_help_panel=_SERVER,
        ),
    ] = ReasoningParser.auto,
    trust_request_chat_template: Annotated[
        bool, typer.Option(help="Take chat templates from requests, too.", rich_help_panel=_SERVER)
    ] = False,
    log_format: Annotated[
        LogFormat, typer.Option(help="Lines for people, or a JSON object a line.", rich_help_panel=_SERVER)
    ] = LogFormat.text,
) -> None:
    """Serve a model to OpenAI's clients: /v1/chat/completions, /v1/completions and more (docs/server.md).

    Needs the extra `serve`. Example: puna serve --model demo
    """
    began = time.perf_counter()
    keys = _api_keys(api_key, api_key_file)
    from puna.cli.sampling import num_bytes
    from puna.cli.session import OpenedModel
    from puna.config import EngineConfig
    from puna.engine.engine import Engine

    try:
        from puna.serving.server import ListenSettings
        from puna.serving.server import serve as run
        from puna.serving.state import ServerSettings
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("puna"):
            raise
        raise ValueError(f"the server needs {error.name}: pip install 'puna[serve]'") from error
    import_seconds = time.perf_counter() - began
    _log_to_stderr(log_format)
    settings = ServerSettings(
        model_name=served_model_name or model_flags.model,
        api_keys=keys,
        max_body_bytes=num_bytes(max_body_size, "--max-body-size"),
        splits_reasoning=reasoning_parser is ReasoningParser.auto,
        trusts_request_template=trust_request_chat_template,
    )
    if not keys and not host.startswith(_LOOPBACK):
        say("warning", f"everyone who reaches {host} may use this server: give --api-key-file, or listen on 127.0.0.1")

    def load(begin: Callable[[str], None]) -> Engine:
        begin("open model")
        opened = OpenedModel.open(model_flags, engine_flags)
        begin("load weights")
        limits = EngineConfig(
            max_model_len=opened.context_length,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            kv_cache_memory=opened.kv_cache_memory,
            kv_cache_dtype=opened.kv_cache_dtype,
            enable_prefix_caching=opened.enable_prefix_caching,
            max_waiting=max_queue,
            seed=secrets.randbits(62),  # requests without a seed are to differ between runs
        )
        return Engine.from_pretrained(
            str(opened.folder),
            opened.config.dtype,
            opened.device,
            limits,
            quantization=opened.quantization,
            tokenizer=opened.tokenizer,
        )

    _tell(f"{'import':<16} {import_seconds:7.2f} s")
    code = run(settings, ListenSettings(host=host, port=port, shutdown_timeout=shutdown_timeout), load, _tell)
    if code:
        raise typer.Exit(code)


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _api_keys(flag: str | None, file: Path | None) -> tuple[str, ...]:
    """The flag's, the file's and the environment's. Raises ValueError for empty ones, which would lock nobody out."""
    found = [] if flag is None else [("--api-key", [flag])]
    if file is not None:
        lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
        found.append((str(file), [line for line in lines if line]))
    if _KEY_VARIABLE in os.environ:
        found.append((_KEY_VARIABLE, [os.environ[_KEY_VARIABLE]]))
    for name, keys in found:
        if not keys or not all(key.strip() for key in keys):
            raise ValueError(f"{name} has no key: give one, or leave it out")
    return tuple(key.strip() for _, keys in found for key in keys)


class _JsonFormatter(logging.Formatter):
    """An object a line: time, level, logger, and the record's own fields or else its message."""

    def format(self, record: logging.LogRecord) -> str:
        found = {"time": round(record.created, 3), "level": record.levelname.lower(), "logger": record.name}
        found |= record.__dict__.get("fields") or {"message": record.getMessage()}
        if record.exc_info:
            found["traceback"] = self.formatException(record.exc_info)
        return json.dumps(found)


def _log_to_stderr(log_format: LogFormat) -> None:
    handler = logging.StreamHandler()
    text = logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
    handler.setFormatter(_JsonFormatter() if log_format is LogFormat.json else text)
    for name, level in (("puna", logging.INFO), ("uvicorn", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.setLevel(level)
        logger.addHandler(handler)
