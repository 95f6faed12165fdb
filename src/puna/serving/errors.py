"""ApiError and the shape in which OpenAI's clients expect errors; how pydantic's messages become one of them."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

from fastapi import HTTPException, Response

_TYPES: Final = frozenset(["str", "int", "float", "bool"])
# httpx and requests end lines here, too: their clients would see half an event.
_LINE_ENDS: Final = re.compile("[\x85\u2028\u2029]")


class ApiError(HTTPException):
    """An answer that is no success. `param` names the field at fault; `code` is OpenAI's word, where it has one.

    FastAPI would turn any other exception that is raised while it reads a body into one of its own.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(status, message)
        self.message = message
        self.kind = kind
        self.param = param
        self.code = code
        self.retry_after = retry_after

    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        headers = dict(self.headers or {})
        if self.retry_after is not None:
            headers["retry-after"] = str(max(1, math.ceil(self.retry_after)))
        if self.status_code == 401:
            headers["www-authenticate"] = "Bearer"
        return json_response(self.body(), self.status_code, headers)


def bad_request(message: str, param: str | None = None) -> ApiError:
    return ApiError(400, message, param=param)


def validation_error(errors: Sequence[Any]) -> ApiError:
    """What pydantic found wrong first, as a 400 that names the field."""
    first = errors[0]
    # Of the alternatives of a union, what is wrong with the one that fits best: the errors in it lie deepest.
    *parent, last = first["loc"]
    if _is_alternative(last) and first["type"] != "extra_forbidden":
        first = max((each for each in errors if list(each["loc"][: len(parent)]) == parent), key=_depth)
    # Without "body", and without the names of alternatives, which are pydantic's and not the client's.
    given = first["loc"][-1:] if first["type"] == "extra_forbidden" else ()
    parts = [str(p) for p in first["loc"][1 : len(first["loc"]) - len(given)] if not _is_alternative(p)]
    parts += map(str, given)
    place = ".".join(parts)
    if first["type"] == "json_invalid":
        return bad_request("the body is no valid JSON")
    if first["type"] == "extra_forbidden":
        return bad_request(f"{place}: this server does not know this field; leave it out", place)
    if not place and isinstance(first["input"], bytes):  # FastAPI reads only what says that it is JSON
        return bad_request("the body must be JSON: send it with content-type: application/json")
    if not place and first["type"] in ("missing", "model_attributes_type"):
        return bad_request("the body must be a JSON object")
    message = str(first["msg"]).removeprefix("Value error, ")
    # What fields are to each other is told of the object that has them, in words that begin with one of them.
    word = message.partition(" ")[0]
    if first["type"] == "value_error" and isinstance(first["input"], dict) and word in first["input"]:
        return bad_request(message, ".".join([*parts, word]))
    return bad_request(f"{place}: {message}" if place else message, place or None)


def _is_alternative(part: str | int) -> bool:
    """Types and models stand between the names of fields, which are all in lower case."""
    return isinstance(part, str) and (part in _TYPES or not part.isidentifier() or not part.islower())


def _depth(error: Any) -> int:
    return len(error["loc"])


# Made once: json.dumps makes one for every call that has options.
_ENCODER: Final = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def dumps(value: Any) -> bytes:
    """JSON as UTF-8, in one line whatever a client takes for a line's end."""
    text = _ENCODER.encode(value)
    if not text.isascii():
        text = _LINE_ENDS.sub(lambda found: f"\\u{ord(found[0]):04x}", text)
    try:
        return text.encode()
    except UnicodeEncodeError:  # half a surrogate pair, which the client sent
        return json.dumps(value, allow_nan=False, separators=(",", ":")).encode()


def json_response(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(dumps(value), status, dict(headers or {}), "application/json")
