"""Filling a model with a checkpoint's tensors, one at a time, and writing a model out as a checkpoint."""

from __future__ import annotations

import ctypes
import dataclasses
import logging
import math
import sys
from collections.abc import Callable
from collections.abc import Mapping as ReadOnlyDict
from pathlib import Path
from typing import TYPE_CHECKING, Generic, TypeVar, cast, get_args

import torch
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, TextColumn
from rich.progress import Progress as ProgressBars
from torch import Tensor, nn

from puna.checkpoints import Checkpoint, EngineDirectory, open_checkpoint, write_checkpoint
from puna.checkpoints.engine_directory import EngineDescription, TensorKind, text_files, writing_engine
from puna.checkpoints.fp8 import cuts_blocks
from puna.config import Dtype, LLaMAConfig
from puna.distributed import Communicator, NullCommunicator, TorchCommunicator
from puna.layers.pieces import Piece, PiecewiseModule, weight_layout
from puna.mapping import Mapping
from puna.ops.pages import zero_pages
from puna.quantization import QUANTIZATIONS, stored_format

if TYPE_CHECKING:
    from puna.models.llama import LLaMAForCausalLM

# Called with how much is done, and the total.
Progress = Callable[[int, int], None]
Model = TypeVar("Model", bound="LLaMAForCausalLM")

# What old versions of transformers wrote beside the weights; the values follow from the config.
_DERIVED_TENSORS = (".rotary_emb.inv_freq",)
_PANEL_ALIGNMENT = 64  # a line of the cache
_log = logging.getLogger(__name__)
_GIVE_BACK_EVERY = 1 << 25  # bytes of tensors that were read


class ModelLoader(Generic[Model]):
    """A model without storage, checked against its checkpoint and ready to be filled; see `puna.load_model`.

    Peak memory of `load` is that of this rank's weights and the largest tensor: each one is read, converted into place
    and dropped.
    """

    def __init__(
        self,
        model_class: type[Model],
        path: str | Path | Checkpoint,
        dtype: str | torch.dtype | None = None,
        device: torch.device | str = "cpu",
        mapping: Mapping | None = None,
        comm: Communicator | None = None,
        quantization: str | None = None,
        deterministic: bool = False,
    ) -> None:
        checkpoint = path if isinstance(path, Checkpoint) else open_checkpoint(path)
        config = dataclasses.replace(resolved_config(checkpoint, dtype, quantization), deterministic=deterministic)
        if model_class.architecture != config.architecture:
            raise ValueError(
                f"{checkpoint.source} is a {config.architecture}, not a {model_class.architecture}: use "
                "puna.load_model, which picks the class"
            )
        if comm is None:
            several = mapping is not None and mapping.world_size > 1
            comm = TorchCommunicator(mapping, device) if several and mapping is not None else NullCommunicator(device)
        _check_layers(checkpoint, config)
        if config.quant.startswith("fp8") and weight_layout(comm) == "panels":
            raise ValueError(
                f"quantization is 'fp8', but there are no kernels for FP8 on {comm.device}: use int8, or a GPU"
            )
        with torch.device("meta"):
            model = model_class(config, comm)
            whole = model if comm.mapping.world_size == 1 else model_class(config)
        if isinstance(checkpoint, EngineDirectory):
            _check_use(checkpoint, comm)
            formats = checkpoint.description.weight_formats
        else:
            check_tensors(checkpoint, dict(whole.pieces()), config)
            formats = _weight_formats(model, checkpoint)
        _store_as(model, formats, checkpoint)
        # What an engine directory has is in the layout of the CPU, from which other devices' is made while loading.
        self._host: Model | None = None
        if isinstance(checkpoint, EngineDirectory):
            if weight_layout(comm) != "panels":
                with torch.device("meta"):
                    self._host = model_class(config)
                _store_as(self._host, formats, checkpoint)
            checkpoint.check(_kinds(self._host or model))
        model.generation_config = checkpoint.generation_config
        model.set_cache_scales(checkpoint.cache_scales)
        self.checkpoint, self.config, self.comm = checkpoint, config, comm
        self._model, self._formats = model, formats

    @property
    def weight_bytes(self) -> int:
        """What the weights of this rank take."""
        return sum(parameter.numel() * parameter.element_size() for parameter in self._model.parameters())

    @property
    def model(self) -> Model:
        """Without storage until `load` has given it some."""
        return self._model

    def load(self, progress: Progress | None = None) -> Model:
        """Gives the model storage, fills it and hands it over. One call of `load` or `build` may be made.

        `progress` is called with the bytes of weights that were read, and those of all.
        """
        if isinstance(self.checkpoint, EngineDirectory):
            stored = self._model if self._host is None else self._host
            mapped = self.checkpoint.map(_kinds(stored))
            _place(stored, lambda name, _: mapped[name])
            if self._host is not None:
                allocate(self._model, self.comm.device)
                _convert(self._host, self._model)
                self._host = None
            if progress is not None:
                progress(self.weight_bytes, self.weight_bytes)
        else:
            allocate(self._model, self.comm.device)
            self._fill(progress)
        return self._model.eval()

    def build(self, target: str | Path) -> None:
        """Fills the model in the file of an engine directory; see `writing_engine`.

        What `load` would need is needed here as pages of the file, which the system may write out as they are filled.
        Raises ValueError for weights that are no engine's, and where there is something at `target`.
        """
        if isinstance(self.checkpoint, EngineDirectory):
            raise ValueError(f"{self.checkpoint.source} is an engine directory already: build from the original model")
        if self.config.quant == "none" or self.comm.mapping.world_size > 1:
            raise ValueError("an engine directory holds a whole model for inference: give a quantization, no mapping")
        description = EngineDescription(
            source=self.checkpoint.source,
            quantization=self.config.quant,
            config_fields=self.config.to_hugging_face(),
            weight_formats=self._formats,
            cache_scales=self.checkpoint.cache_scales,
            cache_dtype=self.checkpoint.cache_dtype,
        )
        others = text_files(self.checkpoint)
        with writing_engine(Path(target), description, _kinds(self._model), others) as storage:
            _place(self._model, lambda name, _: storage[name])
            self._fill()

    def _fill(self, tell: Progress | None = None) -> None:
        checkpoint, pieces = self.checkpoint, list(self._model.pieces())
        with _bar(is_first_rank=self.comm.mapping.rank == 0) as bar:
            total = sum(_bytes_of(piece, checkpoint, name) for name, piece in pieces)
            task, done = bar.add_task("loading weights", total=total), 0
            left_behind = 0
            for name, piece in pieces:
                kept = _is_kept(self.config.quant, checkpoint, name)
                quantized = checkpoint.read_quantized(name, piece.source) if kept and piece.write_quantized else None
                if quantized is not None and piece.write_quantized is not None:
                    piece.write_quantized(quantized)
                else:
                    piece.write(checkpoint.read(name, piece.source))
                left_behind += _bytes_of(piece, checkpoint, name)
                if left_behind > _GIVE_BACK_EVERY:
                    _give_back()
                    left_behind = 0
                done += _bytes_of(piece, checkpoint, name)
                bar.update(task, completed=done)
                if tell is not None:
                    tell(done, total)
        _give_back()


def _is_kept(quant: str, checkpoint: Checkpoint, name: str) -> bool:
    """Whether a tensor that is stored quantised stays so; asked for another format, it is rounded anew."""
    return quant == "stored" or (quant == "fp8" and checkpoint.dtype(name).startswith("fp8"))


def _weight_formats(model: LLaMAForCausalLM, checkpoint: Checkpoint) -> dict[str, str]:
    """By the names of a checkpoint's tensors, the formats of weights that are in another one than the config's `quant`:
    of those that are stored quantised, the format that keeps their numbers. FP8 is kept where there are kernels for it,
    and where no block of scales is cut between ranks."""
    formats: dict[str, str] = {}
    unkept: list[str] = []
    for name, piece in model.pieces():
        kept = checkpoint.is_quantized(name) and _is_kept(model.config.quant, checkpoint, name)
        if piece.store_as is None or not kept:
            continue
        form = stored_format(checkpoint.dtype(name))
        if form.startswith("fp8") and weight_layout(model.comm) == "panels":
            unkept.append(name)
        elif form == "fp8-block" and cuts_blocks(piece.source, piece.full_shape):
            formats[name] = "panels"
            unkept.append(name)
        else:
            formats[name] = form
    if unkept:
        why = (
            "there are no kernels for FP8 here" if unkept[0] not in formats else "ranks would cut its blocks of scales"
        )
        _log.warning(
            "%s: %s in FP8 become%s %s while loading, since %s",
            checkpoint.source,
            _listed(unkept),
            "s" if len(unkept) == 1 else "",
            model.config.dtype,
            why,
        )
    return formats


def _store_as(model: LLaMAForCausalLM, formats: ReadOnlyDict[str, str], checkpoint: Checkpoint) -> None:
    left = dict(formats)
    for name, piece in model.pieces():
        form = left.pop(name, None)
        if form is not None and piece.store_as is not None:
            piece.store_as(form)
    if left:
        raise ValueError(f"{checkpoint.config_source} has formats for {_listed(sorted(left))}, which the model lacks")
    if formats:
        model.tie_weights()


def _kinds(model: nn.Module) -> dict[str, TensorKind]:
    return {name: (tuple(parameter.shape), parameter.dtype) for name, parameter in model.named_parameters()}


def _check_use(checkpoint: EngineDirectory, comm: Communicator) -> None:
    if comm.mapping.world_size > 1:
        raise ValueError(
            f"{checkpoint.source} holds a whole model: load its source, {checkpoint.description.source}, on several "
            "ranks"
        )


def _convert(host: nn.Module, model: nn.Module) -> None:
    """Fills a model with what another one of the same weights holds, in another layout. Codes in panels are the same
    bytes on every device; what else lies otherwise goes through rows."""
    for mine, theirs in zip(model.modules(), host.modules(), strict=True):
        own, other = (dict(module.named_parameters(recurse=False)) for module in (mine, theirs))
        alike = {name for name in own if own[name].shape == other[name].shape and own[name].dtype == other[name].dtype}
        if isinstance(mine, PiecewiseModule) and isinstance(theirs, PiecewiseModule) and len(alike) < len(own):
            for target, source in zip(mine.pieces(), theirs.pieces(), strict=True):
                target.write(source.read())
        # After that, since rows of codes may have been rounded anew on their way.
        with torch.no_grad():
            for name in alike:
                own[name].copy_(other[name])


def allocate(model: nn.Module, device: torch.device) -> None:
    """Gives storage to the parameters of a model that was built on the meta device; shared ones stay shared.

    This is `nn.Module.to_empty`, which allocates shared parameters twice, and makes torch import its symbolic algebra:
    40 MB and half a second.
    """

    # Panels lie one after another in the system's own pages. In the allocator's heap they would lie among what loading
    # leaves behind, which then stays with the process: 0 to 400 MB of a 1B model.
    on_host = device.type == "cpu"
    sizes = [_panel_room(one) for one in model.parameters() if on_host and one.dtype == torch.uint8]
    pages, used = zero_pages(sum(sizes)), 0

    def storage(_: str, parameter: nn.Parameter) -> Tensor:
        nonlocal used
        if not (on_host and parameter.dtype == torch.uint8):
            return torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
        start, used = used, used + _panel_room(parameter)
        return pages[start : start + parameter.numel()].view(parameter.shape)

    _place(model, storage)


def _give_back() -> None:
    """Free parts of the allocator's heap, to the system. What one tensor leaves behind does not fit the next, and glibc
    keeps it all: 100 MB of a 1B model, which would count in its peak."""
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # not glibc
        return
    trim(0)


def _panel_room(parameter: nn.Parameter) -> int:
    return -(-parameter.numel() // _PANEL_ALIGNMENT) * _PANEL_ALIGNMENT


def _place(model: nn.Module, storage: Callable[[str, nn.Parameter], Tensor]) -> None:
    """Puts the tensors that `storage` gives, for the name and the old one, in the place of the parameters."""
    made: dict[nn.Parameter, nn.Parameter] = {}
    for path, module in model.named_modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter not in made:
                tensor = storage(f"{path}.{name}", parameter)
                made[parameter] = nn.Parameter(tensor, requires_grad=parameter.requires_grad)
            setattr(module, name, made[parameter])


def save_model(
    model: LLaMAForCausalLM, folder: str | Path, extra_files: ReadOnlyDict[str, bytes] | None = None
) -> None:
    """Writes an unsharded model as a Hugging Face folder that puna and transformers load; see `write_checkpoint`.

    Raises ValueError for a model that holds only one rank's part.
    """
    if model.comm.mapping.world_size > 1:
        raise ValueError(
            f"this model is one of {model.comm.mapping.world_size} parts: load it without a mapping to save it"
        )
    tensors: dict[str, Tensor] = {name: piece.read().contiguous().cpu() for name, piece in model.pieces()}
    config, generation = model.config.to_hugging_face(), model.generation_config.to_hugging_face()
    write_checkpoint(Path(folder), config, generation, tensors, extra_files or {})


def resolved_config(
    checkpoint: Checkpoint, dtype: str | torch.dtype | None, quantization: str | None = None
) -> LLaMAConfig:
    """The checkpoint's config in the dtype asked for, or else the one that its config or else its tensors have."""
    fields = checkpoint.config_fields
    config = LLaMAConfig.from_fields(fields, checkpoint.config_source)
    checkpoint.check_readable()
    if isinstance(checkpoint, EngineDirectory):
        checkpoint.check_numbers(quantization, None if dtype is None else str(dtype).removeprefix("torch."))
        return dataclasses.replace(config, quant=checkpoint.description.quantization)
    if quantization is not None:
        if quantization not in (*QUANTIZATIONS, "stored"):
            raise ValueError(f"quantization is {quantization!r}: use {', '.join(QUANTIZATIONS)}, or None")
        config = dataclasses.replace(config, quant=quantization)
    if dtype is None and fields.get("torch_dtype") is None and fields.get("dtype") is None and checkpoint.names:
        # Norms are sometimes kept in float32: the largest tensor is what the model is stored in.
        plain = [name for name in checkpoint.names if not checkpoint.is_quantized(name)] or checkpoint.names
        largest = max(plain, key=lambda name: math.prod(checkpoint.shape(name)))
        dtype = checkpoint.dtype(largest) if checkpoint.dtype(largest) in get_args(Dtype) else None
    if dtype is None:
        return config
    name = str(dtype).removeprefix("torch.") if isinstance(dtype, torch.dtype) else dtype
    if name not in get_args(Dtype):
        raise ValueError(f"dtype is {dtype!r}: use {', '.join(get_args(Dtype))}")
    return dataclasses.replace(config, dtype=cast(Dtype, name))


def _check_layers(checkpoint: Checkpoint, config: LLaMAConfig) -> None:
    """Raises ValueError for a config of many more layers than there are tensors: building a million takes minutes."""
    parts = config.num_layers * max(config.num_experts, 1)
    if parts > len(checkpoint.names):
        raise ValueError(
            f"{checkpoint.config_source} asks for {config.num_layers} layers, but there are only "
            f"{len(checkpoint.names)} tensors: the download is incomplete, or the config is another model's"
        )


def check_tensors(checkpoint: Checkpoint, pieces: ReadOnlyDict[str, Piece], config: LLaMAConfig) -> None:
    """Raises ValueError unless the checkpoint has exactly the tensors of these pieces, in their shapes."""
    names = set(checkpoint.names)
    surplus = {name for name in names - pieces.keys() if not name.endswith(_DERIVED_TENSORS)}
    if config.tie_embeddings:
        surplus.discard("lm_head.weight")
    missing = sorted(pieces.keys() - names)
    if missing:
        instead = f" (it has {_listed(sorted(surplus))} instead)" if surplus else ""
        raise ValueError(
            f"{checkpoint.source} has no tensor {_listed(missing)}{instead}: the download is incomplete, or "
            f"{checkpoint.config_source} describes another model"
        )
    if surplus:
        raise ValueError(
            f"{checkpoint.source} has the tensor {_listed(sorted(surplus))}, which a {config.architecture} with this "
            "config does not use: it is made for another model"
        )
    for name, piece in pieces.items():
        if checkpoint.shape(name) != piece.full_shape:
            stored, wanted = list(checkpoint.shape(name)), list(piece.full_shape)
            raise ValueError(
                f"{checkpoint.source}: {name} has the shape {stored}, but {checkpoint.config_source} asks for {wanted}"
                ": the two belong to different models"
            )
        if checkpoint.dtype(name) not in get_args(Dtype) and not checkpoint.is_quantized(name):
            raise ValueError(
                f"{checkpoint.source}: {name} is stored as {checkpoint.dtype(name)}, and puna reads "
                f"{', '.join(get_args(Dtype))}: convert the model, or choose another copy of it"
            )


def _listed(names: list[str]) -> str:
    shown = ", ".join(name if name.isprintable() else repr(name) for name in names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"


def _bytes_of(piece: Piece, checkpoint: Checkpoint, name: str) -> int:
    count: int = math.prod(part.stop - part.start for part in piece.source)
    return count * (4 if checkpoint.dtype(name) == "float32" else 2)


def _bar(is_first_rank: bool) -> ProgressBars:
    """A bar on standard error if that is a terminal, gone when the loading is done."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    return ProgressBars(*columns, console=console, transient=True, disable=not (is_first_rank and sys.stderr.isatty()))
