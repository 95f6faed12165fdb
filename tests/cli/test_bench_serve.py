"""`puna bench serve`: its client against a server that answers in every way HTTP allows; its sums; what it refuses."""

from __future__ import annotations

import asyncio
import json
import math
import random
import socket
import statistics
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from puna.cli import load_run
from puna.cli.load_client import Address, HttpClient
from puna.cli.load_report import LoadReport
from puna.cli.load_run import Lengths, Load, Prompts, Record, Run, run_load

Puna = Callable[..., Any]


def event(payload: Any) -> bytes:
    return b"data: " + json.dumps(payload).encode() + b"\n\n"


def chunked(*pieces: bytes) -> bytes:
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    return head + b"".join(b"%X\r\n%s\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"


def sized(body: bytes, status: bytes = b"200 OK", more: bytes = b"") -> bytes:
    return b"HTTP/1.1 %s\r\n%scontent-length: %d\r\n\r\n%s" % (status, more, len(body), body)


class Fake:
    """A server in a thread. `answer` gets method, path and body of each request, and returns bytes, or None to hang up;
    they are sent in pieces of `piece` bytes."""

    def __init__(self, answer: Callable[[str, str, Any], bytes | None], piece: int = 1 << 20) -> None:
        self._answer = answer
        self._piece = piece
        self.connections = 0
        self.asked: list[tuple[str, str, dict[str, str], Any]] = []
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            self.connections += 1
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection, connection.makefile("rb") as lines:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            while first := lines.readline():
                method, path, _ = first.decode().split()
                headers = {}
                while (line := lines.readline()) != b"\r\n":
                    name, _, value = line.decode().partition(":")
                    headers[name.lower()] = value.strip()
                body = lines.read(int(headers.get("content-length", 0)))
                request = json.loads(body) if body else None
                self.asked.append((method, path, headers, request))
                answer = self._answer(method, path, request)
                if answer is None:
                    return
                for start in range(0, len(answer), self._piece):
                    connection.sendall(answer[start : start + self._piece])
                if b"connection: close" in answer:
                    return

    def close(self) -> None:
        self._socket.close()


@pytest.fixture
def fake() -> Iterator[Callable[..., Fake]]:
    made: list[Fake] = []

    def make(answer: Callable[[str, str, Any], bytes | None], piece: int = 1 << 20) -> Fake:
        made.append(Fake(answer, piece))
        return made[-1]

    yield make
    for one in made:
        one.close()


def exchange(server: Fake, *requests: tuple[str, str, Any]) -> list[tuple[int, bytes]]:
    async def ask() -> list[tuple[int, bytes]]:
        client = HttpClient(Address.of(server.url), "secret")
        try:
            return [await client.request(*request) for request in requests]
        finally:
            client.close()

    return asyncio.run(ask())


# ---- the client


@pytest.mark.parametrize("piece", [1, 2, 7, 1 << 20])
@pytest.mark.parametrize(
    ("answer", "body"),
    [
        (chunked(b"one ", b"t", b"wo\r\n0\r\n\r\n and more"), b"one two\r\n0\r\n\r\n and more"),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3;x=1\r\nabc\r\n0\r\n\r\n", b"abc"),
        (sized(b"whole"), b"whole"),
        (sized(b""), b""),
        (b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\nuntil the end", b"until the end"),
    ],
)
def test_bodies_of_every_kind(fake: Callable[..., Fake], answer: bytes, body: bytes, piece: int) -> None:
    server = fake(lambda *_: answer, piece)
    assert exchange(server, ("GET", "/a", None), ("POST", "/b", {"é": 1})) == [(200, body)] * 2
    assert [(method, path, json_body) for method, path, _, json_body in server.asked] == [
        ("GET", "/a", None),
        ("POST", "/b", {"é": 1}),
    ]
    assert server.asked[0][2]["authorization"] == "Bearer secret"
    assert server.connections == (2 if b"close" in answer else 1)  # kept where it can be


def test_an_idle_connection_that_the_server_closed_is_replaced(fake: Callable[..., Fake]) -> None:
    answers = iter([sized(b"1"), None, sized(b"2")])
    server = fake(lambda *_: next(answers))
    assert exchange(server, ("GET", "/", None), ("GET", "/", None)) == [(200, b"1"), (200, b"2")]
    assert server.connections == 2


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (None, "the connection broke"),
        (b"SSH-2.0-OpenSSH_9\r\n\r\n", "no HTTP"),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nxyz\r\n", "no HTTP"),
        (chunked(b"some")[:-8] + b"connection: close", "no HTTP|broke"),
    ],
)
def test_broken_answers_are_errors(fake: Callable[..., Fake], answer: bytes | None, message: str) -> None:
    with pytest.raises((OSError, ValueError), match=message):
        exchange(fake(lambda *_: answer), ("GET", "/", None))


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("http://127.0.0.1:8000", Address("127.0.0.1", 8000, False, "")),
        ("localhost:8000/v1/", Address("localhost", 8000, False, "")),
        ("https://example.com/llm/v1", Address("example.com", 443, True, "/llm")),
        ("http://[::1]:80", Address("::1", 80, False, "")),
    ],
)
def test_addresses(url: str, address: Address) -> None:
    assert Address.of(url) == address


@pytest.mark.parametrize("url", ["ftp://host", "http://", "http://host:x", "http://host/?a=1", ""])
def test_wrong_addresses(url: str) -> None:
    with pytest.raises(ValueError, match="is no address of a server"):
        Address.of(url)


# ---- lengths, prompts, times


def test_lengths() -> None:
    chooser = random.Random(0)
    assert {Lengths.parse("7", "").draw(chooser) for _ in range(9)} == {7}
    assert {Lengths.parse("2-4", "").draw(chooser) for _ in range(99)} == {2, 3, 4}
    normal = [Lengths.parse("normal:100:20", "").draw(chooser) for _ in range(4000)]
    assert statistics.mean(normal) == pytest.approx(100, abs=2)
    assert statistics.stdev(normal) == pytest.approx(20, abs=2)
    exponential = [Lengths.parse("exp:50", "").draw(chooser) for _ in range(4000)]
    assert statistics.mean(exponential) == pytest.approx(50, rel=0.1)
    assert min(exponential) >= 1


@pytest.mark.parametrize(
    "text", ["", "0", "x", "5-3", "normal:5", "normal:5:-1", "exp:0", "exp:nan", "1-2-3", "-4", "inf"]
)
def test_wrong_lengths(text: str) -> None:
    with pytest.raises(ValueError, match="--input-len is"):
        Lengths.parse(text, "--input-len")


def load(**fields: Any) -> Load:
    ten = Lengths("uniform", 10, 10)
    return Load(
        **{"model": "m", "chat": False, "input_lengths": ten, "output_lengths": ten, "num_requests": 5, **fields}
    )


def test_prompts_are_exact_and_share_their_prefix_only() -> None:
    prompts = Prompts(load(prefix_length=30), range(1000), 1.0)
    drawn = [prompts.draw()[0] for _ in range(20)]
    assert {len(prompt) for prompt in drawn} == {40}
    assert len({tuple(prompt[:30]) for prompt in drawn}) == 1
    assert len({tuple(prompt[30:]) for prompt in drawn}) == 20
    again = Prompts(load(prefix_length=30), range(1000), 1.0)
    assert [again.draw()[0] for _ in range(20)] == drawn


class Clock:
    """Time that only sleeping moves on; requests take none."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.sent: list[float] = []
        monkeypatch.setattr(load_run.time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(load_run.asyncio, "sleep", self._sleep)
        monkeypatch.setattr(load_run, "_send", self._send)

    async def _sleep(self, seconds: float) -> None:
        self.now += seconds

    async def _send(self, *_: Any) -> Record:
        self.sent.append(self.now)
        return Record(self.now)


def measured(it: Load) -> Run:
    return asyncio.run(run_load(None, it, Prompts(it, range(9), 1.0), lambda ended: None))  # type: ignore[arg-type]


def test_arrivals_are_a_poisson_process(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    # One at once: each is sent before the next one's time comes.
    run = measured(load(rate=8.0, num_requests=4000, concurrency=1))
    assert len(run.records) == 4000
    gaps = [after - before for before, after in zip(clock.sent, clock.sent[1:], strict=False)]
    assert statistics.mean(gaps) == pytest.approx(1 / 8, rel=0.05)
    assert statistics.stdev(gaps) == pytest.approx(1 / 8, rel=0.05)  # an exponential distribution's is its mean
    assert sum(gap > 1 / 8 for gap in gaps) / len(gaps) == pytest.approx(math.exp(-1), abs=0.03)


def test_duration_ends_the_sending(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    measured(load(rate=10.0, num_requests=None, duration=60.0, concurrency=1))
    assert 480 < len(clock.sent) < 720
    assert max(clock.sent) <= 60.0


@pytest.mark.parametrize(("concurrency", "most"), [(3, 3), (None, 20)])
def test_concurrency(monkeypatch: pytest.MonkeyPatch, concurrency: int | None, most: int) -> None:
    running, seen = 0, []

    async def send(*_: Any) -> Record:
        nonlocal running
        running += 1
        seen.append(running)
        for _ in range(50):
            await asyncio.sleep(0)
        running -= 1
        return Record(0.0)

    monkeypatch.setattr(load_run, "_send", send)
    run = measured(load(num_requests=20, concurrency=concurrency, warmup=2))
    assert len(run.records) == 20  # those of the warm-up do not count
    assert len(seen) == 22
    assert max(seen) == most


# ---- what is reported


def test_sums_are_as_vllm_defines_them() -> None:
    records = [
        # Sent at 1 s; text after 100, 150 and 250 ms; 5 tokens, so that one piece had several.
        Record(1.0, [1.1, 1.15, 1.25], end=1.3, prompt_tokens=10, output_tokens=5),
        Record(2.0, [2.4], end=2.4, prompt_tokens=20, output_tokens=1),
        Record(2.0, [2.1], end=2.2, error="status 500: oh"),
    ]
    report = LoadReport.of(Run(records, 4.0, 1.0), {"ttft": 200.0, "itl": 100.1})
    found = report.fields()
    assert (found["completed"], found["failed"], found["errors"]) == (2, 1, {"status 500: oh": 1})
    assert (found["total_input_tokens"], found["total_output_tokens"]) == (30, 6)
    assert (found["request_throughput"], found["output_throughput"], found["total_token_throughput"]) == (0.5, 1.5, 9.0)
    assert found["request_goodput"] == 0.25  # the second one had its first text too late
    assert found["mean_ttft_ms"] == pytest.approx(250)
    assert found["p99_ttft_ms"] == pytest.approx(100 + 0.99 * 300)
    assert found["mean_itl_ms"] == pytest.approx(75)
    assert found["std_itl_ms"] == pytest.approx(25)
    assert found["mean_tpot_ms"] == pytest.approx(200 / 4)  # 300 - 100 ms, by 4 further tokens; one token has none
    assert found["median_e2el_ms"] == found["p50_e2el_ms"] == pytest.approx(350)
    assert LoadReport.of(Run(records, 4.0, 1.0), {"itl": 99.9, "ttft": 500}).request_goodput == 0.25
    assert LoadReport.of(Run(records, 4.0, 1.0), {}).request_goodput is None


def test_percentiles_are_those_of_the_standard_library() -> None:
    values = [random.Random(3).expovariate(1) for _ in range(500)]
    records = [Record(0.0, [value], value, 1, 1) for value in values]
    latency = LoadReport.of(Run(records, 1.0, 0.0), {}).latencies["ttft"]
    cuts = statistics.quantiles([1e3 * value for value in values], n=100, method="inclusive")
    assert [latency.percentile(p) for p in (50, 90, 95, 99)] == pytest.approx([cuts[p - 1] for p in (50, 90, 95, 99)])


# ---- the command


class Model:
    """OpenAI's endpoints: answers of as many tokens as asked, one a chunk but for the last two, which share one."""

    def __init__(self, tokenizer: bool = True) -> None:
        self.tokenizer = tokenizer
        self.bodies: list[Any] = []

    def __call__(self, method: str, path: str, body: Any) -> bytes:
        if path == "/v1/models":
            return sized(json.dumps({"object": "list", "data": [{"id": "fake"}]}).encode())
        if path == "/tokenize":
            if not self.tokenizer:
                return sized(b"no", b"404 Not Found")
            found = {"tokens": [len(word) for word in body["prompt"].split() for _ in range(2)]}  # two a word
            return sized(json.dumps(found).encode())
        self.bodies.append(body)
        chat = path == "/v1/chat/completions"
        count = body["max_completion_tokens" if chat else "max_tokens"]
        if count == 13:
            return sized(b'{"error": {"message": "unlucky"}}', b"400 Bad Request")
        events = []
        if chat:
            events.append(event({"choices": [{"delta": {"role": "assistant", "content": ""}}]}))
        for index in range(count - 1):
            text = "ab" if index == count - 2 else "a"
            events.append(event({"choices": [{"delta": {"content": text}} if chat else {"text": text}]}))
        events.append(event({"choices": [{"delta": {} if chat else None, "text": "", "finish_reason": "length"}]}))
        prompt = body["messages"][0]["content"].split() if chat else body["prompt"]
        usage = {"prompt_tokens": len(prompt), "completion_tokens": count}
        return chunked(*events, event({"choices": [], "usage": usage}), b"data: [DONE]\n\n")


def words(server: Fake, *more: object) -> tuple[object, ...]:
    return ("bench", "serve", server.url, "--num-requests", 6, "--concurrency", 2, "--warmup", 1, *more)


def test_json_of_completions(puna: Puna, fake: Callable[..., Fake]) -> None:
    model = Model()
    server = fake(model, 5)
    done = puna(
        *words(server, "--input-len", 12, "--prefix-len", 4, "--output-len", 8, "--json", "--goodput", "ttft:60000")
    )
    assert (done.code, done.err) == (0, "")
    found = json.loads(done.out)
    assert found["model"] == "fake"
    assert (found["completed"], found["failed"]) == (6, 0)
    assert (found["total_input_tokens"], found["total_output_tokens"]) == (6 * 16, 6 * 8)
    assert found["request_goodput"] == found["request_throughput"] > 0
    for name in ("ttft", "tpot", "itl", "e2el"):
        assert 0 <= found[f"p50_{name}_ms"] <= found[f"p99_{name}_ms"]
    assert len(model.bodies) == 7
    for body in model.bodies:
        assert (body["model"], body["max_tokens"], body["ignore_eos"], body["temperature"]) == ("fake", 8, True, 0)
        assert body["stream"] is True
        assert len(body["prompt"]) == 16
    assert server.connections == 2  # kept and used again


def test_chat_table_and_plot(puna: Puna, fake: Callable[..., Fake], tmp_path: Any) -> None:
    model, plot = Model(), tmp_path / "latencies.svg"
    extra = ("--endpoint", "chat", "--input-len", 10, "--output-len", 4, "--no-ignore-eos", "--plot", plot)
    done = puna(*words(fake(model), *extra, "--extra-body", '{"temperature": 1, "top_k": 3}'))
    assert (done.code, done.err) == (0, "")
    assert "6 completed, 0 failed" in done.out
    assert "TTFT" in done.out
    assert plot.read_text().startswith("<?xml")
    for body in model.bodies:
        assert (body["temperature"], body["top_k"], body["max_completion_tokens"]) == (1, 3, 4)
        assert "ignore_eos" not in body
        assert len(body["messages"][0]["content"].split()) == 5  # of two tokens each


def test_without_a_tokenizer_prompts_are_words(puna: Puna, fake: Callable[..., Fake]) -> None:
    model = Model(tokenizer=False)
    assert puna(*words(fake(model), "--input-len", 9, "--output-len", 3)).code == 0
    assert {len(body["prompt"].split()) for body in model.bodies} == {9}


def test_failed_requests_are_counted(puna: Puna, fake: Callable[..., Fake]) -> None:
    done = puna(*words(fake(Model()), "--output-len", "12-13", "--warmup", 0, "--json", "--num-requests", 40))
    assert done.code == 1
    found = json.loads(done.out)
    assert found["errors"] == {"status 400: unlucky": found["failed"]}
    assert found["completed"] + found["failed"] == 40
    assert 0 < found["failed"] < 40
    assert found["total_output_tokens"] == 12 * found["completed"]
    assert "requests failed: status 400: unlucky" in done.err


def test_a_server_that_refuses_everything_is_told_at_once(puna: Puna, fake: Callable[..., Fake]) -> None:
    assert "status 400: unlucky" in puna(*words(fake(Model()), "--output-len", 13)).message


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--rate", "0"), "--rate is '0'"),
        (("--rate", "x"), "--rate is 'x'"),
        (("--duration", 5), "--duration alone would send requests without end"),
        (("--duration", 0, "--rate", 5), "--duration is 0.0: give the seconds"),
        (("--goodput", "ttft"), "--goodput is 'ttft': give ttft, tpot, itl, e2el and milliseconds"),
        (("--goodput", "foo:5"), "--goodput is 'foo:5'"),
        (("--input-len", "0"), "--input-len is '0'"),
        (("--output-len", "many"), "--output-len is 'many'"),
        (("--extra-body", "[1]"), "--extra-body is '[1]': give a JSON object"),
        (("--plot", "x.jpg"), "--plot is 'x.jpg'"),
    ],
)
def test_refusals(puna: Puna, more: Sequence[object], message: str) -> None:
    assert message in puna("bench", "serve", "http://127.0.0.1:1", *more).message


def test_a_duration_in_which_nothing_is_due(puna: Puna, fake: Callable[..., Fake]) -> None:
    done = puna("bench", "serve", fake(Model()).url, "--rate", 0.001, "--duration", 0.01)
    assert "no request was due within --duration 0.01" in done.message


def test_nobody_there(puna: Puna) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    assert f"no connection to 127.0.0.1:{port}" in puna("bench", "serve", f"127.0.0.1:{port}").message
