"""/v1/embeddings over a socket: OpenAI's client and plain HTTP, against LLM.embed and transformers."""

from __future__ import annotations

import asyncio
import base64
import json
import shutil
import socket
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from puna.engine.engine import Engine
from puna.engine.recommended_pooling import POOLING_FILE, recommended_pooling
from puna.llm import LLM
from puna.ops import cpu
from puna.scheduling.scheduler import QueueFullError
from puna.serving.state import ServerSettings, ServerState
from serving.conftest import Running, Serve, listening, openai

PATH = "/v1/embeddings"
TEXTS = ["a llama", "x", "the high grassland", "grün " * 20]


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[LLM]:
    with LLM(folder) as it:
        yield it


def post(server: Running, **fields: Any) -> Any:
    body = json.dumps({"model": "small"} | fields)  # httpx's own refuses half a surrogate pair
    return server.http.post(PATH, content=body, headers={"content-type": "application/json"})


def vectors(answer: dict[str, Any]) -> torch.Tensor:
    assert [entry["index"] for entry in answer["data"]] == list(range(len(answer["data"])))
    return torch.tensor([entry["embedding"] for entry in answer["data"]])


def assert_same(found: torch.Tensor, expected: list[torch.Tensor]) -> None:
    """In every bit on the compiled kernels."""
    if cpu.compiled():
        assert torch.equal(found, torch.stack(expected))
    else:
        torch.testing.assert_close(found, torch.stack(expected), rtol=0, atol=2e-5)


def test_openai_client_gets_what_transformers_computes(server: Running, folder: Path, llm: LLM) -> None:
    model = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    for encoding in (openai.omit, "float", "base64"):  # left out, the client asks for base64 and decodes it
        answer = server.client.embeddings.create(model="small", input=TEXTS, encoding_format=encoding)
        assert answer.object == "list"
        assert answer.model == "small"
        assert answer.usage.prompt_tokens == answer.usage.total_tokens == sum(len(llm.encode(t)) for t in TEXTS)
        for index, (text, entry) in enumerate(zip(TEXTS, answer.data, strict=True)):
            assert (entry.index, entry.object) == (index, "embedding")
            values = entry.embedding
            if isinstance(values, str):
                values = list(struct.unpack("<32f", base64.b64decode(values)))
            with torch.no_grad():
                hidden = model(torch.tensor([llm.encode(text)])).last_hidden_state[0, -1]
            expected = torch.nn.functional.normalize(hidden, dim=0)
            torch.testing.assert_close(torch.tensor(values), expected, rtol=0, atol=2e-5)


FLAGS = {"word_embedding_dimension": 32, "pooling_mode_cls_token": False, "include_prompt": True}


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (FLAGS | {"pooling_mode_mean_tokens": True, "pooling_mode_lasttoken": False}, "mean"),
        (FLAGS | {"pooling_mode_mean_tokens": False, "pooling_mode_lasttoken": True}, "last"),
        ({"pooling_mode": "mean"}, "mean"),
        ({"pooling_mode": ["lasttoken"]}, "last"),
        (FLAGS | {"pooling_mode_cls_token": True}, None),
        (FLAGS | {"pooling_mode_mean_tokens": True, "pooling_mode_lasttoken": True}, None),
        ({"pooling_mode": ["mean", "max"]}, None),
        ({"pooling_mode": "weightedmean"}, None),
        (FLAGS, None),
    ],
)
def test_what_the_checkpoint_says_of_pooling(tmp_path: Path, content: dict[str, Any], expected: str | None) -> None:
    assert recommended_pooling(tmp_path) == "last"
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / POOLING_FILE).write_text(json.dumps(content))
    assert recommended_pooling(tmp_path) == expected


def test_a_file_about_pooling_that_is_damaged(tmp_path: Path) -> None:
    (tmp_path / "1_Pooling").mkdir()
    for content, message in (
        ("{", "not valid JSON"),
        ('{"pooling_mode_mean_tokens": 1}', "pooling_mode_mean_tokens is 1"),
    ):
        (tmp_path / POOLING_FILE).write_text(content)
        with pytest.raises(ValueError, match=message):
            recommended_pooling(tmp_path)


@pytest.mark.parametrize("word", ["mean", "cls"])
def test_the_checkpoints_pooling_is_the_default(folder: Path, tmp_path: Path, llm: LLM, word: str) -> None:
    model = shutil.copytree(folder, tmp_path / "model")
    (model / "1_Pooling").mkdir()
    (model / POOLING_FILE).write_text(json.dumps({"pooling_mode": word}))
    engine = Engine.from_pretrained(str(model))
    with listening(ServerState(ServerSettings(model_name="small"), engine, "ready")) as running:
        if word == "cls":
            refused = post(running, input=TEXTS)
            assert refused.status_code == 400
            assert refused.json()["error"]["param"] == "pooling"
        else:
            assert_same(vectors(post(running, input=TEXTS).json()), llm.embed(TEXTS, "mean"))
        assert_same(vectors(post(running, input=TEXTS, pooling="last").json()), llm.embed(TEXTS))
    engine.shutdown()


def test_every_form_of_input(server: Running, llm: LLM) -> None:
    tokens = [llm.encode(text) for text in TEXTS]
    expected = llm.embed(TEXTS)
    assert_same(vectors(post(server, input=TEXTS).json()), expected)
    assert_same(vectors(post(server, input=tokens).json()), expected)
    assert_same(vectors(post(server, input=TEXTS[0]).json()), expected[:1])
    assert_same(vectors(post(server, input=tokens[0]).json()), expected[:1])


def test_fields(server: Running, llm: LLM) -> None:
    def found(**fields: Any) -> torch.Tensor:
        return vectors(post(server, input=TEXTS, **fields).json())

    assert_same(found(pooling="mean"), llm.embed(TEXTS, "mean"))
    assert_same(found(pooling="mean", normalize=False), llm.embed(TEXTS, "mean", normalize=False))
    assert_same(found(pooling="last", normalize=True), llm.embed(TEXTS))
    assert_same(found(dimensions=32, user="u", priority=3, cache_salt="s", deadline=30), llm.embed(TEXTS))
    assert_same(found(pooling=None, encoding_format=None, unheard_of=None), llm.embed(TEXTS))
    bare = [{"prompt_token_ids": llm.encode(text, add_special_tokens=False)} for text in TEXTS]
    assert_same(found(add_special_tokens=False), llm.embed(bare))
    ends = [{"prompt_token_ids": llm.encode(text)[-3:]} for text in TEXTS]
    assert_same(found(truncate_prompt_tokens=3), llm.embed(ends))
    long = post(server, input="y" * 400, truncate_prompt_tokens=-1).json()
    assert long["usage"] == {"prompt_tokens": 256, "total_tokens": 256}
    assert_same(vectors(long), llm.embed({"prompt_token_ids": llm.encode("y" * 400)[-256:]}))


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        (
            {"input": ["ok", "y" * 256]},
            "input",
            "input 1 is too long: this model's maximum context length is 256 tokens, and it has 257",
        ),
        ({"input": [[5] * 257]}, "input", "it has 257: shorten it, or set truncate_prompt_tokens"),
        ({"input": [5, 258]}, "input", "input 0 has the token 258"),
        ({"input": ["a", "\ud800"]}, "input", "input 1: "),
        ({"input": "", "add_special_tokens": False}, "input", "input 0 is empty"),
        ({"input": []}, "input", "at least 1 item"),
        ({"input": [[5], []]}, "input.1", "at least 1 item"),
        ({"input": ["a"] * 2049}, "input", "at most 2048 items"),
        ({"input": ["a", 5]}, "input.1", "string"),
        ({"input": {"text": "a"}}, "input", "should be a text, a list of texts, token ids, or a list of lists"),
        ({"input": [True]}, "input", "should be a text, a list of texts, token ids, or a list of lists"),
        ({"input": [[5], ["a"]]}, "input.1.0", "valid integer"),
        ({}, "input", "required"),
        ({"input": "a", "dimensions": 16}, "dimensions", "dimensions is 16, but this model's embeddings have 32"),
        ({"input": "a", "dimensions": 0}, "dimensions", "greater than or equal to 1"),
        ({"input": "a", "encoding_format": "hex"}, "encoding_format", "'float' or 'base64'"),
        ({"input": "a", "pooling": "max"}, "pooling", "'last' or 'mean'"),
        ({"input": "a", "normalize": 1}, "normalize", "boolean"),
        ({"input": "a", "truncate_prompt_tokens": 0}, "truncate_prompt_tokens", "greater than or equal to 1"),
        ({"input": "a", "temperature": 1}, "temperature", "does not know this field"),
        ({"input": "a", "deadline": 0}, "deadline", "greater than 0"),
    ],
)
def test_refusals_name_the_field(server: Running, fields: dict[str, Any], param: str, words: str) -> None:
    answer = post(server, **fields)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert words in error["message"]
    server.wait_until_idle()


def test_an_unknown_model_is_not_found(server: Running) -> None:
    with pytest.raises(openai.NotFoundError, match="'other' does not exist"):
        server.client.embeddings.create(model="other", input="a")


def test_many_inputs_do_not_need_a_long_queue(serve: Serve, llm: LLM) -> None:
    """More than run at once, and more than may wait; also beside others who keep the queue full."""
    texts = [f"{i} " * (1 + i % 7) for i in range(200)]
    with serve(engine={"max_num_seqs": 4, "max_waiting": 1}) as server:
        assert_same(vectors(post(server, input=texts, pooling="mean").json()), llm.embed(texts, "mean"))
        answers: list[Any] = []
        both = [threading.Thread(target=lambda: answers.append(post(server, input=texts))) for _ in range(2)]
        for thread in both:
            thread.start()
        for thread in both:
            thread.join()
        expected = llm.embed(texts)
        assert sorted({answer.status_code for answer in answers}) in ([200], [200, 429])
        for answer in answers:
            if answer.status_code == 200:
                assert_same(vectors(answer.json()), expected)
            else:
                assert answer.headers["retry-after"]
        server.wait_until_idle()


def test_a_request_that_meets_a_full_queue_goes_on(
    serve: Serve, llm: LLM, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One of its inputs runs, so that there will be room; each is counted once."""
    with serve(engine={"max_num_seqs": 4}) as server, caplog.at_level("INFO"):
        assert server.state.engine is not None
        submit, calls = server.state.engine.submit, [0]

        def crowded(*args: Any, **options: Any) -> str:
            calls[0] += 1
            if 1 < calls[0] < 4:
                raise QueueFullError("2 requests are waiting")
            return submit(*args, **options)

        monkeypatch.setattr(server.state.engine, "submit", crowded)
        answer = post(server, input=TEXTS)
        assert answer.status_code == 200
        assert_same(vectors(answer.json()), llm.embed(TEXTS))
        assert calls[0] == len(TEXTS) + 2
        server.http.get("/health")  # on the same connection: by now the line before is written
        assert f"prompt_tokens={answer.json()['usage']['prompt_tokens']} " in caplog.text


def hold_steps(server: Running, monkeypatch: pytest.MonkeyPatch) -> tuple[threading.Event, threading.Event]:
    """Steps wait for the second event once they have run; the first tells of it."""
    assert server.state.engine is not None
    runner = server.state.engine.parts.executor._runner  # type: ignore[attr-defined]
    execute, has_run, may_go_on = runner.execute, threading.Event(), threading.Event()

    def held(plan: Any) -> Any:
        result = execute(plan)
        has_run.set()
        assert may_go_on.wait(30)
        return result

    monkeypatch.setattr(runner, "execute", held)
    return has_run, may_go_on


def test_a_full_queue_answers_429(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    with serve(engine={"max_num_seqs": 1, "max_waiting": 1}) as server:
        has_run, may_go_on = hold_steps(server, monkeypatch)
        engine = server.state.engine
        assert engine is not None
        first = threading.Thread(target=lambda: post(server, input=["a", "b"]))
        first.start()
        assert has_run.wait(30)
        second = threading.Thread(target=lambda: post(server, input="c"))
        second.start()
        while not engine.statistics().num_waiting:
            time.sleep(0.01)
        answer = post(server, input="d")
        assert answer.status_code == 429
        assert answer.json()["error"]["code"] == "queue_full"
        assert int(answer.headers["retry-after"]) >= 1
        may_go_on.set()
        first.join()
        second.join()
        server.wait_until_idle()


def test_a_deadline_is_the_whole_requests(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    with serve(engine={"max_num_seqs": 1}) as server:
        _, may_go_on = hold_steps(server, monkeypatch)
        threading.Timer(0.3, may_go_on.set).start()
        answer = post(server, input=["a", "b", "c"], deadline=0.1)
        assert answer.status_code == 408
        assert answer.headers["x-should-retry"] == "false"
        assert answer.json()["error"] == {
            "message": "the embeddings took longer than the deadline of 0.1 seconds",
            "type": "timeout_error",
            "param": "deadline",
            "code": "deadline_exceeded",
        }
        server.wait_until_idle()


def test_a_client_that_leaves_frees_its_blocks(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    with serve(engine={"max_num_seqs": 2, "max_num_batched_tokens": 4}) as server:
        has_run, may_go_on = hold_steps(server, monkeypatch)
        body = json.dumps({"model": "small", "input": ["a long one " * 20] * 50, "pooling": "mean"}).encode()
        head = (
            f"POST {PATH} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        )
        with socket.create_connection(("127.0.0.1", int(server.url.rsplit(":", 1)[1]))) as connection:
            connection.sendall(head.encode() + body)
            assert has_run.wait(30)
        assert server.state.engine is not None
        scheduler = server.state.engine.parts.scheduler
        while scheduler.num_running:  # cancelled while the step is still held
            time.sleep(0.01)
        may_go_on.set()
        server.wait_until_idle()
        assert len(server.state.engine.parts.executor._runner.pooler) == 0  # type: ignore[attr-defined]


def test_the_same_bits_beside_others(server: Running) -> None:
    fields: dict[str, Any] = {"input": TEXTS, "pooling": "mean", "encoding_format": "base64"}
    alone = [post(server, **fields | {"input": text}).json()["data"][0]["embedding"] for text in TEXTS]

    async def together() -> list[Any]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
            create = client.embeddings.create
            chats = [
                client.completions.create(model="small", prompt=f"{i} and", max_tokens=20, temperature=0)
                for i in range(4)
            ]
            asked = [
                create(model="small", input=TEXTS, encoding_format="base64", extra_body={"pooling": "mean"})
                for _ in range(6)
            ]
            return (await asyncio.gather(*chats, *asked))[4:]

    for answer in asyncio.run(together()):
        found = [entry.embedding for entry in answer.data]
        if cpu.compiled():
            assert found == alone
        assert len(found) == len(alone)


def test_metrics_count_their_tokens(serve: Serve) -> None:
    def value(server: Running, name: str) -> float:
        lines = server.http.get("/metrics").text.splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name))

    with serve() as server:
        answer = post(server, input=TEXTS).json()
        assert value(server, "vllm:prompt_tokens_total") == answer["usage"]["prompt_tokens"]
        assert value(server, "vllm:generation_tokens_total") == 0
        assert value(server, 'vllm:request_success_total{engine="0",finished_reason="stop"') == len(TEXTS)
        assert value(server, "vllm:e2e_request_latency_seconds_count") == len(TEXTS)
        assert value(server, "vllm:request_queue_time_seconds_count") == len(TEXTS)
        assert value(server, "vllm:time_to_first_token_seconds_count") == 0


def test_a_model_whose_numbers_overflow_fails_alone(
    server: Running, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert server.state.engine is not None
    pooler = server.state.engine.parts.executor._runner.pooler  # type: ignore[attr-defined]
    pool = pooler.pool
    monkeypatch.setattr(pooler, "pool", lambda rows, hidden: pool(rows, hidden * torch.inf))
    answer = post(server, input="a")
    assert answer.status_code == 500
    assert answer.json()["error"]["message"] == "the engine failed on this request"
    (line,) = [record.getMessage() for record in caplog.records if record.name == "puna.engine.engine"]
    assert line.endswith("failed: the model's hidden states are NaN or infinite"), line
    monkeypatch.undo()
    assert post(server, input="a").status_code == 200
