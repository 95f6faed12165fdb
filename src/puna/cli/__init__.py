"""The command line: `app` holds the commands, `main` runs one and turns what goes wrong into a line and an exit code.

Nothing here or in the command modules imports torch at the top, so that --help and --version answer at once.
"""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer
import typer.main

from puna import __version__
from puna.cli.bench import bench_app
from puna.cli.build import build
from puna.cli.chat import chat
from puna.cli.errors import exit_code_of, one_line_warnings
from puna.cli.evaluate import eval_app
from puna.cli.generate import generate
from puna.cli.info import info
from puna.cli.serve import serve
from puna.cli.train import train

app = typer.Typer(
    name="puna",
    help="Run LLaMA-family language models.",
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="rich",
)
app.command()(generate)
app.command()(chat)
app.command()(serve)
app.command()(info)
app.command()(build)
app.command()(train)
app.add_typer(bench_app, name="bench")
app.add_typer(eval_app, name="eval")


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"puna {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def puna(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_show_version, is_eager=True)
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show tracebacks of errors; may also stand after the command.")
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        print(context.get_help())


def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns its exit code: 0, 2 for what a user can mend, 1 for what should not happen."""
    if "_PUNA_COMPLETE" in os.environ:  # set by the shell's completion script, which typer answers
        app(prog_name="puna")
    # Threads that wait for work would spin, and take a shared machine's processors from those that have some: a model
    # of 260K parameters gave 6 tokens/s instead of 600 on two busy cores. OpenMP reads this when torch is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    arguments = sys.argv[1:] if argv is None else list(argv)
    options = arguments[: arguments.index("--")] if "--" in arguments else arguments
    debug = "--debug" in options
    if debug:
        rest = arguments[len(options) :]
        arguments = ["--debug", *(word for word in options if word != "--debug"), *rest]
    command = typer.main.get_command(app)
    with one_line_warnings():
        # Not command.main: it has answers of its own to interrupts and closed pipes, which differ between releases.
        try:
            with command.make_context("puna", arguments) as context:
                command.invoke(context)
            sys.stdout.flush()  # here a closed pipe can still be reported
        except BaseException as error:
            if isinstance(error, SystemExit | GeneratorExit):
                raise
            return exit_code_of(error, debug)
    return 0
