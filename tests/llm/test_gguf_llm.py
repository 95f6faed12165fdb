"""LLM on GGUF files: the texts of the folder that they were made of, and llama.cpp's where it is installed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from gguf_writer import write_gguf
from puna import LLM, SamplingParams
from puna.checkpoints import resolve_path
from puna.cli import app

PROMPTS = ["Once upon a time", "The little dog", "Lily and her mom went to the park. They saw"]
GREEDY = SamplingParams(temperature=0, max_tokens=60)


@pytest.fixture(scope="module")
def demo_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(resolve_path("demo"), tmp_path_factory.mktemp("gguf") / "demo.gguf")


def texts(model: str | Path, dtype: str | None = None) -> list[str]:
    outputs = LLM(str(model), dtype=dtype).generate(PROMPTS, GREEDY)
    return [output.outputs[0].text for output in outputs]


def test_text_and_chat_are_the_folders(demo_file: Path) -> None:
    assert texts(demo_file) == texts("demo", "float32")
    messages = [{"role": "user", "content": "Once upon a time"}]
    file, folder = (LLM(name, dtype="float32").chat(messages, GREEDY) for name in (str(demo_file), "demo"))
    assert file[0].outputs[0].token_ids == folder[0].outputs[0].token_ids
    assert file[0].prompt_token_ids == folder[0].prompt_token_ids


def test_the_command_line_takes_a_file(demo_file: Path) -> None:
    options = ["generate", PROMPTS[0], "--model", str(demo_file), "--max-new-tokens", "8", "--temperature", "0"]
    result = CliRunner().invoke(app, options)
    assert result.exit_code == 0, result.output
    assert len(result.stdout.split()) > 3
    report = CliRunner().invoke(app, ["info", str(demo_file), "--json"])
    fields = json.loads(report.stdout)
    assert fields["supported"] is True
    assert fields["architecture"] == "LlamaForCausalLM"
    tensor_bytes = demo_file.stat().st_size - fields["stored_bytes"]
    assert 0 < tensor_bytes < 200_000  # the header, with its vocabulary


@pytest.mark.parametrize("name", ["demo", "stories260k"])
def test_greedy_text_equals_llama_cpp(name: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    library = pytest.importorskip("llama_cpp")
    folder = resolve_path("demo") if name == "demo" else request.getfixturevalue("shared_data") / name
    file = write_gguf(folder, tmp_path / "x.gguf")
    # Its cache is float16 where nobody asks: enough to change a word in a hundred.
    cache = {"type_k": library.GGML_TYPE_F32, "type_v": library.GGML_TYPE_F32}
    model = library.Llama(str(file), n_ctx=256, n_threads=1, verbose=False, **cache)
    expected = []
    for prompt in PROMPTS:
        completion = model.create_completion(prompt, max_tokens=GREEDY.max_tokens, temperature=0)
        expected.append(completion["choices"][0]["text"])
    assert texts(file) == expected
