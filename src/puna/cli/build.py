"""`puna build`: writes an engine directory, a model's weights as the kernels want them, mapped at start."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from puna.cli.options import DtypeName, Quantization


def build(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A folder, a GGUF file, a hub id or 'demo'.")],
    output: Annotated[
        Path,
        typer.Option("--output", "-o", metavar="ENGINE", help="The directory to write, which must be new or empty."),
    ],
    quantization: Annotated[
        Quantization | None, typer.Option(help="Format of the weights; as they are stored if not given.")
    ] = None,
    dtype: Annotated[
        DtypeName | None, typer.Option(help="Number type to run in; the checkpoint's if not given.")
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads; what this process may use if not given.")
    ] = None,
) -> None:
    """Write an engine directory: weights in the layout of the kernels, mapped at start instead of read and converted.

    Every command takes it where it takes a model. Example: puna build demo --quantization int8 -o demo-int8
    """
    from puna.cli.session import set_threads
    from puna.models import model_loader

    set_threads(threads)
    asked = "stored" if quantization is None else quantization.value
    model_loader(model, dtype.value if dtype else None, quantization=asked).build(output)
