"""The public command line, frozen in tests/cli_flags.txt: a change to a flag shows as a change to that file.

`python tests/test_cli_flags.py` writes the file anew, for the reviewer to see what users will notice.
"""

from __future__ import annotations

import enum
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

FROZEN: Final = Path(__file__).with_name("cli_flags.txt")


def command_line() -> list[str]:
    """A line per command and per option or argument: 'puna generate --top-k INTEGER = 0'."""
    import typer.main

    from puna.cli import app

    return sorted(_lines(typer.main.get_command(app), "puna"))


# click's own classes are not named: newer releases of typer bring their copy of them.
def _lines(command: Any, name: str) -> Iterator[str]:
    yield name
    for parameter in command.params:
        if getattr(parameter, "hidden", False):
            continue
        yield f"{name} {_describe(parameter)}"
    for child_name, child in getattr(command, "commands", {}).items():
        if not child.hidden:
            yield from _lines(child, f"{name} {child_name}")


def _describe(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        names = parameter.name.upper()
    else:
        names = "/".join([*parameter.opts, *parameter.secondary_opts])
    choices = getattr(parameter.type, "choices", None)
    kind = "|".join(_plain(choice) for choice in choices) if choices else str(parameter.type.name).upper()
    words = [names, kind]
    if parameter.nargs == -1 or getattr(parameter, "multiple", False):
        words.append("...")
    if parameter.required:
        words.append("required")
    elif not callable(parameter.default) and parameter.default is not None:
        words.append(f"= {_plain(parameter.default)}")
    return " ".join(words)


def _plain(value: object) -> str:
    return str(value.value if isinstance(value, enum.Enum) else value)


def test_command_line_is_the_frozen_one() -> None:
    frozen = FROZEN.read_text(encoding="utf-8").splitlines()
    now = command_line()
    gone = [f"- {line}" for line in frozen if line not in now]
    new = [f"+ {line}" for line in now if line not in frozen]
    assert now == frozen, "\n".join(
        ["the public command line changed; if that is meant, run `python tests/test_cli_flags.py`", *gone, *new]
    )


def test_every_frozen_command_has_help() -> None:
    commands = [line for line in FROZEN.read_text(encoding="utf-8").splitlines() if not _is_flag(line)]
    assert "puna generate" in commands
    for command in commands:
        code = f"from puna.cli import main\nraise SystemExit(main({[*command.split()[1:], '--help']}))"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{command} --help: {done.stderr}"
        assert "Usage" in done.stdout, f"{command} --help printed {done.stdout!r}"


def _is_flag(line: str) -> bool:
    return any(word.startswith("-") or word.isupper() for word in line.split())


if __name__ == "__main__":
    FROZEN.write_text("\n".join(command_line()) + "\n", encoding="utf-8")
