"""The FastAPI application: routes, and around them keys, request ids, size limits and errors in OpenAI's shape."""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid
from typing import Any, Final

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from puna import __version__
from puna.serving.chat import Chat
from puna.serving.chat_page import PAGE_PATHS, add_chat_page
from puna.serving.completions import Completion
from puna.serving.conversation import encode_conversation, own_template
from puna.serving.embeddings import Embeddings
from puna.serving.errors import ApiError, bad_request, json_response, validation_error
from puna.serving.generation import encoded, engine_error
from puna.serving.openapi import describe
from puna.serving.protocol import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    TokenizeRequest,
)
from puna.serving.record import RequestRecord
from puna.serving.state import ServerState, is_authorized
from puna.serving.streaming import EventStream, until_gone

_log = logging.getLogger(__name__)
# Probes have no key, and learn nothing of the model; the chat page asks for one.
_OPEN_PATHS: Final = frozenset(["/health", "/ready"]) | PAGE_PATHS
_REQUEST_ID: Final = re.compile(r"[\w.:-]{1,128}", re.ASCII)
_GONE: Final = 499  # nginx's status for a client that left; nobody sees it but the log


def make_app(state: ServerState) -> FastAPI:
    app = FastAPI(title="puna", version=__version__, docs_url=None, redoc_url=None)
    _add_errors(app)
    _add_generation(app, state)
    _add_text(app, state)
    _add_status(app, state)
    add_chat_page(app)
    describe(app, state.settings)
    app.add_middleware(_Guard, state=state)
    return app


def _add_generation(app: FastAPI, state: ServerState) -> None:
    async def respond(work: Completion | Chat, stream: bool, request: Request) -> Response:
        if stream:
            return EventStream(work.chunks(await work.start()))

        async def run() -> dict[str, Any]:
            return await work.answer(await work.start())

        answer = await until_gone(run(), request.receive)
        return Response(status_code=_GONE) if answer is None else json_response(answer)

    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        return await respond(Completion(state, body, request.state.record), bool(body.stream), request)

    @app.post("/v1/embeddings")
    async def embeddings(body: EmbeddingRequest, request: Request) -> Response:
        answer = await until_gone(Embeddings(state, body, request.state.record).answer(), request.receive)
        return Response(status_code=_GONE) if answer is None else answer

    @app.post("/v1/chat/completions")
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        return await respond(Chat(state, body, request.state.record), bool(body.stream), request)


def _add_text(app: FastAPI, state: ServerState) -> None:
    @app.post("/tokenize")
    async def tokenize(body: TokenizeRequest) -> Response:
        engine = state.ready_engine()
        if body.model is not None:
            state.check_model(body.model)
        if body.messages is not None:
            if body.add_special_tokens:
                raise bad_request("the chat template writes the special tokens: leave it out", "add_special_tokens")
            conversation = await encode_conversation(
                engine,
                await own_template(engine, None, False),
                body.messages,
                add_generation_prompt=body.add_generation_prompt,
                continue_final_message=body.continue_final_message,
                variables=body.chat_template_kwargs,
            )
            tokens = conversation.token_ids
        else:
            for name in ("add_generation_prompt", "continue_final_message", "chat_template_kwargs"):
                if getattr(body, name) is not None:
                    raise bad_request(f"{name} goes with messages: leave it out", name)
            tokens = await encoded(engine, body.prompt or "", body.add_special_tokens is not False)
        found = {"count": len(tokens), "max_model_len": engine.max_model_len, "tokens": tokens}
        if body.return_token_strs:
            found["token_strs"] = [engine.parts.tokenizer.id_to_token(token) for token in tokens]
        return json_response(found)

    @app.post("/detokenize")
    async def detokenize(body: DetokenizeRequest) -> Response:
        engine = state.ready_engine()
        if body.model is not None:
            state.check_model(body.model)
        vocab_size = engine.parts.config.vocab_size
        wrong = next((token for token in body.tokens if token >= vocab_size), None)
        if wrong is not None:
            raise bad_request(f"tokens has {wrong}: the model's vocabulary ends at {vocab_size - 1}", "tokens")
        return json_response({"prompt": await asyncio.to_thread(engine.parts.tokenizer.decode, body.tokens, False)})


def _add_status(app: FastAPI, state: ServerState) -> None:
    def card() -> dict[str, Any]:
        engine = state.engine
        return {
            "id": state.settings.model_name,
            "object": "model",
            "created": state.created,
            "owned_by": "puna",
            "max_model_len": None if engine is None else engine.max_model_len,
        }

    @app.get("/v1/models")
    async def models() -> Response:
        return json_response({"object": "list", "data": [card()]})

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        state.check_model(name)
        return json_response(card())

    @app.get("/health")
    async def health() -> Response:
        """Whether the process is alive, and how far loading is; 503 once the engine has failed."""
        found = {"status": state.phase, "step": state.step, "seconds": round(time.monotonic() - state.started, 1)}
        return json_response(found, 503 if state.phase == "failed" else 200)

    @app.get("/ready")
    async def ready() -> Response:
        """Whether requests are taken now."""
        state.ready_engine()
        return json_response({"status": "ready"})

    @app.get("/metrics")
    async def metrics() -> Response:
        """For Prometheus."""
        state.metrics.tasks.set(len(asyncio.all_tasks()))
        return Response(await asyncio.to_thread(state.metrics.text), media_type="text/plain; version=0.0.4")

    @app.get("/version")
    async def version() -> Response:
        return json_response({"version": __version__})


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def refused(request: Request, error: ApiError) -> Response:
        request.state.record.error = error.code
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        return validation_error(error.errors()).response()

    @app.exception_handler(HTTPException)
    async def unknown(request: Request, error: HTTPException) -> Response:
        missing = error.status_code == 404
        message = f"there is no {request.url.path} here" if missing else str(error.detail)
        response = ApiError(error.status_code, message, code="not_found" if missing else None).response()
        response.headers.update(error.headers or {})
        return response


class _Guard:
    """What comes before and after every route. An error inside is logged with its traceback; the client gets none."""

    def __init__(self, app: ASGIApp, state: ServerState) -> None:
        self._app = app
        self._state = state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name.lower(): value for name, value in scope["headers"]}
        given = headers.get(b"x-request-id", b"").decode("latin-1")
        request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        record = RequestRecord(request_id=request_id)
        scope.setdefault("state", {})["record"] = record
        status = 0

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode())]
            await send(message)

        try:
            self._check(scope, headers)
            await self._app(scope, self._limited(receive), answer)
        except ApiError as error:
            record.error = error.code
            if status == 0:
                await error.response()(scope, receive, answer)
        except Exception:
            _log.exception("request %s failed", request_id)
            if status == 0:
                await engine_error().response()(scope, receive, answer)
        finally:
            _log_answer(scope, status, record)
            handler = getattr(scope.get("route"), "path", "none")
            self._state.metrics.answered(handler, scope["method"], status or _GONE)

    def _check(self, scope: Scope, headers: dict[bytes, bytes]) -> None:
        header = headers.get(b"authorization", b"").decode("latin-1")
        if scope["path"] not in _OPEN_PATHS and not is_authorized(header, self._state.settings.api_keys):
            message = "the API key is wrong" if header else "this server needs an API key: Authorization: Bearer KEY"
            raise ApiError(401, message, kind="authentication_error", code="invalid_api_key")
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length[:18]) > self._state.settings.max_body_bytes:
            raise self._too_large()

    def _limited(self, receive: Receive) -> Receive:
        """Also where the length is not told before."""
        received = 0

        async def limited() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._state.settings.max_body_bytes:
                raise self._too_large()
            return message

        return limited

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the body has more than {self._state.settings.max_body_bytes} bytes", code="too_large")


def _log_answer(scope: Scope, status: int, record: RequestRecord) -> None:
    """A line for people; its parts for programs."""
    seconds = round(time.monotonic() - record.arrived, 4)
    fields = {"method": scope["method"], "path": scope["path"], "status": status, "seconds": seconds}
    rest = record.fields()
    words = "".join(f" {name}={value}" for name, value in rest.items() if value is not None)
    _log.info("%s %r %d %.3fs%s", *fields.values(), words, extra={"fields": fields | rest})
