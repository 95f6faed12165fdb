"""/openapi.json tells all there is: every route's request, answers, errors and keys; real answers have those shapes."""

from __future__ import annotations

from typing import Any

import jsonschema
import pytest

CHAT: dict[str, Any] = {"model": "small", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
TEXT: dict[str, Any] = {"model": "small", "prompt": "hi", "max_tokens": 4}
OPEN = {"/health", "/ready"}


@pytest.fixture(scope="module")
def document(server: Any) -> Any:
    return server.http.get("/openapi.json").json()


def refs(value: Any) -> list[str]:
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
    found = [value["$ref"]] if isinstance(value, dict) and isinstance(value.get("$ref"), str) else []
    return found + [ref for one in inside for ref in refs(one)]


def lookup(document: Any, ref: str) -> Any:
    for key in ref.removeprefix("#/").split("/"):
        document = document[key]
    return document


def test_every_route_tells_its_answers(document: Any) -> None:
    assert document["openapi"].startswith("3.1")
    assert "HTTPValidationError" not in document["components"]["schemas"]  # FastAPI's own errors are never sent
    for ref in refs(document):
        assert lookup(document, ref)
    for path, operations in document["paths"].items():
        for operation in operations.values():
            content = operation["responses"]["200"]["content"]
            if path != "/metrics":
                assert "$ref" in content["application/json"]["schema"], path
            if "requestBody" in operation:
                assert {"400", "408", "413", "503"} <= operation["responses"].keys(), path


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", TEXT | {"echo": True, "logprobs": 2, "return_token_ids": True, "prompt_logprobs": 2}),
        ("/v1/completions", TEXT | {"n": 2, "prompt": ["a", "b"]}),
        ("/v1/chat/completions", CHAT | {"logprobs": True, "top_logprobs": 2, "prompt_logprobs": 1}),
        ("/v1/chat/completions", CHAT | {"n": 2, "return_token_ids": True}),
        ("/v1/completions", TEXT | {"n": 0}),
        ("/v1/completions", TEXT | {"model": "other"}),
        ("/v1/embeddings", {"model": "small", "input": ["a", "b"]}),
        ("/v1/embeddings", {"model": "small", "input": [5, 6], "encoding_format": "base64"}),
        ("/v1/embeddings", {"model": "small", "input": "a", "deadline": 1e-9}),
        ("/v1/models", None),
        ("/v1/models/small", None),
        ("/v1/models/other", None),
        ("/tokenize", {"prompt": "hi", "return_token_strs": True}),
        ("/detokenize", {"tokens": [5, 6]}),
        ("/health", None),
        ("/ready", None),
        ("/version", None),
    ],
)
def test_answers_are_as_told(server: Any, document: Any, path: str, body: Any) -> None:
    answer = server.http.get(path) if body is None else server.http.post(path, json=body)
    if path.startswith("/v1/models/"):
        path = "/v1/models/{name}"
    told = document["paths"][path]["get" if body is None else "post"]["responses"][str(answer.status_code)]
    told = lookup(document, told["$ref"]) if "$ref" in told else told
    schema = told["content"]["application/json"]["schema"]
    jsonschema.validate(answer.json(), schema | {"components": document["components"]})


def test_keys_are_told_where_there_are_any(serve: Any, document: Any) -> None:
    assert "security" not in document
    with serve(api_keys=("right",)) as running:
        guarded = running.http.get("/openapi.json").json()
    assert guarded["security"] == [{"key": []}]
    assert guarded["components"]["securitySchemes"]["key"] == {"type": "http", "scheme": "bearer"}
    for path, operations in guarded["paths"].items():
        for operation in operations.values():
            assert (operation.get("security") == []) == (path in OPEN)
            assert ("401" in operation["responses"]) == (path not in OPEN)
