"""`puna eval`: against the same sums done plainly, token by token, in float64."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import puna as puna_package
from puna.evaluation.windows import sliding_windows

Run = Callable[..., Any]
TEXTS = ("the llama grazes on the high grassland, über den Wolken", "das Alpaka steht", "das")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    file = tmp_path / "data.txt"
    file.write_text("\n<|endoftext|>\n".join(TEXTS), encoding="utf-8")
    return file


def log_probs(folder: Any, context: int, stride: int, dtype: str | None = None) -> tuple[np.ndarray, np.ndarray]:
    """float64 [N, V] and the tokens [N], by the recipe of transformers' documentation."""
    model = puna_package.load_model(folder.path, dtype)
    rows, targets = [], []
    for text in TEXTS:
        ids = folder.ids(text)
        previous_end = 0
        for begin in range(0, len(ids), stride):
            end = min(begin + context, len(ids))
            if end - begin < 2:
                break
            with torch.inference_mode():
                logits = model(torch.tensor([ids[begin : end - 1]]))[0].double().numpy()
            labels = [-100] * (previous_end - begin) + ids[previous_end:end]
            for position, label in enumerate(labels[1:]):
                if label != -100:
                    row = logits[position] - logits[position].max()
                    rows.append(row - np.log(np.exp(row).sum()))
                    targets.append(label)
            previous_end = end
            if end == len(ids):
                break
    assert len(targets) == sum(len(folder.ids(text)) - 1 for text in TEXTS)
    return np.array(rows), np.array(targets)


@pytest.mark.parametrize(("context", "stride"), [(64, 32), (8, 4), (8, 1), (7, 6), (2, 1)])
def test_perplexity(random_model: Any, data: Path, puna: Run, context: int, stride: int) -> None:
    words = ("--data", data, "--context", context, "--stride", stride, "--json")
    result = json.loads(puna("eval", "perplexity", "-m", random_model, *words).out)
    rows, targets = log_probs(random_model, context, stride)
    nats = -rows[np.arange(len(targets)), targets]
    assert result["tokens"] == len(targets)
    assert result["nats_per_token"] == pytest.approx(nats.mean(), rel=1e-5)
    assert result["perplexity"] == pytest.approx(math.exp(nats.mean()), rel=1e-4)
    assert result["bytes"] == sum(len(text.encode()) for text in TEXTS)
    assert result["bits_per_byte"] == pytest.approx(nats.sum() / math.log(2) / result["bytes"], rel=1e-5)
    assert result["tokens_per_second"] > 0
    assert (result["context"], result["stride"]) == (context, stride)


def test_perplexity_of_several_files_as_a_table(random_model: Any, data: Path, puna: Run, tmp_path: Path) -> None:
    parts = []
    for index, text in enumerate(TEXTS):
        (tmp_path / f"{index}.txt").write_text(text, encoding="utf-8")
        parts += ["--data", tmp_path / f"{index}.txt"]
    done = puna("eval", "perplexity", "-m", random_model, *parts)
    assert (done.code, done.err) == (0, "")
    rows, targets = log_probs(random_model, 64, 32)  # the defaults for this model
    perplexity = math.exp(-rows[np.arange(len(targets)), targets].mean())
    (line,) = [line for line in done.out.splitlines() if "perplexity" in line]
    assert float(line.split()[-2]) == pytest.approx(perplexity, rel=1e-4)
    assert "64, 32" in done.out


@pytest.mark.parametrize(("length", "context", "stride"), [(30, 8, 3), (8, 8, 4), (9, 8, 7), (2, 5, 1), (100, 7, 1)])
def test_windows_score_every_token_once_with_enough_before_it(length: int, context: int, stride: int) -> None:
    scored = []
    for number, window in enumerate(sliding_windows(range(length), context, stride)):
        assert len(window.token_ids) <= context
        assert window.token_ids == list(range(window.token_ids[0], window.token_ids[-1] + 1))
        assert len(window.token_ids) - window.num_scored >= (1 if number == 0 else context - stride)
        scored += window.token_ids[-window.num_scored :]
    assert scored == list(range(1, length))


def test_windows_of_nothing() -> None:
    assert list(sliding_windows([], 8, 4)) == list(sliding_windows([5], 8, 4)) == []


def test_a_model_is_as_good_as_itself(random_model: Any, data: Path, puna: Run) -> None:
    words = ("compare", random_model, random_model, "--data", data, "--context", 8)
    result = json.loads(puna("eval", *words, "--json").out)
    assert result["kl"] == {"mean": 0, "median": 0, "p99": 0, "max": 0}
    assert (result["top1_agreement"], result["perplexity_ratio"]) == (1, 1)
    table = puna("eval", *words).out
    assert "100.000%" in table
    assert table.startswith(f"A: {random_model} (float32)\nB: {random_model} (float32)\n")


def test_two_dtypes_of_one_model(random_model: Any, data: Path, puna: Run) -> None:
    words = ("--data", data, "--context", 16, "--stride", 5, "--dtype-b", "bfloat16", "--json")
    result = json.loads(puna("eval", "compare", random_model, random_model, *words).out)
    log_p, targets = log_probs(random_model, 16, 5)
    log_q, _ = log_probs(random_model, 16, 5, "bfloat16")
    kl = (np.exp(log_p) * (log_p - log_q)).sum(axis=1)
    wanted = {"mean": kl.mean(), "median": np.median(kl), "p99": np.quantile(kl, 0.99), "max": kl.max()}
    assert result["kl"] == pytest.approx(wanted, rel=1e-3)
    assert result["kl"]["mean"] > 1e-6
    assert result["top1_agreement"] == pytest.approx((log_p.argmax(axis=1) == log_q.argmax(axis=1)).mean())
    places = np.arange(len(targets))
    a, b = (math.exp(-rows[places, targets].mean()) for rows in (log_p, log_q))
    assert (result["a"]["perplexity"], result["b"]["perplexity"]) == pytest.approx((a, b), rel=1e-5)
    assert result["perplexity_ratio"] == pytest.approx(b / a, rel=1e-5)
    assert (result["a"]["dtype"], result["b"]["dtype"], result["tokens"]) == ("float32", "bfloat16", len(targets))


def test_two_formats_of_one_model(random_model: Any, data: Path, puna: Run) -> None:
    divergences = []
    for quantization in ("int8", "int4"):
        words = ("--data", data, "--context", 32, "--quantization-b", quantization, "--json")
        result = json.loads(puna("eval", "compare", random_model, random_model, *words).out)
        assert (result["a"]["quantization"], result["b"]["quantization"]) == (None, quantization)
        divergences.append(result["kl"]["mean"])
    assert 0 < 10 * divergences[0] < divergences[1]


def test_perplexity_in_a_format(random_model: Any, data: Path, puna: Run) -> None:
    pytest.importorskip("puna._kernels", reason="engines quantise for the compiled kernels")
    words = ("--data", data, "--context", 32, "--quantization", "int8", "--json")
    result = json.loads(puna("eval", "perplexity", "-m", random_model, *words).out)
    plain = json.loads(puna("eval", "perplexity", "-m", random_model, "--data", data, "--context", 32, "--json").out)
    assert (plain["quantization"], result["quantization"]) == (None, "int8")
    assert result["perplexity"] != plain["perplexity"]
    assert result["perplexity"] == pytest.approx(plain["perplexity"], rel=0.05)


def test_two_models_and_a_plot(random_model: Any, data: Path, puna: Run, tmp_path: Path) -> None:
    from puna.models.loading import save_model

    other = Path(shutil.copytree(random_model.path, tmp_path / "other"))
    model = puna_package.load_model(other)
    with torch.no_grad():
        model.lm_head.weight.copy_(model.lm_head.weight.flip(0))
    shutil.rmtree(other)
    files = {name: (random_model.path / name).read_bytes() for name in ("tokenizer.json", "tokenizer_config.json")}
    save_model(model, other, files)
    plot = tmp_path / "plot.png"
    done = puna("eval", "compare", random_model, other, "--data", data, "--json", "--plot", plot)
    result = json.loads(done.out)
    assert result["kl"]["mean"] > 0.1
    assert result["top1_agreement"] < 0.5
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert plot.stat().st_size > 5000


def test_models_with_different_tokenizers(random_model: Any, chain: Any, data: Path, puna: Run, tmp_path: Path) -> None:
    assert (
        "tokens: only models with the same tokenizer"
        in puna(*("eval", "compare", random_model, chain, "--data", data)).message
    )
    other = Path(shutil.copytree(random_model.path, tmp_path / "other"))
    fields = json.loads((other / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = fields["model"]["vocab"]
    vocabulary["A"], vocabulary["B"] = vocabulary["B"], vocabulary["A"]
    (other / "tokenizer.json").write_text(json.dumps(fields), encoding="utf-8")
    told = puna("eval", "compare", random_model, other, "--data", data).message
    assert told.startswith(f"token {min(vocabulary['A'], vocabulary['B'])} is ")
    vocabulary["A"], vocabulary["B"] = vocabulary["B"], vocabulary["A"]
    fields["model"]["merges"] = []
    (other / "tokenizer.json").write_text(json.dumps(fields), encoding="utf-8")
    assert "cut the text differently" in puna("eval", "compare", random_model, other, "--data", data).message


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--context", "65"], "--context is 65, but the model's context is 64"),
        (["--context", "8", "--stride", "8"], "stride is 8: it must be in 1..7"),
        (["--context", "1"], "--context"),
        (["--data", "no such file"], "no such file is not a file"),
    ],
)
@pytest.mark.parametrize("command", ["perplexity", "compare"])
def test_refused_before_the_weights_are_read(
    random_model: Any,
    data: Path,
    puna: Run,
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    words: list[str],
    message: str,
) -> None:
    monkeypatch.setattr("puna.models.load_model", lambda *_, **__: pytest.fail("the weights were read"))
    monkeypatch.setattr("puna.models.loading.ModelLoader.load", lambda *_, **__: pytest.fail("the weights were read"))
    models = ["-m", random_model] if command == "perplexity" else [random_model, random_model]
    assert message in puna("eval", command, *models, "--data", data, *words).message


def test_a_text_without_a_token_to_predict(random_model: Any, puna: Run, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    for models in (["perplexity", "-m", random_model], ["compare", random_model, random_model]):
        assert "has no token to predict" in puna("eval", *models, "--data", tmp_path / "a.txt").message


@pytest.mark.parametrize(
    ("plot", "message"), [("plot.jpeg", "must end in .png, .pdf, .svg"), ("no folder/plot.png", "there is no folder")]
)
def test_plot_that_can_not_be_written(random_model: Any, data: Path, puna: Run, plot: str, message: str) -> None:
    words = ("eval", "compare", random_model, random_model, "--data", data, "--plot", plot)
    assert message in puna(*words).message


def test_plot_needs_matplotlib(random_model: Any, data: Path, puna: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    words = ("eval", "compare", random_model, random_model, "--data", data, "--plot", "plot.png")
    assert puna(*words).message == "--plot needs matplotlib: pip install 'puna[plot]'"


def test_eval_alone_lists_its_commands(puna: Run) -> None:
    done = puna("eval")
    assert done.code == 0
    assert "perplexity" in done.out
    assert "compare" in done.out
