"""`puna eval`: how well a model predicts texts, and how far two models, or two precisions of one, are apart."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from puna.cli.display import check_plot, print_table, progress_bar, write
from puna.cli.options import DtypeName, EngineFlags, ModelFlags, Quantization, unbundle

if TYPE_CHECKING:
    from puna.evaluation.compare import Comparison

# Where --context is not given: long enough for most of what a model knows of its context, and bearable on a CPU, whose
# time goes with the square of it.
DEFAULT_CONTEXT: Final = 2048
# Windows at once, and tokens in a step. How many of these have logits is the scheduler's affair (max_scored_tokens).
_MAX_NUM_SEQS: Final = 8
_MAX_NUM_BATCHED_TOKENS: Final = 512

eval_app = typer.Typer(help="Measure how well a model predicts texts, and compare two models.")

Data = Annotated[
    list[Path],
    typer.Option(
        "--data", help="Text file in UTF-8, documents separated by lines of <|endoftext|>; may be given several times."
    ),
]
Context = Annotated[
    int | None, typer.Option(min=2, help="Tokens in a window. Default: the model's context, and at most 2048.")
]
Stride = Annotated[
    int | None, typer.Option(min=1, help="Tokens by which the window moves. Default: half of --context.")
]
JsonOutput = Annotated[bool, typer.Option("--json", help="Write one JSON object instead of a table.")]


@eval_app.callback(invoke_without_command=True)
def evaluate(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        print(context.get_help())


@eval_app.command()
@unbundle
def perplexity(
    model_flags: ModelFlags,
    *,
    data: Data,
    context: Context = None,
    stride: Stride = None,
    json_output: JsonOutput = False,
) -> None:
    """Perplexity of text files, in a window that slides over them; every token is predicted once.

    Example: puna eval perplexity --model demo --data stories.txt
    """
    documents = _documents(data)

    from puna.cli.session import OpenedModel
    from puna.evaluation.perplexity import measure_perplexity

    opened = OpenedModel.open(model_flags, EngineFlags(no_prefix_caching=True))
    window, step = _window(context, stride, opened.config.context_length)
    with (
        opened.engine(window, _MAX_NUM_SEQS, _MAX_NUM_BATCHED_TOKENS) as (engine, _),
        progress_bar("tokens") as on_progress,
    ):
        result = measure_perplexity(engine, documents, window, step, on_progress)
    fields = {
        "model": model_flags.model,
        "dtype": opened.config.dtype,
        "quantization": opened.quantization,
        "nats_per_token": result.nats_per_token,
        "perplexity": result.perplexity,
        "bits_per_byte": result.bits_per_byte,
        "tokens": result.num_tokens,
        "bytes": result.num_bytes,
        "tokens_per_second": result.tokens_per_second,
        "context": window,
        "stride": step,
    }
    if json_output:
        write(json.dumps(fields, ensure_ascii=False) + "\n")
        return
    print_table(
        opened.title,
        None,
        [
            ("perplexity", f"{result.perplexity:.4f}"),
            ("nats per token", f"{result.nats_per_token:.4f}"),
            ("bits per byte", f"{result.bits_per_byte:.4f}"),
            ("tokens", f"{result.num_tokens:,}"),
            ("tokens/s", f"{result.tokens_per_second:,.1f}"),
            ("context, stride", f"{window}, {step}"),
        ],
    )


@eval_app.command()
def compare(
    a: Annotated[str, typer.Argument(metavar="A", help="The model to compare with: folder, hub id or 'demo'.")],
    b: Annotated[str, typer.Argument(metavar="B", help="The other model; it may be the same one in another dtype.")],
    data: Data,
    dtype_a: Annotated[DtypeName | None, typer.Option(help="Number type of A; the checkpoint's if not given.")] = None,
    dtype_b: Annotated[DtypeName | None, typer.Option(help="Number type of B; the checkpoint's if not given.")] = None,
    quantization_a: Annotated[
        Quantization | None, typer.Option(help="Format of A's weights, for the compiled kernels; plain if not given.")
    ] = None,
    quantization_b: Annotated[
        Quantization | None, typer.Option(help="Format of B's weights, for the compiled kernels; plain if not given.")
    ] = None,
    context: Context = None,
    stride: Stride = None,
    json_output: JsonOutput = False,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw the differences into a .png, .pdf or .svg file.")
    ] = None,
    device: Annotated[str, typer.Option(help="Where to run, such as cpu or cuda.")] = "cpu",
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads; what this process may use if not given.")
    ] = None,
) -> None:
    """How far the predictions of B are from those of A: KL divergence, top-1 agreement and perplexity ratio.

    Example: puna eval compare demo demo --dtype-a float32 --dtype-b bfloat16 --data stories.txt
    """
    documents = _documents(data)
    if plot is not None:
        check_plot(plot)

    from puna.cli.session import OpenedModel
    from puna.evaluation.compare import compare_models, encode_for_both
    from puna.models import load_model

    flags = [
        ModelFlags(model=name, dtype=dtype, quantization=quantization, device=device, threads=threads)
        for name, dtype, quantization in ((a, dtype_a, quantization_a), (b, dtype_b, quantization_b))
    ]
    opened = [OpenedModel.open(one, EngineFlags()) for one in flags]
    encoded = encode_for_both(opened[0].tokenizer, opened[1].tokenizer, documents)
    window, step = _window(context, stride, min(one.config.context_length for one in opened))
    model_a, model_b = (
        load_model(one.folder, one.config.dtype, one.device, quantization=one.quantization) for one in opened
    )
    with progress_bar("tokens") as on_progress:
        found = compare_models(model_a, model_b, encoded, window, step, on_progress)
    names = [one.title for one in opened]
    if plot is not None:
        from puna.cli.comparison_plot import draw

        draw(found, names[0], names[1], plot)
    fields = _comparison_fields(found)
    if json_output:
        sides = {
            name: {"model": one.model, "dtype": its.config.dtype, "quantization": its.quantization, "perplexity": value}
            for name, one, its, value in zip("ab", flags, opened, (found.perplexity_a, found.perplexity_b), strict=True)
        }
        write(json.dumps({**sides, **fields, "context": window, "stride": step}, ensure_ascii=False) + "\n")
        return
    kl = fields["kl"]
    print_table(
        f"A: {names[0]}\nB: {names[1]}",
        None,
        [
            ("KL(A || B), mean", f"{kl['mean']:.3e} nats"),
            ("KL(A || B), median", f"{kl['median']:.3e} nats"),
            ("KL(A || B), 99th percentile", f"{kl['p99']:.3e} nats"),
            ("KL(A || B), largest", f"{kl['max']:.3e} nats"),
            ("same likeliest token", f"{found.agreement:.3%}"),
            ("perplexity of A", f"{found.perplexity_a:.4f}"),
            ("perplexity of B", f"{found.perplexity_b:.4f}"),
            ("perplexity, B / A", f"{found.perplexity_ratio:.5f}"),
            ("tokens", f"{len(found.kl):,}"),
            ("context, stride", f"{window}, {step}"),
        ],
    )


def _comparison_fields(found: Comparison) -> dict[str, Any]:
    return {
        "kl": {
            "mean": found.mean_kl,
            "median": found.kl_quantile(0.5),
            "p99": found.kl_quantile(0.99),
            "max": found.kl_quantile(1.0),
        },
        "top1_agreement": found.agreement,
        "perplexity_ratio": found.perplexity_ratio,
        "tokens": len(found.kl),
    }


def _documents(files: Sequence[Path]) -> list[str]:
    from puna.training.data import read_documents

    return [document for file in files for document in read_documents(file)]


def _window(context: int | None, stride: int | None, context_length: int) -> tuple[int, int]:
    """The window's size and its step. Raises ValueError for a window that the model has no room for."""
    from puna.evaluation.windows import check_window

    size = min(context_length, DEFAULT_CONTEXT) if context is None else context
    if size > context_length:
        raise ValueError(f"--context is {size}, but the model's context is {context_length}: ask for at most that")
    step = max(1, size // 2) if stride is None else stride
    check_window(size, step)
    return size, step
