"""run_load: sends requests to a server at random times or so many at once, and notes when what came came."""

from __future__ import annotations

import asyncio
import json
import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from puna.cli.load_client import HttpClient

# Common words, each one token of most vocabularies with the space before it.
_WORDS: Final = """
    time year people way day man thing woman life child world school state family student group country problem hand
    part place case week company system program question work government number night point home water room mother
    area money story fact month lot right study book eye job word business issue side kind head house service friend
    father power hour game line end member law car city community name president team minute idea body information
    back parent face others level office door health person art war history party result change morning reason
    research girl guy moment air teacher force education
    """
_POOL_WORDS: Final = 2000
_DONE: Final = b"[DONE]"
_LONGEST_MESSAGE: Final = 10_000


@dataclass(frozen=True)
class Lengths:
    """How many tokens: a number, a range (each as likely), or a normal or exponential distribution; at least 1."""

    kind: str
    first: float
    second: float = 0.0

    @classmethod
    def parse(cls, text: str, flag: str) -> Lengths:
        """128, 64-256, normal:128:32 (mean, deviation) or exp:128 (mean). Raises ValueError for anything else."""
        words = text.split(":")
        try:
            if words[0] == "normal" and len(words) == 3:
                found = cls("normal", float(words[1]), float(words[2]))
            elif words[0] == "exp" and len(words) == 2:
                found = cls("exp", float(words[1]))
            else:
                low, dash, high = text.partition("-")
                found = cls("uniform", int(low), int(high) if dash else int(low))
            ok = 1 <= found.first < math.inf and 0 <= found.second < math.inf
            ok = ok and (found.kind != "uniform" or found.first <= found.second)
        except ValueError:
            ok = False
        if not ok:
            raise ValueError(
                f"{flag} is {text!r}: give a number of tokens, LOW-HIGH, normal:MEAN:DEVIATION or exp:MEAN"
            )
        return found

    def draw(self, chooser: random.Random) -> int:
        if self.kind == "uniform":
            return chooser.randint(int(self.first), int(self.second))
        if self.kind == "normal":
            return max(1, round(chooser.gauss(self.first, self.second)))
        return max(1, round(chooser.expovariate(1 / self.first)))


@dataclass(frozen=True, kw_only=True)
class Load:
    """What is sent. `rate`: requests per second, at random times (Poisson); infinite: as soon as `concurrency` allows.

    The run ends after `num_requests`, or with those that were sent within `duration` seconds. `fields` go into every
    request's body.
    """

    model: str
    chat: bool
    input_lengths: Lengths
    output_lengths: Lengths
    prefix_length: int = 0
    rate: float = math.inf
    concurrency: int | None = None
    num_requests: int | None = None
    duration: float | None = None
    warmup: int = 0
    seed: int = 0
    ignore_eos: bool = True
    fields: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class Record:
    """One request: times of `time.perf_counter`, and how many tokens it had. `times`: when pieces with text came."""

    start: float
    times: list[float] = field(default_factory=list)
    end: float = 0.0
    prompt_tokens: int = 0
    output_tokens: int = 0
    error: str | None = None


@dataclass(frozen=True)
class Run:
    """`duration`: from the first request to the end of the last. `cpu_seconds`: what this thread itself took."""

    records: list[Record]
    duration: float
    cpu_seconds: float


class Prompts:
    """Random prompts. Token ids where the server's tokenizer is known: exactly as long as asked; else words."""

    def __init__(self, load: Load, pool: Sequence[int] | None, tokens_per_word: float) -> None:
        self._load = load
        self._pool = pool
        self._tokens_per_word = tokens_per_word
        self._chooser = random.Random(load.seed)
        self._prefix = self._random(load.prefix_length)

    def draw(self) -> tuple[str | list[int], int]:
        """A prompt, and how many tokens the answer should have."""
        length = self._load.input_lengths.draw(self._chooser)
        parts = [*self._prefix, *self._random(length)]
        prompt = " ".join(map(str, parts)) if self._pool is None else [int(part) for part in parts]
        return prompt, self._load.output_lengths.draw(self._chooser)

    def _random(self, length: int) -> list[Any]:
        if self._pool is not None:
            return self._chooser.choices(self._pool, k=length)
        return self._chooser.choices(_WORDS.split(), k=math.ceil(length / self._tokens_per_word))


async def find_model(client: HttpClient) -> str:
    """The first one of /v1/models. Raises ValueError where there is none."""
    status, body = await client.request("GET", "/v1/models")
    try:
        name = json.loads(body)["data"][0]["id"]
    except (ValueError, KeyError, IndexError, TypeError):
        name = None
    if status != 200 or not isinstance(name, str):
        raise ValueError(f"/v1/models does not tell the model (status {status}): give --model")
    return name


async def make_prompts(client: HttpClient, load: Load) -> Prompts:
    """Asks the server's /tokenize, as vLLM and puna have it or llama.cpp, how it writes words; others have none."""
    chooser = random.Random(load.seed)
    text = " ".join(chooser.choices(_WORDS.split(), k=_POOL_WORDS))
    for body in ({"model": load.model, "prompt": text, "add_special_tokens": False}, {"content": text}):
        status, answer = await client.request("POST", "/tokenize", body)
        try:
            tokens = json.loads(answer)["tokens"] if status == 200 else None
        except (ValueError, KeyError, TypeError):
            tokens = None
        if tokens:
            return Prompts(load, None if load.chat else tokens, len(tokens) / _POOL_WORDS)
    return Prompts(load, None, 1.0)


async def run_load(client: HttpClient, load: Load, prompts: Prompts, on_progress: Callable[[int], None]) -> Run:
    """Warms up, then measures. `on_progress` gets the number of requests that have ended."""
    for record in await asyncio.gather(*(_send(client, load, *prompts.draw()) for _ in range(load.warmup))):
        if record.error is not None:
            raise ValueError(f"the server does not answer as it should: {record.error}")
    records: list[Record] = []
    room = None if load.concurrency is None else asyncio.Semaphore(load.concurrency)
    ended = 0

    async def one(prompt: str | list[int], length: int) -> None:
        nonlocal ended
        try:
            records.append(await _send(client, load, prompt, length))
        finally:
            if room is not None:
                room.release()
        ended += 1
        on_progress(ended)

    times = random.Random(load.seed + 1)  # of their own: the prompts are the same at every rate
    cpu, start = time.thread_time(), time.perf_counter()
    due = start
    tasks: set[asyncio.Task[None]] = set()
    sent = 0
    while load.num_requests is None or sent < load.num_requests:
        drawn = prompts.draw()
        if load.rate < math.inf:
            due += times.expovariate(load.rate)
        # The server's time is not taken: what is due later than the end is not waited for.
        if load.duration is not None and due > start + load.duration:
            break
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        if room is not None:
            await room.acquire()
        if load.duration is not None and time.perf_counter() > start + load.duration:
            break
        task = asyncio.create_task(one(*drawn))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
        sent += 1
    await asyncio.gather(*tasks)
    return Run(records, time.perf_counter() - start, time.thread_time() - cpu)


async def _send(client: HttpClient, load: Load, prompt: str | list[int], length: int) -> Record:
    record = Record(time.perf_counter())
    reader = _Reader(record, load.chat)
    body: dict[str, Any] = {"model": load.model, "stream": True, "stream_options": {"include_usage": True}}
    if load.chat:
        body |= {"messages": [{"role": "user", "content": prompt}], "max_completion_tokens": length}
    else:
        body |= {"prompt": prompt, "max_tokens": length}
    body |= {"temperature": 0} | ({"ignore_eos": True} if load.ignore_eos else {}) | load.fields
    record.start = time.perf_counter()
    try:
        path = "/v1/chat/completions" if load.chat else "/v1/completions"
        status = await client.stream("POST", path, body, reader.push)
        if status != 200:
            record.error = f"status {status}: {reader.message}"
        elif record.error is None and not record.times:
            record.error = "the answer has no text"
    except (OSError, ValueError) as error:
        record.error = str(error)
    if record.error is not None or not record.end:
        record.end = time.perf_counter()
    record.output_tokens = record.output_tokens or len(record.times)
    return record


class _Reader:
    """Server-sent events, as pieces of any size, into a record."""

    def __init__(self, record: Record, chat: bool) -> None:
        self._record = record
        self._chat = chat
        self._rest = b""
        self._others = b""  # lines that are no events, such as those of an error

    @property
    def message(self) -> str:
        """What an answer that is no stream said."""
        said = self._others + self._rest
        try:
            return str(json.loads(said)["error"]["message"])
        except (ValueError, KeyError, TypeError):
            return said[:200].decode(errors="replace")

    def push(self, data: bytes) -> None:
        now = time.perf_counter()
        if self._rest:
            data = self._rest + data
        *lines, self._rest = data.split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                self._take(line[5:].strip(), now)
            elif len(self._others) < _LONGEST_MESSAGE:
                self._others += line

    def _take(self, payload: bytes, now: float) -> None:
        if payload == _DONE:
            return
        record = self._record
        try:
            event = json.loads(payload)
        except ValueError:
            record.error = f"an event is no JSON: {payload[:80].decode(errors='replace')}"
            return
        if "error" in event:
            record.error = str(event["error"])
            return
        for choice in event.get("choices") or ():
            record.end = now
            if _has_text(choice.get("delta") or {} if self._chat else choice):
                record.times.append(now)
        usage = event.get("usage")
        if usage:
            record.prompt_tokens = usage.get("prompt_tokens") or 0
            record.output_tokens = usage.get("completion_tokens") or 0


def _has_text(delta: dict[str, Any]) -> bool:
    """Not the role that chat begins with, nor an end without text."""
    return bool(
        delta.get("text")
        or delta.get("content")
        or delta.get("reasoning_content")
        or delta.get("reasoning")
        or delta.get("tool_calls")
    )
