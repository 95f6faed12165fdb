"""`puna serve`: the OpenAI-compatible server on one model."""

from __future__ import annotations

import dataclasses
import enum
import os
import re
import secrets
import socket
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from puna.cli.options import EngineFlags, ModelFlags, unbundle
from puna.cli.server_log import LogFormat, ServerLog

if TYPE_CHECKING:
    from puna.engine.engine import Engine
    from puna.serving.server import Loading, Ready

_SERVER: Final = "Server"
_KEY_VARIABLE: Final = "PUNA_API_KEY"
_LOOPBACK: Final = ("127.", "localhost", "::1")


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
    allowed_host: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="A name under which clients reach a server without keys (repeat); '*' for all names. IP addresses, "
            "localhost, HOST and this machine's name always do.",
            rich_help_panel=_SERVER,
        ),
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
    step_timeout: Annotated[
        float,
        typer.Option(
            min=0,
            help="Seconds after which a step counts as hanging, and the server ends with an error; 0 is off.",
            rich_help_panel=_SERVER,
        ),
    ] = 600.0,
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
    profile: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Write a timeline of steps and requests there, for Perfetto or chrome://tracing.",
            rich_help_panel=_SERVER,
        ),
    ] = None,
) -> None:
    """Serve a model to OpenAI's clients: /v1/chat/completions, /v1/completions and more (docs/server.md).

    Needs the extra `serve`. Example: puna serve --model demo
    """
    began = time.perf_counter()
    log = ServerLog(log_format)
    with log.errors():
        keys = _api_keys(api_key, api_key_file, log)
        from puna.cli.sampling import num_bytes
        from puna.cli.session import OpenedModel
        from puna.engine.engine import Engine
        from puna.runtime.tracing import ChromeTrace

        try:
            from puna.serving.server import ListenSettings
            from puna.serving.server import serve as run
            from puna.serving.state import ServerSettings
        except ModuleNotFoundError as error:
            if error.name is None or error.name.startswith("puna"):
                raise
            raise ValueError(f"the server needs {error.name}: pip install 'puna[serve]'") from error
        import_seconds = time.perf_counter() - began
        settings = ServerSettings(
            model_name=served_model_name or model_flags.model,
            api_keys=keys,
            max_body_bytes=num_bytes(max_body_size, "--max-body-size"),
            splits_reasoning=reasoning_parser is ReasoningParser.auto,
            trusts_request_template=trust_request_chat_template,
            allowed_hosts=_allowed_hosts(host, allowed_host, keys),
        )
        if not keys and not host.startswith(_LOOPBACK):
            log.warn(f"everyone who reaches {host} may use this server: give --api-key-file, or listen on 127.0.0.1")
        tracer = None if profile is None else ChromeTrace(profile)

        def load(loading: Loading) -> Engine:
            loading.begin("open model")
            opened = OpenedModel.open(model_flags, engine_flags)
            loading.begin("load weights")
            limits = dataclasses.replace(
                opened.limits,
                max_model_len=opened.context_length,
                max_num_seqs=max_num_seqs,
                max_num_batched_tokens=max_num_batched_tokens,
                max_waiting=max_queue,
                step_timeout=step_timeout or None,
                seed=secrets.randbits(62),  # requests without a seed are to differ between runs
            )
            return Engine.from_pretrained(
                str(opened.folder),
                opened.config.dtype,
                opened.device,
                limits,
                quantization=opened.quantization,
                tokenizer=opened.tokenizer,
                progress=loading.progress,
                tracer=tracer,
            )

        def on_ready(ready: Ready) -> None:
            total = time.perf_counter() - began
            log.ready(ready.url, ready.model_name, {"import": import_seconds, **ready.seconds, "total": total})

        listen = ListenSettings(host=host, port=port, shutdown_timeout=shutdown_timeout)
        try:
            code = run(settings, listen, load, on_ready)
        finally:
            if tracer is not None:  # where there is no engine that has closed it
                tracer.close()
        if code:
            raise typer.Exit(code)


def _allowed_hosts(host: str, flag: list[str] | None, keys: tuple[str, ...]) -> frozenset[str] | None:
    """None where every name is fine: with keys, which a web page does not have, unless the flag is given, too."""
    names = frozenset(name.lower().removesuffix(".") for name in flag or ())
    wrong = next((name for name in names if name != "*" and not re.fullmatch(r"[\w.-]+", name)), None)
    if wrong is not None:
        raise ValueError(f"--allowed-host is {wrong!r}: give a name such as box.example, without scheme and port")
    if "*" in names or (keys and not names):
        return None
    return names | {host.lower(), socket.gethostname().lower()}


def _api_keys(flag: str | None, file: Path | None, log: ServerLog) -> tuple[str, ...]:
    """The flag's, the file's and the environment's. Raises ValueError for empty ones, which would lock nobody out."""
    found = [] if flag is None else [("--api-key", [flag])]
    if file is not None:
        if file.stat().st_mode & 0o077 and file.is_file():
            log.warn(f"{file} has keys, and others may read it: chmod 600 {file}")
        lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
        found.append((str(file), [line for line in lines if line]))
    if _KEY_VARIABLE in os.environ:
        found.append((_KEY_VARIABLE, [os.environ[_KEY_VARIABLE]]))
    for name, keys in found:
        if not keys or not all(key.strip() for key in keys):
            raise ValueError(f"{name} has no key: give one, or leave it out")
        # Clients could not send any other in a header.
        if not all(key.strip().isascii() and key.strip().isprintable() and len(key.split()) == 1 for key in keys):
            raise ValueError(f"{name} has a key with a space or with a character that is not ASCII: choose another")
    return tuple(key.strip() for _, keys in found for key in keys)
