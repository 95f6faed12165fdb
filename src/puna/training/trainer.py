"""Trainer: the optimiser steps, the held-out loss and the checkpoints of one run."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from puna.config import Dtype
from puna.models.llama import LLaMAForCausalLM
from puna.models.loading import save_model
from puna.training.data import TokenStream, TrainingWindows
from puna.training.replicas import Replicas
from puna.training.state import has_state, load_state, remove_partial_files, save_state


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """How to train. Raises ValueError for values out of range.

    `batch_size` counts the windows of one optimiser step, over all processes; each process takes its share in
    `gradient_accumulation` parts. `dtype` is what matrix products are computed in, while the weights and the optimiser
    stay float32; `save_dtype` is what the model is written in. 0 for eval_every or save_every means only at the end.
    """

    steps: int
    batch_size: int
    gradient_accumulation: int
    context: int
    learning_rate: float
    warmup_steps: int
    weight_decay: float
    gradient_clip: float
    dtype: Literal["float32", "bfloat16"]
    save_dtype: Dtype
    eval_every: int
    save_every: int
    seed: int

    def __post_init__(self) -> None:
        ranges = (
            ("steps", self.steps >= 1, "at least 1"),
            ("batch_size", self.batch_size >= 1, "at least 1"),
            ("gradient_accumulation", self.gradient_accumulation >= 1, "at least 1"),
            ("context", self.context >= 2, "at least 2 tokens"),
            ("learning_rate", 0 < self.learning_rate < math.inf, "above 0"),
            ("warmup_steps", 0 <= self.warmup_steps <= self.steps, f"in 0..{self.steps}, the number of steps"),
            ("weight_decay", 0 <= self.weight_decay < math.inf, "0 or above"),
            ("gradient_clip", self.gradient_clip > 0, "above 0 (inf for no clipping)"),
            ("dtype", self.dtype in ("float32", "bfloat16"), "float32 or bfloat16"),
            ("save_dtype", self.save_dtype in ("float32", "bfloat16", "float16"), "float32, bfloat16 or float16"),
            ("eval_every", self.eval_every >= 0, "0 (at the end) or above"),
            ("save_every", self.save_every >= 0, "0 (at the end) or above"),
            ("seed", 0 <= self.seed < 2**32, "in 0..2**32 - 1"),
        )
        for name, holds, wanted in ranges:
            if not holds:
                raise ValueError(f"{name} is {getattr(self, name)!r}: it must be {wanted}")

    def check_share(self, replicas: Replicas) -> None:
        """Raises ValueError where the batch can't be split evenly over the processes and their parts."""
        parts = replicas.count * self.gradient_accumulation
        if self.batch_size % parts != 0:
            raise ValueError(
                f"batch_size is {self.batch_size}: it must be a multiple of {parts}, the {replicas.count} processes "
                f"times gradient_accumulation {self.gradient_accumulation}"
            )

    def learning_rate_at(self, step: int) -> float:
        """Of step 0, 1, ...: up in a line over the warm-up, then down a cosine to a tenth (SGDR, Loshchilov 2017)."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        progress = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        return self.learning_rate * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress)))

    def fixed_settings(self) -> dict[str, Any]:
        """What must not change when a run is resumed: everything that the next step's numbers depend on."""
        settings = dataclasses.asdict(self)
        for name in ("eval_every", "save_every", "save_dtype"):
            del settings[name]
        return settings


@dataclass(frozen=True)
class Step:
    """What one optimiser step reports; `loss` is the mean over its tokens, in nats, before the step."""

    number: int
    loss: float
    learning_rate: float
    gradient_norm: float


@dataclass(frozen=True)
class HeldOut:
    """The loss on text that was not trained on, after `step` steps. `nats` is per token."""

    step: int
    name: str
    nats: float
    bits_per_byte: float
    tokens: int


class Trainer:
    """Trains a float32 model in place. `run` does what is left of the run and reports as it goes.

    With several `replicas`, each process has a Trainer with the same arguments; the first one writes the files.
    `held_out` maps names to texts. `extra_files` (a tokenizer's) are written beside the model. Raises ValueError for a
    model in another dtype, and for a batch or a text that doesn't fit the options.
    """

    def __init__(
        self,
        model: LLaMAForCausalLM,
        text: TokenStream,
        held_out: Mapping[str, TokenStream],
        options: TrainingOptions,
        folder: Path,
        extra_files: Mapping[str, bytes],
        replicas: Replicas | None = None,
    ) -> None:
        self.replicas = Replicas() if replicas is None else replicas
        options.check_share(self.replicas)
        self.model, self.held_out, self.options = model.train(), held_out, options
        self.folder, self.extra_files = folder, extra_files
        # How many windows one pass through the model takes.
        self.part = options.batch_size // self.replicas.count // options.gradient_accumulation
        self.windows = TrainingWindows(text, options.context, options.seed)
        self.device = next(model.parameters()).device
        self.parameters = list(model.parameters())
        if any(parameter.dtype != torch.float32 for parameter in self.parameters):
            raise ValueError(f"the model is in {model.config.dtype}: load it with dtype='float32' to train it")
        groups = [
            {"params": [p for p in self.parameters if p.dim() >= 2], "weight_decay": options.weight_decay},
            {"params": [p for p in self.parameters if p.dim() < 2], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=options.learning_rate, betas=(0.9, 0.95), fused=True)
        self.settings = {
            **options.fixed_settings(),
            **model.config.to_hugging_face(),
            "text": text.fingerprint(),
        }
        self.steps_done = 0

    def resume(self) -> None:
        """Goes on where the folder's last checkpoint is. Raises ValueError where that is of another run."""
        if has_state(self.folder):
            self.steps_done = load_state(self.folder, self.model, self.optimizer, self.settings)

    def run(self) -> Iterator[Step | HeldOut]:
        """Trains to the last step; yields every step, and the held-out losses when their turn comes and at the end."""
        options = self.options
        while self.steps_done < options.steps:
            yield self.step()
            is_last = self.steps_done == options.steps
            if is_last or (options.save_every and self.steps_done % options.save_every == 0):
                self.save()
            if is_last or (options.eval_every and self.steps_done % options.eval_every == 0):
                yield from self.evaluate()

    def step(self) -> Step:
        """One optimiser step on the next windows."""
        options = self.options
        learning_rate = options.learning_rate_at(self.steps_done)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        share = options.batch_size // self.replicas.count
        first = self.steps_done * options.batch_size + self.replicas.rank * share
        total = torch.zeros((), device=self.device)
        self.optimizer.zero_grad()
        for start in range(first, first + share, self.part):
            inputs, targets = self.windows.batch(start, self.part)
            loss = self._losses(inputs, targets).mean() / options.gradient_accumulation
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        for parameter in self.parameters:
            if parameter.grad is None:  # an expert that no token of this process was sent to
                parameter.grad = torch.zeros_like(parameter)
        self.replicas.average([*(p.grad for p in self.parameters if p.grad is not None), total])
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, options.gradient_clip)
        self.optimizer.step()
        self.steps_done += 1
        return Step(self.steps_done, float(total), learning_rate, float(norm))

    @torch.no_grad()
    def evaluate(self) -> Iterator[HeldOut]:
        """The loss on each held-out text, the windows shared among the processes."""
        for name, stream in self.held_out.items():
            nats = torch.zeros((), device=self.device)
            for place, (inputs, targets) in enumerate(stream.windows_in_order(self.options.context, self.part)):
                if place % self.replicas.count == self.replicas.rank:
                    nats += self._losses(inputs, targets).sum()
            self.replicas.average([nats])
            total, tokens = float(nats) * self.replicas.count, len(stream.ids) - 1
            bits_per_byte = total / math.log(2) / max(1, stream.num_bytes)
            yield HeldOut(self.steps_done, name, total / max(1, tokens), bits_per_byte, tokens)

    def save(self) -> None:
        """Writes the run's state and the model; the first process does, and the others wait for it."""
        if self.replicas.is_first:
            self.folder.mkdir(parents=True, exist_ok=True)
            remove_partial_files(self.folder)
            save_state(self.folder, self.model, self.optimizer, self.steps_done, self.settings)
            config = dataclasses.replace(self.model.config, dtype=self.options.save_dtype)
            rounded = type(self.model)(config)
            rounded.load_state_dict(self.model.state_dict())
            rounded.generation_config = copy.copy(self.model.generation_config)
            save_model(rounded, self.folder, self.extra_files)
        self.replicas.wait()

    def _losses(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """The cross-entropy in nats of each target; inputs and targets [B, S] -> float32 [B * S]."""
        inputs, targets = inputs.to(self.device), targets.to(self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.options.dtype == "bfloat16"):
            logits = self.model(inputs)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
