"""Log-probabilities in the three shapes that clients know: of completions, of chat, and vLLM's of prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from puna.engine.detokenizer import Detokenizer
from puna.engine.outputs import Logprob, PositionLogprobs
from puna.engine.tokenizer import Tokenizer

# What OpenAI shows for a token that can't come: JSON has no infinity.
_LEAST: Final = -9999.0


class CompletionLogprobs:
    """The `logprobs` of one choice of a completion, piece by piece; keeps the text's length for the offsets."""

    def __init__(self, tokenizer: Tokenizer, count: int, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._count = count
        self._text = Detokenizer(tokenizer, skip_special_tokens)
        self._offset = 0

    def skip(self, token_ids: Sequence[int]) -> None:
        """The tokens before the first one that is shown, which decide how that one reads."""
        for token_id in token_ids:
            self._text.push(token_id)

    def push(self, token_ids: Sequence[int], positions: Sequence[PositionLogprobs | None]) -> dict[str, Any]:
        found: dict[str, Any] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for token_id, position in zip(token_ids, positions, strict=True):
            found["text_offset"].append(self._offset)
            self._offset += len(self._text.push(token_id))
            if position is None:
                found["tokens"].append(self._tokenizer.decode([token_id], skip_special_tokens=False))
                found["token_logprobs"].append(None)
                found["top_logprobs"].append(None)
                continue
            found["tokens"].append(_text(position[token_id]))
            found["token_logprobs"].append(_value(position[token_id]))
            top: dict[str, float] = {}
            for logprob in _likeliest(position, self._count, token_id):
                # Several tokens may read the same (parts of characters): the likeliest one stands for them.
                top[_text(logprob)] = max(_value(logprob), top.get(_text(logprob), _LEAST))
            found["top_logprobs"].append(top)
        return found


def chat_logprobs(
    token_ids: Sequence[int], positions: Sequence[PositionLogprobs], count: int, tokenizer: Tokenizer
) -> dict[str, Any]:
    content = []
    for token_id, position in zip(token_ids, positions, strict=True):
        entry = _chat_entry(token_id, position[token_id], tokenizer)
        top = sorted((item for item in position.items() if (item[1].rank or 0) <= count), key=lambda i: i[1].rank or 0)
        entry["top_logprobs"] = [_chat_entry(other, logprob, tokenizer) for other, logprob in top[:count]]
        content.append(entry)
    return {"content": content, "refusal": None}


def prompt_logprobs(positions: Sequence[PositionLogprobs | None]) -> list[dict[str, Any] | None]:
    return [
        None
        if position is None
        else {
            str(token_id): {"logprob": _value(one), "rank": one.rank, "decoded_token": one.decoded_token}
            for token_id, one in position.items()
        }
        for position in positions
    ]


def _likeliest(position: PositionLogprobs, count: int, chosen: int) -> list[Logprob]:
    """The `count` likeliest, and the chosen one where it is none of them."""
    return [one for token_id, one in position.items() if token_id == chosen or (one.rank or 0) <= count]


def _chat_entry(token_id: int, logprob: Logprob, tokenizer: Tokenizer) -> dict[str, Any]:
    token_bytes = tokenizer.decode_stream(False).token_bytes(token_id)
    return {"token": _text(logprob), "logprob": _value(logprob), "bytes": list(token_bytes)}


def _text(logprob: Logprob) -> str:
    return logprob.decoded_token or ""


def _value(logprob: Logprob) -> float:
    return max(logprob.logprob, _LEAST)
