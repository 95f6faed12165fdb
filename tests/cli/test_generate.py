"""`puna generate`: text as it comes, options, JSON, statistics, and what it refuses."""

from __future__ import annotations

import io
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import puna as puna_package
from puna.cli import main
from puna.ops import cpu

Run = Callable[..., Any]


class Recorder(io.StringIO):
    """Standard output that remembers each write, and how much had been written at each flush."""

    def __init__(self) -> None:
        super().__init__()
        self.writes: list[str] = []
        self.flushed: list[int] = []

    def write(self, text: str) -> int:
        self.writes.append(text)
        return super().write(text)

    def flush(self) -> None:
        self.flushed.append(len(self.writes))


def test_text_comes_character_by_character(chain: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    out = Recorder()
    monkeypatch.setattr(sys, "stdout", out)
    assert main(["generate", "-m", str(chain), "!"]) == 0
    assert out.writes == ["a", "é", "€", "😀", "b", "\n"]
    assert set(out.flushed) >= {1, 2, 3, 4, 5, 6}  # nothing waits in a buffer


def test_output_of_the_process_is_utf_8(chain: Any, run_program: Run) -> None:
    done = run_program("generate", "-m", chain, "!")
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout == "aé€😀b\n".encode()


def test_character_cut_off_by_the_limit_is_marked(chain: Any, puna: Run) -> None:
    done = puna("generate", "-m", chain, "--max-new-tokens", 2, "!")  # 'a' and the first byte of 'é'
    assert done.out == "a\ufffd\n"


def test_reader_gets_the_text_at_once_and_may_leave(chain: Any, start_program: Run) -> None:
    """As `puna generate ... | head -c 6`, of a text that would take minutes."""
    process = start_program(
        *("generate", "-m", chain, "--max-new-tokens", 90_000, "x"), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout.read(6) == b"yzxyzx"
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait() == 128 + signal.SIGPIPE


def test_ctrl_c_ends_the_program_quietly(chain: Any, start_program: Run) -> None:
    process = start_program(
        *("generate", "-m", chain, "--max-new-tokens", 90_000, "x"), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout.read(3) == b"yzx"
    process.send_signal(signal.SIGINT)
    assert process.communicate()[1] == b"\n"
    assert process.returncode == 130


@pytest.mark.parametrize("words", [["-"], []])
@pytest.mark.parametrize("line_end", [b"", b"\n", b"\r\n"])
def test_prompt_from_standard_input(chain: Any, puna: Run, words: list[str], line_end: bytes) -> None:
    done = puna("generate", "-m", chain, "--echo", *words, stdin=b"any text!" + line_end)
    assert done.out == "any text!aé€😀b\n"


def test_only_one_line_end_is_taken_from_standard_input(chain: Any, puna: Run) -> None:
    assert puna("generate", "-m", chain, "--echo", "-", stdin=b"x\n\n").out == "x\n\n"


def test_no_prompt_at_a_terminal_is_an_error(
    chain: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", type("Terminal", (io.StringIO,), {"isatty": lambda self: True})())
    assert main(["generate", "-m", str(chain)]) == 2
    assert "give a prompt" in capsys.readouterr().err


def test_json(random_model: Any, puna: Run) -> None:
    prompt = "the llama"
    done = puna("generate", "-m", random_model, "--json", "--ignore-eos", "--max-new-tokens", 12, prompt)
    result = json.loads(done.out)
    assert done.out.count("\n") == 1
    assert set(result) == {
        *("model", "prompt", "text", "token_ids", "finish_reason", "usage", "timings", "peak_memory_bytes")
    }
    prompt_ids = random_model.ids(prompt)
    expected = dense_greedy(random_model, prompt_ids, 12)
    assert result["token_ids"] == expected
    assert result["text"] == random_model.tokenizer.decode(expected)
    assert (result["model"], result["prompt"], result["finish_reason"]) == (str(random_model), prompt, "length")
    count = len(prompt_ids)
    assert result["usage"] == {"prompt_tokens": count, "completion_tokens": 12, "total_tokens": count + 12}
    timings = result["timings"]
    assert timings["prefill_tokens_per_second"] == pytest.approx(count / timings["prefill_seconds"])
    assert timings["decode_tokens_per_second"] == pytest.approx(11 / timings["decode_seconds"])
    assert timings["load_seconds"] > 0
    assert result["peak_memory_bytes"] > 2**20


def dense_greedy(folder: Any, prompt_ids: list[int], count: int, **options: Any) -> list[int]:
    model = puna_package.load_model(folder.path)
    rows = model.generate(torch.tensor([prompt_ids]), max_new_tokens=count, eos_token_id=[], **options)
    return rows[0, len(prompt_ids) :].tolist()


def test_json_of_a_text_that_ends_by_itself(chain: Any, puna: Run) -> None:
    result = json.loads(puna("generate", "-m", chain, "--json", "!").out)
    assert result["text"] == "aé€😀b"
    assert result["token_ids"] == [*chain.ids("aé€😀b"), 1]
    assert result["finish_reason"] == "stop"
    assert result["usage"] == {"prompt_tokens": 2, "completion_tokens": 12, "total_tokens": 14}
    assert json.loads(puna("generate", "-m", chain, "--json", "--echo", "!").out)["text"] == "!aé€😀b"


def test_json_with_beams(random_model: Any, puna: Run) -> None:
    words = ("--num-beams", 3, "--length-penalty", 0.5, "--early-stopping", "never", "--ignore-eos")
    result = json.loads(puna("generate", "-m", random_model, "--json", "--max-new-tokens", 8, *words, "das Alpaka").out)
    beams = {"num_beams": 3, "length_penalty": 0.5, "early_stopping": "never"}
    assert result["token_ids"] == dense_greedy(random_model, random_model.ids("das Alpaka"), 8, **beams)
    assert result["timings"]["prefill_seconds"] is None
    assert result["timings"]["decode_tokens_per_second"] > 0


def test_beams_go_on_after_the_end_where_it_is_ignored(chain: Any, puna: Run) -> None:
    words = ("generate", "-m", chain, "--json", "--num-beams", 2, "--early-stopping", "true", "--max-new-tokens", 15)
    ended = json.loads(puna(*words, "!").out)
    assert (ended["token_ids"][-1], ended["finish_reason"]) == (1, "stop")
    result = json.loads(puna(*words, "--ignore-eos", "!").out)
    assert (len(result["token_ids"]), result["finish_reason"]) == (15, "length")


def test_sampling_flags_reach_the_model(random_model: Any, puna: Run) -> None:
    flags = {"temperature": 1.5, "top_k": 40, "top_p": 0.95, "min_p": 0.001, "repetition_penalty": 1.2, "seed": 7}
    flags |= {"typical_p": 0.99, "presence_penalty": 0.5, "frequency_penalty": 0.25, "no_repeat_ngram_size": 3}
    words = [word for name, value in flags.items() for word in (f"--{name.replace('_', '-')}", value)]
    command = ("generate", "-m", random_model, "--json", "--ignore-eos", "--max-new-tokens", 16)
    result = json.loads(puna(*command, *words, "das Alpaka").out)
    expected = sampled(random_model, "das Alpaka", 16, **flags)
    assert result["token_ids"] == expected
    assert expected != dense_greedy(random_model, random_model.ids("das Alpaka"), 16)


def sampled(folder: Any, prompt: str, count: int, **options: Any) -> list[int]:
    """What the library gives for the same settings."""
    params = puna_package.SamplingParams(max_tokens=count, ignore_eos=True, **options)
    with puna_package.LLM(folder.path) as llm:
        (output,) = llm.generate({"prompt_token_ids": folder.ids(prompt)}, params)
    return output.outputs[0].token_ids


@pytest.mark.parametrize("flag", [[], ["--temperature", "0"]])
def test_recommended_sampling_holds_unless_a_flag_says_otherwise(
    random_model: Any, puna: Run, tmp_path: Path, flag: list[str]
) -> None:
    folder = Path(shutil.copytree(random_model.path, tmp_path / "model"))
    recommended = {"do_sample": True, "temperature": 1.3, "top_k": 30, "top_p": 0.9, "eos_token_id": 1}
    (folder / "generation_config.json").write_text(json.dumps(recommended))
    words = ("--json", "--ignore-eos", "--max-new-tokens", 16, "--seed", 5, *flag)
    result = json.loads(puna("generate", "-m", folder, *words, "das Alpaka").out)
    options = {"temperature": 0} if flag else {"temperature": 1.3, "top_k": 30, "top_p": 0.9, "seed": 5}
    assert result["token_ids"] == sampled(random_model, "das Alpaka", 16, **options)


def test_a_filter_alone_asks_for_sampling(random_model: Any, puna: Run) -> None:
    words = ("--json", "--ignore-eos", "--max-new-tokens", 16, "--seed", 5, "--top-k", 50)
    result = json.loads(puna("generate", "-m", random_model, *words, "das Alpaka").out)
    options = {"temperature": 1.0, "top_k": 50, "seed": 5}
    assert result["token_ids"] == sampled(random_model, "das Alpaka", 16, **options)


def test_json_of_several_texts(random_model: Any, puna: Run) -> None:
    words = ("--n", 3, "--temperature", 1, "--seed", 4, "--ignore-eos", "--max-new-tokens", 5)
    result = json.loads(puna("generate", "-m", random_model, "--json", *words, "das Alpaka").out)
    params = puna_package.SamplingParams(n=3, temperature=1, seed=4, ignore_eos=True, max_tokens=5)
    with puna_package.LLM(random_model.path) as llm:
        (expected,) = llm.generate("das Alpaka", params)
    assert [one["token_ids"] for one in result["outputs"]] == [one.token_ids for one in expected.outputs]
    assert {one["finish_reason"] for one in result["outputs"]} == {"length"}
    assert result["usage"]["completion_tokens"] == 15
    assert "text" not in result


def test_runs_without_a_seed_differ(random_model: Any, puna: Run) -> None:
    words = ("generate", "-m", random_model, "--temperature", 2, "--ignore-eos", "--max-new-tokens", 20, "das Alpaka")
    assert puna(*words).out != puna(*words).out


def test_guided_choice(random_model: Any, puna: Run) -> None:
    words = ("--guided-choice", "left", "--guided-choice", "right")
    assert puna("generate", "-m", random_model, *words, "das Alpaka").out in ("left\n", "right\n")


def test_grammar_that_can_not_be_compiled(random_model: Any, puna: Run) -> None:
    assert "regex" in puna("generate", "-m", random_model, "--guided-regex", "(", "das Alpaka").message


def test_shorter_context(chain: Any, puna: Run) -> None:
    result = json.loads(puna("generate", "-m", chain, "--json", "--max-model-len", 12, "x").out)
    assert (result["usage"]["total_tokens"], result["finish_reason"]) == (12, "length")
    told = puna("generate", "-m", chain, "--max-model-len", 12, "--max-new-tokens", 11, "x").message
    assert "the context of 12 has room for 10" in told


def test_cache_that_is_too_small_is_refused_before_the_weights_are_read(
    chain: Any, puna: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("puna.models.loading.ModelLoader.load", lambda *_, **__: pytest.fail("the weights were read"))
    told = puna("generate", "-m", chain, "--kv-cache-memory", "1KiB", "--max-new-tokens", 90, "x").message
    assert "kv_cache_memory" in told


@pytest.mark.parametrize(
    ("stops", "text"), [(["€"], "aé"), (["😀b", "é€"], "a"), (["€x", "b!"], "aé€😀b"), (["a"], ""), (["€😀"], "aé")]
)
def test_stop_strings(chain: Any, puna: Run, stops: list[str], text: str) -> None:
    words = [word for stop in stops for word in ("--stop", stop)]
    result = json.loads(puna("generate", "-m", chain, "--json", *words, "!").out)
    assert (result["text"], result["finish_reason"]) == (text, "stop")
    assert puna("generate", "-m", chain, *words, "!").out == f"{text}\n"


def test_generation_ends_at_a_stop_string(chain: Any, puna: Run) -> None:
    result = json.loads(puna("generate", "-m", chain, "--json", "--stop", "zxy", "x").out)
    assert (result["text"], result["finish_reason"], len(result["token_ids"])) == ("y", "stop", 4)


def test_ignore_eos(chain: Any, puna: Run) -> None:
    result = json.loads(puna("generate", "-m", chain, "--json", "--ignore-eos", "--max-new-tokens", 15, "!").out)
    assert result["token_ids"][-3:] == [1, 1, 1]
    assert (result["text"], result["finish_reason"]) == ("aé€😀b", "length")


def test_eos_of_the_tokenizer_counts_too(build_chain: Run, puna: Run, tmp_path: Path) -> None:
    folder = build_chain(tmp_path / "model", "!ab</s>").path
    (folder / "generation_config.json").write_text("{}")
    result = json.loads(puna("generate", "-m", folder, "--json", "!").out)
    assert (result["text"], result["finish_reason"]) == ("ab", "stop")


def test_stats_go_to_standard_error(chain: Any, puna: Run) -> None:
    done = puna("generate", "-m", chain, "--stats", "!")
    assert done.out == "aé€😀b\n"
    names, values = zip(*(line.split("  ", 1) for line in done.err.splitlines()), strict=True)
    assert names == ("prompt", "generated", "loading", "peak memory", "ops")
    assert values[0].strip().startswith("2 tokens, ")
    assert values[1].strip().startswith("12 tokens, ")
    assert values[1].count("tokens/s") == 1
    assert values[2].endswith(" s")
    assert values[3].endswith(" MiB")
    assert (
        values[4].strip().startswith(f"compiled ({cpu.level()}) for all " if cpu.compiled() else "reference for all ")
    )


def test_chat_template(build_chain: Run, puna: Run, tmp_path: Path) -> None:
    folder = build_chain(tmp_path / "model", "<|assistant|>hey</s>")
    words = ("generate", "-m", folder, "--apply-chat-template", "--json")
    result = json.loads(puna(*words, "--system", "Be brief.", "Hi").out)
    assert result["text"] == "hey"
    assert result["usage"]["prompt_tokens"] == len(folder.ids("<|system|>Be brief.<|user|>Hi<|assistant|>"))
    assert json.loads(puna(*words, "Hi").out)["usage"]["prompt_tokens"] == len(folder.ids("<|user|>Hi<|assistant|>"))


def test_special_tokens_in_a_prompt_are_text_unless_asked_for(chain: Any, puna: Run) -> None:
    words = ("generate", "-m", chain, "--json", "--max-new-tokens", 1)
    assert json.loads(puna(*words, "<|user|>").out)["usage"]["prompt_tokens"] == 1 + len("<|user|>")
    assert json.loads(puna(*words, "--parse-special", "<|user|>").out)["usage"]["prompt_tokens"] == 2


def test_default_length_is_capped_by_the_context(build_chain: Run, puna: Run, tmp_path: Path) -> None:
    small = build_chain(tmp_path / "small", "xyzx", context=20)
    large = build_chain(tmp_path / "large", "xyzx", context=1000)
    for folder, count in ((small, 20 - 2), (large, 256)):
        result = json.loads(puna("generate", "-m", folder, "--json", "x").out)
        assert (result["usage"]["completion_tokens"], result["finish_reason"]) == (count, "length")


def test_empty_prompt_needs_a_start_token(build_chain: Run, puna: Run, tmp_path: Path) -> None:
    with_bos = build_chain(tmp_path / "with", "<s>ok</s>")
    assert puna("generate", "-m", with_bos, "").out == "ok\n"
    assert puna("generate", "-m", with_bos, stdin=b"").out == "ok\n"
    without = build_chain(tmp_path / "without", "<s>ok</s>", bos=False)
    assert "the prompt is empty" in puna("generate", "-m", without, "").message


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--max-new-tokens", "19", "x"], "after the prompt's 2 tokens the context of 20 has room for 18"),
        (["x" * 19], "the prompt has 20 tokens, and the context is 20: shorten it by at least 1"),
        (["x" * 30], "the prompt has 31 tokens, and the context is 20: shorten it by at least 12"),
        (["--temperature", "-1", "x"], "temperature is -1.0"),
        (["--top-p", "0", "x"], "top_p is 0.0"),
        (["--min-p", "2", "x"], "min_p is 2.0"),
        (["--top-k", "-2", "x"], "top_k is -2"),
        (["--repetition-penalty", "0", "x"], "repetition_penalty is 0.0"),
        (["--temperature", "0", "--top-k", "3", "x"], "leave out --top-k"),
        (["--num-beams", "2", "--top-k", "3", "x"], "leave out --top-k"),
        (["--num-beams", "2", "--temperature", "1", "x"], "beam search does not sample"),
        (["--length-penalty", "2", "x"], "--length-penalty belongs to beam search"),
        (["--early-stopping", "true", "x"], "--early-stopping belongs to beam search"),
        (["--device", "abacus", "x"], "--device is 'abacus'"),
        (["--device", "meta", "x"], "--device is 'meta', but this machine"),
    ],
)
def test_refused_before_the_weights_are_read(
    build_chain: Run, puna: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], message: str
) -> None:
    folder = build_chain(tmp_path / "model", "xyzx", context=20)
    monkeypatch.setattr("puna.models.loading.ModelLoader.load", lambda *_, **__: pytest.fail("the weights were read"))
    assert message in puna("generate", "-m", folder, *words).message


def test_folder_without_tokenizer(chain: Any, puna: Run, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(chain.path, tmp_path / "model"))
    (folder / "tokenizer.json").unlink()
    assert "tokenizer" in puna("generate", "-m", folder, "x").message


def test_folder_without_chat_template(build_chain: Run, puna: Run, tmp_path: Path) -> None:
    folder = build_chain(tmp_path / "model", template=None)
    assert "no chat template" in puna("generate", "-m", folder, "--apply-chat-template", "x").message


def test_tokenizer_of_another_model(build_chain: Run, random_model: Any, puna: Run, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(random_model.path, tmp_path / "model"))
    content = json.loads((folder / "tokenizer.json").read_text())
    content["added_tokens"].append({**content["added_tokens"][0], "id": 400, "content": "<big>"})
    content["model"]["vocab"]["<big>"] = 400
    (folder / "tokenizer.json").write_text(json.dumps(content))
    assert "the tokenizer gives the token 400" in puna("generate", "-m", folder, "--parse-special", "<big>").message


def test_threads_are_set(chain: Any, puna: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    set_to: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", set_to.append)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    monkeypatch.setattr("puna.cli.session.usable_cpus", lambda: 3)
    puna("generate", "-m", chain, "--threads", 5, "!")
    puna("generate", "-m", chain, "!")
    assert set_to == [5, 3]
