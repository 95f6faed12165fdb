"""OpenedModel, a checkpoint ready to load into an engine; and Answer, one generation as it streams out as text."""

from __future__ import annotations

import dataclasses
import os
import queue
import secrets
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from puna.checkpoints import open_checkpoint
from puna.cli.options import EngineFlags, ModelFlags, SamplingFlags
from puna.cli.sampling import RequestSettings, num_bytes, request_settings
from puna.config import EngineConfig, GenerationConfig, LLaMAConfig
from puna.engine.engine import Engine
from puna.engine.outputs import CompletionOutput, PositionLogprobs, RequestDelta, RequestOutput
from puna.engine.tokenizer import Tokenizer
from puna.mapping import Mapping
from puna.models.loading import resolved_config
from puna.ops import cpu
from puna.planning.memory_plan import Capacity, longest_context
from puna.runtime import cuda
from puna.runtime.machine import peak_memory_bytes, usable_cpus


@dataclass(frozen=True, kw_only=True)
class OpenedModel:
    """What is known of a model before its weights are read: enough to refuse a request at once.

    `name` is what the user calls it. `context_length` is the model's, or the flag's where that is less.
    """

    name: str
    folder: Path
    config: LLaMAConfig
    generation_config: GenerationConfig
    tokenizer: Tokenizer
    device: torch.device
    quantization: str | None
    context_length: int
    limits: EngineConfig

    @classmethod
    def open(cls, flags: ModelFlags, engine_flags: EngineFlags) -> OpenedModel:
        """Raises FileNotFoundError or ValueError for a model, tokenizer or device that can't be used."""
        memory = engine_flags.kv_cache_memory
        cache = None if memory is None else num_bytes(memory, "--kv-cache-memory")
        device = usable_device(flags.device)
        checkpoint = open_checkpoint(flags.model)
        set_threads(flags.threads)
        quantization = flags.quantization.value if flags.quantization else None
        config = resolved_config(checkpoint, flags.dtype.value if flags.dtype else None, quantization)
        asked = engine_flags.max_model_len
        if asked is not None and asked > config.context_length:
            raise ValueError(
                f"--max-model-len is {asked}, but the model's context is {config.context_length}: ask for at most that"
            )
        return cls(
            name=flags.model,
            folder=checkpoint.folder,
            config=config,
            generation_config=checkpoint.generation_config,
            tokenizer=Tokenizer.from_pretrained(checkpoint.folder),
            device=device,
            quantization=quantization,
            context_length=asked or config.context_length,
            limits=EngineConfig(
                kv_cache_memory=cache,
                kv_cache_dtype=engine_flags.kv_cache_dtype.value,
                enable_prefix_caching=not engine_flags.no_prefix_caching,
                gpu_memory_utilization=engine_flags.gpu_memory_utilization,
                capture=engine_flags.capture.value,
                deterministic=engine_flags.deterministic,
                overlap_kernels=engine_flags.overlap_kernels,
                tuning_dir=_cache_folder(),
            ),
        )

    @property
    def title(self) -> str:
        quantization = "" if self.quantization is None else f", {self.quantization}"
        return f"{self.name} ({self.config.dtype}{quantization})"

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """Some chat models name the end of a turn in the one file, some in the other."""
        own = () if self.tokenizer.eos_token_id is None else (self.tokenizer.eos_token_id,)
        return frozenset((*self.generation_config.eos_token_ids, *own))

    def within(self, cache_bytes: int) -> OpenedModel:
        """The same with a context whose keys and values fit into so many bytes."""
        defaults = EngineConfig()
        capacity = Capacity(
            max_model_len=self.context_length,
            max_num_seqs=1,
            max_num_batched_tokens=defaults.max_num_batched_tokens,
            block_size=defaults.block_size,
            kv_cache_dtype=self.limits.kv_cache_dtype,
        )
        fits = longest_context(self.config, Mapping(), capacity, cache_bytes)
        return dataclasses.replace(self, context_length=max(1, fits))

    @contextmanager
    def engine(
        self, max_model_len: int, max_num_seqs: int, max_num_batched_tokens: int = 2048
    ) -> Iterator[tuple[Engine, float]]:
        """An engine that holds so many sequences of so many tokens, and the seconds that loading it took."""
        limits = dataclasses.replace(
            self.limits,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            seed=secrets.randbits(62),  # where no --seed is given, every run is to be another one
        )
        start = time.perf_counter()
        engine = Engine.from_pretrained(
            str(self.folder),
            self.config.dtype,
            self.device,
            limits,
            quantization=self.quantization,
            tokenizer=self.tokenizer,
        )
        try:
            yield engine, time.perf_counter() - start
        finally:
            engine.shutdown()

    def settings(
        self, flags: SamplingFlags, prompt_ids: Sequence[int], default_max_new_tokens: int, n: int = 1
    ) -> RequestSettings:
        """The flags over the checkpoint's own, for this prompt. Raises ValueError where they don't fit the context."""
        room = self.room_after(prompt_ids)
        if flags.max_new_tokens is not None and flags.max_new_tokens > room:
            raise ValueError(
                f"--max-new-tokens is {flags.max_new_tokens}, but after the prompt's {len(prompt_ids)} tokens the "
                f"context of {self.context_length} has room for {room}: ask for at most {room}"
            )
        max_tokens = flags.max_new_tokens or min(default_max_new_tokens, room)
        return request_settings(flags, self.generation_config, max_tokens, n)

    def room_after(self, prompt_ids: Sequence[int]) -> int:
        """The new tokens that fit behind a prompt. Raises ValueError for one that is empty, too long or another's."""
        count, context = len(prompt_ids), self.context_length
        if count == 0:
            raise ValueError(
                "the prompt is empty, and this model's tokenizer puts no start token before it: give some text"
            )
        if count >= context:
            raise ValueError(
                f"the prompt has {count} tokens, and the context is {context}: shorten it by at least "
                f"{count + 1 - context}, which leaves room for one new token"
            )
        largest = max(prompt_ids)
        if largest >= self.config.vocab_size:
            raise ValueError(
                f"the tokenizer gives the token {largest}, but the model's vocabulary has {self.config.vocab_size}: "
                "tokenizer.json belongs to another model"
            )
        return context - count


class Answer:
    """One generation: iterate over it for the text as it comes; afterwards it knows what happened.

    With n > 1 the text is that of the first one, and `output` has all. `drops_space`: a space at the start of the text
    is left out, since it is the one that some tokenizers put before every word.
    """

    def __init__(
        self,
        engine: Engine,
        opened: OpenedModel,
        prompt_ids: Sequence[int],
        settings: RequestSettings,
        drops_space: bool = False,
    ) -> None:
        self.output = RequestOutput(
            "", None, list(prompt_ids), [CompletionOutput(index) for index in range(settings.params.n)]
        )
        self.text = ""
        self._engine = engine
        self._settings = settings
        self._ends = frozenset[int]() if settings.params.ignore_eos else opened.eos_token_ids
        self._drops_space = drops_space
        self._deltas: queue.SimpleQueue[RequestDelta] = queue.SimpleQueue()
        self._start = self._first = self._last = time.perf_counter()

    def __iter__(self) -> Iterator[str]:
        prompt_ids, settings = self.output.prompt_token_ids, self._settings
        self._start = self._first = self._last = time.perf_counter()
        self.output.request_id = self._engine.submit(
            prompt_ids, settings.params, self._deltas.put, beams=settings.beams
        )
        while not self.output.finished:
            text = self._take(self._deltas.get())
            if text:
                yield text

    def interrupt(self) -> str:
        """Ends it after a Ctrl-C: the text that had come, but was not shown yet."""
        self._engine.cancel(self.output.request_id)
        rest = ""
        while not self.output.finished:
            delta = self._deltas.get()
            if delta.error is not None:  # of beams there is nothing before their end
                break
            rest += self._take(delta)
        return rest

    def _take(self, delta: RequestDelta) -> str:
        had_tokens = bool(self.token_ids)
        add_delta(self.output, delta, self._ends)
        if len(self.token_ids) > 0 and (delta.beams or any(part.token_ids for part in delta.completions)):
            self._last = time.perf_counter()
            self._first = self._first if had_tokens else self._last
        whole = self.output.outputs[0].text
        whole = whole.removeprefix(" ") if self._drops_space else whole
        new, self.text = whole[len(self.text) :], whole
        return new

    @property
    def token_ids(self) -> list[int]:
        return self.output.outputs[0].token_ids

    @property
    def finish_reason(self) -> str:
        reason = self.output.outputs[0].finish_reason
        return "interrupted" if reason is None or reason == "abort" else reason

    @property
    def prefill_seconds(self) -> float | None:
        """Until the first new token was there; None with beams, whose tokens all come at the end."""
        return self._first - self._start if self._settings.beams is None and self.token_ids else None

    @property
    def decode_seconds(self) -> float:
        """For the tokens after the first one; for all of them with beams."""
        return self._last - (self._first if self._settings.beams is None else self._start)

    @property
    def prefill_rate(self) -> float | None:
        """Prompt tokens per second."""
        seconds = self.prefill_seconds
        return len(self.output.prompt_token_ids) / seconds if seconds else None

    @property
    def decode_rate(self) -> float | None:
        """New tokens per second; None where there were only those that the prefill gives."""
        count = self.usage()["completion_tokens"] - (len(self.output.outputs) if self._settings.beams is None else 0)
        return count / self.decode_seconds if count > 0 and self.decode_seconds > 0 else None

    def usage(self) -> dict[str, int]:
        return usage(self.output)

    def timings(self, load_seconds: float) -> dict[str, float | None]:
        return {
            "load_seconds": load_seconds,
            "prefill_seconds": self.prefill_seconds,
            "decode_seconds": self.decode_seconds,
            "prefill_tokens_per_second": self.prefill_rate,
            "decode_tokens_per_second": self.decode_rate,
        }


def add_delta(output: RequestOutput, delta: RequestDelta, ends: frozenset[int]) -> None:
    """Takes a delta in; of beams, the best one becomes the only completion. Raises RuntimeError for a failed request.

    `ends` are the tokens that end a beam.
    """
    output.add(delta)
    if delta.beams:
        best, (completion,) = delta.beams[0], output.outputs
        completion.text, completion.token_ids = best.text, best.token_ids
        completion.cumulative_logprob = best.cum_logprob
        completion.finish_reason = "stop" if best.token_ids[-1] in ends else "length"


def usage(output: RequestOutput) -> dict[str, int]:
    prompt, new = len(output.prompt_token_ids), sum(len(one.token_ids) for one in output.outputs)
    return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}


def result_fields(output: RequestOutput, echoed: str = "") -> dict[str, Any]:
    """What was generated, as fields for JSON: of the only completion, or of each under "outputs".

    `echoed` stands before every text.
    """
    results = []
    for one in output.outputs:
        fields: dict[str, Any] = {
            "text": echoed + one.text,
            "token_ids": one.token_ids,
            "finish_reason": one.finish_reason,
        }
        if one.logprobs is not None:
            fields["logprobs"] = [_plain(position) for position in one.logprobs]
            fields["cumulative_logprob"] = one.cumulative_logprob
        results.append(fields)
    found: dict[str, Any] = results[0] if len(results) == 1 else {"outputs": results}
    if output.prompt_logprobs is not None:
        found["prompt_logprobs"] = [None if one is None else _plain(one) for one in output.prompt_logprobs]
    return found


def _plain(position: PositionLogprobs) -> dict[str, float]:
    return {str(token_id): known.logprob for token_id, known in position.items()}


def stats_lines(answer: Answer, load_seconds: float) -> list[str]:
    """What --stats and /stats show."""
    prefill, decode, counts = answer.prefill_rate, answer.decode_rate, answer.usage()
    prompt_line = f"{counts['prompt_tokens']} tokens" + (f", {prefill:.1f} tokens/s" if prefill else "")
    new_line = f"{counts['completion_tokens']} tokens" + (f", {decode:.1f} tokens/s" if decode else "")
    return [
        f"prompt       {prompt_line}",
        f"generated    {new_line}, {answer.finish_reason}",
        f"loading      {load_seconds:.2f} s",
        f"peak memory  {peak_memory_bytes() / 2**20:.0f} MiB",
    ]


def _cache_folder() -> str | None:
    """puna's part of the folder that the environment names for caches, if it does."""
    folder = os.environ.get("XDG_CACHE_HOME", "")
    # The specification (XDG Base Directory) wants others to be ignored.
    return os.path.join(folder, "puna") if os.path.isabs(folder) else None


def set_threads(threads: int | None) -> None:
    # torch counts the processors, but knows nothing of a container's quota; threads beyond it wait for each other.
    torch.set_num_threads(min(torch.get_num_threads(), usable_cpus()) if threads is None else threads)
    cpu.set_threads(torch.get_num_threads())


def usable_device(name: str) -> torch.device:
    if name == "auto":
        return cuda.usable_device(name)
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"--device is {name!r}: use cpu, auto, or the name of an accelerator such as cuda") from error
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
