"""The FastAPI application: its routes, and errors in OpenAI's shape."""

from __future__ import annotations

import asyncio
from typing import Any, Final

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from puna import __version__
from puna.serving.chat import Chat
from puna.serving.chat_page import PAGE_PATHS, add_chat_page
from puna.serving.completions import Completion
from puna.serving.conversation import encode_conversation, own_template
from puna.serving.embeddings import Embeddings
from puna.serving.errors import ApiError, bad_request, json_response, validation_error
from puna.serving.generation import encoded
from puna.serving.guard import GONE, Guard
from puna.serving.openapi import describe
from puna.serving.protocol import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    TokenizeRequest,
)
from puna.serving.state import ServerState
from puna.serving.streaming import EventStream, until_gone
from puna.serving.tools import as_for_template, tools_dialect

# Probes have no key, and learn nothing of the model; the chat page asks for one.
_OPEN_PATHS: Final = frozenset(["/health", "/ready"]) | PAGE_PATHS


def make_app(state: ServerState) -> FastAPI:
    app = FastAPI(title="puna", version=__version__, docs_url=None, redoc_url=None)
    _add_errors(app)
    _add_generation(app, state)
    _add_text(app, state)
    _add_status(app, state)
    add_chat_page(app)
    describe(app, state.settings)
    app.add_middleware(Guard, state=state, open_paths=_OPEN_PATHS)
    return app


def _add_generation(app: FastAPI, state: ServerState) -> None:
    async def respond(work: Completion | Chat, stream: bool, request: Request) -> Response:
        if stream:
            generation = await work.start()
            return EventStream(work.chunks(generation), generation.cancel)

        async def run() -> dict[str, Any]:
            return await work.answer(await work.start())

        answer = await until_gone(run(), request.receive)
        return Response(status_code=GONE) if answer is None else json_response(answer)

    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        return await respond(Completion(state, body, request.state.record), bool(body.stream), request)

    @app.post("/v1/embeddings")
    async def embeddings(body: EmbeddingRequest, request: Request) -> Response:
        answer = await until_gone(Embeddings(state, body, request.state.record).answer(), request.receive)
        return Response(status_code=GONE) if answer is None else answer

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
            template = await own_template(engine, None, False)
            if body.tools:
                await tools_dialect(template)
            conversation = await encode_conversation(
                engine,
                template,
                body.messages,
                add_generation_prompt=body.add_generation_prompt,
                continue_final_message=body.continue_final_message,
                variables=body.chat_template_kwargs,
                tools=as_for_template(body.tools or []),
            )
            tokens = conversation.token_ids
        else:
            for name in ("tools", "add_generation_prompt", "continue_final_message", "chat_template_kwargs"):
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
        found = state.health()
        return json_response(found, 503 if found["status"] == "failed" else 200)

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
        request.state.record.error = error.code or error.kind
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        return await refused(request, validation_error(error.errors()))

    @app.exception_handler(HTTPException)
    async def unknown(request: Request, error: HTTPException) -> Response:
        missing = error.status_code == 404
        message = f"there is no {request.url.path} here" if missing else str(error.detail)
        if error.status_code == 405:
            message = f"{request.url.path} does not take {request.method}"
        response = await refused(request, ApiError(error.status_code, message, code="not_found" if missing else None))
        response.headers.update(error.headers or {})
        return response
