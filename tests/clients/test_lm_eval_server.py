"""lm-evaluation-harness through `local-completions`: what it computes from our answers is what puna.LLM computes.

Needs the extra `eval`, as tests/llm/test_lm_eval.py does.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from puna.engine.engine import Engine
from puna.llm import LLM
from puna.scheduling.sampling_params import SamplingParams
from puna.serving.state import ServerSettings, ServerState
from serving.conftest import Running, listening

lm_eval = pytest.importorskip("lm_eval")
datasets = pytest.importorskip("datasets")
pytest.importorskip("aiohttp")
from lm_eval.models.openai_completions import LocalCompletionsAPI  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

CONTEXT = 200
QUESTIONS = [
    {"question": "the sky is", "choices": [" blue", " red", " a stone"], "answer": 0},
    {"question": "two and two are", "choices": [" five", " four"], "answer": 1},
    {"question": "a llama is", "choices": [" an animal", " a number", " b"], "answer": 2},
]
OPENINGS = [{"text": "ab"}, {"text": "once upon"}, {"text": "grün, grüner"}]


class Side:
    """A server, and the same model without one."""

    def __init__(self, running: Running, folder: Path, llm: LLM) -> None:
        self.running, self.folder, self.llm = running, folder, llm


@pytest.fixture(scope="module")
def with_bos(shared_server: Running, tools_folder: Path) -> Iterator[Side]:
    """As LLaMA has it: a text begins with <s>."""
    with LLM(tools_folder) as llm:
        yield Side(shared_server, tools_folder, llm)
    shared_server.wait_until_idle()


@pytest.fixture(scope="module")
def without_bos(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Side]:
    """As Qwen has it: nothing comes before a text."""
    model = tmp_path_factory.mktemp("plain") / "model"
    shutil.copytree(folder, model)
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    (model / "tokenizer.json").write_text(json.dumps(tokenizer | {"post_processor": None}))
    engine = Engine.from_pretrained(str(model))
    with listening(ServerState(ServerSettings(model_name="small"), engine, "ready")) as running, LLM(model) as llm:
        yield Side(running, model, llm)
        running.wait_until_idle()
    engine.shutdown()


def harness(running: Running, folder: Path, **options: Any) -> LocalCompletionsAPI:
    return LocalCompletionsAPI(
        model="small",
        base_url=f"{running.url}/v1/completions",
        tokenizer=str(folder) if options.get("tokenizer_backend", "huggingface") == "huggingface" else None,
        **({"tokenizer_backend": "huggingface", "max_length": CONTEXT, "seed": 1, "max_retries": 1} | options),
    )


def evaluate(model: LocalCompletionsAPI, rows: list[dict[str, Any]], folder: Path, **options: Any) -> list[Any]:
    """The harness's answers to a task over a file of rows, in the rows' order."""
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def load(**_: Any) -> dict[str, Any]:
        return {"test": datasets.Dataset.from_json(str(file), cache_dir=str(folder / "cache"))}

    made = {"task": "tiny", "custom_dataset": load, "test_split": "test", **options}
    none = TaskManager(include_defaults=False)
    found = lm_eval.simple_evaluate(model, tasks=[made], task_manager=none, log_samples=True, bootstrap_iters=0)
    samples = sorted(found["samples"]["tiny"], key=lambda sample: sample["doc_id"])
    return [sample["filtered_resps"] for sample in samples]


# Where a text begins with <s>, the harness must be told so, and sends token ids: of a text that it sends itself, it
# would count the tokens without <s>, and take one too many for those of the continuation.
SIDES = [("with_bos", True), ("without_bos", True), ("without_bos", False)]


@pytest.mark.parametrize(("side", "tokenized"), SIDES, ids=["bos-ids", "ids", "texts"])
@pytest.mark.parametrize("batch", [1, 4])
def test_log_likelihoods(
    request: pytest.FixtureRequest, tmp_path: Path, side: str, tokenized: bool, batch: int
) -> None:
    it: Side = request.getfixturevalue(side)
    model = harness(
        it.running, it.folder, tokenized_requests=tokenized, batch_size=batch, add_bos_token=side == "with_bos"
    )
    rows = [*QUESTIONS, greedy_question(it.llm)]
    answers = evaluate(
        model,
        rows,
        tmp_path,
        output_type="multiple_choice",
        doc_to_text="{{question}}",
        doc_to_choice="{{choices}}",
        doc_to_target="answer",
        target_delimiter="",
        metric_list=[{"metric": "acc"}],
    )
    flags = []
    for row, answer in zip(rows, answers, strict=True):
        for choice, (logprob, is_greedy) in zip(row["choices"], answer, strict=True):
            score = it.llm.score(row["question"], choice)
            assert float(logprob) == pytest.approx(score.logprob, abs=1e-6)
            assert str(is_greedy) == str(score.is_greedy)
            flags.append(score.is_greedy)
    assert True in flags
    assert False in flags


def greedy_question(llm: LLM) -> dict[str, Any]:
    """One whose first choice the model itself would write."""
    for text in (f"q{number}" for number in range(200)):
        (output,) = llm.generate([text], SamplingParams(temperature=0, max_tokens=1, ignore_eos=True))
        found = output.outputs[0].text
        if found.isascii() and found.isalpha():
            return {"question": text, "choices": [found, "zz"], "answer": 0}
    raise AssertionError("the model never writes a letter")


@pytest.mark.parametrize("backend", ["huggingface", None])
def test_generate_until(without_bos: Side, tmp_path: Path, backend: str | None) -> None:
    """Also without any tokenizer on the harness's side."""
    model = harness(
        without_bos.running, without_bos.folder, tokenizer_backend=backend, eos_string="</s>", num_concurrent=2
    )
    params = SamplingParams(temperature=0, max_tokens=12, stop=["e", "</s>"])
    expected = [output.outputs[0].text for output in without_bos.llm.generate([r["text"] for r in OPENINGS], params)]
    answers = evaluate(
        model,
        OPENINGS,
        tmp_path,
        output_type="generate_until",
        doc_to_text="{{text}}",
        doc_to_target="{{text}}",
        generation_kwargs={"until": ["e"], "max_gen_toks": 12, "do_sample": False},
        metric_list=[{"metric": "exact_match"}],
    )
    assert [found for (found,) in answers] == expected
