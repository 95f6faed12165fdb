"""`puna bench MODEL`: tokens per second of a model, and what share that is of what memory and cores allow.

Also the group `puna bench`, which `serve` belongs to, too (see bench_serve.py).
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer
import typer.core

from puna.cli.bench_serve import bench_serve
from puna.cli.display import check_plot, print_table, progress_bar, write
from puna.cli.options import CacheDtypeName, DtypeName, Quantization

if TYPE_CHECKING:
    from puna.cli.bench_run import Report
    from puna.config import LLaMAConfig

_PROMPT_TOKENS: Final = 512


class _BenchGroup(typer.core.TyperGroup):
    """`puna bench MODEL` stands for `puna bench model MODEL`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args or args[0] not in (*self.commands, *ctx.help_option_names):
            args = ["model", *args]
        return super().parse_args(ctx, args)


bench_app = typer.Typer(cls=_BenchGroup)
bench_app.command(name="serve")(bench_serve)


@bench_app.callback()
def bench() -> None:
    """Measure the speed of a model (puna bench MODEL), or of a running server (puna bench serve URL).

    What comes after `puna bench` and is neither `serve` nor `model` belongs to `model`: see puna bench model --help.
    """


@bench_app.command(name="model")
def bench_model(
    model: Annotated[
        str | None,
        typer.Argument(metavar="[MODEL]", help="A folder, a GGUF file, a hub id or 'demo'; or give --random."),
    ] = None,
    random: Annotated[
        str | None,
        typer.Option(
            metavar="CONFIG", help="Random weights in a known shape such as llama-3.2-1b, or that of a config.json."
        ),
    ] = None,
    prompt_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens of each prompt. Default: 512, or fewer in a short context.")
    ] = None,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens to generate after each prompt.")] = 64,
    batch: Annotated[
        str, typer.Option(metavar="N,N...", help="Sequences at once; several sizes, with commas.")
    ] = "1,8",
    repeat: Annotated[int, typer.Option(min=1, help="Runs of each batch; medians are shown.")] = 5,
    dtype: Annotated[
        DtypeName | None, typer.Option(help="Number type to run in; the checkpoint's if not given.")
    ] = None,
    quantization: Annotated[
        Quantization | None, typer.Option(help="Format of the weights; as they are stored if not given.")
    ] = None,
    kv_cache_dtype: Annotated[
        CacheDtypeName, typer.Option(help="Number type of keys and values; auto is the model's.")
    ] = CacheDtypeName.auto,
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads; what this process may use if not given.")
    ] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Write one JSON object instead of a table.")] = False,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw the rates into a .png, .pdf or .svg file.")
    ] = None,
) -> None:
    """Measure prefill and decode, and compare them with what this machine allows.

    Example: puna bench --random llama-3.2-1b --quantization int8
    """
    batches = _batches(batch)
    if (model is None) == (random is None):
        raise ValueError("give a model, or --random CONFIG for one that need not exist; one of the two")
    if plot is not None:
        check_plot(plot)
    shape = None if random is None else _shape(random)

    import torch

    from puna.checkpoints import open_checkpoint
    from puna.cli.bench_run import Settings, measure
    from puna.cli.session import set_threads
    from puna.engine.token_ids import token_id_tokenizer
    from puna.models.loading import resolved_config
    from puna.models.random_weights import random_checkpoint

    set_threads(threads)
    asked, tokenizer = None if quantization is None else quantization.value, None
    if shape is None:
        checkpoint = open_checkpoint(model or "")
    else:
        if dtype is not None:
            shape = dataclasses.replace(shape, dtype=dtype.value)
        checkpoint = random_checkpoint(shape, quantization=asked)
        asked = None if checkpoint.holds_codes else asked  # they are made in that format
        tokenizer = token_id_tokenizer(shape.vocab_size)
    config = resolved_config(checkpoint, dtype.value if dtype else None)
    settings = Settings(
        prompt_tokens=_prompt_tokens(prompt_tokens, new_tokens, config),
        new_tokens=new_tokens,
        batches=batches,
        repeat=repeat,
        threads=torch.get_num_threads(),
        kv_cache_dtype=kv_cache_dtype.value,
    )
    with progress_bar("runs") as on_progress:
        report = measure(checkpoint, config.dtype, asked, tokenizer, settings, on_progress)
    name = f"{random} with random weights" if random else str(model)
    title = f"{name} ({config.dtype}{f', {quantization.value}' if quantization else ''})"
    if plot is not None:
        from puna.cli.bench_plot import draw

        draw(report, title, plot)
    if json_output:
        what = {
            "model": model,
            "random": random,
            "dtype": config.dtype,
            "quantization": quantization.value if quantization else None,
            "kv_cache_dtype": kv_cache_dtype.value,
        }
        write(json.dumps({**what, **_fields(report)}, ensure_ascii=False) + "\n")
        return
    _print_report(title, report)


def _batches(text: str) -> tuple[int, ...]:
    """Raises ValueError for anything but whole numbers above 0, with commas."""
    try:
        sizes = tuple(int(part) for part in text.split(","))
    except ValueError:
        sizes = ()
    if not sizes or min(sizes) < 1:
        raise ValueError(f"--batch is {text!r}: give whole numbers from 1 on, with commas, such as 1,8")
    return sizes


def _shape(name: str) -> LLaMAConfig:
    """Raises ValueError for a name that is neither a preset nor a file."""
    from puna.config import LLaMAConfig
    from puna.config.presets import PRESETS

    preset = PRESETS.get(name.lower())
    if preset is not None:
        return preset
    if Path(name).exists():
        return LLaMAConfig.from_hugging_face(name)
    raise ValueError(f"--random is {name!r}: give the path of a config.json, or one of {', '.join(PRESETS)}")


def _prompt_tokens(asked: int | None, new_tokens: int, config: LLaMAConfig) -> int:
    room = config.context_length - new_tokens
    if room < 1 or (asked is not None and asked > room):
        raise ValueError(
            f"--prompt-tokens is {asked or _PROMPT_TOKENS} and --new-tokens {new_tokens}, but the model's context is "
            f"{config.context_length}: ask for fewer"
        )
    return min(_PROMPT_TOKENS, room) if asked is None else asked


def _fields(report: Report) -> dict[str, Any]:
    settings, limit = report.settings, report.limit
    return {
        "threads": settings.threads,
        "level": report.level,
        "repeat": settings.repeat,
        "load_seconds": report.load_seconds,
        "peak_memory_bytes": report.peak_memory_bytes,
        "limit": {
            "read_bytes_per_second": limit.read_bandwidth,
            **{f"{kind}_operations_per_second": count for kind, count in sorted(limit.operations.items())},
        },
        "results": [
            {
                "batch": one.batch,
                "prompt_tokens": settings.prompt_tokens,
                "new_tokens": settings.new_tokens,
                "prefill_tokens_per_second": one.prefill_tokens_per_second,
                "decode_tokens_per_second": one.decode_tokens_per_second,
                "time_to_first_token_seconds": one.time_to_first_token_seconds,
                "percent_of_limit": {"prefill": one.prefill_percent, "decode": one.decode_percent},
            }
            for one in report.results
        ],
    }


def _print_report(title: str, report: Report) -> None:
    settings, limit, rates = report.settings, report.limit, report.limit.operations
    kernels = "reference ops" if report.level is None else f"{report.level} kernels"
    threads = "thread" if settings.threads == 1 else "threads"
    peaks = ", ".join(f"{kind} {rates[kind] / 1e9:,.0f}" for kind in ("int8", "bfloat16", "float32"))
    print_table(
        f"{title}\n{settings.threads} {threads}, {kernels}; prompts of {settings.prompt_tokens} tokens, "
        f"{settings.new_tokens} new; medians of {settings.repeat}",
        ("batch", "prefill tokens/s", "of limit", "first token", "decode tokens/s", "of limit"),
        [
            (
                str(one.batch),
                f"{one.prefill_tokens_per_second:,.1f}",
                f"{one.prefill_percent:.0f} %",
                f"{one.time_to_first_token_seconds:.3f} s",
                f"{one.decode_tokens_per_second:,.1f}",
                f"{one.decode_percent:.0f} %",
            )
            for one in report.results
        ],
    )
    print(f"limit        reads {limit.read_bandwidth / 1e9:.1f} GB/s; 10^9 operations/s: {peaks}")
    print(f"loading      {report.load_seconds:.2f} s")
    print(f"peak memory  {report.peak_memory_bytes / 2**20:,.0f} MiB")
