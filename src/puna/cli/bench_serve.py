"""`puna bench serve`: how quickly a server answers many requests at once; for any that OpenAI's clients can use."""

from __future__ import annotations

import asyncio
import enum
import json
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from puna.cli.display import check_plot, print_table, progress_bar, write
from puna.cli.errors import say

if TYPE_CHECKING:
    from puna.cli.load_report import LoadReport
    from puna.cli.load_run import Load

_NUM_REQUESTS: Final = 100
_LIMITS: Final = ("ttft", "tpot", "itl", "e2el")
_LOAD, _REQUESTS = "Load", "Requests"
# Above this share of one processor the client itself is what is measured.
_BUSY: Final = 0.8


class Endpoint(str, enum.Enum):
    completions = "completions"
    chat = "chat"


def bench_serve(
    url: Annotated[str, typer.Argument(metavar="URL", help="The server's address, such as http://127.0.0.1:8000.")],
    model: Annotated[str | None, typer.Option(help="The model's name; the server's first if not given.")] = None,
    endpoint: Annotated[Endpoint, typer.Option(help="Which path is asked.")] = Endpoint.completions,
    api_key: Annotated[str | None, typer.Option(help="The server's key; PUNA_API_KEY if not given.")] = None,
    rate: Annotated[
        str,
        typer.Option(
            metavar="R|inf",
            help="Requests per second, at random times (Poisson); inf: as soon as --concurrency allows.",
            rich_help_panel=_LOAD,
        ),
    ] = "inf",
    concurrency: Annotated[
        int | None, typer.Option(min=1, help="At most so many at once.", rich_help_panel=_LOAD)
    ] = None,
    num_requests: Annotated[
        int | None, typer.Option(min=1, help="Default: 100, or no limit with --duration.", rich_help_panel=_LOAD)
    ] = None,
    duration: Annotated[
        float | None,
        typer.Option(min=0, help="Seconds in which requests are sent; all may end.", rich_help_panel=_LOAD),
    ] = None,
    warmup: Annotated[
        int | None,
        typer.Option(min=0, help="Requests before, not measured. Default: --concurrency, or 1.", rich_help_panel=_LOAD),
    ] = None,
    input_len: Annotated[
        str,
        typer.Option(
            metavar="LENGTHS",
            help="Tokens of a prompt: 128, 64-256, normal:MEAN:DEVIATION or exp:MEAN.",
            rich_help_panel=_REQUESTS,
        ),
    ] = "128",
    output_len: Annotated[
        str, typer.Option(metavar="LENGTHS", help="Tokens to generate, in the same ways.", rich_help_panel=_REQUESTS)
    ] = "128",
    prefix_len: Annotated[
        int, typer.Option(min=0, help="Tokens before that, the same in every prompt.", rich_help_panel=_REQUESTS)
    ] = 0,
    ignore_eos: Annotated[
        bool,
        typer.Option(
            help="Go on after an end of text, so that lengths are as asked; not every server knows this.",
            rich_help_panel=_REQUESTS,
        ),
    ] = True,
    extra_body: Annotated[
        str | None,
        typer.Option(
            metavar="JSON",
            help="Fields for every body, such as temperature, which is else 0.",
            rich_help_panel=_REQUESTS,
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of lengths, prompts and times.", rich_help_panel=_LOAD)] = 0,
    goodput: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME:MS",
            help="Count requests within this limit: ttft, tpot, itl (every gap) or e2el; may be given several times.",
        ),
    ] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Write one JSON object instead of a table.")] = False,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw the latencies into a .png, .pdf or .svg file.")
    ] = None,
) -> None:
    """Measure a running server: throughput, and percentiles of its latencies. Names and meanings are vLLM's.

    Examples: puna bench serve http://127.0.0.1:8000 --concurrency 32;
    puna bench serve http://127.0.0.1:8000 --rate 4 --duration 60 --goodput ttft:500 --goodput itl:100
    """
    from puna.cli.load_client import Address, HttpClient
    from puna.cli.load_run import Lengths, Load

    limits = _limits(goodput or [])
    if plot is not None:
        check_plot(plot)
    pace = _rate(rate)
    if duration is not None and not 0 < duration < math.inf:
        raise ValueError(f"--duration is {duration}: give the seconds in which requests are sent, above 0")
    if pace == math.inf and concurrency is None and num_requests is None and duration is not None:
        raise ValueError(
            "--duration alone would send requests without end: give --rate, --concurrency or --num-requests"
        )
    client = HttpClient(Address.of(url), api_key or os.environ.get("PUNA_API_KEY"))
    load = Load(
        model=model or "",
        chat=endpoint is Endpoint.chat,
        input_lengths=Lengths.parse(input_len, "--input-len"),
        output_lengths=Lengths.parse(output_len, "--output-len"),
        prefix_length=prefix_len,
        rate=pace,
        concurrency=concurrency,
        num_requests=_NUM_REQUESTS if num_requests is None and duration is None else num_requests,
        duration=duration,
        warmup=(concurrency or 1) if warmup is None else warmup,
        seed=seed,
        ignore_eos=ignore_eos,
        fields=_fields(extra_body),
    )
    load, report = asyncio.run(_measure(client, load, limits))
    if report.completed + report.failed == 0:
        raise ValueError(f"no request was due within --duration {duration}: give a longer one, or a higher --rate")
    title = f"{url}, {load.model}: {_described(load, input_len, output_len)}"
    if plot is not None:
        from puna.cli.load_plot import draw

        draw(report, title, plot)
    _warn(report)
    if json_output:
        what = {
            "url": url,
            "model": load.model,
            "endpoint": endpoint.value,
            "request_rate": rate,
            "max_concurrency": concurrency,
            "input_len": input_len,
            "output_len": output_len,
            "prefix_len": prefix_len,
            "seed": seed,
            "goodput_limits_ms": limits,
        }
        write(json.dumps({**what, **report.fields()}, ensure_ascii=False) + "\n")
    else:
        _print_report(title, report)
    if report.failed:
        raise typer.Exit(1)


async def _measure(client: Any, load: Load, limits: dict[str, float]) -> tuple[Load, LoadReport]:
    import dataclasses

    from puna.cli.load_report import LoadReport
    from puna.cli.load_run import find_model, make_prompts, run_load

    try:
        if not load.model:
            load = dataclasses.replace(load, model=await find_model(client))
        prompts = await make_prompts(client, load)
        with progress_bar("requests") as on_progress:
            run = await run_load(client, load, prompts, lambda ended: on_progress(ended, load.num_requests or ended))
    finally:
        client.close()
    return load, LoadReport.of(run, limits)


def _rate(text: str) -> float:
    """Raises ValueError for anything but a number above 0, or inf."""
    try:
        found = float(text)
    except ValueError:
        found = math.nan
    if not found > 0:
        raise ValueError(f"--rate is {text!r}: give requests per second, above 0, or inf")
    return found


def _limits(words: list[str]) -> dict[str, float]:
    """Raises ValueError for anything but NAME:MS."""
    found = {}
    for word in words:
        name, _, number = word.partition(":")
        name = "e2el" if name == "e2e" else name
        try:
            limit = float(number)
        except ValueError:
            limit = math.nan
        if name not in _LIMITS or not limit > 0:
            raise ValueError(f"--goodput is {word!r}: give {', '.join(_LIMITS)} and milliseconds, such as ttft:500")
        found[name] = limit
    return found


def _fields(text: str | None) -> dict[str, Any]:
    try:
        found = {} if text is None else json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ValueError(f"--extra-body is {text!r}: give a JSON object, such as '{{\"temperature\": 1}}'")
    return found


def _described(load: Load, input_len: str, output_len: str) -> str:
    pace = "all at once" if load.concurrency is None else f"{load.concurrency} at once"
    if load.rate < math.inf:
        limit = "" if load.concurrency is None else f", at most {load.concurrency} at once"
        pace = f"{load.rate:g} requests/s (Poisson){limit}"
    prefix = f"{load.prefix_length} + " if load.prefix_length else ""
    return f"{pace}; {prefix}{input_len} tokens in, {output_len} out"


def _warn(report: LoadReport) -> None:
    for message, count in list(report.errors.items())[:3]:
        say("warning", f"{count} of {report.completed + report.failed} requests failed: {message}")
    if report.client_cpu_seconds > _BUSY * report.duration:
        say("warning", "this client was busy nearly all the time: the server may be faster than what is shown")


def _print_report(title: str, report: LoadReport) -> None:
    from puna.cli.load_report import HEADER

    print_table(title, HEADER, report.rows())
    print(f"requests     {report.completed} completed, {report.failed} failed, in {report.duration:.2f} s")
    print(
        f"throughput   {report.request_throughput:,.2f} requests/s, {report.output_throughput:,.1f} output tokens/s, ",
        end="",
    )
    print(f"{report.total_token_throughput:,.1f} with those of prompts")
    print(f"tokens       {report.total_input_tokens:,} in, {report.total_output_tokens:,} out")
    if report.request_goodput is not None:
        limits = ", ".join(f"{name.upper()} {limit:g} ms" for name, limit in report.limits.items())
        print(f"goodput      {report.request_goodput:,.2f} requests/s within {limits}")
    share = 100 * report.client_cpu_seconds / report.duration
    print(f"this client  {share:.0f} % of one processor")
