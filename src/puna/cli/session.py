"""OpenedModel, a checkpoint ready to load; and Answer, one generation as it streams out as text."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from puna.checkpoints import open_checkpoint
from puna.cli.options import ModelFlags, SamplingFlags, generation_options
from puna.config import GenerationConfig, LLaMAConfig
from puna.engine.detokenizer import Detokenizer
from puna.engine.stop_strings import StopStrings
from puna.engine.tokenizer import Tokenizer
from puna.models import load_model
from puna.models.generation_mixin import GenerationOptions
from puna.models.loading import resolved_config
from puna.runtime.machine import peak_memory_bytes, usable_cpus

if TYPE_CHECKING:
    from puna.models.llama import LLaMAForCausalLM

FinishReason = Literal["stop", "length", "interrupted"]


@dataclass(frozen=True, kw_only=True)
class OpenedModel:
    """What is known of a model before its weights are read: enough to refuse a request at once."""

    folder: Path
    config: LLaMAConfig
    generation_config: GenerationConfig
    tokenizer: Tokenizer
    device: torch.device

    @classmethod
    def open(cls, flags: ModelFlags) -> OpenedModel:
        """Raises FileNotFoundError or ValueError for a model, tokenizer or device that can't be used."""
        device = _device(flags.device)
        checkpoint = open_checkpoint(flags.model)
        _set_threads(flags.threads)
        return cls(
            folder=checkpoint.folder,
            config=resolved_config(checkpoint, flags.dtype.value if flags.dtype else None),
            generation_config=checkpoint.generation_config,
            tokenizer=Tokenizer.from_pretrained(checkpoint.folder),
            device=device,
        )

    def load(self) -> tuple[LLaMAForCausalLM, float]:
        """The model, and the seconds that loading took."""
        start = time.perf_counter()
        model = load_model(self.folder, self.config.dtype, self.device)
        return model, time.perf_counter() - start

    def options(
        self, flags: SamplingFlags, prompt_ids: Sequence[int], default_max_new_tokens: int
    ) -> GenerationOptions:
        """The flags over the checkpoint's own, for this prompt. Raises ValueError where they don't fit the context."""
        count, context = len(prompt_ids), self.config.context_length
        room = context - count
        if count == 0:
            raise ValueError(
                "the prompt is empty, and this model's tokenizer puts no start token before it: give some text"
            )
        if room < 1:
            raise ValueError(
                f"the prompt has {count} tokens, and the context is {context}: shorten it by at least {1 - room}, "
                "which leaves room for one new token"
            )
        if flags.max_new_tokens is not None and flags.max_new_tokens > room:
            raise ValueError(
                f"--max-new-tokens is {flags.max_new_tokens}, but after the prompt's {count} tokens the context of "
                f"{context} has room for {room}: ask for at most {room}"
            )
        largest = max(prompt_ids)
        if largest >= self.config.vocab_size:
            raise ValueError(
                f"the tokenizer gives the token {largest}, but the model's vocabulary has {self.config.vocab_size}: "
                "tokenizer.json belongs to another model"
            )
        # Some chat models name the end of a turn in the one file, some in the other.
        ends = self.generation_config.eos_token_ids
        if self.tokenizer.eos_token_id is not None and self.tokenizer.eos_token_id not in ends:
            ends = (*ends, self.tokenizer.eos_token_id)
        max_new_tokens = flags.max_new_tokens or min(default_max_new_tokens, room)
        return generation_options(flags, self.generation_config, ends, max_new_tokens)


def stream_tokens(model: LLaMAForCausalLM, prompt_ids: Sequence[int], options: GenerationOptions) -> Iterator[int]:
    """The new tokens as they are chosen, the end-of-sequence token included; with beams, all of them at the end."""
    prompt = torch.tensor([list(prompt_ids)], device=model.comm.device)
    settings = {name: getattr(options, name) for name in options.__dataclass_fields__}
    if options.num_beams > 1:
        yield from model.generate(prompt, **settings)[0, len(prompt_ids) :].tolist()
        return
    for chosen in model.stream(prompt, **settings):
        yield int(chosen[0])


class Answer:
    """One generation: iterate over it for the text as it comes; afterwards it knows what happened.

    `continues` says that the text goes on where the prompt's ends, so that a space between them is kept; otherwise it
    begins on its own.
    """

    def __init__(
        self,
        model: LLaMAForCausalLM,
        tokenizer: Tokenizer,
        prompt_ids: Sequence[int],
        options: GenerationOptions,
        stop_strings: tuple[str, ...] = (),
        continues: bool = False,
    ) -> None:
        self.prompt_ids = tuple(prompt_ids)
        self.token_ids: list[int] = []
        self.text = ""
        self.finish_reason: FinishReason = "interrupted"
        self._streams = options.num_beams == 1
        self._ends = _as_tuple(options.eos_token_id)
        self._tokens = stream_tokens(model, prompt_ids, options)
        self._stops = StopStrings(stop_strings)
        self._detokenizer = Detokenizer(tokenizer)
        if continues:
            for token in prompt_ids:
                self._detokenizer.push(token)
        self._start = self._first = self._last = time.perf_counter()

    def __iter__(self) -> Iterator[str]:
        for token in self._tokens:
            self._last = time.perf_counter()
            if not self.token_ids:
                self._first = self._last
            self.token_ids.append(token)
            if token in self._ends:
                self.finish_reason = "stop"
                break
            yield from self._emit(self._stops.push(self._detokenizer.push(token)))
            if self._stops.found:
                self.finish_reason = "stop"
                return
        else:
            self.finish_reason = "length"
        yield from self._emit(self._stops.push(self._detokenizer.flush()))
        if self._stops.found:
            self.finish_reason = "stop"
        yield from self._emit(self._stops.flush())

    def interrupt(self) -> str:
        """Ends it after a Ctrl-C: the text that was held back as a possible stop string."""
        return "".join(self._emit(self._stops.flush()))

    def _emit(self, text: str) -> Iterator[str]:
        self.text += text
        if text:
            yield text

    @property
    def prefill_seconds(self) -> float | None:
        """Until the first new token was there; None with beams, whose tokens all come at the end."""
        return self._first - self._start if self._streams and self.token_ids else None

    @property
    def decode_seconds(self) -> float:
        """For the tokens after the first one; for all of them with beams."""
        return self._last - (self._first if self._streams else self._start)

    @property
    def prefill_rate(self) -> float | None:
        """Prompt tokens per second."""
        seconds = self.prefill_seconds
        return len(self.prompt_ids) / seconds if seconds else None

    @property
    def decode_rate(self) -> float | None:
        """New tokens per second; None where there was only the one that the prefill gives."""
        count = len(self.token_ids) - (1 if self._streams else 0)
        return count / self.decode_seconds if count > 0 and self.decode_seconds > 0 else None

    def usage(self) -> dict[str, int]:
        prompt, new = len(self.prompt_ids), len(self.token_ids)
        return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}

    def timings(self, load_seconds: float) -> dict[str, float | None]:
        return {
            "load_seconds": load_seconds,
            "prefill_seconds": self.prefill_seconds,
            "decode_seconds": self.decode_seconds,
            "prefill_tokens_per_second": self.prefill_rate,
            "decode_tokens_per_second": self.decode_rate,
        }


def stats_lines(answer: Answer, load_seconds: float) -> list[str]:
    """What --stats and /stats show."""
    prefill, decode = answer.prefill_rate, answer.decode_rate
    prompt_line = f"{len(answer.prompt_ids)} tokens" + (f", {prefill:.1f} tokens/s" if prefill else "")
    new_line = f"{len(answer.token_ids)} tokens" + (f", {decode:.1f} tokens/s" if decode else "")
    return [
        f"prompt       {prompt_line}",
        f"generated    {new_line}, {answer.finish_reason}",
        f"loading      {load_seconds:.2f} s",
        f"peak memory  {peak_memory_bytes() / 2**20:.0f} MiB",
    ]


def write(text: str) -> None:
    """To standard output at once, so that a reader of a pipe has it too."""
    sys.stdout.write(text)
    sys.stdout.flush()


def prepare_output() -> None:
    """A terminal that can't show a character gets a question mark for it, not the user an error."""
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


def _as_tuple(tokens: Any) -> tuple[int, ...]:
    if tokens is None:
        return ()
    return (tokens,) if isinstance(tokens, int) else tuple(tokens)


def _set_threads(threads: int | None) -> None:
    # torch counts the processors, but knows nothing of a container's quota; threads beyond it wait for each other.
    torch.set_num_threads(min(torch.get_num_threads(), usable_cpus()) if threads is None else threads)


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"--device is {name!r}: use cpu, or the name of an accelerator such as cuda") from error
    if device.type == "cpu":
        return device
    found = torch.accelerator.current_accelerator(check_available=True)
    if found is None or found.type != device.type:
        there = "cpu" if found is None else f"cpu and {found.type}"
        raise ValueError(f"--device is {name!r}, but this machine, or this build of torch, has only {there}")
    if device.index is not None and device.index >= torch.accelerator.device_count():
        raise ValueError(
            f"--device is {name!r}, but there are {torch.accelerator.device_count()} of them, counted from 0"
        )
    return device
