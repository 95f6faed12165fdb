"""Perplexity of texts, through an engine: the log-probability of every token, in sliding windows."""

from __future__ import annotations

import math
import queue
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from puna.engine.engine import Engine
from puna.engine.outputs import CompletionOutput, RequestDelta, RequestOutput
from puna.evaluation.windows import Window, check_window, sliding_windows
from puna.scheduling.sampling_params import SamplingParams


@dataclass(frozen=True, kw_only=True)
class Perplexity:
    """`nats`: the sum of -ln p over the tokens that were predicted; `num_bytes` of UTF-8 in the texts."""

    nats: float
    num_tokens: int
    num_bytes: int
    seconds: float

    @property
    def nats_per_token(self) -> float:
        return self.nats / self.num_tokens

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.nats_per_token, 700.0))  # the largest that a float holds is e^709

    @property
    def bits_per_byte(self) -> float:
        """Comparable between tokenizers. The first token of a text counts as free where no start token predicts it."""
        return self.nats / math.log(2) / self.num_bytes

    @property
    def tokens_per_second(self) -> float:
        return self.num_tokens / self.seconds


def measure_perplexity(
    engine: Engine,
    documents: Sequence[str],
    context: int,
    stride: int,
    on_progress: Callable[[int, int], None] | None = None,
) -> Perplexity:
    """Predicts every token of each document from those before it, with windows of `context` tokens.

    `on_progress` is called with the tokens predicted so far and all there are. Raises ValueError for a context or
    stride out of range, and for documents without a token to predict; RuntimeError where a request fails.
    """
    check_window(context, stride)
    encoded = [engine.parts.tokenizer.encode(document) for document in documents]
    total = sum(max(0, len(token_ids) - 1) for token_ids in encoded)
    if total == 0:
        raise ValueError("the text has no token to predict: it needs at least two")
    windows = (window for token_ids in encoded for window in sliding_windows(token_ids, context, stride))
    start = time.perf_counter()
    nats: list[float] = []
    for scored in _scored(engine, windows):
        nats += scored
        if on_progress is not None:
            on_progress(len(nats), total)
    return Perplexity(
        nats=math.fsum(nats),
        num_tokens=len(nats),
        num_bytes=sum(len(document.encode()) for document in documents),
        seconds=time.perf_counter() - start,
    )


def _scored(engine: Engine, windows: Iterator[Window]) -> Iterator[list[float]]:
    """-ln p of each window's scored tokens, as the windows are done; few more are in the engine than run at once."""
    deltas: queue.SimpleQueue[RequestDelta] = queue.SimpleQueue()
    running: dict[str, tuple[Window, RequestOutput]] = {}
    limit = 2 * engine.parts.engine_config.max_num_seqs
    try:
        while True:
            while len(running) < limit and (window := next(windows, None)) is not None:
                # The last token is generated, with no other choice: as a part of the prompt it would leave no room
                # for the token that every request makes, in a context as long as the window.
                prompt, last = window.token_ids[:-1], window.token_ids[-1]
                params = SamplingParams(
                    max_tokens=1,
                    temperature=0,
                    prompt_logprobs=0,
                    logprobs=0,
                    allowed_token_ids=[last],
                    ignore_eos=True,
                )
                name = engine.submit(prompt, params, deltas.put)
                running[name] = (window, RequestOutput(name, None, prompt, [CompletionOutput(0)]))
            if not running:
                return
            delta = deltas.get()
            window, output = running[delta.request_id]
            output.add(delta)
            if output.finished:
                del running[delta.request_id]
                yield _nats(window, output)
    finally:
        for name in running:
            engine.cancel(name)


def _nats(window: Window, output: RequestOutput) -> list[float]:
    positions = [*(output.prompt_logprobs or []), *(output.outputs[0].logprobs or [])]
    pairs = list(zip(window.token_ids, positions, strict=True))[-window.num_scored :]
    return [-known[token].logprob for token, known in pairs if known is not None]
