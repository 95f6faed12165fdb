"""A conversation through a chat template: the prompt's text and tokens."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from puna.engine.chat_template import ChatTemplate
from puna.engine.engine import Engine
from puna.serving.errors import bad_request
from puna.serving.protocol import Message


@dataclass(frozen=True, slots=True)
class Conversation:
    """`continued` is the last message's text, where that is not over."""

    text: str
    token_ids: list[int]
    continued: str | None


async def own_template(engine: Engine, source: str | None, is_trusted: bool) -> ChatTemplate:
    """The model's, or the request's own where the server was told to take such."""
    tokenizer = engine.parts.tokenizer
    if source is None:
        if tokenizer.chat_template is None:
            raise bad_request("this model has no chat template: send its prompt to /v1/completions", "messages")
        return tokenizer.chat_template
    if not is_trusted:
        raise bad_request(
            "chat_template is taken only by servers that were started with --trust-request-chat-template; leave it out",
            "chat_template",
        )
    try:
        return await asyncio.to_thread(tokenizer.isolated_chat_template, source)
    except ValueError as error:
        raise bad_request(str(error), "chat_template") from None


async def encode_conversation(
    engine: Engine,
    template: ChatTemplate,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool | None,
    continue_final_message: bool | None,
    variables: dict[str, Any] | None,
    tools: list[dict[str, Any]] | None = None,
    field: str = "messages",
) -> Conversation:
    """An assistant's last message is not over where it is to be continued.

    Raises ApiError; for what the template refuses it names `field`.
    """
    continues = continue_final_message is True
    if continues and add_generation_prompt:
        raise bad_request(
            "continue_final_message and add_generation_prompt can't both be true: the last message is not over",
            "continue_final_message",
        )
    adds = not continues if add_generation_prompt is None else add_generation_prompt
    chat = [message.for_template() for message in messages]
    tokenizer = engine.parts.tokenizer

    def encode() -> Conversation:
        text = template.render(chat, tools, adds, continues, variables)
        token_ids = tokenizer.encode(text, add_special_tokens=False, parse_special=True)
        return Conversation(text, token_ids, chat[-1]["content"] if continues else None)

    try:
        return await asyncio.to_thread(encode)
    except ValueError as error:
        raise bad_request(str(error), field) from None
