"""lm-evaluation-harness drives an LLM through its LM interface; every number is compared with transformers' model.

Needs the extra `eval`, which is not part of `dev`: lm-eval brings 45 packages of about 600 MB.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from puna.llm import LLM
from puna.scheduling.sampling_params import SamplingParams

lm_eval = pytest.importorskip("lm_eval")
datasets = pytest.importorskip("datasets")
from lm_eval.api.model import LM as HarnessLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window  # noqa: E402

CONTEXT = 64
QUESTIONS = [
    {"question": "the sky is", "choices": [" blue", " red", " a stone"], "answer": 0},
    {"question": "two and two are", "choices": [" five", " four"], "answer": 1},
    {"question": "", "choices": ["yes", "no", "maybe"], "answer": 2},
    {"question": "a llama is", "choices": [" an animal", " a number", " b"], "answer": 2},
]
TEXTS = [{"text": "short"}, {"text": "one two three four five six seven. " * 5}, {"text": "grün, grüner"}]
OPENINGS = [{"text": "ab", "answer": "x"}, {"text": "once upon", "answer": "y"}]


class PunaLM(HarnessLM):  # type: ignore[misc]
    """What the harness wants of a model, in terms of puna.LLM."""

    def __init__(self, llm: LLM) -> None:
        super().__init__()
        self.llm = llm

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        scores = self.llm.score(*map(list, zip(*(request.args for request in requests), strict=True)))
        return [(score.logprob, score.is_greedy) for score in scores]

    def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
        found = []
        for request in requests:
            first, *tokens = self.llm.encode(request.args[0])
            windows = get_rolling_token_windows(tokens, first, self.llm.engine.max_model_len - 2, context_len=1)
            contexts, continuations = zip(*map(make_disjoint_window, windows), strict=True)
            scores = self.llm.score([{"prompt_token_ids": context} for context in contexts], continuations)
            found.append(sum(score.logprob for score in scores))
        return found

    def generate_until(self, requests: list[Any]) -> list[str]:
        params = [
            SamplingParams(temperature=0, max_tokens=options["max_gen_toks"], stop=options["until"])
            for _, options in (request.args for request in requests)
        ]
        outputs = self.llm.generate([request.args[0] for request in requests], params)
        return [output.outputs[0].text for output in outputs]


@pytest.fixture(scope="module")
def harness_llm(folder: Path) -> Iterator[LLM]:
    with LLM(folder, max_model_len=CONTEXT) as it:
        yield it


@pytest.fixture(scope="module")
def theirs(folder: Path) -> transformers.LlamaForCausalLM:
    return transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def task(name: str, rows: list[dict[str, Any]], folder: Path, **options: Any) -> dict[str, Any]:
    """A task of the harness over a JSON file of rows."""
    file = folder / f"{name}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def load(**_: Any) -> dict[str, Any]:
        return {"test": datasets.Dataset.from_json(str(file), cache_dir=str(folder / "cache"))}

    return {"task": name, "custom_dataset": load, "test_split": "test", **options}


def evaluate(llm: LLM, made: dict[str, Any]) -> tuple[dict[str, float], list[Any]]:
    none = TaskManager(include_defaults=False)  # to read the thousands of tasks that come with it takes ten seconds
    found = lm_eval.simple_evaluate(PunaLM(llm), tasks=[made], task_manager=none, log_samples=True, bootstrap_iters=0)
    samples = sorted(found["samples"][made["task"]], key=lambda sample: sample["doc_id"])
    return found["results"][made["task"]], [sample["filtered_resps"] for sample in samples]


def their_logprob(model: transformers.LlamaForCausalLM, tokens: list[int], first: int) -> tuple[float, bool]:
    """Of tokens[first:] after those before, and whether each is the likeliest."""
    with torch.no_grad():
        rows = model(torch.tensor([tokens])).logits[0].log_softmax(-1)
    places = range(first, len(tokens))
    return (
        sum(rows[place - 1, tokens[place]].item() for place in places),
        all(int(rows[place - 1].argmax()) == tokens[place] for place in places),
    )


def test_multiple_choice(harness_llm: LLM, theirs: transformers.LlamaForCausalLM, tmp_path: Path) -> None:
    made = task(
        "tiny_choice",
        QUESTIONS,
        tmp_path,
        output_type="multiple_choice",
        doc_to_text="{{question}}",
        doc_to_choice="{{choices}}",
        doc_to_target="answer",
        target_delimiter="",
        metric_list=[{"metric": "acc"}],
    )
    results, answers = evaluate(harness_llm, made)
    right = 0
    for row, answer in zip(QUESTIONS, answers, strict=True):
        prompt = harness_llm.encode(row["question"])
        expected = [their_logprob(theirs, harness_llm.encode(row["question"] + c), len(prompt)) for c in row["choices"]]
        assert [found[0] for found in answer] == pytest.approx([logprob for logprob, _ in expected], abs=1e-3)
        assert [found[1] for found in answer] == [is_greedy for _, is_greedy in expected]
        logprobs = [logprob for logprob, _ in expected]
        right += logprobs.index(max(logprobs)) == row["answer"]
    assert results["acc,none"] == right / len(QUESTIONS)


def test_rolling_log_likelihood(harness_llm: LLM, theirs: transformers.LlamaForCausalLM, tmp_path: Path) -> None:
    made = task(
        "tiny_perplexity",
        TEXTS,
        tmp_path,
        output_type="loglikelihood_rolling",
        doc_to_text="",
        doc_to_target="{{text}}",
        metric_list=[{"metric": "byte_perplexity"}],
    )
    results, answers = evaluate(harness_llm, made)
    total, num_bytes, longest = 0.0, 0, CONTEXT - 2
    for row, (found,) in zip(TEXTS, answers, strict=True):
        tokens = harness_llm.encode(row["text"])
        expected = 0.0
        # Whole windows of new tokens; a last, shorter one is filled up with context from before it.
        for start in range(1, len(tokens), longest):
            end = min(start + longest, len(tokens))
            begin = max(0, end - longest - 1)
            expected += their_logprob(theirs, tokens[begin:end], start - begin)[0]
        assert found == pytest.approx(expected, abs=1e-2)
        total += expected
        num_bytes += len(row["text"].encode())
    assert results["byte_perplexity,none"] == pytest.approx(math.exp(-total / num_bytes), rel=1e-4)


def test_generate_until(harness_llm: LLM, theirs: transformers.LlamaForCausalLM, tmp_path: Path) -> None:
    def answer(text: str, until: str | None) -> str:
        tokens = harness_llm.encode(text)
        ids = torch.tensor([tokens])
        out = theirs.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12, pad_token_id=0
        )[0, len(tokens) :].tolist()
        whole = harness_llm.decode(out[:-1] if out[-1] in (1, 40, 90) else out)
        return whole if until is None else whole.split(until)[0]

    until = answer(OPENINGS[0]["text"], None)[4:6]  # stops the first one for certain
    rows = [{"text": row["text"], "answer": answer(row["text"], until)} for row in OPENINGS]
    rows.append({"text": "another", "answer": "something else"})
    made = task(
        "tiny_generation",
        rows,
        tmp_path,
        output_type="generate_until",
        doc_to_text="{{text}}",
        doc_to_target="{{answer}}",
        generation_kwargs={"until": [until], "max_gen_toks": 12, "do_sample": False},
        metric_list=[{"metric": "exact_match"}],
    )
    results, answers = evaluate(harness_llm, made)
    assert [found for (found,) in answers] == [answer(row["text"], until) for row in rows]
    assert results["exact_match,none"] == pytest.approx(2 / 3)
