"""`puna chat`: a conversation on the terminal, or one read from a pipe."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Annotated, Final

import typer

from puna.cli.display import prepare_output, write
from puna.cli.errors import say
from puna.cli.options import EngineFlags, ModelFlags, SamplingFlags, unbundle

if TYPE_CHECKING:
    from puna.cli.sampling import RequestSettings
    from puna.cli.session import Answer, OpenedModel
    from puna.engine.engine import Engine

# Where --max-new-tokens is not given, and the context does not end first.
DEFAULT_MAX_NEW_TOKENS: Final = 1024
# For keys and values, where no flag says how much. Contexts of 128K tokens would take 16 GiB of a model of 8B
# parameters, which few conversations fill; all of it is allocated at the start.
DEFAULT_CACHE_BYTES: Final = 1 << 30

_HELP: Final = """\
/system TEXT  set the system message (without TEXT: remove it)
/reset        forget the conversation, but not the system message
/stats        speed of the last answer, and how full the context is
/help         this list
/exit         leave; so does Ctrl-D
A \\ at the end of a line continues the message on the next one. Ctrl-C stops an answer; what was said so far stays."""


@unbundle
def chat(
    model_flags: ModelFlags,
    *,
    engine_flags: EngineFlags,
    sampling: SamplingFlags,
    system: Annotated[str | None, typer.Option(help="System message to begin with.")] = None,
    stats: Annotated[bool, typer.Option("--stats", help="Show the speed after every answer.")] = False,
) -> None:
    """Talk with a model. Reads messages from the terminal, or line by line from a pipe.

    The context is as long as 1 GiB of keys and values allows, unless --max-model-len or --kv-cache-memory says more.

    Example: puna chat --model Qwen/Qwen2.5-0.5B-Instruct
    """
    from puna.cli.session import OpenedModel

    opened = OpenedModel.open(model_flags, engine_flags)
    if engine_flags.max_model_len is None:
        opened = opened.within((opened.limits.kv_cache_memory or DEFAULT_CACHE_BYTES) // (sampling.num_beams or 1))
    if opened.tokenizer.chat_template is None:
        raise ValueError(
            f"{model_flags.model} has no chat template, so it was probably not trained to chat: use `puna generate`, "
            "or add the chat_template.jinja of its makers to its folder"
        )
    # Once, before the weights are read: a template without a place for it, or a flag out of range, is told at once.
    first = opened.tokenizer.encode_chat(_messages(system, [("user", "Hi")]))
    width = opened.settings(sampling, first, DEFAULT_MAX_NEW_TOKENS).num_sequences
    with opened.engine(opened.context_length, width) as (engine, load_seconds):
        prepare_output()
        is_interactive = sys.stdin.isatty() and sys.stdout.isatty()
        conversation = Conversation(opened, engine, sampling, system, load_seconds, is_interactive)
        if is_interactive:
            held, whole = opened.context_length, opened.config.context_length
            if held < whole and engine_flags.max_model_len is None:
                note(f"The context is {held} tokens of the model's {whole}: --max-model-len asks for more.")
            _talk(conversation, model_flags.model, stats)
        else:
            for message in _joined(line.rstrip("\r\n") for line in sys.stdin):
                conversation.take(message, stats)


class Conversation:
    """The messages so far, and what a line of input does to them."""

    def __init__(
        self,
        opened: OpenedModel,
        engine: Engine,
        sampling: SamplingFlags,
        system: str | None,
        load_seconds: float,
        is_interactive: bool,
    ) -> None:
        self._opened = opened
        self._engine = engine
        self._sampling = sampling
        self._system = system
        self._load_seconds = load_seconds
        self._is_interactive = is_interactive
        self._turns: list[tuple[str, str]] = []  # (role, content), user and assistant by turns
        self._last: Answer | None = None

    def take(self, message: str, stats: bool = False) -> None:
        """Runs a command or answers a message. Raises ValueError where it can't, and typer.Exit for /exit."""
        word, _, rest = message.strip().partition(" ")
        commands: dict[str, Callable[[str], None]] = {
            "/help": lambda _: note(_HELP),
            "/reset": self._reset,
            "/system": self._set_system,
            "/stats": self._show_stats,
            "/exit": _leave,
            "/quit": _leave,
            "/bye": _leave,
        }
        if word in commands:
            commands[word](rest.strip())
        elif word.startswith("/") and "/" not in word[1:]:
            raise ValueError(f"there is no command {word}: /help lists those that there are")
        elif word:
            self._answer(message)
            if stats:
                self._show_stats("")

    def _answer(self, message: str) -> None:
        """Streams an answer. Nothing is remembered of a message that can't be answered."""
        from puna.cli.session import Answer

        turns, prompt_ids, settings = self._fitted([*self._turns, ("user", message)])
        answer = Answer(self._engine, self._opened, prompt_ids, settings, drops_space=True)
        try:
            for delta in answer:
                write(delta)
        except KeyboardInterrupt:
            write(answer.interrupt())
            if not self._is_interactive:
                raise
        write("\n")
        self._last = answer
        if answer.finish_reason == "interrupted" and not answer.text:
            note("(stopped before the answer began; the message is forgotten)")
            return
        self._turns = [*turns, ("assistant", answer.text)]
        if answer.finish_reason == "interrupted":
            note("(stopped)")
        elif answer.finish_reason == "length":
            full = len(prompt_ids) + len(answer.token_ids) >= self._opened.context_length
            reason = "the context is full" if full else "--max-new-tokens sets the limit"
            note(f"(cut off after {len(answer.token_ids)} tokens: {reason})")

    def _fitted(self, turns: list[tuple[str, str]]) -> tuple[list[tuple[str, str]], list[int], RequestSettings]:
        """The turns without the oldest ones that the context has no room for, as turns, as tokens, and the settings.

        A quarter of the context is kept for the answer, unless fewer tokens are asked for.
        """
        context = self._opened.context_length
        wanted = self._sampling.max_new_tokens or DEFAULT_MAX_NEW_TOKENS
        reserve = min(wanted, max(1, context // 4)) if self._sampling.max_new_tokens is None else wanted
        kept = turns
        prompt_ids = self._encode(kept)
        while len(prompt_ids) + reserve > context and len(kept) > 2:
            kept = kept[2:]  # a message with its answer, since templates want the roles by turns
            prompt_ids = self._encode(kept)
        settings = self._opened.settings(self._sampling, prompt_ids, DEFAULT_MAX_NEW_TOKENS)
        forgotten = (len(turns) - len(kept)) // 2
        if forgotten:
            messages = "message and its answer" if forgotten == 1 else f"{forgotten} messages and their answers"
            note(f"(the context of {context} tokens is full: forgot the oldest {messages})")
        return kept, prompt_ids, settings

    def _encode(self, turns: list[tuple[str, str]]) -> list[int]:
        return self._opened.tokenizer.encode_chat(_messages(self._system, turns))

    def _reset(self, _: str) -> None:
        self._turns = []
        note("(the conversation is forgotten)")

    def _set_system(self, text: str) -> None:
        before, self._system = self._system, text or None
        try:
            self._encode([*self._turns, ("user", "Hi")])
        except ValueError:
            self._system = before
            raise
        note(f"(system message: {text})" if text else "(no system message)")

    def _show_stats(self, _: str) -> None:
        from puna.cli.session import stats_lines

        context = self._opened.context_length
        messages = _messages(self._system, self._turns)
        encode = self._opened.tokenizer.encode_chat
        used = len(encode(messages, add_generation_prompt=False)) if self._turns else 0
        lines = stats_lines(self._last, self._load_seconds) if self._last else ["no answer yet"]
        note("\n".join([*lines, f"context      {used} of {context} tokens"]))


def note(text: str) -> None:
    """What the program says, as opposed to the model: on standard error, so that a pipe gets answers only."""
    print(text, file=sys.stderr, flush=True)


def _messages(system: str | None, turns: list[tuple[str, str]]) -> list[dict[str, str]]:
    all_turns = turns if system is None else [("system", system), *turns]
    return [{"role": role, "content": content} for role, content in all_turns]


def _talk(conversation: Conversation, model: str, stats: bool) -> None:
    """The loop at a terminal: an error or a Ctrl-C ends a message, not the program."""
    with contextlib.suppress(ImportError):  # some Pythons are built without it
        importlib.import_module("readline")  # gives input() line editing and history
    note(f"Talking with {model}. /help lists the commands, Ctrl-D leaves.")
    lines = _terminal_lines()
    while True:
        try:
            message = next(_joined(lines), None)
            if message is None:
                note("")  # the shell's prompt gets a line of its own
                return
            conversation.take(message, stats)
        except ValueError as error:
            say("error", str(error))
        except KeyboardInterrupt:
            note("\n(Ctrl-D or /exit leaves)")
            lines = _terminal_lines()  # the interrupt ended the old generator


def _terminal_lines() -> Iterator[str]:
    prompt = ">>> "
    while True:
        try:
            line = input(prompt)
        except EOFError:
            return
        yield line
        prompt = "... " if line.endswith("\\") else ">>> "


def _joined(lines: Iterator[str]) -> Iterator[str]:
    """Messages out of lines: a backslash at the end of a line continues the message."""
    parts: list[str] = []
    for line in lines:
        parts.append(line.removesuffix("\\"))
        if not line.endswith("\\"):
            yield "\n".join(parts)
            parts = []
    if parts:
        yield "\n".join(parts)


def _leave(_: str) -> None:
    raise typer.Exit
