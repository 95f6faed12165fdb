"""`puna generate --input --output`: every prompt once, whatever happens on the way."""

from __future__ import annotations

import fcntl
import json
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import puna

Run = Callable[..., Any]


def write_lines(file: Path, lines: list[Any]) -> Path:
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return file


def results(file: Path) -> dict[int, dict[str, Any]]:
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    found = {line["index"]: line for line in lines}
    assert len(found) == len(lines), "a prompt has two results"
    return found


def test_every_kind_of_prompt(chain: Any, puna: Run, tmp_path: Path) -> None:
    lines = [
        {"prompt": "!", "id": "first"},
        {"prompt_token_ids": chain.ids("x"), "id": 7},
        {"messages": [{"role": "user", "content": "Hi"}]},
        {"prompt": "x", "max_tokens": 2, "echo": True},
        {"prompt": "!", "stop": "€"},
    ]
    source, out = write_lines(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl"
    done = puna(
        "generate", "-m", chain, "--input", source, "--output", out, "--max-new-tokens", 20, "--max-num-seqs", 2
    )
    assert (done.code, done.out, done.err) == (0, "", "")
    found = results(out)
    assert [found[index]["text"] for index in range(5)] == ["aé€😀b", ("yzx" * 7)[:20], "0123456789", "xyz", "aé"]
    assert [found[index].get("id") for index in range(5)] == ["first", 7, None, None, None]
    assert [found[index]["finish_reason"] for index in range(5)] == ["stop", "length", "stop", "length", "stop"]
    assert found[0]["token_ids"] == [*chain.ids("aé€😀b"), 1]
    assert found[0]["usage"] == {"prompt_tokens": 2, "completion_tokens": 12, "total_tokens": 14}


def test_sampling_fields_of_a_line_replace_the_flags(random_model: Any, puna: Run, tmp_path: Path) -> None:
    lines = [
        {"prompt": "das Alpaka"},
        {"prompt": "das Alpaka"},
        {"prompt": "das Alpaka", "seed": 5, "temperature": 0.7, "top_k": 9},
        {"prompt": "das Alpaka", "n": 3, "seed": 8},
        {"prompt": "das", "logit_bias": {"30": 100}, "logprobs": 2, "prompt_logprobs": 0},
        {"prompt": "das", "guided": {"choice": ["yes", "no"]}, "ignore_eos": False},
    ]
    source, out = write_lines(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl"
    words = ("--temperature", 1.1, "--seed", 40, "--max-new-tokens", 8)
    assert puna("generate", "-m", random_model, "--input", source, "--output", out, *words).code == 0
    found = results(out)
    wanted = [{"seed": 40}, {"seed": 41}, {"seed": 5, "temperature": 0.7, "top_k": 9}]
    for index, options in enumerate(wanted):
        assert [found[index]["token_ids"]] == sampled(random_model, "das Alpaka", **{"temperature": 1.1, **options})
    assert [one["token_ids"] for one in found[3]["outputs"]] == sampled(
        random_model, "das Alpaka", n=3, seed=8, temperature=1.1
    )
    assert found[4]["token_ids"] == [30] * 8
    assert len(found[4]["logprobs"]) == 8
    assert found[4]["cumulative_logprob"] == pytest.approx(sum(position["30"] for position in found[4]["logprobs"]))
    assert len(found[4]["prompt_logprobs"]) == found[4]["usage"]["prompt_tokens"]
    assert found[5]["text"] in ("yes", "no")


def sampled(folder: Any, prompt: str, **options: Any) -> list[list[int]]:
    with puna.LLM(folder.path) as llm:
        (output,) = llm.generate(prompt, puna.SamplingParams(max_tokens=8, **options))
    return [one.token_ids for one in output.outputs]


def test_beams_and_chats(random_model: Any, chain: Any, puna: Run, tmp_path: Path) -> None:
    source, out = write_lines(tmp_path / "in.jsonl", [{"prompt": "das Alpaka"}]), tmp_path / "out.jsonl"
    words = ("--num-beams", 3, "--max-new-tokens", 6, "--ignore-eos")
    assert puna("generate", "-m", random_model, "--input", source, "--output", out, *words).code == 0
    alone = json.loads(puna("generate", "-m", random_model, "--json", *words, "das Alpaka").out)
    found = results(out)[0]
    assert {name: found[name] for name in ("text", "token_ids", "finish_reason", "usage")} == {
        name: alone[name] for name in ("text", "token_ids", "finish_reason", "usage")
    }
    chats = tmp_path / "chats.jsonl"
    words = ("--apply-chat-template", "--system", "Be brief.")
    assert puna("generate", "-m", chain, "--input", source, "--output", chats, *words).code == 0
    result = results(chats)[0]
    assert result["text"] == "0123456789"
    assert result["usage"]["prompt_tokens"] == len(chain.ids("<|system|>Be brief.<|user|>das Alpaka<|assistant|>"))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"prompt": "x", "warmth": 1}, "there is no field warmth"),
        ({"text": "x"}, "has no prompt"),
        ({"prompt": "x", "messages": []}, "has prompt and messages"),
        ({"prompt": 5}, "prompt is 5: give a text"),
        ({"prompt_token_ids": [1, "2"]}, "prompt_token_ids is"),
        ({"prompt_token_ids": [1, 9999]}, "the tokenizer gives the token 9999"),
        ({"prompt_token_ids": []}, "the prompt is empty"),
        ({"messages": "Hi"}, "messages is"),
        ({"prompt": "x", "id": [1]}, "id is [1]"),
        ({"prompt": "x", "temperature": "hot"}, 'temperature is "hot": it must be a number'),
        ({"prompt": "x", "temperature": None}, "temperature is null: it must be a number"),
        ({"prompt": "x", "max_tokens": 1.5}, "max_tokens is 1.5: it must be a whole number"),
        ({"prompt": "x", "n": True}, "n is true: it must be a whole number"),
        ({"prompt": "x", "stop": [1]}, "stop is [1]"),
        ({"prompt": "x", "logit_bias": {"a": 1}}, "logit_bias is"),
        ({"prompt": "x", "logit_bias": {"9999": 1}}, "logit_bias has the token id 9999"),
        ({"prompt": "x", "top_p": 0}, "top_p is 0: it must be above 0"),
        ({"prompt": "x", "guided": {"jsonschema": {}}}, "guided has jsonschema"),
        ({"prompt": "x", "guided": {"regex": "a", "choice": ["b"]}}, "exactly one of"),
        ({"prompt": "x" * 30}, "the prompt has 31 tokens, and the context is 20"),
        (["x"], "is not an object"),
    ],
)
def test_a_bad_line_is_named_before_anything_runs(
    build_chain: Run, puna: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: Any, message: str
) -> None:
    folder = build_chain(tmp_path / "model", "xyzx", context=20)
    monkeypatch.setattr("puna.models.loading.ModelLoader.load", lambda *_, **__: pytest.fail("the weights were read"))
    source, out = write_lines(tmp_path / "in.jsonl", [{"prompt": "x"}, line]), tmp_path / "out.jsonl"
    told = puna("generate", "-m", folder, "--input", source, "--output", out).message
    assert told.startswith(f"{source}, line 2: ")
    assert message in told
    assert not out.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"prompt": "x"}\n{"prompt": \n', "line 2: not JSON"),
        (b'{"prompt": "\xff"}\n', "line 1: not UTF-8 text, from byte 12 on"),
        (b"\n \n", "--input has no prompts in it"),
    ],
)
def test_a_file_that_is_no_batch(chain: Any, puna: Run, tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "in.jsonl").write_bytes(content)
    words = ("--input", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl")
    assert message in puna("generate", "-m", chain, *words).message


def test_a_grammar_that_can_not_be_compiled_ends_the_batch_before_anything_runs(
    random_model: Any, puna: Run, tmp_path: Path
) -> None:
    lines = [{"prompt": "das"}, {"prompt": "das", "guided": {"regex": "("}}]
    source, out = write_lines(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl"
    assert puna("generate", "-m", random_model, "--input", source, "--output", out).message.startswith("prompt 1: ")
    assert out.read_bytes() == b""


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--input", "in"], "--input and --output belong together"),
        (["--output", "out"], "--input and --output belong together"),
        (["--input", "in", "--output", "out", "text"], "PROMPT can't be combined with --input"),
        (["--input", "in", "--output", "out", "--json"], "--json can't be combined with --input"),
        (["--input", "no such file", "--output", "out"], "--input is 'no such file', which is no file"),
        (["--n", "2", "text"], "--n is 2, but only one text can be streamed"),
        (["--max-model-len", "999999", "x"], "--max-model-len is 999999, but the model's context is 100000"),
        (["--kv-cache-memory", "lots", "x"], "--kv-cache-memory is 'lots'"),
    ],
)
def test_flags_that_do_not_go_together(chain: Any, puna: Run, words: list[str], message: str) -> None:
    assert message in puna("generate", "-m", chain, *words).message


def test_a_finished_batch_is_not_done_again(
    chain: Any, puna: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = write_lines(tmp_path / "in.jsonl", [{"prompt": "!"}, {"prompt": "!"}]), tmp_path / "out.jsonl"
    words = ("generate", "-m", chain, "--input", source, "--output", out)
    assert puna(*words).code == 0
    before = out.read_bytes()
    monkeypatch.setattr("puna.models.loading.ModelLoader.load", lambda *_, **__: pytest.fail("the weights were read"))
    done = puna(*words, "--max-num-seqs", 3, "--threads", 1)  # neither changes a result
    assert (done.code, done.err) == (0, f"all 2 prompts have their results in {out}\n")
    assert out.read_bytes() == before


def test_a_torn_last_line_is_cut_off_and_done_again(chain: Any, puna: Run, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "in.jsonl", [{"prompt": "!", "id": i} for i in range(4)])
    out = tmp_path / "out.jsonl"
    words = ("generate", "-m", chain, "--input", source, "--output", out)
    puna(*words)
    whole = out.read_bytes()
    for cut in (1, 20, len(whole.splitlines(keepends=True)[-1]) + 3):
        out.write_bytes(whole[:-cut])
        done = puna(*words)
        assert done.code == 0
        assert "was not finished, and is done again" in done.err
        assert sorted(out.read_bytes().splitlines()) == sorted(whole.splitlines())


def test_output_of_another_run_is_refused(chain: Any, puna: Run, tmp_path: Path) -> None:
    source, out = write_lines(tmp_path / "in.jsonl", [{"prompt": "!"}]), tmp_path / "out.jsonl"
    words = ("generate", "-m", chain, "--input", source, "--output", out)
    puna(*words)
    before = out.read_bytes()
    assert "(sampling differs)" in puna(*words, "--max-new-tokens", 3).message
    assert "(dtype differs)" in puna(*words, "--dtype", "bfloat16").message
    write_lines(source, [{"prompt": "x"}])
    assert "(input differs)" in puna(*words).message
    (tmp_path / "out.jsonl.run.json").unlink()
    assert "no out.jsonl.run.json beside it says whose it is" in puna(*words).message
    assert out.read_bytes() == before


@pytest.mark.parametrize("line", [b"notes\n", b"[]\n", b'{"index": "0"}\n'])
def test_output_with_lines_that_are_no_results_is_refused(chain: Any, puna: Run, tmp_path: Path, line: bytes) -> None:
    source, out = write_lines(tmp_path / "in.jsonl", [{"prompt": "!"}, {"prompt": "x"}]), tmp_path / "out.jsonl"
    words = ("generate", "-m", chain, "--input", source, "--output", out, "--max-new-tokens", 3)
    puna(*words)
    damaged = line + out.read_bytes()
    out.write_bytes(damaged)
    assert "line 1: not a result of puna" in puna(*words).message
    assert out.read_bytes() == damaged
    first = damaged.splitlines(keepends=True)[1]
    out.write_bytes(first + first)
    assert "stands there twice" in puna(*words).message


def test_two_runs_do_not_write_one_output(chain: Any, puna: Run, tmp_path: Path) -> None:
    source, out = write_lines(tmp_path / "in.jsonl", [{"prompt": "!"}]), tmp_path / "out.jsonl"
    with out.open("wb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert "another run is writing" in puna("generate", "-m", chain, "--input", source, "--output", out).message


def test_a_failed_request_has_no_result_and_the_others_do(
    chain: Any, puna: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from puna.engine.output_processor import OutputProcessor

    make, broken = OutputProcessor.process, chain.ids("xy")

    def fail(self: OutputProcessor, events: Any) -> Any:
        if list(self.request.prompt_token_ids) == broken:
            raise RuntimeError("no text for this one")
        return make(self, events)

    lines = [{"prompt": "!"}, {"prompt_token_ids": broken}, {"prompt": "!"}]
    source, out = write_lines(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl"
    words = ("generate", "-m", chain, "--input", source, "--output", out, "--max-new-tokens", 3)
    with monkeypatch.context() as patch:
        patch.setattr(OutputProcessor, "process", fail)
        done = puna(*words)
    assert done.code == 1
    assert "1 prompts failed and have no result, the first of them prompt 1" in done.err
    assert sorted(results(out)) == [0, 2]
    assert puna(*words).code == 0
    assert sorted(results(out)) == [0, 1, 2]


def test_killed_runs_lose_and_repeat_nothing(random_model: Any, start_program: Run, puna: Run, tmp_path: Path) -> None:
    lines = [{"prompt": "das Alpaka steht", "id": f"p{i}", "max_tokens": 20 + i % 30} for i in range(300)]
    source = write_lines(tmp_path / "in.jsonl", lines)
    words = ("generate", "-m", random_model, "--input", source, "--temperature", 1, "--seed", 3, "--ignore-eos")
    assert puna(*words, "--output", tmp_path / "whole.jsonl").code == 0
    out = tmp_path / "out.jsonl"
    lengths = []
    for wanted in (1, 60, 140):
        process = start_program(
            *(*words, "--output", out, "--threads", 1), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        while count_lines(out) < wanted and process.poll() is None:
            time.sleep(0.002)
        process.kill()
        process.communicate()
        lengths.append(count_lines(out))
    assert 0 < lengths[0] < lengths[1] < lengths[2] < 300  # each was killed in the middle
    done = puna(*words, "--output", out, "--stats")
    assert done.code == 0
    assert done.err.splitlines()[-1].startswith(f"{300 - lengths[2]} prompts, ")
    assert results(out) == results(tmp_path / "whole.jsonl")
    assert sorted(results(out)) == list(range(300))


def count_lines(file: Path) -> int:
    return file.read_bytes().count(b"\n") if file.exists() else 0


def test_ctrl_c_says_how_to_go_on(chain: Any, start_program: Run, tmp_path: Path) -> None:
    lines = [{"prompt": "!"}, {"prompt": "x", "max_tokens": 90_000}]
    source, out = write_lines(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl"
    process = start_program("generate", "-m", chain, "--input", source, "--output", out, stderr=subprocess.PIPE)
    while count_lines(out) < 1 and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    # A result that has just been written may not be counted yet.
    assert re.search("[01] of 2 prompts are done; the same command does the rest", process.communicate()[1].decode())
    assert process.returncode == 130
