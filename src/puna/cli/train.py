"""`puna train`: trains a LLaMA, and a tokenizer for it, on text files; under torchrun on several processes."""

from __future__ import annotations

import dataclasses
import enum
import json
import math
import os
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from puna.cli.options import DtypeName, unbundle
from puna.runtime.machine import usable_cpus

if TYPE_CHECKING:
    from puna.training.replicas import Replicas
    from puna.training.trainer import HeldOut, Step, Trainer

_FILES, _MODEL, _TRAINING, _MACHINE = "Files", "New model", "Training", "Machine and reports"


class ComputeDtype(str, enum.Enum):
    float32 = "float32"
    bfloat16 = "bfloat16"


@dataclass(frozen=True, kw_only=True)
class SourceFlags:
    """The fields of `puna.training.run.Sources`."""

    data: Annotated[
        list[Path],
        typer.Option(
            help="Text file in UTF-8, documents separated by lines of <|endoftext|>; may be given several times.",
            rich_help_panel=_FILES,
        ),
    ]
    out: Annotated[Path, typer.Option(help="Folder for the model and its checkpoints.", rich_help_panel=_FILES)]
    held_out: Annotated[
        list[Path] | None,
        typer.Option(help="Text file for the held-out loss; may be given several times.", rich_help_panel=_FILES),
    ] = None
    eval_fraction: Annotated[
        float | None,
        typer.Option(help="Part of the data to hold out, without --held-out. Default: 0.02.", rich_help_panel=_FILES),
    ] = None
    tokenizer: Annotated[
        str | None,
        typer.Option(help="Model whose tokenizer to use, instead of training one.", rich_help_panel=_FILES),
    ] = None
    init: Annotated[
        str | None, typer.Option(help="Checkpoint to start from, instead of a new model.", rich_help_panel=_FILES)
    ] = None
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in --out, if there is one.", rich_help_panel=_FILES)
    ] = False


@dataclass(frozen=True, kw_only=True)
class ShapeFlags:
    """The fields of `puna.training.run.ModelShape`, which has the defaults; None where the user gave nothing."""

    hidden_size: Annotated[int | None, typer.Option(min=1, help="Default: 256.", rich_help_panel=_MODEL)] = None
    num_layers: Annotated[int | None, typer.Option(min=1, help="Default: 4.", rich_help_panel=_MODEL)] = None
    num_heads: Annotated[int | None, typer.Option(min=1, help="Default: 8.", rich_help_panel=_MODEL)] = None
    num_kv_heads: Annotated[int | None, typer.Option(min=1, help="Default: 4.", rich_help_panel=_MODEL)] = None
    mlp_hidden_size: Annotated[int | None, typer.Option(min=1, help="Default: 640.", rich_help_panel=_MODEL)] = None
    vocab_size: Annotated[
        int | None, typer.Option(help="Of the tokenizer that is trained. Default: 2048.", rich_help_panel=_MODEL)
    ] = None


@dataclass(frozen=True, kw_only=True)
class TrainingFlags:
    """The fields of `puna.training.trainer.TrainingOptions`."""

    steps: Annotated[int, typer.Option(help="Optimiser steps.", rich_help_panel=_TRAINING)] = 1000
    batch_size: Annotated[
        int, typer.Option(help="Sequences in a step, over all processes.", rich_help_panel=_TRAINING)
    ] = 16
    gradient_accumulation: Annotated[
        int, typer.Option(help="Parts that a process computes its share of a batch in.", rich_help_panel=_TRAINING)
    ] = 1
    context: Annotated[int, typer.Option(help="Tokens in a sequence.", rich_help_panel=_TRAINING)] = 512
    learning_rate: Annotated[float, typer.Option(help="The highest one.", rich_help_panel=_TRAINING)] = 1e-3
    warmup_steps: Annotated[
        int | None,
        typer.Option(help="Steps until it is reached; a twentieth of all if not given.", rich_help_panel=_TRAINING),
    ] = None
    weight_decay: Annotated[float, typer.Option(help="Of matrices only.", rich_help_panel=_TRAINING)] = 0.1
    gradient_clip: Annotated[float, typer.Option(help="Longest gradient; inf for any.", rich_help_panel=_TRAINING)] = (
        1.0
    )
    dtype: Annotated[
        ComputeDtype,
        typer.Option(
            help="What to multiply in: float32, or bfloat16 by autocast. Weights stay float32.",
            rich_help_panel=_TRAINING,
        ),
    ] = ComputeDtype.float32
    save_dtype: Annotated[DtypeName, typer.Option(help="What the model is written in.", rich_help_panel=_TRAINING)] = (
        DtypeName.bfloat16
    )
    save_every: Annotated[
        int, typer.Option(help="Steps between checkpoints; 0 for one at the end.", rich_help_panel=_TRAINING)
    ] = 200
    eval_every: Annotated[
        int, typer.Option(help="Steps between held-out losses; 0 for one at the end.", rich_help_panel=_TRAINING)
    ] = 200
    seed: Annotated[
        int, typer.Option(help="Of a new model's weights and the data's order.", rich_help_panel=_TRAINING)
    ] = 0


@unbundle
def train(
    source_flags: SourceFlags,
    shape_flags: ShapeFlags,
    training_flags: TrainingFlags,
    *,
    device: Annotated[str, typer.Option(help="Where to train, such as cpu or cuda.", rich_help_panel=_MACHINE)] = "cpu",
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads of each process.", rich_help_panel=_MACHINE)
    ] = None,
    json_output: Annotated[
        bool, typer.Option("--json", help="Write the last figures as one JSON object.", rich_help_panel=_MACHINE)
    ] = False,
) -> None:
    """Train a LLaMA on text files, from scratch or from a checkpoint.

    The folder can be used after every checkpoint: puna generate --model OUT.
    A run that was stopped goes on with the same command and --resume.
    torchrun --nproc-per-node 2 -m puna train ... shares the work of a run.

    Example: puna train --data stories.txt --out my-model
    """
    from puna.training.run import ModelShape, Sources, prepare
    from puna.training.trainer import TrainingOptions

    sizes = _given(shape_flags)
    if source_flags.init is not None and sizes:
        raise ValueError(f"--init brings a model with its own sizes: leave out {_spelled(sizes)}")
    if source_flags.tokenizer is not None and "vocab_size" in sizes:
        raise ValueError("--tokenizer brings its own vocabulary: leave out --vocab-size")
    if source_flags.held_out and source_flags.eval_fraction is not None:
        raise ValueError("--held-out gives the text to hold out: leave out --eval-fraction")
    sources, shape = Sources(**_given(source_flags)), ModelShape(**sizes)
    options = TrainingOptions(**{"warmup_steps": max(1, training_flags.steps // 20), **_given(training_flags)})
    with _replicas(device, threads) as (replicas, own_device):
        trainer = prepare(sources, shape, options, own_device, replicas)
        summary = _run(trainer)
        if json_output and replicas.is_first:
            print(json.dumps(summary))


def _given(flags: SourceFlags | ShapeFlags | TrainingFlags) -> dict[str, Any]:
    """The fields that have a value, as the dataclasses of puna.training want them."""
    values = {field.name: getattr(flags, field.name) for field in dataclasses.fields(flags)}
    plain = {name: value.value if isinstance(value, enum.Enum) else value for name, value in values.items()}
    return {name: value for name, value in plain.items() if value is not None}


def _spelled(names: Iterable[str]) -> str:
    return ", ".join(f"--{name.replace('_', '-')}" for name in names)


@contextmanager
def _replicas(device: str, threads: int | None) -> Iterator[tuple[Replicas, str]]:
    """This process's place among those that torchrun started, with torch.distributed ready if there are several."""
    import torch

    from puna.training.replicas import Replicas

    count = int(os.environ.get("WORLD_SIZE", "1"))
    # torch counts the processors, or reads OMP_NUM_THREADS, which torchrun sets to 1; it knows nothing of a quota.
    torch.set_num_threads(min(torch.get_num_threads(), usable_cpus()) if threads is None else threads)
    if count == 1:
        yield Replicas(), device
        return
    is_cuda = device == "cuda"
    torch.distributed.init_process_group("nccl" if is_cuda else "gloo")
    try:
        yield Replicas(int(os.environ["RANK"]), count), f"cuda:{os.environ['LOCAL_RANK']}" if is_cuda else device
    finally:
        torch.distributed.destroy_process_group()


def _run(trainer: Trainer) -> dict[str, object]:
    """Trains, shows how it goes on standard error, and returns the last figures."""
    from puna.training.trainer import Step

    report = _Report(trainer)
    loss = math.nan
    held_out: dict[str, dict[str, float]] = {}
    with report:
        for event in trainer.run():
            if isinstance(event, Step):
                report.step(event)
                loss = event.loss
            else:
                report.held_out(event)
                held_out[event.name] = {"nats_per_token": event.nats, "bits_per_byte": event.bits_per_byte}
    return {
        "out": str(trainer.folder),
        "steps": trainer.steps_done,
        "parameters": report.num_parameters,
        "loss": loss,
        "held_out": held_out,
        "tokens_per_second": report.tokens_per_second,
    }


class _Report:
    """A progress bar on a terminal, lines otherwise; nothing on processes other than the first."""

    def __init__(self, trainer: Trainer) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self.options, self.is_shown = trainer.options, trainer.replicas.is_first
        self.num_parameters = sum(parameter.numel() for parameter in trainer.parameters)
        self.is_terminal = sys.stderr.isatty()
        columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
        self.progress = Progress(
            *columns, console=Console(stderr=True), disable=not (self.is_terminal and self.is_shown)
        )
        self.task = self.progress.add_task("", total=self.options.steps, completed=trainer.steps_done)
        self.smooth_loss, self.steps, self.seconds, self.tokens_per_second = math.nan, 0, 0.0, 0.0
        tokens = len(trainer.windows.ids)
        self.say(
            f"{self.num_parameters:,} parameters, {tokens:,} tokens of text, {trainer.steps_done} of "
            f"{self.options.steps} steps done"
        )

    def __enter__(self) -> None:
        self.progress.start()
        self.last = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def say(self, line: str) -> None:
        if self.is_shown and self.is_terminal:
            self.progress.console.print(line, highlight=False)
        elif self.is_shown:
            print(line, file=sys.stderr, flush=True)

    def step(self, step: Step) -> None:
        now = time.perf_counter()
        self.steps, self.seconds, self.last = self.steps + 1, self.seconds + now - self.last, now
        self.tokens_per_second = self.steps * self.options.batch_size * self.options.context / self.seconds
        # The mean over about the last 20 steps: single batches differ more than training changes.
        self.smooth_loss = step.loss if self.steps == 1 else 0.95 * self.smooth_loss + 0.05 * step.loss
        line = f"loss {self.smooth_loss:.3f}, {self.tokens_per_second:,.0f} tokens/s"
        self.progress.update(self.task, completed=step.number, description=line)
        every = max(1, self.options.steps // 100)
        if not self.is_terminal and (step.number % every == 0 or step.number == self.options.steps):
            minutes = self.seconds / self.steps * (self.options.steps - step.number) / 60
            rate = f"learning rate {step.learning_rate:.2e}"
            self.say(f"step {step.number}/{self.options.steps}: {line}, {rate}, {minutes:.1f} minutes left")

    def held_out(self, result: HeldOut) -> None:
        self.say(
            f"step {result.step}: held out {result.name}: {result.nats:.4f} nats a token, "
            f"{result.bits_per_byte:.4f} bits a byte ({result.tokens:,} tokens)"
        )
        self.last = time.perf_counter()  # the time it took is not training's
