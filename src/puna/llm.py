"""LLM: the offline facade; a model in memory that answers lists of prompts."""

from __future__ import annotations

import queue
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from puna.config import CacheDtype, Capture, EngineConfig
from puna.engine.engine import Engine
from puna.engine.outputs import BeamSearchOutput, CompletionOutput, RequestDelta, RequestOutput
from puna.runtime.tracing import ChromeTrace
from puna.scheduling.beams import BeamParams
from puna.scheduling.pooling_params import Pooling, PoolingParams
from puna.scheduling.sampling_params import SamplingParams

if TYPE_CHECKING:
    from types import TracebackType

    from typing_extensions import Self

# A text, or {"prompt_token_ids": [...]}.
Prompt = str | Mapping[str, Sequence[int]]
Messages = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Score:
    """How likely a continuation is: the sum of its tokens' log-probabilities, and each one.

    `is_greedy`: every token is the likeliest one at its place.
    """

    logprob: float
    token_logprobs: list[float]
    token_ids: list[int]
    is_greedy: bool


class LLM:
    """Loads a model and generates with it; see EngineConfig for the limits. Several threads may use one.

    `quantization`: "int8", "int4", "bf16" or, on GPUs, "fp8" rounds the weights while they are read; None takes them as
    they are.
    `device`: "cpu", "cuda", "cuda:1" or the like, or "auto", which is a GPU where there is one.
    `profile_dir`: a folder for a timeline of steps and requests, which Perfetto and chrome://tracing show.

    Raises ValueError and FileNotFoundError as `puna.load_model` does, and ValueError, before weights are read, where
    model and cache do not fit into memory.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        dtype: str | torch.dtype | None = None,
        device: torch.device | str = "cpu",
        max_model_len: int | None = None,
        max_num_seqs: int = 64,
        max_num_batched_tokens: int = 2048,
        kv_cache_memory: int | None = None,
        enable_prefix_caching: bool = True,
        block_size: int = 16,
        seed: int = 0,
        quantization: str | None = None,
        kv_cache_dtype: CacheDtype = "auto",
        threads: int | None = None,
        enforce_eager: bool = False,
        capture: Capture = "lazy",
        gpu_memory_utilization: float = 0.9,
        deterministic: bool = False,
        overlap_kernels: bool = False,
        tuning_dir: str | Path | None = None,
        profile_dir: str | Path | None = None,
    ) -> None:
        limits = EngineConfig(
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            kv_cache_memory=kv_cache_memory,
            enable_prefix_caching=enable_prefix_caching,
            block_size=block_size,
            seed=seed,
            kv_cache_dtype=kv_cache_dtype,
            threads=threads,
            enforce_eager=enforce_eager,
            capture=capture,
            gpu_memory_utilization=gpu_memory_utilization,
            deterministic=deterministic,
            overlap_kernels=overlap_kernels,
            tuning_dir=None if tuning_dir is None else str(tuning_dir),
        )
        tracer = None if profile_dir is None else ChromeTrace(profile_dir)
        try:
            self.engine = Engine.from_pretrained(
                str(model), dtype, device, limits, quantization=quantization, tracer=tracer
            )
        except BaseException:
            if tracer is not None:
                tracer.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the engine's threads; what still runs is cancelled."""
        self.engine.shutdown()

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return self.engine.parts.tokenizer.encode(text, add_special_tokens)

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return self.engine.parts.tokenizer.decode(token_ids, skip_special_tokens)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        show_progress: bool | None = None,
    ) -> list[RequestOutput]:
        """Continues each prompt; one set of params for all, or one for each. Outputs are in the order of the prompts.

        `show_progress` None means a bar where standard error is a terminal. Raises ValueError for a prompt or params
        that can't be run; the others are then cancelled.
        """
        several = [prompts] if isinstance(prompts, (str, Mapping)) else list(prompts)
        if params is None or isinstance(params, SamplingParams):
            each = [params or SamplingParams()] * len(several)
        else:
            each = list(params)
            if len(each) != len(several):
                raise ValueError(f"there are {len(several)} prompts and {len(each)} params: give one for each, or one")
        outputs = []
        for prompt in several:
            text, token_ids = self._tokens_of(prompt)
            outputs.append(RequestOutput("", text, token_ids, []))
        self._run(outputs, each, show_progress)
        for output, its_params in zip(outputs, each, strict=True):
            if its_params.echo:
                prompt_text = self.decode(output.prompt_token_ids) if output.prompt is None else output.prompt
                for completion in output.outputs:
                    completion.text = prompt_text + completion.text
        return outputs

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template_variables: Mapping[str, Any] | None = None,
        show_progress: bool | None = None,
    ) -> list[RequestOutput]:
        """Answers one conversation, or each of a list of them, through the model's chat template.

        Raises ValueError where the model has none.
        """
        is_one = len(messages) > 0 and isinstance(messages[0], Mapping)
        conversations: Sequence[Any] = [messages] if is_one else messages
        encode = self.engine.parts.tokenizer.encode_chat
        prompts = [
            {
                "prompt_token_ids": encode(
                    conversation, tools, add_generation_prompt, continue_final_message, template_variables
                )
            }
            for conversation in conversations
        ]
        return self.generate(prompts, params, show_progress=show_progress)

    def beam_search(
        self,
        prompts: Prompt | Sequence[Prompt],
        beam_width: int,
        max_tokens: int,
        length_penalty: float = 1.0,
        early_stopping: bool | Literal["never"] = False,
        ignore_eos: bool = False,
    ) -> list[BeamSearchOutput]:
        """The `beam_width` best continuations of each prompt, by the rules of transformers; see BeamParams.

        Raises ValueError for a prompt that can't be run, and RuntimeError where a search is cut short; the others are
        then cancelled.
        """
        several = [prompts] if isinstance(prompts, (str, Mapping)) else list(prompts)
        beams = BeamParams(width=beam_width, length_penalty=length_penalty, early_stopping=early_stopping)
        params = SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=ignore_eos)
        deltas: queue.SimpleQueue[RequestDelta] = queue.SimpleQueue()
        tokens = [self._tokens_of(prompt)[1] for prompt in several]
        names: list[str] = []
        found: dict[str, BeamSearchOutput] = {}
        try:
            for token_ids in tokens:
                names.append(self.engine.submit(token_ids, params, deltas.put, beams=beams))
            while len(found) < len(names):
                delta = deltas.get()
                if delta.error is not None:
                    raise RuntimeError(f"request {delta.request_id}: {delta.error}")
                if delta.beams is not None:
                    found[delta.request_id] = BeamSearchOutput(list(delta.beams))
        except BaseException:
            for name in names:
                self.engine.cancel(name)
            raise
        return [found[name] for name in names]

    def embed(
        self,
        prompts: Prompt | Sequence[Prompt],
        pooling: Pooling | None = None,
        normalize: bool = True,
        *,
        show_progress: bool | None = None,
    ) -> list[Tensor]:
        """An embedding of each prompt, float32 [E], in the order of the prompts.

        "last" is the last token's hidden state after the last norm, "mean" the mean over all tokens, special ones
        included; None is what the checkpoint recommends (in sentence-transformers' files), else "last". `normalize`
        scales it to a length (L2) of 1. How many prompts there are changes no bit of it (on the compiled kernels).
        Raises ValueError for a prompt that can't be run, such as one that is longer than the context, and RuntimeError
        where the engine is shut down meanwhile; the others are then cancelled.
        """
        several = [prompts] if isinstance(prompts, (str, Mapping)) else list(prompts)
        how = self.engine.pooling_params(pooling, normalize)
        outputs = [RequestOutput("", *self._tokens_of(prompt), []) for prompt in several]
        self._run(outputs, [SamplingParams()] * len(outputs), show_progress, how)
        found = [output.embedding for output in outputs if output.embedding is not None]
        if len(found) < len(outputs):
            raise RuntimeError("the engine was shut down before all embeddings were there")
        return [torch.frombuffer(embedding, dtype=torch.float32) for embedding in found]

    @overload
    def score(  # type: ignore[overload-overlap]  # a str is a sequence of str, but the first one comes first
        self, prompt: Prompt, continuation: str | Sequence[int]
    ) -> Score: ...

    @overload
    def score(self, prompt: Sequence[Prompt], continuation: Sequence[str | Sequence[int]]) -> list[Score]: ...

    def score(self, prompt: Prompt | Sequence[Prompt], continuation: Any) -> Score | list[Score]:
        """How likely the continuation is after the prompt, token by token; of a list of prompts, each with its own.

        A text is encoded together with the prompt, and its tokens are those that come after the prompt's own. Raises
        ValueError for an empty continuation, where both together exceed the context, and for lists that are not
        equally long.
        """
        if isinstance(prompt, (str, Mapping)):
            return self.score([prompt], [continuation])[0]
        if len(prompt) != len(continuation):
            raise ValueError(
                f"there are {len(prompt)} prompts and {len(continuation)} continuations: give one for each"
            )
        split = [self._split(*pair) for pair in zip(prompt, continuation, strict=True)]
        params = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0)
        whole = [{"prompt_token_ids": before + after} for before, after in split]
        scores = []
        for (before, after), output in zip(split, self.generate(whole, params, show_progress=False), strict=True):
            scored = (output.prompt_logprobs or [])[len(before) :]
            found = [position[token] for position, token in zip(scored, after, strict=True) if position]
            values = [one.logprob for one in found]
            scores.append(Score(sum(values), values, after, all(one.rank == 1 for one in found)))
        return scores

    def _split(self, prompt: Prompt, continuation: str | Sequence[int]) -> tuple[list[int], list[int]]:
        """Both as tokens."""
        text, token_ids = self._tokens_of(prompt)
        if not isinstance(continuation, str):
            whole = [*token_ids, *continuation]
        elif text is None:
            whole = [*token_ids, *self.encode(continuation, add_special_tokens=False)]
        else:
            whole = self.encode(text + continuation)
        if len(whole) <= len(token_ids):
            raise ValueError("the continuation is empty: it needs at least one token")
        return whole[: len(token_ids)], whole[len(token_ids) :]

    def _tokens_of(self, prompt: Prompt) -> tuple[str | None, list[int]]:
        if isinstance(prompt, str):
            return prompt, self.encode(prompt)
        if not isinstance(prompt, Mapping) or set(prompt) != {"prompt_token_ids"}:
            raise ValueError(f'a prompt is {prompt!r}: give a text, or {{"prompt_token_ids": [...]}}')
        return None, list(prompt["prompt_token_ids"])

    def _run(
        self,
        outputs: list[RequestOutput],
        params: list[SamplingParams],
        show_progress: bool | None,
        pooling: PoolingParams | None = None,
    ) -> None:
        """Submits all and waits for all; where one is refused, the others are cancelled."""
        ended: queue.SimpleQueue[list[RequestDelta]] = queue.SimpleQueue()
        by_id: dict[str, RequestOutput] = {}
        shows = sys.stderr.isatty() if show_progress is None else show_progress
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        try:
            for output, its_params in zip(outputs, params, strict=True):
                output.request_id = self.engine.submit(
                    output.prompt_token_ids, its_params, _collector(ended), pooling=pooling
                )
                output.outputs = [CompletionOutput(index) for index in range(its_params.n)]
                by_id[output.request_id] = output
            with Progress(*columns, console=Console(stderr=True), transient=True, disable=not shows) as progress:
                task = progress.add_task("generating" if pooling is None else "embedding", total=len(outputs))
                for _ in outputs:
                    for delta in ended.get():
                        by_id[delta.request_id].add(delta)
                    progress.advance(task)
        except BaseException:
            for request_id in by_id:
                self.engine.cancel(request_id)
            raise


def _collector(ended: queue.SimpleQueue[list[RequestDelta]]) -> Callable[[RequestDelta], None]:
    """A listener that hands over all of a request's deltas at its end.

    Waking the caller for every token would take the interpreter away from the threads that make them.
    """
    deltas: list[RequestDelta] = []

    def listen(delta: RequestDelta) -> None:
        deltas.append(delta)
        if delta.finished:
            ended.put(deltas)

    return listen
