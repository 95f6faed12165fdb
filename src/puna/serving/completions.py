"""/v1/completions: prompts in, texts out, whole or streamed."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator
from typing import Any

from puna import __version__
from puna.engine.outputs import CompletionOutput, RequestOutput
from puna.serving.errors import bad_request
from puna.serving.generation import Generation, Part, encoded
from puna.serving.logprobs import CompletionLogprobs, prompt_logprobs
from puna.serving.protocol import MAX_PROMPTS, CompletionRequest
from puna.serving.record import RequestRecord
from puna.serving.sampling import sampling_params
from puna.serving.state import ServerState
from puna.serving.streaming import Chunk, TextChunks

_DEFAULT_MAX_TOKENS = 16  # OpenAI's


class Completion:
    """One request from its fields to its answer. `start` first; then either `answer` or `chunks`."""

    def __init__(self, state: ServerState, request: CompletionRequest, record: RequestRecord) -> None:
        self._state = state
        self._request = request
        self._record = record
        self._tokenizer = state.ready_engine().parts.tokenizer
        self._head = {
            "id": f"cmpl-{record.request_id}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": request.model,
            "system_fingerprint": fingerprint(state),
        }
        self._n = request.n or 1
        self._copies = 1  # of each text that the engine makes
        self._texts: list[str] = []

    async def start(self) -> Generation:
        """Raises ApiError for a request that can't be run."""
        request, engine = self._request, self._state.ready_engine()
        self._state.check_model(request.model)
        prompts = request.prompts
        best_of = request.best_of or self._n
        if len(prompts) * best_of > MAX_PROMPTS:
            raise bad_request(
                f"the request is for {len(prompts) * best_of} texts; at most {MAX_PROMPTS} go into one", "prompt"
            )
        add_special_tokens = request.add_special_tokens is not False
        token_ids = [await encoded(engine, prompt, add_special_tokens) for prompt in prompts]
        logprobs = request.logprobs
        if best_of > self._n and logprobs is None:
            logprobs = 0
        overrides: dict[str, Any] = {}
        if request.echo and request.logprobs is not None and request.prompt_logprobs is None:
            overrides["prompt_logprobs"] = request.logprobs
        max_tokens = _DEFAULT_MAX_TOKENS if request.max_tokens is None else request.max_tokens
        params = sampling_params(
            request,
            engine.parts.generation_config,
            n=best_of,
            max_tokens=max(1, max_tokens),  # the token that echo alone does not want is dropped below
            logprobs=logprobs,
            **overrides,
        )
        self._copies = best_of // params.n
        if request.echo and request.logprobs is not None and (request.prompt_logprobs or 99) < request.logprobs:
            raise bad_request("with echo, prompt_logprobs can't be less than logprobs", "prompt_logprobs")
        if request.echo:
            decode = self._tokenizer.decode
            self._texts = [
                p
                if isinstance(p, str)
                else await asyncio.to_thread(decode, p, request.skip_special_tokens is not False)
                for p in prompts
            ]
        return await Generation(self._state, token_ids, params, request, self._record).start()

    async def answer(self, generation: Generation) -> dict[str, Any]:
        async with generation:
            outputs = await generation.finish()
        choices = []
        for prompt_index, output in enumerate(outputs):
            best = [completion for completion in output.outputs for _ in range(self._copies)]
            if len(best) > self._n:  # the likeliest by token, as OpenAI ranks them
                best = sorted(best, key=_mean_logprob, reverse=True)[: self._n]
            choices += [self._whole_choice(prompt_index, i, output, completion) for i, completion in enumerate(best)]
        return self._head | {"choices": choices, "usage": self._usage(outputs)}

    async def chunks(self, generation: Generation) -> AsyncIterator[Chunk | None]:
        options = self._request.stream_options
        include_usage = options is not None and options.include_usage is True
        usage_in_each = options is not None and options.continuous_usage_stats is True
        no_usage = {"usage": None} if include_usage else {}
        texts = TextChunks(lambda index, text: self._head | {"choices": [self._choice(index, text)]} | no_usage)
        only_texts = self._request.logprobs is None and not self._request.return_token_ids and not usage_in_each
        async with generation:
            async for choice in self._chunk_choices(generation):
                if choice is None:
                    yield None
                    continue
                if only_texts and choice["finish_reason"] is None:
                    yield texts.write(choice["index"], choice["text"])
                    continue
                chunk = self._head | {"choices": [choice]}
                if usage_in_each:
                    chunk["usage"] = self._usage(generation.outputs)
                elif include_usage:
                    chunk["usage"] = None
                yield chunk
        if include_usage:
            yield self._head | {"choices": [], "usage": self._usage(generation.outputs)}

    async def _chunk_choices(self, generation: Generation) -> AsyncIterator[dict[str, Any] | None]:
        """None where nothing has come for a while. A choice begins with its echo: at once, or, with its
        log-probabilities, when they are known."""
        request = self._request
        logprobs: dict[int, CompletionLogprobs] = {}
        seen: set[int] = set()
        if request.echo and request.logprobs is None:
            for prompt_index, output in enumerate(generation.outputs):
                for index in range(prompt_index * self._n, (prompt_index + 1) * self._n):
                    seen.add(index)
                    yield self._echo_choice(index, prompt_index, output)
        async for part in generation.parts(self._state.settings.keep_alive):
            if part is None:
                yield None
                continue
            output = generation.outputs[part.prompt_index]
            first = part.prompt_index * self._n + part.completion.index * self._copies
            for index in range(first, first + self._copies):
                begins = index not in seen
                seen.add(index)
                if begins and request.logprobs is not None:
                    logprobs[index] = self._logprobs()
                if begins and request.echo:
                    yield self._echo_choice(index, part.prompt_index, output, logprobs[index])
                elif begins and request.logprobs is not None:
                    logprobs[index].skip(output.prompt_token_ids[-8:])
                choice = self._part_choice(index, part, logprobs.get(index))
                if request.return_token_ids and begins and not request.echo:
                    choice["prompt_token_ids"] = output.prompt_token_ids
                yield choice

    def _echo_choice(
        self, index: int, prompt_index: int, output: RequestOutput, logprobs: CompletionLogprobs | None = None
    ) -> dict[str, Any]:
        choice = self._choice(index, self._texts[prompt_index])
        if logprobs is not None:
            choice["logprobs"] = logprobs.push(output.prompt_token_ids, output.prompt_logprobs or [])
        if self._request.return_token_ids:
            choice |= {"prompt_token_ids": output.prompt_token_ids, "token_ids": []}
        return choice

    def _part_choice(self, index: int, part: Part, logprobs: CompletionLogprobs | None) -> dict[str, Any]:
        piece, echoes_only = part.completion, self._request.max_tokens == 0
        choice = self._choice(index, "" if echoes_only else piece.text, piece.finish_reason, piece.stop_reason)
        if echoes_only:  # how the token that nobody asked for ended says nothing
            choice |= ending("length", None)
        if logprobs is not None:
            count = 0 if echoes_only else len(piece.token_ids)
            choice["logprobs"] = logprobs.push(piece.token_ids[:count], piece.logprobs[:count])
        if self._request.return_token_ids:
            choice["token_ids"] = [] if echoes_only else list(piece.token_ids)
        return choice

    def _whole_choice(
        self, prompt_index: int, index: int, output: RequestOutput, completion: CompletionOutput
    ) -> dict[str, Any]:
        request = self._request
        echoes_only = request.max_tokens == 0
        text = "" if echoes_only else completion.text
        token_ids = [] if echoes_only else completion.token_ids
        if request.echo:
            text = self._texts[prompt_index] + text
        choice = self._choice(prompt_index * self._n + index, text, completion.finish_reason, completion.stop_reason)
        if echoes_only:
            choice |= ending("length", None)
        if request.logprobs is not None:
            writer, shown = self._logprobs(), []
            if request.echo:
                shown.append(writer.push(output.prompt_token_ids, output.prompt_logprobs or []))
            else:
                writer.skip(output.prompt_token_ids[-8:])
            shown.append(writer.push(token_ids, (completion.logprobs or [])[: len(token_ids)]))
            choice["logprobs"] = _merged(shown)
        if request.return_token_ids:
            choice |= {"prompt_token_ids": output.prompt_token_ids, "token_ids": token_ids}
        if request.prompt_logprobs is not None:
            choice["prompt_logprobs"] = prompt_logprobs(output.prompt_logprobs or [])
        return choice

    def _choice(
        self, index: int, text: str, finish_reason: str | None = None, stop_reason: str | int | None = None
    ) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": None} | ending(finish_reason, stop_reason)

    def _logprobs(self) -> CompletionLogprobs:
        request = self._request
        return CompletionLogprobs(self._tokenizer, request.logprobs or 0, request.skip_special_tokens is not False)

    def _usage(self, outputs: list[RequestOutput]) -> dict[str, Any]:
        return usage(outputs, self._record.cached_tokens, 0 if self._request.max_tokens == 0 else self._copies)


def ending(finish_reason: str | None, stop_reason: str | int | None) -> dict[str, Any]:
    """A request that ran out of time is one that was cut off at a length; stop_reason, vLLM's field, says which."""
    if finish_reason == "deadline":
        return {"finish_reason": "length", "stop_reason": "deadline"}
    return {"finish_reason": finish_reason, "stop_reason": stop_reason}


def usage(
    outputs: list[RequestOutput], cached_tokens: int, copies: int = 1, reasoning_tokens: int | None = None
) -> dict[str, Any]:
    """`copies`: how often each text is shown. `cached_tokens` and `reasoning_tokens` are among those counted."""
    prompt = sum(len(output.prompt_token_ids) for output in outputs)
    completion = copies * sum(len(completion.token_ids) for output in outputs for completion in output.outputs)
    found: dict[str, Any] = {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
    }
    if reasoning_tokens is not None:
        found["completion_tokens_details"] = {"reasoning_tokens": reasoning_tokens}
    return found


def fingerprint(state: ServerState) -> str:
    """The same for the same model, in the same numbers, by the same version: then seeds give the same texts."""
    parts = state.ready_engine().parts
    numbers = f"{parts.config} {parts.engine_config.kv_cache_dtype}"
    digest = hashlib.sha256(f"{state.settings.model_name} {numbers}".encode()).hexdigest()
    return f"puna-{__version__}-{digest[:8]}"


def _mean_logprob(completion: CompletionOutput) -> float:
    count = len(completion.token_ids)
    return (completion.cumulative_logprob or 0.0) / count if count else float("-inf")


def _merged(pieces: list[dict[str, Any]]) -> dict[str, Any]:
    names = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
    return {name: [entry for piece in pieces for entry in piece[name]] for name in names}
