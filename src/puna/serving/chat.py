"""/v1/chat/completions: a conversation in, answers out, whole or streamed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

from puna.engine.engine import Engine
from puna.engine.outputs import CompletionOutput
from puna.serving.completions import ending, usage
from puna.serving.errors import bad_request
from puna.serving.generation import Generation
from puna.serving.logprobs import chat_logprobs, prompt_logprobs
from puna.serving.message import MessageWriter, joined
from puna.serving.protocol import ChatRequest, Message, Tool
from puna.serving.record import RequestRecord
from puna.serving.sampling import sampling_params
from puna.serving.state import ServerState
from puna.serving.tools import Dialect, dialect_of, forcing, offered_tools, parser_for


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
        self._created = int(time.time())

    async def start(self) -> Generation:
        """Raises ApiError for a request that can't be run."""
        request, engine = self._request, self._state.ready_engine()
        self._state.check_model(request.model)
        self._tools = offered_tools(request)
        overrides: dict[str, Any] = {}
        if self._tools:
            self._dialect = await asyncio.to_thread(dialect_of, self._tokenizer)
            if self._dialect is None:
                raise bad_request("this model's chat template knows no tools: leave them out", "tools")
            if self._dialect != "hermes":  # there, the marks of calls are special tokens
                overrides["skip_special_tokens"] = False
        token_ids = await encode_conversation(
            engine,
            request.messages,
            add_generation_prompt=request.add_generation_prompt,
            continue_final_message=request.continue_final_message,
            variables=request.chat_template_kwargs,
            tools=[tool.model_dump(exclude_none=True) for tool in self._tools] or None,
        )
        params = sampling_params(
            request,
            engine.parts.generation_config,
            n=request.n or 1,
            max_tokens=request.max_completion_tokens or request.max_tokens,
            logprobs=(request.top_logprobs or 0) if request.logprobs else None,
            guided=forcing(request, self._tools),
            **overrides,
        )
        return await Generation(self._state, [token_ids], params, request, self._record).start()

    async def answer(self, generation: Generation) -> dict[str, Any]:
        request = self._request
        async with generation:
            (output,) = await generation.finish()
        found = self._head("chat.completion") | {
            "choices": [self._whole_choice(completion) for completion in output.outputs],
            "usage": usage([output]),
        }
        if request.prompt_logprobs is not None:
            found["prompt_logprobs"] = prompt_logprobs(output.prompt_logprobs or [])
        if request.return_token_ids:
            found["prompt_token_ids"] = output.prompt_token_ids
        return found

    async def chunks(self, generation: Generation) -> AsyncIterator[dict[str, Any] | None]:
        request = self._request
        include_usage = request.stream_options is not None and request.stream_options.include_usage
        head = self._head("chat.completion.chunk") | ({"usage": None} if include_usage else {})
        async with generation:
            (output,) = generation.outputs
            for completion in output.outputs:
                first = head | {"choices": [self._chunk_choice(completion.index, {"role": "assistant", "content": ""})]}
                if request.return_token_ids and completion.index == 0:
                    first["prompt_token_ids"] = output.prompt_token_ids
                yield first
            writers = [self._writer() for _ in output.outputs]
            async for part in generation.parts(self._state.settings.keep_alive):
                if part is None:
                    yield None
                    continue
                piece = part.completion
                deltas = writers[piece.index].push(piece.text, piece.finish_reason)
                last = deltas.pop() if deltas else {}
                for delta in deltas:
                    yield head | {"choices": [self._chunk_choice(piece.index, delta)]}
                if not last and piece.finish_reason is None and not (request.logprobs or request.return_token_ids):
                    continue  # half a character, or what may yet become a stop string or a call
                choice = self._chunk_choice(piece.index, last)
                choice |= ending(writers[piece.index].finish_reason(piece.finish_reason), piece.stop_reason)
                if request.logprobs:
                    choice["logprobs"] = self._logprobs(piece.token_ids, piece.logprobs)
                if request.return_token_ids:
                    choice["token_ids"] = list(piece.token_ids)
                yield head | {"choices": [choice]}
        if include_usage:
            yield head | {"choices": [], "usage": usage(generation.outputs)}

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._request.model}

    def _whole_choice(self, completion: CompletionOutput) -> dict[str, Any]:
        writer = self._writer()
        message = joined(writer.push(completion.text, completion.finish_reason))
        choice: dict[str, Any] = {"index": completion.index, "message": message, "logprobs": None}
        choice |= ending(writer.finish_reason(completion.finish_reason), completion.stop_reason)
        if self._request.logprobs:
            choice["logprobs"] = self._logprobs(completion.token_ids, completion.logprobs or [])
        if self._request.return_token_ids:
            choice["token_ids"] = completion.token_ids
        return choice

    def _writer(self) -> MessageWriter:
        parser = parser_for(self._request, self._tools, self._dialect)
        return MessageWriter(parser, self._request.named_tool, self._dialect)

    def _chunk_choice(self, index: int, delta: dict[str, Any]) -> dict[str, Any]:
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def _logprobs(self, token_ids: Any, positions: Any) -> dict[str, Any]:
        return chat_logprobs(token_ids, positions, self._request.top_logprobs or 0, self._tokenizer)


async def encode_conversation(
    engine: Engine,
    messages: list[Message],
    *,
    add_generation_prompt: bool | None,
    continue_final_message: bool | None,
    variables: dict[str, Any] | None,
    tools: list[dict[str, Any]] | None = None,
) -> list[int]:
    """Through the model's own template. An assistant's last message is not over where it is to be continued."""
    continues = continue_final_message is True
    if continues and add_generation_prompt:
        raise bad_request(
            "continue_final_message and add_generation_prompt can't both be true: the last message is not over",
            "continue_final_message",
        )
    adds = not continues if add_generation_prompt is None else add_generation_prompt
    chat = [message.for_template() for message in messages]
    try:
        return await asyncio.to_thread(engine.parts.tokenizer.encode_chat, chat, tools, adds, continues, variables)
    except ValueError as error:
        raise bad_request(str(error), "messages") from None
