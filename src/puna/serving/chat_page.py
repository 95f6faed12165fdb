"""The chat page's files, in the folder `page`, and how they are sent: with a policy under which nothing else loads."""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable
from importlib import resources
from types import MappingProxyType
from typing import Final

from fastapi import FastAPI, Request, Response

_MEDIA_TYPES: Final = MappingProxyType(
    {
        "index.html": "text/html",
        "style.css": "text/css",
        "app.js": "text/javascript",
        "api.js": "text/javascript",
        "dom.js": "text/javascript",
        "inline.js": "text/javascript",
        "markdown.js": "text/javascript",
        "message.js": "text/javascript",
        "store.js": "text/javascript",
        "icon.svg": "image/svg+xml",
    }
)
# No inline script, no other origin, and no string that becomes HTML or code (trusted types): should the page ever be
# tricked into showing a model's text as HTML, the browser refuses.
_POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)
_HEADERS: Final = MappingProxyType(
    {
        "content-security-policy": _POLICY,
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cross-origin-opener-policy": "same-origin",
        "cache-control": "no-cache",  # kept, but asked for anew each time: a new release shows at once
    }
)
# These paths need no key: the page has nothing that is not in the package. What it asks the API for does.
PAGE_PATHS: Final = frozenset(["/", *(f"/page/{name}" for name in _MEDIA_TYPES if name != "index.html")])


def add_chat_page(app: FastAPI) -> None:
    """Routes for GET and HEAD, which answer 304 to who has the file."""
    folder = resources.files("puna.serving") / "page"
    for name, media_type in _MEDIA_TYPES.items():
        path = "/" if name == "index.html" else f"/page/{name}"
        app.add_route(path, _sender((folder / name).read_bytes(), media_type), include_in_schema=False)


def _sender(content: bytes, media_type: str) -> Callable[[Request], Awaitable[Response]]:
    tag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
    headers = {**_HEADERS, "etag": tag}

    async def send(request: Request) -> Response:
        known = [each.strip().removeprefix("W/") for each in request.headers.get("if-none-match", "").split(",")]
        if tag in known or "*" in known:
            return Response(status_code=304, headers=headers)
        return Response(content, headers=headers, media_type=f"{media_type}; charset=utf-8")

    return send
