"""`puna chat`: through a pipe, and at a pseudo-terminal with the keys that a user presses."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import termios
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

Run = Callable[..., Any]

# One answer, then a model that would say "xyzxyz..." to the end of its context.
ANSWER, ENDLESS = "<|assistant|>0123456789</s>", ("<|assistant|>xyz", "zx")


def test_lines_of_a_pipe_are_messages(chain: Any, puna: Run) -> None:
    done = puna("chat", "-m", chain, stdin=b"Hi\n\nHow are you?")
    assert (done.code, done.out, done.err) == (0, "0123456789\n0123456789\n", "")


def test_every_turn_sees_the_ones_before(chain: Any, puna: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = conversations(monkeypatch)
    lines = ["Hi", "And \\", "you?", "/reset", "Again", "/system Be brief.", "Well", "/system", "Now"]
    puna("chat", "-m", chain, "--system", "Be kind.", stdin="\n".join(lines).encode())
    kind, brief = [("system", "Be kind.")], [("system", "Be brief.")]
    first, again = [("user", "Hi"), ("assistant", "0123456789")], [("user", "Again"), ("assistant", "0123456789")]
    well = [("user", "Well"), ("assistant", "0123456789")]
    answered = [conversation for conversation in asked if conversation[-1] != ("user", "Hi") or len(conversation) == 2]
    assert [*kind, *first[:1]] in answered
    assert [*kind, *first, ("user", "And \nyou?")] in answered
    assert [*kind, again[0]] in answered
    assert [*brief, *again, well[0]] in answered
    assert answered[-1] == [*again, *well, ("user", "Now")]


def test_a_turn_computes_only_what_is_new(chain: Any, puna: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from puna.runtime.model_runner import ModelRunner

    computed: list[int] = []
    execute = ModelRunner.execute

    def record(self: ModelRunner, plan: Any) -> Any:
        computed.append(plan.num_tokens)
        return execute(self, plan)

    monkeypatch.setattr(ModelRunner, "execute", record)
    talk = b"a" * 100 + b"\nHi\n"
    assert puna("chat", "-m", chain, stdin=talk).out == "0123456789\n" * 2
    first, second = sorted(computed)[-1], sorted(computed)[-2]
    assert first == 102
    assert second <= 16 + len("<") + 12 + len("<>Hi")  # less than a block, and what came since
    computed.clear()
    puna("chat", "-m", chain, "--no-prefix-caching", stdin=talk)
    assert sorted(computed)[-1] == 102 + 10 + 4


def test_context_is_kept_within_the_memory_for_it(build_chain: Run, puna: Run, tmp_path: Path) -> None:
    folder = build_chain(tmp_path / "model", ANSWER, context=100_000_000)
    used = "context      0 of {} tokens"
    per_block = 16 * 2 * 4 * 4  # tokens, key and value, numbers, float32
    assert used.format(((1 << 30) // per_block - 1) * 16) in puna("chat", "-m", folder, stdin=b"/stats").err
    assert (
        used.format((10**6 // per_block - 1) * 16)
        in puna("chat", "-m", folder, "--kv-cache-memory", "1MB", stdin=b"/stats").err
    )
    assert used.format(77) in puna("chat", "-m", folder, "--max-model-len", 77, stdin=b"/stats").err


def conversations(monkeypatch: pytest.MonkeyPatch) -> list[list[tuple[str, str]]]:
    """Fills up with the conversations that are rendered."""
    from puna.engine.tokenizer import Tokenizer

    asked: list[list[tuple[str, str]]] = []
    encode = Tokenizer.encode_chat

    def record(self: Tokenizer, messages: Any, *rest: Any, **named: Any) -> list[int]:
        asked.append([(message["role"], message["content"]) for message in messages])
        return encode(self, messages, *rest, **named)

    monkeypatch.setattr(Tokenizer, "encode_chat", record)
    return asked


def test_a_full_context_forgets_the_oldest_turns_and_says_so(
    build_chain: Run, puna: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A turn takes 1 + 4 tokens for the message and 1 + 10 for the answer; a quarter, 15, is kept for the next answer.
    folder = build_chain(tmp_path / "model", ANSWER, context=60)
    asked = conversations(monkeypatch)
    done = puna("chat", "-m", folder, "--system", "s", stdin=b"one.\ntwo.\nthr.\nfou.\nfiv.\n")
    assert done.out == "0123456789\n" * 5
    assert done.err.splitlines() == [
        "(the context of 60 tokens is full: forgot the oldest message and its answer)",
        "(the context of 60 tokens is full: forgot the oldest message and its answer)",
    ]
    answer = ("assistant", "0123456789")
    assert asked[-1] == [("system", "s"), ("user", "thr."), answer, ("user", "fou."), answer, ("user", "fiv.")]


def test_a_message_longer_than_the_context_is_refused(build_chain: Run, puna: Run, tmp_path: Path) -> None:
    folder = build_chain(tmp_path / "model", ANSWER, context=40)
    done = puna("chat", "-m", folder, stdin=b"Hi\n" + b"x" * 50)
    assert done.code == 2
    assert done.out == "0123456789\n"
    assert done.err == (
        "puna: error: the prompt has 52 tokens, and the context is 40: shorten it by at least 13, which leaves room "
        "for one new token\n"
    )


@pytest.mark.parametrize(
    ("words", "text", "reason"),
    [
        (["--max-new-tokens", "5"], "xyzxy", "(cut off after 5 tokens: --max-new-tokens sets the limit)"),
        ([], ("xyz" * 20)[:36], "(cut off after 36 tokens: the context is full)"),
    ],
)
def test_an_answer_that_is_cut_off_says_why(
    build_chain: Run, puna: Run, tmp_path: Path, words: list[str], text: str, reason: str
) -> None:
    folder = build_chain(tmp_path / "model", *ENDLESS, context=40)
    done = puna("chat", "-m", folder, *words, stdin=b"Hi")
    assert (done.out, done.err) == (f"{text}\n", f"{reason}\n")


def test_commands(chain: Any, puna: Run) -> None:
    done = puna("chat", "-m", chain, stdin=b"/stats\n/help\nHi\n/stats\n/exit\nnever asked\n")
    assert (done.code, done.out) == (0, "0123456789\n")
    before, after = done.err.split("/system TEXT", 1)
    assert "no answer yet" in before
    assert "context      0 of 100000 tokens" in before
    for word in ("/reset", "/stats", "/help", "/exit", "Ctrl-C"):
        assert word in after
    assert "generated    11 tokens" in after
    assert "context      14 of 100000 tokens" in after  # <|user|>Hi<|assistant|>0123456789


def test_stats_after_every_answer(chain: Any, puna: Run) -> None:
    assert puna("chat", "-m", chain, "--stats", stdin=b"Hi\nHi").err.count("generated    11 tokens") == 2


def test_unknown_command(chain: Any, puna: Run) -> None:
    assert (
        puna("chat", "-m", chain, stdin=b"/frob").message
        == "there is no command /frob: /help lists those that there are"
    )
    assert puna("chat", "-m", chain, stdin=b"/usr/bin is a folder").out == "0123456789\n"


def test_stop_strings(chain: Any, puna: Run) -> None:
    assert puna("chat", "-m", chain, "--stop", "45", stdin=b"Hi").out == "0123\n"


def test_model_without_chat_template(build_chain: Run, puna: Run, tmp_path: Path) -> None:
    folder = build_chain(tmp_path / "model", template=None)
    message = puna("chat", "-m", folder, stdin=b"Hi").message
    assert "has no chat template" in message
    assert "`puna generate`" in message


def test_template_without_a_place_for_a_system_message(build_chain: Run, puna: Run, tmp_path: Path) -> None:
    template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system here') }}{% endif %}<|assistant|>"
    folder = build_chain(tmp_path / "model", ANSWER, template=template)
    assert "no system here" in puna("chat", "-m", folder, "--system", "s", stdin=b"Hi").message
    done = puna("chat", "-m", folder, stdin=b"Hi\n/system s\n")
    assert (done.code, done.out) == (2, "0123456789\n")
    assert "no system here" in done.err


def test_flags_are_checked_before_the_weights_are_read(chain: Any, puna: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("puna.models.loading.ModelLoader.load", lambda *_, **__: pytest.fail("the weights were read"))
    assert "top_p is 2.0" in puna("chat", "-m", chain, "--top-p", "2", stdin=b"Hi").message


class Terminal:
    """The program at a pseudo-terminal of its own; `expect` reads on until some text has come."""

    def __init__(self, start: Run, *words: object) -> None:
        self._screen, program_side = pty.openpty()
        self._process = start(
            *words,
            stdin=program_side,
            stdout=program_side,
            stderr=program_side,
            start_new_session=True,
            # The terminal whose Ctrl-C reaches the program.
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        os.close(program_side)
        self._seen = ""

    def type(self, keys: str) -> None:
        os.write(self._screen, keys.encode())

    def expect(self, text: str) -> str:
        """What came before `text`. Fails if the program ends, or says nothing for a minute, before that."""
        while text not in self._seen:
            ready, _, _ = select.select([self._screen], [], [], 60)
            assert ready, f"no {text!r} after {self._seen!r}"
            new = self._read()
            assert new, f"ended without {text!r} after {self._seen!r}"
            self._seen += new
        before, self._seen = self._seen.split(text, 1)
        return before

    def press(self, key: str, text: str) -> str:
        """The same, with a key that is pressed until `text` comes.

        Python's input() sleeps through a signal that comes just before it waits for a key.
        """
        for _ in range(60):
            self.type(key)
            while text not in self._seen and select.select([self._screen], [], [], 1)[0]:
                self._seen += self._read()
            if text in self._seen:
                break
        return self.expect(text)

    def _read(self) -> str:
        try:
            return os.read(self._screen, 65536).decode()
        except OSError:  # what Linux says at the end of a terminal
            return ""

    def end(self) -> int:
        """Reads on to the end of the program, and returns its exit code."""
        while self._read():
            pass
        return int(self._process.wait(60))

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._screen)


@pytest.fixture
def terminal(
    build_chain: Run, start_program: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Terminal]:
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setenv("INPUTRC", os.devnull)
    folder = build_chain(tmp_path / "model", *ENDLESS)
    terminal = Terminal(start_program, "chat", "-m", folder, "--max-new-tokens", 90_000)
    yield terminal
    terminal.close()


def test_a_conversation_at_a_terminal(terminal: Terminal) -> None:
    terminal.expect("/help lists the commands")
    terminal.expect(">>> ")
    terminal.type("/help\r")
    terminal.expect("/system TEXT")
    terminal.expect(">>> ")

    terminal.type("Hi\r")
    terminal.expect("xyzxyz")
    terminal.type("\x03")  # Ctrl-C stops the answer
    terminal.expect("(stopped)")
    terminal.expect(">>> ")
    terminal.type("/stats\r")
    terminal.expect("interrupted")
    used = int(terminal.expect(" of 100000 tokens").split()[-1])
    assert used > len("xyzxyz")  # what was said so far is still there
    terminal.expect(">>> ")

    terminal.type("/frob\r")
    terminal.expect("puna: error: there is no command /frob")
    terminal.expect(">>> ")
    terminal.type("half a mess")
    terminal.expect("half a mess")  # a Ctrl-C takes away what was not read yet, for which readline would wait
    terminal.press("\x03", "(Ctrl-D or /exit leaves)")  # Ctrl-C drops the line
    terminal.expect(">>> ")

    terminal.type("/reset\r")
    terminal.expect("(the conversation is forgotten)")
    terminal.expect(">>> ")
    terminal.type("/stats\r")
    terminal.expect(" 0 of 100000 tokens")
    terminal.expect(">>> ")

    terminal.type("two \\\r")
    terminal.expect("... ")
    terminal.type("lines\r")
    terminal.expect("xyzxyz")
    terminal.type("\x03")
    terminal.expect(">>> ")
    terminal.type("\x04")  # Ctrl-D leaves
    assert terminal.end() == 0


def test_exit_at_a_terminal(terminal: Terminal) -> None:
    terminal.expect(">>> ")
    terminal.type("/exit\r")
    assert terminal.end() == 0


def test_a_context_that_is_cut_is_told_at_a_terminal(
    build_chain: Run, start_program: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "dumb")
    folder = build_chain(tmp_path / "model", ANSWER)
    terminal = Terminal(start_program, "chat", "-m", folder, "--kv-cache-memory", "100KB")
    terminal.expect("tokens of the model's 100000: --max-model-len asks for more.")
    terminal.expect(">>> ")
    terminal.type("/exit\r")
    assert terminal.end() == 0
    terminal.close()
