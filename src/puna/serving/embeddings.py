"""/v1/embeddings: texts in, vectors out."""

from __future__ import annotations

import asyncio
import base64
import time
from array import array
from collections import deque
from typing import Any

import numpy as np
from fastapi import Response

from puna.engine.engine import Engine
from puna.scheduling.sampling_params import SamplingParams
from puna.serving.errors import ApiError, bad_request, dumps
from puna.serving.generation import Generation, too_long
from puna.serving.protocol import EmbeddingRequest
from puna.serving.record import RequestRecord
from puna.serving.state import ServerState


class Embeddings:
    """One request from its fields to its answer.

    Only so many of its inputs are in the engine at once as run there, and as many that wait behind them, so that steps
    stay full: a request of thousands neither fills the queue nor is refused because it would.
    """

    def __init__(self, state: ServerState, request: EmbeddingRequest, record: RequestRecord) -> None:
        self._state = state
        self._engine = state.ready_engine()
        self._request = request
        self._record = record
        try:
            self._pooling = self._engine.pooling_params(request.pooling, request.normalize is not False)
        except ValueError as error:
            raise bad_request(str(error), "pooling") from None
        self._inputs: list[list[int]] = []
        self._pending: deque[int] = deque()
        self._num_running = 0
        self._found: dict[int, array[float]] = {}

    async def answer(self) -> Response:
        """Raises ApiError for a request that can't be run; cancelling this leaves nothing behind."""
        self._state.check_model(self._request.model)
        self._check_dimensions()
        self._inputs = await asyncio.to_thread(self._encode)
        self._pending.extend(range(len(self._inputs)))
        count = min(len(self._inputs), 2 * self._engine.parts.engine_config.max_num_seqs)
        workers = [asyncio.create_task(self._work()) for _ in range(count)]
        try:
            await asyncio.gather(*workers)
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)
        # In a thread and one by one: a thousand of them are seconds of work, and nobody else is to wait for all.
        return Response(await asyncio.to_thread(self._body), media_type="application/json")

    def _encode(self) -> list[list[int]]:
        """All at once: a thread of its own for each would take longer than its work."""
        request, engine = self._request, self._engine
        keep = engine.max_model_len if request.truncate_prompt_tokens == -1 else request.truncate_prompt_tokens
        encode, found = engine.parts.tokenizer.encode, []
        for index, prompt in enumerate(request.inputs):
            try:
                token_ids = (
                    encode(prompt, request.add_special_tokens is not False) if isinstance(prompt, str) else prompt
                )
            except ValueError as error:
                raise bad_request(f"input {index}: {error}", "input") from None
            token_ids = token_ids if keep is None else token_ids[-keep:]
            if len(token_ids) > engine.max_model_len:
                remedy = "shorten it, or set truncate_prompt_tokens"
                raise too_long(f"input {index}", len(token_ids), engine.max_model_len, "input", remedy)
            refusal = _refusal(engine, token_ids)
            if refusal is not None:
                raise bad_request(f"input {index} {refusal}", "input")
            found.append(token_ids)
        return found

    def _check_dimensions(self) -> None:
        asked, size = self._request.dimensions, self._engine.parts.config.hidden_size
        if asked is not None and asked != size:
            raise bad_request(
                f"dimensions is {asked}, but this model's embeddings have {size} numbers, and nothing says that it was "
                "trained to have them cut off: leave it out",
                "dimensions",
            )

    async def _work(self) -> None:
        """Takes one input after the other while there are any."""
        while self._pending:
            index = self._pending.popleft()
            generation = Generation(
                self._state,
                [self._inputs[index]],
                SamplingParams(),
                self._request.model_copy(update={"deadline": self._seconds_left()}),
                self._record,
                self._pooling,
            )
            try:
                await generation.start()
            except ApiError as error:
                if error.status_code != 429 or self._num_running == 0:
                    raise
                self._pending.appendleft(index)  # whoever has an input running will take it, and count it
                self._record.prompt_tokens -= len(self._inputs[index])
                return
            self._num_running += 1
            try:
                async with generation:
                    (output,) = await generation.finish()
            finally:
                self._num_running -= 1
            if output.embedding is None:
                raise self._late()
            self._found[index] = output.embedding

    def _seconds_left(self) -> float | None:
        """The deadline is the request's, not each input's."""
        if self._request.deadline is None:
            return None
        left = self._record.arrived + self._request.deadline - time.monotonic()
        if left <= 0:
            raise self._late()
        return left

    def _late(self) -> ApiError:
        message = f"the embeddings took longer than the deadline of {self._request.deadline} seconds"
        error = ApiError(408, message, kind="timeout_error", param="deadline", code="deadline_exceeded")
        error.headers = {"x-should-retry": "false"}  # OpenAI's clients would, by the status alone
        return error

    def _body(self) -> bytes:
        as_base64 = self._request.encoding_format == "base64"
        count = sum(map(len, self._inputs))
        rest = {"model": self._request.model, "usage": {"prompt_tokens": count, "total_tokens": count}}
        data = b",".join(dumps(_entry(index, self._found[index], as_base64)) for index in range(len(self._inputs)))
        return b'{"object":"list","data":[' + data + b"]," + dumps(rest)[1:]


def _entry(index: int, embedding: array[float], as_base64: bool) -> dict[str, Any]:
    raw = np.asarray(embedding, "<f4").tobytes()
    values = base64.b64encode(raw).decode() if as_base64 else embedding.tolist()
    return {"object": "embedding", "index": index, "embedding": values}


def _refusal(engine: Engine, token_ids: list[int]) -> str | None:
    """What is wrong with an input, which the engine would say without telling which it is."""
    vocab_size = engine.parts.config.vocab_size
    if not token_ids:
        return "is empty: it needs at least one token"
    wrong = next((token for token in token_ids if token >= vocab_size), None)
    return None if wrong is None else f"has the token {wrong}: the model's vocabulary ends at {vocab_size - 1}"
