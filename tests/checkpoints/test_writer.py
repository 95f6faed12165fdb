"""save_model: what is written is read back, by puna and transformers; a failure in the middle changes nothing."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from puna.checkpoints import write_checkpoint, writer
from puna.config import GenerationConfig
from puna.mapping import Mapping
from puna.models import MODELS, load_model
from puna.models.loading import save_model

Make = Callable[..., Any]


def content(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("architecture", MODELS)
def test_round_trip(make: Make, tmp_path: Path, architecture: str, tied: bool, dtype: str) -> None:
    original = make(architecture, tie_word_embeddings=tied, dtype=getattr(torch, dtype))
    model = load_model(original.path)
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_ids=(2, 5), temperature=0.7, do_sample=True)
    save_model(model, tmp_path / "new" / "saved", {"tokenizer.json": b"{}"})
    saved = tmp_path / "new" / "saved"
    assert sorted(content(saved)) == ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json"]
    again = load_model(saved)
    assert again.config == model.config
    assert again.generation_config == model.generation_config
    for (name, mine), (_, other) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(mine, other), name
    theirs = transformers.AutoModelForCausalLM.from_pretrained(saved)
    for name, tensor in transformers.AutoModelForCausalLM.from_pretrained(original.path).state_dict().items():
        assert torch.equal(theirs.state_dict()[name], tensor), name


def test_a_rank_alone_can_not_be_saved(make: Make, tmp_path: Path) -> None:
    class Rank:
        device = torch.device("cpu")
        mapping = Mapping(tp_size=2)

    model = load_model(make().path, comm=Rank())
    with pytest.raises(ValueError, match="one of 2 parts: load it without a mapping"):
        save_model(model, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_a_config_that_can_not_be_written_leaves_no_folder(make: Make, tmp_path: Path) -> None:
    model = load_model(make().path)
    object.__setattr__(model.config, "qk_norm", True)
    with pytest.raises(ValueError, match="qk_norm"):
        save_model(model, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_saving_over_shards_replaces_them(make: Make) -> None:
    folder = make()
    folder.write(*folder.halves(), index=True)
    model = load_model(folder.path)
    with torch.no_grad():
        model.ln_f.weight.fill_(3.0)
    save_model(model, folder.path)
    assert load_model(folder.path).ln_f.weight.unique().tolist() == [3.0]


class Stopped(BaseException):
    """Neither an error that code handles nor an exit that runs more than `finally`."""


# Where a process may end: while it writes the weights, waits for the disk, or between two renames.
@pytest.mark.parametrize("step", ["save_file", "sync", "replace"])
def test_a_failure_leaves_the_old_files(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    model = load_model(make().path)
    folder = tmp_path / "saved"
    save_model(model, folder, {"other.txt": b"old"})
    before = content(folder)

    def stop(*_: object, **__: object) -> None:
        raise Stopped

    monkeypatch.setattr(*((os, "replace") if step == "replace" else (writer, step)), stop)
    with torch.no_grad():
        model.ln_f.weight.fill_(3.0)
    with pytest.raises(Stopped):
        save_model(model, folder, {"other.txt": b"new"})
    assert content(folder) == before
    assert sorted(path.name for path in folder.iterdir()) == sorted(before)  # no hidden folder either


def test_weights_come_last(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a new folder with weights is complete, whenever the process was killed."""
    moved: list[str] = []
    replace = os.replace

    def record(source: Path, target: Path) -> None:
        assert source.parent.name.startswith(".writing-")
        assert source.stat().st_size > 0
        replace(source, target)
        moved.append(target.name)

    monkeypatch.setattr(os, "replace", record)
    save_model(load_model(make().path), tmp_path / "saved", {"tokenizer.json": b"{}"})
    assert moved[-1] == "model.safetensors"
    assert sorted(moved) == ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json"]


def test_other_files_stay(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("mine")
    write_checkpoint(tmp_path, {"a": "é"}, {"b": None, "c": 1}, {"w": torch.ones(2)}, {})
    assert (tmp_path / "README.md").read_text() == "mine"
    assert (tmp_path / "config.json").read_text(encoding="utf-8") == '{\n  "a": "é"\n}\n'
    assert (tmp_path / "generation_config.json").read_text() == '{\n  "c": 1\n}\n'


def test_the_weights_may_be_read_by_whoever_may_read_the_config(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {}, {}, {"x": torch.zeros(1)}, {})
    modes = {(tmp_path / name).stat().st_mode for name in ("config.json", "model.safetensors")}
    assert len(modes) == 1
