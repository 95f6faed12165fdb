"""`puna generate`: continues a prompt, and streams the text; or those of a file, into another (see batch.py)."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Final

import typer

from puna.cli.display import prepare_output, write
from puna.cli.options import EngineFlags, ModelFlags, SamplingFlags, unbundle
from puna.runtime.machine import peak_memory_bytes

# Where --max-new-tokens is not given: a few paragraphs, and less where the context ends first.
DEFAULT_MAX_NEW_TOKENS: Final = 256
_BATCH: Final = "Many prompts"


@unbundle
def generate(
    model_flags: ModelFlags,
    prompt: Annotated[
        str | None,
        typer.Argument(help="The text to continue; '-', or none with piped input, reads standard input."),
    ] = None,
    *,
    engine_flags: EngineFlags,
    sampling: SamplingFlags,
    n: Annotated[int, typer.Option("--n", min=1, help="Texts to sample for each prompt; with --json or --input.")] = 1,
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
        bool,
        typer.Option("--stats", help="Write speed, loading time, peak memory and what computes to standard error."),
    ] = False,
    input_file: Annotated[
        Path | None,
        typer.Option(
            "--input",
            metavar="FILE",
            help="JSON objects, one a line: prompt, prompt_token_ids or messages; optional id and sampling fields.",
            rich_help_panel=_BATCH,
        ),
    ] = None,
    output_file: Annotated[
        Path | None,
        typer.Option(
            "--output",
            metavar="FILE",
            help="Where each result is added as it is done. A run that was stopped goes on where it was.",
            rich_help_panel=_BATCH,
        ),
    ] = None,
    max_num_seqs: Annotated[
        int, typer.Option(min=1, help="Texts that are generated at once, with --input.", rich_help_panel=_BATCH)
    ] = 64,
) -> None:
    """Continue a prompt; the text streams to standard output.

    Example: puna generate --model demo "Once upon a time"

    With --input and --output: continue every prompt of a file, many at once.
    """
    if system is not None and not apply_chat_template:
        raise ValueError("--system is part of a chat: add --apply-chat-template")
    if (input_file is None) != (output_file is None):
        raise ValueError("--input and --output belong together: give both, or neither")
    if input_file is not None and output_file is not None:
        unused = [name for name, given in (("PROMPT", prompt is not None), ("--json", json_output)) if given]
        if unused:
            raise ValueError(f"{' and '.join(unused)} can't be combined with --input: leave it out")
        from puna.cli.batch import BatchOptions, run_batch

        options = BatchOptions(
            input_file=input_file,
            output_file=output_file,
            max_num_seqs=max_num_seqs,
            n=n,
            apply_chat_template=apply_chat_template,
            system=system,
            parse_special=parse_special,
            echo=echo,
            stats=stats,
            default_max_new_tokens=DEFAULT_MAX_NEW_TOKENS,
        )
        run_batch(model_flags, engine_flags, sampling, options)
        return
    if n > 1 and not json_output:
        raise ValueError(f"--n is {n}, but only one text can be streamed: add --json, or use --input")
    text = _prompt_text(prompt)

    from puna.cli.session import Answer, OpenedModel, result_fields, stats_lines
    from puna.engine.weights import in_words

    opened = OpenedModel.open(model_flags, engine_flags)
    if apply_chat_template:
        messages = [{"role": "user", "content": text}]
        if system is not None:
            messages.insert(0, {"role": "system", "content": system})
        prompt_ids = opened.tokenizer.encode_chat(messages)
    else:
        prompt_ids = opened.tokenizer.encode(text, parse_special=parse_special)
    settings = opened.settings(sampling, prompt_ids, DEFAULT_MAX_NEW_TOKENS, n)
    # A cache for this request alone: the whole context of a model may not even fit into memory.
    needed = len(prompt_ids) + (settings.params.max_tokens or 0)
    with opened.engine(needed, settings.num_sequences) as (engine, load_seconds):
        prepare_output()
        answer = Answer(engine, opened, prompt_ids, settings)
        if json_output:
            for _ in answer:
                pass
            fields = {
                "model": model_flags.model,
                "prompt": text,
                **result_fields(answer.output, text if echo else ""),
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
            ops_line = f"ops          {in_words(engine.parts.ops)}"
            print(*stats_lines(answer, load_seconds), ops_line, sep="\n", file=sys.stderr)


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
