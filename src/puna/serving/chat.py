"""/v1/chat/completions: a conversation in, answers out, whole or streamed."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import Any

from puna.engine.chat_template import ChatTemplate
from puna.engine.outputs import CompletionOutput, RequestOutput
from puna.serving.completions import ending, fingerprint, usage
from puna.serving.conversation import Conversation, encode_conversation, own_template
from puna.serving.errors import bad_request
from puna.serving.generation import Generation
from puna.serving.logprobs import chat_logprobs, prompt_logprobs
from puna.serving.message import MessageWriter
from puna.serving.protocol import ChatRequest, Tool
from puna.serving.reasoning import Reasoning
from puna.serving.record import RequestRecord
from puna.serving.sampling import sampling_params
from puna.serving.state import ServerState
from puna.serving.streaming import Chunk, TextChunks
from puna.serving.tools import (
    Dialect,
    as_for_template,
    forcing,
    needs_special_tokens,
    offered_tools,
    parser_for,
    tools_dialect,
)


class Chat:
    """One request from its fields to its answer. `start` first; then either `answer` or `chunks`."""

    def __init__(self, state: ServerState, request: ChatRequest, record: RequestRecord) -> None:
        self._state = state
        self._request = request
        self._record = record
        self._tokenizer = state.ready_engine().parts.tokenizer
        self._id = f"chatcmpl-{record.request_id}"
        self._tools: list[Tool] = []
        self._dialect: Dialect | None = None
        self._reasoning: Reasoning | None = None
        self._created = int(time.time())
        self._copies = 1  # of each text that the engine makes

    async def start(self) -> Generation:
        """Raises ApiError for a request that can't be run."""
        request, engine = self._request, self._state.ready_engine()
        self._state.check_model(request.model)
        template = await own_template(engine, request.chat_template, self._state.settings.trusts_request_template)
        self._tools = offered_tools(request)
        if self._tools:
            self._dialect = await tools_dialect(template)
        conversation = await encode_conversation(
            engine,
            template,
            request.messages,
            add_generation_prompt=request.add_generation_prompt,
            continue_final_message=request.continue_final_message,
            variables=_variables(request, template),
            tools=as_for_template(self._tools),
            field="messages" if request.chat_template is None else "chat_template",
        )
        if self._state.settings.splits_reasoning:
            self._reasoning = Reasoning.of(template, conversation.text, conversation.continued)
        return await self._submit(conversation)

    async def _submit(self, conversation: Conversation) -> Generation:
        request, engine = self._request, self._state.ready_engine()
        marks = None if self._reasoning is None else self._reasoning.marks(self._tokenizer)
        overrides: dict[str, Any] = {}
        # Marks that are special tokens must show, of calls and of reasoning.
        special_marks = marks is not None and isinstance(marks.end, int)
        if special_marks or needs_special_tokens(self._dialect, self._tokenizer):
            overrides["skip_special_tokens"] = False
        params = sampling_params(
            request,
            engine.parts.generation_config,
            n=request.n or 1,
            max_tokens=request.max_completion_tokens or request.max_tokens,
            logprobs=(request.top_logprobs or 0) if request.logprobs else None,
            guided=forcing(request, self._tools, self._dialect, self._tokenizer),
            reasoning=marks,
            **overrides,
        )
        self._copies = (request.n or 1) // params.n
        return await Generation(self._state, [conversation.token_ids], params, request, self._record).start()

    async def answer(self, generation: Generation) -> dict[str, Any]:
        request = self._request
        async with generation:
            (output,) = await generation.finish()
        choices = [
            self._whole_choice(completion, completion.index * self._copies + copy)
            for completion in output.outputs
            for copy in range(self._copies)
        ]
        found = self._head("chat.completion") | {"choices": choices, "usage": self._usage(output)}
        if request.prompt_logprobs is not None:
            found["prompt_logprobs"] = prompt_logprobs(output.prompt_logprobs or [])
        if request.return_token_ids:
            found["prompt_token_ids"] = output.prompt_token_ids
        return found

    async def chunks(self, generation: Generation) -> AsyncIterator[Chunk | None]:
        options = self._request.stream_options
        include_usage = options is not None and options.include_usage is True
        usage_in_each = options is not None and options.continuous_usage_stats is True
        head = self._head("chat.completion.chunk")
        request, no_usage = self._request, {"usage": None} if include_usage else {}
        texts = TextChunks(lambda index, text: head | {"choices": [self._text_choice(index, text)]} | no_usage)
        only_texts = not (request.logprobs or request.return_token_ids or usage_in_each)
        async with generation:
            (output,) = generation.outputs
            async for choice in self._chunk_choices(generation, output):
                if choice is None:
                    yield None
                    continue
                if only_texts and choice["finish_reason"] is None and choice["delta"].keys() == {"content"}:
                    yield texts.write(choice["index"], choice["delta"]["content"])
                    continue
                chunk = head | {"choices": [choice]}
                if self._request.return_token_ids and choice["delta"].get("role") and choice["index"] == 0:
                    chunk["prompt_token_ids"] = output.prompt_token_ids
                if usage_in_each:  # without the reasoning's share, which would be counted anew each time
                    chunk["usage"] = usage([output], self._record.cached_tokens, self._copies)
                elif include_usage:
                    chunk["usage"] = None
                yield chunk
        if include_usage:
            yield head | {"choices": [], "usage": self._usage(output)}

    async def _chunk_choices(
        self, generation: Generation, output: RequestOutput
    ) -> AsyncIterator[dict[str, Any] | None]:
        """None where nothing has been told for a while."""
        request, keep_alive = self._request, self._state.settings.keep_alive
        writers = [self._writer() for _ in range(len(output.outputs) * self._copies)]
        for index in range(len(writers)):
            yield self._chunk_choice(index, {"role": "assistant", "content": "", "refusal": None})
        told = time.monotonic()
        async for part in generation.parts(keep_alive):
            now = time.monotonic()
            if part is None:
                told = now
                yield None
                continue
            piece = part.completion
            for index in range(piece.index * self._copies, (piece.index + 1) * self._copies):
                deltas = writers[index].push(piece.text, piece.finish_reason)
                last = deltas.pop() if deltas else {}
                for delta in deltas:
                    yield self._chunk_choice(index, delta)
                if not last and piece.finish_reason is None and not (request.logprobs or request.return_token_ids):
                    # Half a character, what may yet become a stop string or a call, or reasoning that is not shown.
                    if now - told > keep_alive:
                        told = now
                        yield None
                    continue
                told = now
                choice = self._chunk_choice(index, last)
                choice |= ending(writers[index].finish_reason(piece.finish_reason), piece.stop_reason)
                if request.logprobs:
                    choice["logprobs"] = self._logprobs(piece.token_ids, piece.logprobs)
                if request.return_token_ids:
                    choice["token_ids"] = list(piece.token_ids)
                yield choice

    def _head(self, kind: str) -> dict[str, Any]:
        head = {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": self._request.model,
            "system_fingerprint": fingerprint(self._state),
        }
        return head if self._request.service_tier is None else head | {"service_tier": "default"}

    def _whole_choice(self, completion: CompletionOutput, index: int) -> dict[str, Any]:
        writer = self._writer()
        message = writer.message(writer.push(completion.text, completion.finish_reason))
        choice: dict[str, Any] = {"index": index, "message": message, "logprobs": None}
        choice |= ending(writer.finish_reason(completion.finish_reason), completion.stop_reason)
        if self._request.logprobs:
            choice["logprobs"] = self._logprobs(completion.token_ids, completion.logprobs or [])
        if self._request.return_token_ids:
            choice["token_ids"] = completion.token_ids
        return choice

    def _writer(self) -> MessageWriter:
        request = self._request
        return MessageWriter(
            parser_for(request, self._tools, self._dialect),
            named_tool=request.named_tool,
            dialect=self._dialect,
            reasoning=self._reasoning,
            shows_reasoning=request.include_reasoning is not False,
            only_one_call=request.parallel_tool_calls is False,
        )

    def _chunk_choice(self, index: int, delta: dict[str, Any]) -> dict[str, Any]:
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def _text_choice(self, index: int, text: str) -> dict[str, Any]:
        return self._chunk_choice(index, {"content": text}) | ending(None, None)

    def _logprobs(self, token_ids: Any, positions: Any) -> dict[str, Any]:
        return chat_logprobs(token_ids, positions, self._request.top_logprobs or 0, self._tokenizer)

    def _usage(self, output: RequestOutput) -> dict[str, Any]:
        reasoning = 0
        if self._reasoning is not None:
            counted = (
                self._reasoning.count(completion.token_ids, output.prompt_token_ids, self._tokenizer)
                for completion in output.outputs
            )
            reasoning = self._copies * sum(counted)
        return usage([output], self._record.cached_tokens, self._copies, reasoning)


def _variables(request: ChatRequest, template: ChatTemplate) -> dict[str, Any] | None:
    """The template's, with what reasoning_effort asks of it. Raises ApiError where it knows no such thing."""
    effort = request.reasoning_effort
    if effort is None:
        return request.chat_template_kwargs
    found: dict[str, Any] | None = None
    if template.mentions("reasoning_effort"):
        found = {"reasoning_effort": effort}
    elif effort == "none":
        found = next(({name: False} for name in ("enable_thinking", "thinking") if template.mentions(name)), None)
    if found is None:
        raise bad_request(
            f"reasoning_effort is {effort!r}, and this model's template has no such setting: leave it out",
            "reasoning_effort",
        )
    return found | (request.chat_template_kwargs or {})
