"""What the command line says when something goes wrong: one line on standard error, and the exit code."""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final, TextIO, cast

import typer

USER_ERROR: Final = 2
UNEXPECTED: Final = 1
INTERRUPTED: Final = 130  # 128 + SIGINT, as a shell reports it
BROKEN_PIPE: Final = 141  # 128 + SIGPIPE

# Older releases of typer raise click's exceptions, newer ones those of a copy of click within typer. BadParameter is
# the one that both export; UsageError and ClickException are its bases.
UsageError: Final = cast(type[Exception], typer.BadParameter.__base__)
CommandLineError: Final = cast(type[Exception], UsageError.__base__)


def exit_code_of(error: BaseException, debug: bool) -> int:
    """Reports what a command raised, and returns what the process should exit with."""
    if isinstance(error, typer.Exit):
        return error.exit_code
    if isinstance(error, KeyboardInterrupt | typer.Abort):
        print(file=sys.stderr)  # ends the line that ^C stands on
        return INTERRUPTED
    if isinstance(error, BrokenPipeError):
        _discard_output()
        return BROKEN_PIPE
    if debug:
        traceback.print_exception(error)
    if isinstance(error, CommandLineError | ValueError | OSError):
        say("error", message_of(error))
        return USER_ERROR
    hint = "" if debug else " (unexpected: --debug shows where; please report it)"
    say("error", f"{type(error).__name__}: {error}{hint}")
    return UNEXPECTED


def say(kind: str, message: str) -> None:
    """One line on standard error, whatever the message holds."""
    print(f"puna: {kind}: {' '.join(message.split())}", file=sys.stderr, flush=True)


@contextmanager
def one_line_warnings() -> Iterator[None]:
    """Shows every warning once, as one line."""
    shown: set[str] = set()

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if str(message) not in shown:
            shown.add(str(message))
            say("warning", str(message))

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


def message_of(error: BaseException) -> str:
    """In words for who gave the command."""
    if isinstance(error, CommandLineError):
        # Both classes have these; neither can be named here.
        message: str = error.format_message()  # type: ignore[attr-defined]
        context = error.ctx if isinstance(error, UsageError) else None  # type: ignore[attr-defined]
        return message if context is None else f"{message.rstrip('.')} (see {context.command_path} --help)"
    if isinstance(error, OSError) and error.strerror:
        where = "" if error.filename is None else f"{error.filename}: "
        return f"{where}{error.strerror.lower()}"
    return str(error) or type(error).__name__


def _discard_output() -> None:
    # The interpreter flushes standard output once more at its end, which would complain about the same pipe.
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError):  # standard output is no file, as in tests
        return
