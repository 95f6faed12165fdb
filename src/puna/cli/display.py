"""What commands show: text, a bar while they measure, tables, and plots in files."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from io import TextIOWrapper
from pathlib import Path
from typing import Final

PLOT_TYPES: Final = (".png", ".pdf", ".svg")


def write(text: str) -> None:
    """To standard output at once, so that a reader of a pipe has it too."""
    sys.stdout.write(text)
    sys.stdout.flush()


def prepare_output() -> None:
    """A terminal that can't show a character gets a question mark for it, not the user an error."""
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


@contextmanager
def progress_bar(what: str) -> Iterator[Callable[[int, int], None]]:
    """A function to call with how much is done and the total; the bar is on standard error if that is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task(what, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def print_table(title: str, header: Sequence[str] | None, rows: Sequence[Sequence[str]]) -> None:
    """To standard output; all columns but the first are aligned on the right."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    prepare_output()
    table = Table(show_header=header is not None)
    for index, name in enumerate(header or [""] * len(rows[0])):
        table.add_column(name, justify="right" if index else "left")
    for row in rows:
        table.add_row(*row)
    console = Console(file=sys.stdout)
    console.print(Text(title), soft_wrap=True)
    console.print(table)


def check_plot(file: Path) -> None:
    """Raises ValueError for a name of another type, a folder that is not there, and where matplotlib is missing."""
    if file.suffix not in PLOT_TYPES:
        raise ValueError(f"--plot is {str(file)!r}: its name must end in {', '.join(PLOT_TYPES)}")
    if not file.parent.is_dir():
        raise ValueError(f"--plot is {str(file)!r}, but there is no folder {str(file.parent)!r}")
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("--plot needs matplotlib: pip install 'puna[plot]'")
