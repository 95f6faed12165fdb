"""The public command line, frozen in tests/cli_flags.txt: a change to a flag shows as a change to that file.

`python tests/test_cli_flags.py` writes the file anew, for the reviewer to see what users will notice.
"""

from __future__ import annotations

import enum
import inspect
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, get_type_hints

FROZEN: Final = Path(__file__).with_name("cli_flags.txt")


def command_line() -> list[str]:
    """A line per command and per option or argument: 'puna generate --top-k int = 0'."""
    import typer.main

    from puna.cli import app

    return sorted(_lines(typer.main.get_command(app), "puna"))


# No class of click's is named: newer releases of typer bring their own copy, whose parameters have lost their `type`.
# The annotations of the function behind the command say it in every release.
def _lines(command: Any, name: str) -> Iterator[str]:
    yield name
    types = get_type_hints(inspect.unwrap(command.callback)) if command.callback else {}
    for parameter in command.params:
        if not getattr(parameter, "hidden", False):
            yield f"{name} {_describe(parameter, types.get(parameter.name))}"
    for child_name, child in getattr(command, "commands", {}).items():
        if not child.hidden:
            yield from _lines(child, f"{name} {child_name}")


def _describe(parameter: Any, kind: Any) -> str:
    if parameter.param_type_name == "argument":
        words = [parameter.name.upper()]
    else:
        words = ["/".join([*parameter.opts, *parameter.secondary_opts])]
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        words.append("|".join(str(member.value) for member in kind))
    elif kind is not None:
        words.append(kind.__name__ if type(kind) is type else str(kind).replace("pathlib.", "").replace("typing.", ""))
    if parameter.required:
        words.append("required")
    elif parameter.default is not None and not callable(parameter.default):
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
    return any(word.startswith("-") or word.isupper() for word in line.split())  # options, and names of arguments


if __name__ == "__main__":
    FROZEN.write_text("\n".join(command_line()) + "\n", encoding="utf-8")
