"""One process of benchmarks/server_soak.py's clients: requests of every kind, well behaved and not, until stdin ends.

Writes a line of JSON for each request that came to its end: its kind, how it ended, and what was wrong if anything.
The process may be killed at any time, and is.

Run by server_soak.py: python benchmarks/server_soak_clients.py URL SEED CONCURRENCY REFERENCES
"""

from __future__ import annotations

import asyncio
import json
import random
import re
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx

MODEL = "soak"
COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": name,
            "parameters": {
                "type": "object",
                "properties": {"to": {"enum": ["N", "S"]}},
                "required": ["to"],
                "additionalProperties": False,
            },
        },
    }
    for name in ("go", "look")
]
# Each is refused: path, body, status.
BAD: list[tuple[str, bytes, int]] = [
    (COMPLETIONS, b"{", 400),
    (COMPLETIONS, b"\xff\xfe", 400),
    (COMPLETIONS, b"[" * 10_000, 400),
    (COMPLETIONS, json.dumps({"model": MODEL, "prompt": "x", "n": 10**30}).encode(), 400),
    (COMPLETIONS, json.dumps({"model": MODEL, "prompt": "x" * 5000}).encode(), 400),
    (COMPLETIONS, json.dumps({"model": MODEL, "prompt": "x", "guided_regex": "("}).encode(), 400),
    (COMPLETIONS, json.dumps({"model": "another", "prompt": "x"}).encode(), 404),
    (CHAT, json.dumps({"model": MODEL, "messages": []}).encode(), 400),
    (CHAT, json.dumps({"model": MODEL, "messages": [{"role": "user", "content": "x"}], "top_p": 2}).encode(), 400),
    ("/v1/nothing", b"{}", 404),
]
MESSAGES = [{"role": "user", "content": "hi"}]
LONG: dict[str, Any] = {"model": MODEL, "max_tokens": 200, "ignore_eos": True}


class Refused(Exception):
    """429: the queue was full, as it may be."""


class Wrong(Exception):
    """What must not happen."""


class Client:
    """Requests of every kind, each a method that says how it ended; raises Wrong for what a server must not do."""

    def __init__(self, http: httpx.AsyncClient, chooser: random.Random, references: list[dict[str, Any]]) -> None:
        self.http = http
        self.chooser = chooser
        self.references = references

    async def reference(self) -> str:
        """One of the requests whose answers a quiet server gave before: the same texts, streamed or not."""
        one = self.chooser.choice(self.references)
        stream = self.chooser.random() < 0.7
        if stream:
            text = "".join(
                [_text(c) async for event in self.events(one["path"], one["body"]) for c in event["choices"]]
            )
        else:
            text = _text((await self.post(one["path"], one["body"]))["choices"][0])
        if text != one["text"]:
            raise Wrong(f"stream={stream} {one['body']}: {text!r} is not {one['text']!r}")
        return "the same"

    async def sampled(self) -> str:
        n = self.chooser.randint(1, 4)
        prompts = [self.prompt() for _ in range(self.chooser.randint(1, 3))]
        body = {"model": MODEL, "prompt": prompts, "n": n, "max_tokens": self.chooser.randint(1, 40)}
        body |= self.chooser.choice(({}, {"top_k": 5}, {"min_p": 0.1}, {"presence_penalty": 1}, {"stop": ["e", "12"]}))
        body |= {"cache_salt": str(self.chooser.random())} if self.chooser.random() < 0.2 else {}
        if self.chooser.random() < 0.5:
            seen = [c["index"] async for event in self.events(COMPLETIONS, body) for c in event["choices"]]
        else:
            seen = [choice["index"] for choice in (await self.post(COMPLETIONS, body))["choices"]]
        _check(set(seen) == set(range(n * len(prompts))), f"{body}: choices {sorted(set(seen))}")
        return "answered"

    async def echo(self) -> str:
        body = {"model": MODEL, "prompt": self.prompt(), "echo": True, "logprobs": 2, "max_tokens": 3}
        answer = await self.post(COMPLETIONS, body)
        (choice,) = answer["choices"]
        count = len(choice["logprobs"]["token_logprobs"])
        _check(choice["text"].startswith(body["prompt"]), "the echo is another text")
        _check(count == answer["usage"]["total_tokens"], f"{count} log-probabilities, {answer['usage']}")
        return "answered"

    async def tools(self) -> str:
        choice = self.chooser.choice(("auto", "required", {"type": "function", "function": {"name": "go"}}))
        body = {"model": MODEL, "messages": MESSAGES, "tools": TOOLS, "tool_choice": choice, "max_tokens": 200}
        body |= {"parallel_tool_calls": False, "temperature": 0.5}
        if self.chooser.random() < 0.5:
            parts = [part async for event in self.events(CHAT, body) for part in event["choices"]]
        else:
            parts = (await self.post(CHAT, body))["choices"]
        messages = [part.get("delta") or part.get("message") or {} for part in parts]
        calls = [call["function"] for message in messages for call in message.get("tool_calls") or ()]
        arguments, reason = "".join(call["arguments"] for call in calls), parts[-1]["finish_reason"]
        _check(choice == "auto" or reason in ("tool_calls", "length"), f"ended with {reason}")
        if choice != "auto" and reason == "tool_calls":
            _check(json.loads(arguments)["to"] in ("N", "S"), f"arguments {arguments!r}")
        return "answered"

    async def guided(self) -> str:
        number = self.chooser.randrange(10**6)  # so that most grammars are new ones
        if self.chooser.random() < 0.5:
            guide: dict[str, Any] = {"guided_regex": f"{number}(a|b){{1,4}}"}
        else:
            schema = {"type": "object", "properties": {"x": {"const": number}}, "required": ["x"]}
            form = {"name": "x", "strict": True, "schema": schema | {"additionalProperties": False}}
            guide = {"response_format": {"type": "json_schema", "json_schema": form}}
        answer = await self.post(COMPLETIONS, {"model": MODEL, "prompt": "x", "max_tokens": 60} | guide)
        text, reason = answer["choices"][0]["text"], answer["choices"][0]["finish_reason"]
        is_right = re.fullmatch(
            rf"{number}[ab]{{1,4}}" if "guided_regex" in guide else rf'\s*{{\s*"x"\s*:\s*{number}\s*}}\s*', text
        )
        _check(reason == "length" or bool(is_right), f"{guide}: {text!r}")
        return "answered"

    async def embedding(self) -> str:
        body = {"model": MODEL, "input": [self.prompt() for _ in range(self.chooser.randint(1, 4))]}
        body |= {"encoding_format": self.chooser.choice(("float", "base64"))}
        answer = await self.post("/v1/embeddings", body)
        _check(len(answer["data"]) == len(body["input"]), "another number of embeddings")
        return "answered"

    async def deadline(self) -> str:
        body = LONG | {"prompt": self.prompt(), "deadline": self.chooser.uniform(0.001, 0.2)}
        if self.chooser.random() < 0.5:
            reasons = [c["finish_reason"] async for event in self.events(COMPLETIONS, body) for c in event["choices"]]
        else:
            reasons = [choice["finish_reason"] for choice in (await self.post(COMPLETIONS, body))["choices"]]
        _check(reasons[-1] == "length", f"ended with {reasons[-1]}")
        return "cut off"

    async def bad(self) -> str:
        path, content, status = self.chooser.choice(BAD)
        answer = await self.http.post(path, content=content, headers={"content-type": "application/json"})
        _check(answer.status_code == status, f"{path} {content[:60]!r}: {answer.status_code} {answer.text[:200]}")
        _check(set(answer.json()["error"]) == {"message", "type", "param", "code"}, answer.text)
        return "refused"

    async def look(self) -> str:
        path = self.chooser.choice(("/v1/models", "/health", "/ready", "/version", "/metrics", "/openapi.json"))
        answer = await self.http.get(path)
        _check(answer.status_code == 200, f"{path}: {answer.status_code}")
        return "answered"

    async def leave_stream(self) -> str:
        """The client closes its connection after some events."""
        count = self.chooser.randint(0, 30)
        async for _ in self.events(COMPLETIONS, LONG | {"prompt": self.prompt(), "n": self.chooser.randint(1, 3)}):
            count -= 1
            if count < 0:
                return "left"
        return "answered"

    async def leave_answer(self) -> str:
        """The client does not wait for its whole answer."""
        try:
            body = LONG | {"prompt": self.prompt()}
            await asyncio.wait_for(self.post(COMPLETIONS, body), self.chooser.uniform(0.001, 0.1))
        except asyncio.TimeoutError:
            return "left"
        return "answered"

    async def half_a_request(self) -> str:
        """The connection ends within the head or the body."""
        body = json.dumps(LONG | {"prompt": "x"}).encode()
        head = f"POST {COMPLETIONS} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        whole = f"{head}content-length: {len(body)}\r\n\r\n".encode() + body
        _, writer = await self.connect()
        writer.write(whole[: self.chooser.randrange(1, len(whole))])
        await writer.drain()
        await asyncio.sleep(self.chooser.uniform(0, 0.05))
        writer.transport.abort()
        return "left"

    async def deaf(self) -> str:
        """A stream that nobody reads, and then a reset."""
        body = json.dumps(LONG | {"prompt": "x", "stream": True, "n": 4, "max_tokens": 400}).encode()
        head = f"POST {COMPLETIONS} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        _, writer = await self.connect()
        writer.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        await writer.drain()
        await asyncio.sleep(self.chooser.uniform(0, 1))
        writer.transport.abort()
        return "left"

    def prompt(self) -> str:
        """Some share their beginnings."""
        length = self.chooser.choice((1, 5, 20, 80, 200))
        return ("once upon a time " * 20)[:length] + str(self.chooser.randrange(1000))

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection(self.http.base_url.host, self.http.base_url.port, limit=1024)

    async def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        answer = await self.http.post(path, json=body)
        _check_status(answer, answer.text)
        found: dict[str, Any] = answer.json()
        return found

    async def events(self, path: str, body: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        """The stream's objects; leaving the iteration closes the connection."""
        last = ""
        async with self.http.stream("POST", path, json=body | {"stream": True}) as answer:
            if answer.status_code != 200:
                _check_status(answer, (await answer.aread()).decode())
            async for line in answer.aiter_lines():
                if line.startswith("data: {"):
                    event = json.loads(line[6:])
                    _check("error" not in event, line)
                    yield event
                last = line or last
        _check(last == "data: [DONE]", f"the stream ended with {last!r}")


def _text(choice: dict[str, Any]) -> str:
    message = choice.get("delta") or choice.get("message")
    return (choice.get("text") if message is None else message.get("content")) or ""


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise Wrong(message)


def _check_status(answer: httpx.Response, text: str) -> None:
    if answer.status_code == 429 and int(answer.headers["retry-after"]) >= 1:
        raise Refused
    _check(answer.status_code == 200, f"{answer.status_code}: {text[:300]}")


async def work(client: Client, kinds: list[tuple[str, Callable[[], Awaitable[str]]]], stop: asyncio.Event) -> None:
    while not stop.is_set():
        name, make = client.chooser.choice(kinds)
        detail = None
        try:
            end = await make()
        except Refused:
            end = "queue full"
            await asyncio.sleep(client.chooser.uniform(0, 0.5))
        except Exception as error:
            end, detail = "wrong", f"{type(error).__name__}: {error}"
        # One write for each line: a pipe takes it whole or, from a process that was killed, not at all.
        sys.stdout.write(json.dumps({"kind": name, "end": end, "detail": detail}) + "\n")
        sys.stdout.flush()


async def main() -> None:
    url, seed, concurrency, references = sys.argv[1:]
    stop, loop = asyncio.Event(), asyncio.get_running_loop()

    def wait_for_the_end() -> None:
        sys.stdin.read()
        loop.call_soon_threadsafe(stop.set)

    threading.Thread(target=wait_for_the_end, daemon=True).start()
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=int(concurrency))
    async with httpx.AsyncClient(base_url=url, timeout=300, limits=limits, trust_env=False) as http:
        has_embeddings = (await http.post("/v1/embeddings", json={"model": MODEL, "input": "x"})).status_code != 404
        tasks = []
        for number in range(int(concurrency)):
            chooser = random.Random(f"{seed} {number}")
            client = Client(http, chooser, json.loads(Path(references).read_text()))
            kinds: list[Callable[[], Awaitable[str]]] = [
                *[client.reference] * 4, *[client.sampled] * 2, *[client.leave_stream] * 3, *[client.leave_answer] * 2,
                client.echo, client.tools, client.guided, client.deadline, client.bad, client.look,
                client.half_a_request, client.deaf,
            ]  # fmt: skip
            kinds += [client.embedding] if has_embeddings else []
            tasks.append(work(client, [(kind.__name__, kind) for kind in kinds], stop))
        await asyncio.gather(*tasks)


if __name__ == "__main__":
    asyncio.run(main())
