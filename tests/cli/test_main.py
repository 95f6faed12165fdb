"""`puna` itself: help and version at once, and every error as one line with its exit code."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest

from puna import __version__
from puna.cli import main
from puna.cli.options import SamplingFlags, unbundle

SOURCE: Final = Path(__file__).resolve().parents[2] / "src"
HEAVY: Final = ("torch", "transformers", "tokenizers", "safetensors", "jinja2", "numpy", "huggingface_hub")


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["generate", "--help"], ["info", "--help"], []])
def test_help_and_version_import_nothing_heavy(words: list[str]) -> None:
    code = (
        "import sys\nfrom puna.cli import main\n"
        f"code = main({words!r})\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)\n"
        "sys.exit(code)"
    )
    environment = {**os.environ, "PYTHONPATH": str(SOURCE)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert (done.returncode, done.stderr) == (0, "[]\n")
    assert (f"puna {__version__}\n" if words == ["--version"] else "Usage: puna") in done.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["frob"], "No such command 'frob'"),
        (["generate", "text"], "--model"),
        (["generate", "--model"], "--model"),
        (["generate", "-m", "demo", "--no-such-flag", "text"], "--no-such-flag"),
        (["generate", "-m", "demo", "one", "two"], "two"),
        (["generate", "-m", "demo", "--threads", "0", "text"], "--threads"),
        (["generate", "-m", "demo", "--threads", "many", "text"], "--threads"),
        (["generate", "-m", "demo", "--dtype", "float8", "text"], "'float32', 'bfloat16', 'float16'"),
        (["generate", "-m", "demo", "--max-new-tokens", "0", "text"], "--max-new-tokens"),
        (["generate", "-m", "no such model", "text"], "no such model is not a folder"),
        (["chat", "-m", "no such model"], "no such model is not a folder"),
        (["info", "no such model"], "no such model is not a folder"),
        (["info", "--dtype", "float32"], "give the model as well"),
        (["generate", "-m", "demo", "--system", "Be kind.", "text"], "--apply-chat-template"),
        (["generate", "-m", "demo", "--stop", "", "text"], "--stop is empty"),
        (["generate", "-m", "demo", "a\udcff"], "not UTF-8 text, from character 1"),
    ],
)
def test_error_is_one_line_with_exit_code_2(puna: Callable[..., Any], words: list[str], message: str) -> None:
    assert message in puna(*words).message


def test_standard_input_that_is_no_text(puna: Callable[..., Any]) -> None:
    assert (
        "standard input is not UTF-8 text, from byte 2" in puna("generate", "-m", "demo", "-", stdin=b"ab\xff").message
    )


@pytest.mark.parametrize("words", [["--debug", "info", "no such model"], ["info", "no such model", "--debug"]])
def test_debug_shows_the_traceback(puna: Callable[..., Any], words: list[str]) -> None:
    done = puna(*words)
    assert done.code == 2
    assert done.err.startswith("Traceback (most recent call last):")
    assert "in resolve_path" in done.err
    assert done.err.splitlines()[-1].startswith("puna: error: no such model")


def test_debug_after_two_dashes_is_text(puna: Callable[..., Any]) -> None:
    assert "--debug is not a folder" in puna("info", "--", "--debug").message


def test_folder_without_permission_is_named(
    puna: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: str, dtype: str | None) -> None:
        raise PermissionError(13, "Permission denied", str(tmp_path / "config.json"))

    monkeypatch.setattr("puna.cli.model_report.report_on", refuse)  # root may read everything
    assert puna("info", tmp_path).message == f"{tmp_path / 'config.json'}: permission denied"


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (RuntimeError("a\nb"), 1, "puna: error: RuntimeError: a b (unexpected: --debug shows where; please report it)"),
        (KeyboardInterrupt(), 130, ""),
        (ValueError("several\n  lines"), 2, "puna: error: several lines"),
        (OSError(28, "No space left on device"), 2, "puna: error: no space left on device"),
        (ValueError(), 2, "puna: error: ValueError"),
    ],
)
def test_what_a_command_raises_has_its_exit_code(
    puna: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, line: str
) -> None:
    def fail(path: str, dtype: str | None) -> None:
        raise error

    monkeypatch.setattr("puna.cli.model_report.report_on", fail)
    done = puna("info", "demo")
    assert (done.code, done.err) == (code, f"{line}\n")


def test_warnings_are_one_line_each_and_told_once(puna: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def warn(path: str, dtype: str | None) -> None:
        for text in ("odd\nfield", "odd\nfield", "another"):
            warnings.warn(text, stacklevel=1)
        raise ValueError("enough")

    monkeypatch.setattr("puna.cli.model_report.report_on", warn)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        shown = warnings.showwarning
        done = puna("info", "demo")
        assert warnings.showwarning is shown
    assert done.err == "puna: warning: odd field\npuna: warning: another\npuna: error: enough\n"


def test_main_reads_the_arguments_of_the_process(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["puna", "--version"])
    assert main() == 0
    assert capsys.readouterr().out == f"puna {__version__}\n"


@pytest.mark.parametrize(("before", "after"), [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_waiting_threads_do_not_spin_unless_told_to(
    puna: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, before: str | None, after: str
) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", before or "")
    if before is None:
        monkeypatch.delenv("OMP_WAIT_POLICY")
    puna("--version")
    assert os.environ["OMP_WAIT_POLICY"] == after


def test_unbundle_passes_everything_on() -> None:
    taken: list[object] = []

    def command(sampling: SamplingFlags, other: int = 3) -> None:
        taken.extend((sampling, other))

    command.__annotations__ = {"sampling": SamplingFlags, "other": int, "return": None}
    unbundle(command)(**{**vars(SamplingFlags()), "top_k": 5, "other": 4})
    assert taken == [SamplingFlags(top_k=5), 4]
