"""`puna generate`: continues a prompt, and streams the text."""

from __future__ import annotations

import json
import sys
from typing import Annotated, Final

import typer

from puna.cli.options import ModelFlags, SamplingFlags, unbundle
from puna.runtime.machine import peak_memory_bytes

# Where --max-new-tokens is not given: a few paragraphs, and less where the context ends first.
DEFAULT_MAX_NEW_TOKENS: Final = 256


@unbundle
def generate(
    model_flags: ModelFlags,
    prompt: Annotated[
        str | None,
        typer.Argument(help="The text to continue; '-', or none with piped input, reads standard input."),
    ] = None,
    *,
    sampling: SamplingFlags,
    apply_chat_template: Annotated[
        bool, typer.Option("--apply-chat-template", help="Send the prompt as a user's message, not as plain text.")
    ] = False,
    system: Annotated[str | None, typer.Option(help="System message; with --apply-chat-template.")] = None,
    parse_special: Annotated[
        bool, typer.Option("--parse-special", help="Read special tokens, such as </s>, in the prompt as such.")
    ] = False,
    echo: Annotated[bool, typer.Option("--echo", help="Write the prompt before the text.")] = False,
    json_output: Annotated[
        bool, typer.Option("--json", help="Write one JSON object at the end instead of text.")
    ] = False,
    stats: Annotated[
        bool, typer.Option("--stats", help="Write speed, loading time and peak memory to standard error.")
    ] = False,
) -> None:
    """Continue a prompt; the text streams to standard output.

    Example: puna generate --model demo "Once upon a time"
    """
    if system is not None and not apply_chat_template:
        raise ValueError("--system is part of a chat: add --apply-chat-template")
    text = _prompt_text(prompt)
    stop_strings = sampling.stop_strings

    from puna.cli.session import Answer, OpenedModel, prepare_output, stats_lines, write

    opened = OpenedModel.open(model_flags)
    if apply_chat_template:
        messages = [{"role": "user", "content": text}]
        if system is not None:
            messages.insert(0, {"role": "system", "content": system})
        prompt_ids = opened.tokenizer.encode_chat(messages)
    else:
        prompt_ids = opened.tokenizer.encode(text, parse_special=parse_special)
    options = opened.options(sampling, prompt_ids, DEFAULT_MAX_NEW_TOKENS)
    model, load_seconds = opened.load()

    prepare_output()
    answer = Answer(model, opened.tokenizer, prompt_ids, options, stop_strings, continues=not apply_chat_template)
    if json_output:
        for _ in answer:
            pass
        fields = {
            "model": model_flags.model,
            "prompt": text,
            "text": text + answer.text if echo else answer.text,
            "token_ids": answer.token_ids,
            "finish_reason": answer.finish_reason,
            "usage": answer.usage(),
            "timings": answer.timings(load_seconds),
            "peak_memory_bytes": peak_memory_bytes(),
        }
        write(json.dumps(fields, ensure_ascii=False) + "\n")
    else:
        if echo:
            write(text)
        for delta in answer:
            write(delta)
        write("\n")
    if stats:
        print(*stats_lines(answer, load_seconds), sep="\n", file=sys.stderr)


def _prompt_text(prompt: str | None) -> str:
    """The argument, or standard input without the line end that `echo` and editors put after a text."""
    if prompt is None and sys.stdin.isatty():
        raise ValueError(
            'give a prompt, as in `puna generate --model demo "Once upon a time"`, or - for standard input'
        )
    if prompt is None or prompt == "-":
        try:
            text = sys.stdin.buffer.read().decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"standard input is not UTF-8 text, from byte {error.start} on: convert it first"
            ) from error
        return text.removesuffix("\n").removesuffix("\r")
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"the prompt is not UTF-8 text, from character {error.start} on: convert it first") from error
    return prompt
