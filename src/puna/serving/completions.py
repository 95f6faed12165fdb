"""/v1/completions: prompts in, texts out, whole or streamed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

from puna.engine.outputs import CompletionOutput, RequestOutput
from puna.serving.errors import bad_request
from puna.serving.generation import Generation, Part, encoded
from puna.serving.logprobs import CompletionLogprobs, prompt_logprobs
from puna.serving.protocol import MAX_PROMPTS, CompletionRequest
from puna.serving.record import RequestRecord
from puna.serving.sampling import sampling_params
from puna.serving.state import ServerState

_DEFAULT_MAX_TOKENS = 16  # OpenAI's


class Completion:
    """One request from its fields to its answer. `start` first; then either `answer` or `chunks`."""

    def __init__(self, state: ServerState, request: CompletionRequest, record: RequestRecord) -> None:
        self._state = state
        self._request = request
        self._record = record
        self._tokenizer = state.ready_engine().parts.tokenizer
        self._head = {"id": f"cmpl-{record.request_id}", "object": "text_completion", "created": int(time.time())}
        self._n = request.n or 1
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
            best = output.outputs
            if len(best) > self._n:  # the likeliest by token, as OpenAI ranks them
                best = sorted(best, key=_mean_logprob, reverse=True)[: self._n]
            choices += [self._whole_choice(prompt_index, i, output, completion) for i, completion in enumerate(best)]
        return self._head | {"model": self._request.model, "choices": choices, "usage": self._usage(outputs)}

    async def chunks(self, generation: Generation) -> AsyncIterator[dict[str, Any] | None]:
        request = self._request
        include_usage = request.stream_options is not None and request.stream_options.include_usage
        common = self._head | {"model": request.model} | ({"usage": None} if include_usage else {})
        logprobs: dict[int, CompletionLogprobs] = {}
        async with generation:
            echoes_only = request.max_tokens == 0
            seen: set[int] = set()
            if request.echo and request.logprobs is None:
                for i, output in enumerate(generation.outputs):
                    for k in range(self._n):
                        choice = self._choice(i * self._n + k, self._texts[i])
                        if request.return_token_ids:
                            choice |= {"prompt_token_ids": output.prompt_token_ids, "token_ids": []}
                        seen.add(i * self._n + k)
                        yield common | {"choices": [choice]}
            async for part in self._parts(generation):
                if part is None:
                    yield None
                    continue
                index = part.prompt_index * self._n + part.completion.index
                output = generation.outputs[part.prompt_index]
                choice = self._part_choice(index, part, logprobs, output, echoes_only)
                if request.return_token_ids and index not in seen:
                    choice["prompt_token_ids"] = output.prompt_token_ids
                if index not in seen and request.echo:
                    choice["text"] = self._texts[part.prompt_index] + choice["text"]
                seen.add(index)
                yield common | {"choices": [choice]}
        if include_usage:
            yield common | {"choices": [], "usage": self._usage(generation.outputs)}

    async def _parts(self, generation: Generation) -> AsyncIterator[Part | None]:
        """The generation's; all of them at its end where an echo needs the prompt's log-probabilities, told then."""
        waits = self._request.echo and self._request.logprobs is not None
        held: list[Part] = []
        async for part in generation.parts(self._state.settings.keep_alive):
            if part is not None and waits:
                held.append(part)
            else:
                yield part
        for part in held:
            yield part

    def _part_choice(
        self,
        index: int,
        part: Part,
        logprobs: dict[int, CompletionLogprobs],
        output: RequestOutput,
        echoes_only: bool,
    ) -> dict[str, Any]:
        piece = part.completion
        choice = self._choice(index, "" if echoes_only else piece.text, piece.finish_reason, piece.stop_reason)
        if echoes_only:  # how the token that nobody asked for ended says nothing
            choice |= ending("length", None)
        if self._request.logprobs is not None:
            shown = []
            if index not in logprobs:
                logprobs[index] = self._logprobs()
                if self._request.echo:
                    shown.append(logprobs[index].push(output.prompt_token_ids, output.prompt_logprobs or []))
                else:
                    logprobs[index].skip(output.prompt_token_ids[-8:])
            if not echoes_only:
                shown.append(logprobs[index].push(piece.token_ids, piece.logprobs))
            choice["logprobs"] = _merged(shown)
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
        return usage(outputs, shown_tokens=0 if self._request.max_tokens == 0 else None)


def ending(finish_reason: str | None, stop_reason: str | int | None) -> dict[str, Any]:
    """A request that ran out of time is one that was cut off at a length; stop_reason, vLLM's field, says which."""
    if finish_reason == "deadline":
        return {"finish_reason": "length", "stop_reason": "deadline"}
    return {"finish_reason": finish_reason, "stop_reason": stop_reason}


def usage(outputs: list[RequestOutput], shown_tokens: int | None = None) -> dict[str, Any]:
    prompt = sum(len(output.prompt_token_ids) for output in outputs)
    generated = sum(len(completion.token_ids) for output in outputs for completion in output.outputs)
    completion = generated if shown_tokens is None else shown_tokens
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def _mean_logprob(completion: CompletionOutput) -> float:
    count = len(completion.token_ids)
    return (completion.cumulative_logprob or 0.0) / count if count else float("-inf")


def _merged(pieces: list[dict[str, Any]]) -> dict[str, Any]:
    names = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
    return {name: [entry for piece in pieces for entry in piece[name]] for name in names}
