"""The commands that the README shows, run as they stand there in a copy of the source tree.

Every fenced ```sh block runs as one script that stops at its first failing command. A block with
`<!-- not run: reason -->` on the line before it is left out. A `make` line runs the target's commands in this test's
environment, without the set-up; `make test` itself runs nothing, since it is what runs here.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

ROOT: Final = Path(__file__).resolve().parent.parent
FEWEST_COMMANDS: Final = 3
BLOCK: Final = re.compile(
    r"(?:^<!-- not run: (?P<reason>[^\n]*\S) -->\n+)?^```sh\n(?P<script>.*?)^```$", re.MULTILINE | re.DOTALL
)


def scripts(markdown: str) -> list[str]:
    """The ```sh blocks that are to be run, in their order."""
    return [block["script"] for block in BLOCK.finditer(markdown) if block["reason"] is None]


def commands(script: str) -> list[str]:
    """The commands of a block: lines with their continuations, without comments and blank lines."""
    lines = script.replace("\\\n", " ").splitlines()
    return [line for line in map(str.strip, lines) if line and not line.startswith("#")]


def runnable(command: str) -> str:
    """The command itself, or for `make TARGET` what the target runs once everything is installed."""
    words = command.split()
    if words[0] != "make":
        return command
    if words[1:] == ["test"]:
        return ":"  # what is running now
    dry_run = [
        "make",
        "--dry-run",
        "--no-print-directory",  # which make prints where a make runs this test
        "--old-file=.venv/.puna-installed",
        f"BIN={Path(sys.executable).parent}",
        *words[1:],
    ]
    return subprocess.run(dry_run, cwd=ROOT, capture_output=True, text=True, check=True).stdout


def readme_scripts() -> list[str]:
    return scripts((ROOT / "README.md").read_text(encoding="utf-8"))


def copy_of_source(folder: Path) -> Path:
    """What a clone holds, with this environment as its .venv."""
    unwanted = shutil.ignore_patterns(".git", ".venv", "build", "*_cache", ".hypothesis", "__pycache__")
    shutil.copytree(ROOT, folder, ignore=unwanted, symlinks=True)
    (folder / ".venv").symlink_to(sys.prefix, target_is_directory=True)
    return folder


# One test, not one per block: a block may use files that the one before it wrote.
def test_readme_commands_run(tmp_path: Path) -> None:
    binaries = Path(sys.executable).parent
    if not (binaries / "puna").exists():
        pytest.skip("puna is not installed in this environment; `make test` installs it")
    folder = copy_of_source(tmp_path / "puna")
    for script in readme_scripts():
        done = subprocess.run(
            ["bash", "-exuo", "pipefail", "-c", "\n".join(map(runnable, commands(script)))],
            cwd=folder,
            env={**os.environ, "PATH": f"{binaries}:{os.environ['PATH']}"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"exit status {done.returncode} of\n{script}\n{done.stdout}\n{done.stderr}"


def test_readme_shows_commands() -> None:
    shown = [command for script in readme_scripts() for command in commands(script)]
    assert len(shown) >= FEWEST_COMMANDS, shown
    assert "make demo" in shown
    assert "make test" in shown


def test_blocks_are_found_in_markdown() -> None:
    markdown = """
```sh
first \\
  --flag   # a comment of the shell's
# a line that is not run

second
```
```text
output
```
<!-- not run: needs a large model -->

```sh
third
```
<!-- some other remark -->
```sh
fourth
```
"""
    found = [commands(script) for script in scripts(markdown)]
    assert found == [["first    --flag   # a comment of the shell's", "second"], ["fourth"]]


def test_make_targets_become_their_commands() -> None:
    assert runnable("make test") == ":"
    assert runnable("echo make demo") == "echo make demo"
    demo = runnable("make demo")
    assert f"{Path(sys.executable).parent}/puna generate" in demo
    assert "pip" not in demo
    with pytest.raises(subprocess.CalledProcessError):
        runnable("make no-such-target")
