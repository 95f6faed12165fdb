"""The server's OpenAPI document: FastAPI's of the routes, with answers, errors and keys as this server has them."""

from __future__ import annotations

from types import MappingProxyType
from typing import Any, Final

from fastapi import FastAPI
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from puna.serving import answers
from puna.serving.state import ServerSettings

_REF: Final = "#/components/schemas/{model}"
_ANSWERS: Final = MappingProxyType[str, type[BaseModel]](
    {
        "/v1/completions": answers.CompletionAnswer,
        "/v1/chat/completions": answers.ChatAnswer,
        "/v1/embeddings": answers.EmbeddingAnswer,
        "/v1/models": answers.ModelList,
        "/v1/models/{name}": answers.ModelCard,
        "/tokenize": answers.TokenizeAnswer,
        "/detokenize": answers.DetokenizeAnswer,
        "/health": answers.HealthAnswer,
        "/ready": answers.ReadyAnswer,
        "/version": answers.VersionAnswer,
    }
)
_STREAMED: Final = ("/v1/completions", "/v1/chat/completions")
_QUEUED: Final = (*_STREAMED, "/v1/embeddings")
_WITHOUT_KEY: Final = ("/health", "/ready")
_ERRORS: Final = MappingProxyType(
    {
        400: "The request can't be run: which field it is, and why.",
        401: "The API key is missing or wrong.",
        403: "The server does not go by the name that it was asked under.",
        404: "There is no such model or path.",
        408: "The body was not there in time; or embeddings took longer than their deadline.",
        413: "The body is larger than --max-body-size.",
        422: "A schema, grammar or pattern is written well, but can't be held to.",
        429: "The queue is full.",
        500: "The engine failed.",
        503: "The model is loading, or the server is shutting down.",
    }
)


def describe(app: FastAPI, settings: ServerSettings) -> None:
    """Lets the app's document tell what FastAPI can't know. Every route must be there by now."""
    made_by_fastapi = app.openapi

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _completed(made_by_fastapi(), settings)
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]


def _completed(document: dict[str, Any], settings: ServerSettings) -> dict[str, Any]:
    components = document.setdefault("components", {})
    schemas = components.setdefault("schemas", {})
    for unused in ("HTTPValidationError", "ValidationError"):
        schemas.pop(unused, None)
    models = [(model, "serialization") for model in (*_ANSWERS.values(), answers.ErrorAnswer)]
    schemas |= models_json_schema(models, ref_template=_REF)[1]["$defs"]  # type: ignore[arg-type]
    for name in ("CompletionRequest", "ChatRequest", "EmbeddingRequest"):
        if name in schemas:  # so that what is made from the document asks for a model that there is
            schemas[name]["properties"]["model"]["enum"] = [settings.model_name]
    components["responses"] = {str(status): _error(status) for status in _ERRORS}
    components["headers"] = {
        "RequestId": {"description": "The request's own, or a new one.", "schema": {"type": "string"}},
        "RetryAfter": {"description": "Seconds.", "schema": {"type": "integer", "minimum": 1}},
    }
    if settings.api_keys:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"key": []}]
    for path, operations in document["paths"].items():
        for operation in operations.values():
            operation["responses"] = _responses(path, "requestBody" in operation, settings)
            if path in _WITHOUT_KEY:
                operation["security"] = []
    return document


def _responses(path: str, has_body: bool, settings: ServerSettings) -> dict[str, Any]:
    model = _ANSWERS.get(path)
    if model is None:
        good: dict[str, Any] = {"text/plain": {"schema": {"type": "string"}}}
    else:
        good = {"application/json": {"schema": _ref(model)}}
    if path in _STREAMED:
        events = "With stream true: an object for each event, and [DONE]."
        good["text/event-stream"] = {"schema": {"type": "string", "description": events}}
    errors = [400, 404, 408, 413, 500, 503] if has_body else [404] if "{" in path else [503] if path == "/ready" else []
    errors += [401] if settings.api_keys and path not in _WITHOUT_KEY else []
    errors += [403] if settings.allowed_hosts is not None else []
    errors += [429] if path in _QUEUED else []
    errors += [422] if path in _STREAMED else []
    found = {"200": {"description": "An answer.", "headers": _headers("RequestId"), "content": good}}
    found |= {str(status): {"$ref": f"#/components/responses/{status}"} for status in sorted(errors)}
    if path == "/health":
        found["503"] = found["200"] | {"description": "The engine has failed."}
    return found


def _error(status: int) -> dict[str, Any]:
    names = ("RequestId", "RetryAfter") if status in (429, 503) else ("RequestId",)
    content = {"application/json": {"schema": _ref(answers.ErrorAnswer)}}
    return {"description": _ERRORS[status], "headers": _headers(*names), "content": content}


def _headers(*names: str) -> dict[str, Any]:
    written = {"RequestId": "x-request-id", "RetryAfter": "retry-after"}
    return {written[name]: {"$ref": f"#/components/headers/{name}"} for name in names}


def _ref(model: type[BaseModel]) -> dict[str, str]:
    return {"$ref": _REF.format(model=model.__name__)}
